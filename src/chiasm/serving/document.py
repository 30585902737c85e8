"""The OpenAPI document with the limits of the server that publishes it."""

from typing import Any

from fastapi import FastAPI

from chiasm.serving.settings import Limits


class Documented(FastAPI):
    """An application whose document says how much of a thing this server gives."""

    def __init__(self, limits: Limits, **options: Any) -> None:
        self.limits = limits
        super().__init__(**options)

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        schemas, limits = document["components"]["schemas"], self.limits
        fields = schemas["ChatRequest"]["properties"]
        counts = {"max_tokens": limits.tokens, "max_completion_tokens": limits.tokens, "n": limits.choices}
        for name, most in counts.items():
            next(kind for kind in fields[name]["anyOf"] if kind["type"] == "integer")["maximum"] = most
        inputs = schemas["EmbeddingRequest"]["properties"]["input"]["oneOf"]
        next(kind for kind in inputs if "oneOf" in kind.get("items", {}))["maxItems"] = limits.inputs
        return document
