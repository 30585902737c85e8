"""QLoRA: refused where it cannot be done; elsewhere the weights beside LoRA have 4 bits, and come back bit for bit."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import chiasm
from chiasm.training import four_bit
from chiasm.training.recipe import load_recipe
from chiasm.training.schema import Stage

QLORA = {"*": "frozen", "language": {"tune": "qlora", "lr": 1e-2, "rank": 2}}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def stage(**settings: Any) -> Stage:
    return load_recipe({"stages": [helpers.stage(parts=QLORA, **settings)]}).stages[0]


def test_without_the_package_or_the_device_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"stage 'align': tune: qlora needs the package bitsandbytes.*tune: lora"):
        helpers.run(tmp_path / "run", {"stages": [helpers.stage(parts=QLORA)]})
    monkeypatch.setattr(four_bit, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="cannot hold 4-bit weights on the device 'mps'"):
        four_bit.require_four_bit(stage(), torch.device("mps"))
    with pytest.raises(ValueError, match="whole 4-bit weights, which parallel: fsdp cannot shard; write parallel: ddp"):
        four_bit.require_four_bit(stage(parallel="fsdp"), torch.device("cpu"))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_keeps_four_bits_and_ends_with_full_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    import bitsandbytes

    from chiasm.training.optimization import Optimization

    seen: list[Any] = []
    optimize = Optimization.take

    def watched(self: Any, step: int, batches: Any) -> Any:
        seen.append(sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in self.engine.model.modules()))
        return optimize(self, step, batches)

    monkeypatch.setattr(Optimization, "take", watched)
    model = helpers.vlm()
    before = helpers.weights(model)
    stages = [helpers.stage("first", parts=helpers.LORA), helpers.stage("second", parts=QLORA, dtype=dtype)]
    result = helpers.run(tmp_path / "run", {"stages": stages, "checkpoint_every": 1}, model)
    assert seen == [0] * 4 + [3 * 7] * 4
    first, second = helpers.weights(chiasm.load(result.stages["first"])), helpers.weights(chiasm.load(result.model))
    assert before.keys() == second.keys()
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert len(moved) == 3 * 7
    ranks = [torch.linalg.matrix_rank(second[name] - first[name], atol=1e-4) for name in moved]
    assert all(rank <= 2 for rank in ranks)  # an update of rank 2, without the rounding to 4 bits
