"""The published OpenAPI document: what fits it gets an answer that fits it (where schemathesis is installed)."""

from collections.abc import Callable
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")


@pytest.mark.slow
def test_answers_are_as_published(address: Callable[..., str], metronome: Any) -> None:
    metronome.engine.seconds = 0.0
    schema = schemathesis.openapi.from_url(address(metronome) + "/openapi.json")
    seen = set()
    for operation in schema.get_all_operations():
        case = operation.ok()

        @hypothesis.settings(
            max_examples=40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
        )
        @hypothesis.given(data=case.as_strategy())
        def holds(data: Any) -> None:
            data.call_and_validate(timeout=30)

        holds()
        seen.add(case.path)
    assert {"/v1/chat/completions", "/v1/embeddings", "/v1/models", "/api/attention", "/health"} <= seen
