"""The OpenAPI document with the keys and the limits of the server that publishes it."""

from typing import Any

from fastapi import FastAPI

from chiasm.serving.gate import GUARDED
from chiasm.serving.settings import Settings

DATA, HTTP = "[dD][aA][tT][aA]:", "[hH][tT][tT][pP][sS]?://"


class Documented(FastAPI):
    """An application whose document says who may ask this server, and how much of a thing it gives."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        self.settings = settings
        super().__init__(**options)

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        self._tell_limits(document["components"]["schemas"])
        if self.settings.api_keys:
            self._tell_keys(document)
        return document

    def _tell_limits(self, schemas: dict[str, Any]) -> None:
        fields, limits = schemas["ChatRequest"]["properties"], self.settings.limits
        counts = {"max_tokens": limits.tokens, "max_completion_tokens": limits.tokens, "n": limits.choices}
        for name, most in counts.items():
            next(kind for kind in fields[name]["anyOf"] if kind["type"] == "integer")["maximum"] = most
        inputs = schemas["EmbeddingRequest"]["properties"]["input"]["oneOf"]
        next(kind for kind in inputs if "oneOf" in kind.get("items", {}))["maxItems"] = limits.inputs
        schemes = f"({DATA}|{HTTP})" if self.settings.image_urls else DATA
        schemas["ImageUrl"]["properties"]["url"]["pattern"] = rf"^\s*{schemes}"

    def _tell_keys(self, document: dict[str, Any]) -> None:
        document["components"]["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path.startswith(GUARDED):
                for operation in operations.values():
                    operation["security"] = [{"ApiKey": []}]
