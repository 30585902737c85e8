"""The published OpenAPI document: what fits it is taken, what does not is refused, and answers fit it."""

import re
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from asking import CHAT, ask, data_url
from fastapi.testclient import TestClient
from schemathesis.specs.openapi.checks import positive_data_acceptance
from test_embeddings import Encoder

from chiasm.serving.app import create_app
from chiasm.serving.pictures import from_data_url
from chiasm.serving.served import EmbeddingModel
from chiasm.serving.settings import Limits, Settings

MODELS = {"/v1/chat/completions": "tiny", "/api/attention": "tiny", "/v1/embeddings": "clip"}
UNSAID = {
    ("/v1/chat/completions", "invalid_image"),
    ("/v1/embeddings", "invalid_image"),
    ("/api/attention", "invalid_image"),
    ("/v1/embeddings", "dimensions"),
    ("/v1/embeddings", "unknown_token"),
    ("/v1/embeddings", "no_words"),
    ("/v1/chat/completions", "unknown_token"),
    ("/api/attention", "messages"),
    ("/api/attention", "image"),
}
"""Refusals that JSON Schema has no words for, by path and by code or parameter: that a text is a picture, that the last
message is an assistant's, which pictures there are, how wide a model's vectors are, how many
tokens it knows, and which of them are words."""
MODES = list(schemathesis.GenerationMode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=[mode.value for mode in MODES])
def test_requests_and_answers_are_as_published(metronome: Any, mode: schemathesis.GenerationMode) -> None:
    metronome.engine.seconds = 0.0
    limits = Limits(tokens=16, default_tokens=4, choices=2)
    app = create_app([metronome, EmbeddingModel("clip", Encoder())], Settings(limits=limits))
    statuses: dict[str, set[int]] = {}

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODELS[case.path]
        response = case.call()
        statuses.setdefault(case.path, set()).add(response.status_code)
        error = response.json()["error"] if response.status_code == 400 else {}
        unsaid = {(case.path, error.get("code")), (case.path, error.get("param"))} & UNSAID
        case.validate_response(response, excluded_checks=[positive_data_acceptance] if unsaid else None)

    few = hypothesis.settings(
        max_examples=40,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = found.ok()
        if operation.body or mode is schemathesis.GenerationMode.POSITIVE:  # without a body nothing can be wrong
            few(hypothesis.given(operation.as_strategy(generation_mode=mode))(check))()
    if mode is schemathesis.GenerationMode.POSITIVE:
        assert all(200 in statuses[path] for path in ("/v1/chat/completions", "/v1/embeddings", "/health")), statuses


def test_keys_are_asked_for_where_the_document_says_so(client: Callable[..., TestClient]) -> None:
    api = client(api_keys=("one-key",))
    document = api.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"ApiKey": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            refused = api.request(method, path).status_code == 401
            assert refused == ("401" in operation["responses"]) == (operation.get("security") == [{"ApiKey": []}]), path
    assert api.get("/v1/models", headers={"Authorization": "Bearer one-key"}).status_code == 200
    assert '"security' not in client().get("/openapi.json").text


@pytest.mark.parametrize("image_urls", [False, True])
def test_addresses_of_pictures_are_of_the_published_pattern(
    client: Callable[..., TestClient], image_urls: bool
) -> None:
    """Whatever the server takes fits it, and what does not is refused."""

    async def fetch(url: str, param: str, take: Callable[[int], None]) -> bytes:
        return from_data_url(data_url(), param)

    api = client(image_urls=image_urls, fetcher=fetch)
    pattern = api.get("/openapi.json").json()["components"]["schemas"]["ImageUrl"]["properties"]["url"]["pattern"]
    data = data_url().removeprefix("data:")
    urls = [f"data:{data}", f"DATA:{data}", f" \n\tData: {data} ", f"data :{data}", f"file:{data}", f"x data:{data}"]
    urls += ["http://a.example/b.png", " HTTPS://a.example/", "http:/a.example/b", "ftp://a.example/", "a.png", "//a/b"]
    for url in urls:
        fits = re.search(pattern, url) is not None
        assert fits == (api.post(CHAT, json=ask(url, max_tokens=1)).status_code == 200), url
