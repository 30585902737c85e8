"""The engine answers as `transformers.generate` would, alone and together with others, and survives what callers do."""

from typing import Any

import pytest

import chiasm
import contracts
import tiny
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine, QueueFull
from tiny import ask, picture


def connect(fusion: str, language: str = "llama", **options: Any) -> chiasm.VLM:
    vlm = chiasm.connect(tiny.vision(), tiny.language(language), fusion=fusion, tokenizer=tiny.tokenizer(), **options)
    contracts.open_gates(vlm.model, 1.0)
    return vlm


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_together_as_alone(fusion: str, language: str) -> None:
    """Requests of different lengths and pictures at once give the tokens that each has alone."""
    contracts.check_engine_equals_generate(connect(fusion, language))


def test_cancelled_requests_and_full_lines() -> None:
    vlm = connect("early")
    engine = Engine(vlm.model, vlm.processor, max_batch=1, max_waiting=1)
    long = Decoding(max_new_tokens=900)
    first = engine.submit(ask("a"), [picture()], long)
    next(iter(first))
    second = engine.submit(ask("b"), [picture()], Decoding(max_new_tokens=2))
    with pytest.raises(QueueFull) as full:
        engine.submit(ask("c"), [picture()], long)
    assert full.value.retry_after >= 1
    first.cancel()
    assert second.text() is not None and first.finish_reason == "cancelled"
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(ask("c"), [picture()], long)
