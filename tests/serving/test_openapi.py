"""The published OpenAPI document: what fits it is taken, what does not is refused, and answers fit it."""

from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance
from test_embeddings import Encoder

from chiasm.serving.app import create_app
from chiasm.serving.served import EmbeddingModel
from chiasm.serving.settings import Limits, Settings

MODELS = {"/v1/chat/completions": "tiny", "/api/attention": "tiny", "/v1/embeddings": "clip"}
UNSAID = {
    ("/v1/chat/completions", "invalid_image"),
    ("/v1/embeddings", "invalid_image"),
    ("/api/attention", "invalid_image"),
    ("/v1/embeddings", "dimensions"),
    ("/v1/embeddings", "unknown_token"),
    ("/api/attention", "messages"),
    ("/api/attention", "image"),
}
"""Refusals that JSON Schema has no words for, by path and by code or parameter: that a text is a picture, that the last
message is an assistant's, which pictures there are, how wide a model's vectors are, how many
tokens it knows."""
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
