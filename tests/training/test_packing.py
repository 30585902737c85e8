"""Packed samples cost less and learn the same: no sample sees another, in any fusion and language model."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import chiasm
import tiny
from chiasm.data.collation import Item, collate, load_pixels
from chiasm.data.packing import collate_packed, fill_sequences
from chiasm.training.log import read_log
from chiasm.training.stage_model import AnswerModel, require_isolation


def items(vlm: chiasm.VLM, count: int = 9) -> list[Item]:
    learner = AnswerModel(vlm.model, vlm.processor)
    return [Item(s.id, learner.encode(s), load_pixels(s, vlm.processor)) for s in helpers.samples(count)]


def test_sequences_are_full() -> None:
    assert fill_sequences([3, 9, 4, 5, 2], 10) == [[1], [3, 2], [0, 4]]
    assert fill_sequences([12, 1], 10) == [[0], [1]]


@pytest.mark.parametrize("fusion", helpers.FUSIONS)
@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_packed_equals_unpacked(language: str, fusion: str) -> None:
    vlm = helpers.vlm(language=language, fusion=fusion)
    vlm.model.eval()
    samples = items(vlm)
    packed, padded = collate_packed(samples, vlm.processor, room=160), collate(samples, vlm.processor)
    assert len(packed.inputs["input_ids"]) < len(samples) and sorted(packed.ids) == sorted(padded.ids)
    assert (packed.supervised, packed.tokens) == (padded.supervised, padded.tokens)
    gradients = []
    for batch in (packed, padded):
        loss = vlm.model(**batch.inputs, num_items_in_batch=batch.supervised, return_logits=False).loss
        weights = [*vlm.model.connector.parameters(), *vlm.model.language.parameters()]
        gradients.append((loss, *torch.autograd.grad(loss, weights, allow_unused=True)))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_stage_packs_and_learns_the_same(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"packed": {"pack": True}, "padded": {}, "again": {"gradient_checkpointing": True}}
    parts = {"parts": helpers.LORA, "optimizer": "sgd"}
    for name, settings in runs.items():
        recipe = {"stages": [helpers.stage(**parts, **settings)]}
        helpers.run(tmp_path / name, recipe, cache_root=tmp_path / "features")
    logs = {name: read_log(tmp_path / name / "log.jsonl") for name in runs}
    losses = {name: [event["loss"] for event in log if event["event"] == "step"] for name, log in logs.items()}
    assert losses["packed"] == pytest.approx(losses["padded"], abs=1e-5)
    assert losses["again"] == pytest.approx(losses["padded"], abs=1e-6)


def test_a_language_model_that_looks_across_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = helpers.vlm()
    forward = vlm.model.language.forward
    without = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(vlm.model.language, "forward", without)
    with pytest.raises(ValueError, match="does not keep packed samples apart; write pack: false"):
        require_isolation(vlm.model, vlm.processor, "align")
