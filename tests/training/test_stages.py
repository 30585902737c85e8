"""The freeze plan covers every parameter, refuses what is not clear, and is held against the first step."""

from typing import Any

import helpers
import pytest
import torch
from torch import nn

from chiasm.training.fingerprint import CHUNK, IN_CACHE, digest
from chiasm.training.recipe import load_recipe
from chiasm.training.schema import Stage
from chiasm.training.stages import check_first_step, digests, enter, parts_of


def stage(**parts: Any) -> Stage:
    return load_recipe({"stages": [{**helpers.stage(), "parts": parts}]}).stages[0]


def test_the_table_names_every_parameter() -> None:
    model = helpers.vlm().model
    plan = enter(model, stage(vision="frozen", connector={"tune": "full", "lr": 0.1}, language="frozen"))
    assert set(plan.rates) == {name for name, _ in model.named_parameters()}
    assert set(plan.trainable) == {name for name in plan.rates if name.startswith("connector.")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(plan.trainable)
    rows = {row.part: row for row in plan.rows}
    count = sum(p.numel() for p in model.connector.parameters())
    assert rows["connector"].trainable == rows["connector"].parameters == count
    assert rows["connector"].memory == count * (4 + 4 + 8) and rows["language"].trainable == 0


def test_lora_trains_the_adapters_alone_and_parts_keep_their_mode() -> None:
    model = helpers.vlm(vision="convnext").model
    plan = enter(model, stage(**{"*": "frozen", "language": {"tune": "lora", "lr": 0.1, "targets": ["q_proj"]}}))
    assert len(plan.trainable) == 2 * 3 and all(".lora_" in name for name in plan.trainable)
    assert model.training and model.language.training
    assert not model.vision.training and not model.connector.training
    assert not any(module.training for module in model.vision.modules())


@pytest.mark.parametrize("size", [0, 1, 3 * IN_CACHE + 5, CHUNK + IN_CACHE + 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_digests_are_those_of_older_runs(size: int, dtype: torch.dtype) -> None:
    """Two sums over the bits, of which each part of `CHUNK` elements wraps at 64."""
    width = torch.empty(0, dtype=dtype).element_size()
    tensor = torch.randint(0, 256, (size * width,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]).long()
    weighted = bits * torch.arange(1, size + 1)
    expected = tuple(sum(int(part.sum()) for part in sums.split(CHUNK)) for sums in (bits, weighted))
    assert digest(tensor.view(dtype)) == expected


def test_what_is_not_said_is_refused() -> None:
    model = helpers.vlm().model
    with pytest.raises(ValueError, match='does not say what happens to vision, language; write "vision: frozen"'):
        enter(model, stage(connector={"tune": "full", "lr": 0.1}))
    with pytest.raises(ValueError, match="'cross_attention', which this model does not have; it has vision, connector"):
        enter(model, stage(**{"*": "frozen", "cross_attention": {"tune": "full", "lr": 1}}))
    with pytest.raises(ValueError, match="'align' trains nothing"):
        enter(model, stage(**{"*": "frozen"}))


def test_a_tuned_rest_must_have_a_part() -> None:
    model, full = helpers.vlm().model, {"tune": "full", "lr": 0.1}
    named = {"vision": "frozen", "connector": full, "language": "frozen"}
    with pytest.raises(ValueError, match=r"'align': '\*': full matches nothing, since other lines decide on all parts"):
        enter(model, stage(**named, **{"*": full}))
    enter(model, stage(**named, **{"*": "frozen"}))
    enter(model, stage(vision="frozen", language="frozen", **{"*": full}))


def test_a_parameter_of_no_part_is_refused() -> None:
    model = helpers.vlm().model
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'extra\.weight' belongs to no part; names start with vision, connector"):
        parts_of(model)


def test_one_tensor_cannot_be_both_frozen_and_tuned() -> None:
    model = helpers.vlm().model
    model.connector.output.bias = model.language.model.norm.weight
    with pytest.raises(ValueError, match=r"are one tensor, but the plan says frozen and lr 0\.1"):
        enter(model, stage(vision="frozen", connector={"tune": "full", "lr": 0.1}, language="frozen"))


def step(model: nn.Module, rate: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
            parameter.data.sub_(rate)


def test_the_first_step_is_held_against_the_plan() -> None:
    model = helpers.vlm().model
    plan = enter(model, stage(vision="frozen", connector={"tune": "full", "lr": 0.1}, language="frozen"))
    before = digests(model)
    step(model, 0.1)
    assert check_first_step(model, plan, before, 1.0) == []
    model.connector.output.bias.grad = None
    assert "1 trainable tensors got no gradient" in check_first_step(model, plan, before, 1.0)[0]
    with pytest.raises(RuntimeError, match="is trainable and has a gradient but did not move"):
        check_first_step(model, plan, digests(model), 1.0)
    model.language.model.norm.weight.data[0].add_(1e-6)
    with pytest.raises(RuntimeError, match=r"language\.model\.norm\.weight is frozen by the plan but changed"):
        check_first_step(model, plan, before, 1.0)


def test_batch_norm_statistics_do_not_move() -> None:
    model = helpers.vlm().model
    model.connector.extra = nn.BatchNorm1d(4)
    enter(model, stage(vision="frozen", connector={"tune": "full", "lr": 0.1}, language="frozen"))
    assert model.connector.training and not model.connector.extra.training
