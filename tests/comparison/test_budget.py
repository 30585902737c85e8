"""One budget for all: FLOPs as they are computed, the pace of a step, no tokens where there is no sequence."""

from typing import Any

import pytest
import torch
from torch import nn

import chiasm
import tiny
from chiasm.comparison.budget import samples_within, training_flops
from chiasm.comparison.choices import expand
from chiasm.comparison.cost import encode_flops, language_flops
from chiasm.comparison.flops import counted
from chiasm.comparison.plan import load_plan
from chiasm.comparison.schema import Budget
from chiasm.comparison.strategies import STRATEGIES, new_parts
from chiasm.data.schema import ImageRef, Sample
from chiasm.fusion.adapters import linear_layers
from chiasm.training.pace import measure
from chiasm.training.recipe import load_recipe
from chiasm.training.schema import Recipe

CROSS = {"every": 2, "heads": 4, "head_dim": 10}


def samples(count: int) -> list[Sample]:
    told = [[*tiny.ask("What is it?"), {"role": "assistant", "content": f"thing {n}"}] for n in range(count)]
    return [Sample(str(n), one, [ImageRef.of(tiny.picture(n))]) for n, one in enumerate(told)]


def recipe(fusion: str, tune: str, **more: Any) -> Recipe:
    parts = {"vision": "frozen", "language": "frozen"} | new_parts(fusion, 1e-3, 1e-3) | STRATEGIES[tune]
    stage = {"name": "questions", "samples": 4, "batch_size": 2, "parts": parts, **more}
    return load_recipe({"dtype": "float32", "stages": [stage]})


def connect(fusion: str, connector: Any = "mlp") -> Any:
    more = {"cross_attention": CROSS} if fusion == "intermediate" else {}
    parts = (None, tiny.language()) if fusion == "unified" else (tiny.vision(), tiny.language(), connector)
    more |= {"image_input": {"name": "patches", "patch_size": 8}} if fusion == "unified" else {}
    made = chiasm.connect(*parts, fusion=fusion, tokenizer=tiny.tokenizer(), **more)
    made.model.set_attn_implementation("eager")
    return made


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_flops_of_a_sample_are_those_of_its_forward_and_of_every_gradient(tune: str) -> None:
    """No logits where nothing is learned, low-rank updates, weights that learn; the encoder ran before."""
    vlm, shown = connect("early"), samples(1)
    encoded = vlm.processor.encode(shown[0].messages, 1, supervise=True)
    length, learned = len(encoded["input_ids"]), sum(label >= 0 for label in encoded["labels"])
    matrices = language_flops(vlm.model, new=length, context=0, logits=0)
    attention = language_flops(vlm.model, new=length, context=length, logits=0) - matrices
    head = language_flops(vlm.model, new=0, context=0, logits=learned)
    low_rank = sum(
        16 * sum(vlm.model.language.get_submodule(path).weight.shape) for path in linear_layers(vlm.model, "language")
    )
    expected = 2 * (matrices + head) + 3 * attention + 3 * vlm.model.connector.flops()
    expected += {"frozen": 0, "lora": 6 * length * low_rank, "full": matrices + head}[tune]
    found = training_flops(vlm.model, vlm.processor, recipe("early", tune).stages[0], shown)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("fusion", ["early", "intermediate", "unified", "late"])
def test_a_budget_of_flops_pays_for_every_fusion(fusion: str) -> None:
    vlm, known = connect(fusion) if fusion != "late" else late(), samples(6)
    less, more = (
        samples_within(Budget(flops=flops), vlm.model, vlm.processor, asked(fusion), known) for flops in (1e9, 2e9)
    )
    assert 2 < less < more and more == pytest.approx(2 * less, rel=0.01)


def late() -> Any:
    return chiasm.connect(tiny.vision(), tiny.bert(), "linear", "late", tokenizer=tiny.tokenizer())


def asked(fusion: str, tune: str = "frozen") -> Recipe:
    return recipe(fusion, tune, **({"objectives": ["answers"]} if fusion == "late" else {}))


def test_an_encoder_that_learns_costs_flops() -> None:
    vlm = connect("early")
    frozen, tuned = (
        training_flops(vlm.model, vlm.processor, recipe("early", tune).stages[0], samples(2))
        for tune in ("lora", "vision")
    )
    encoding = encode_flops(vlm.model.vision)
    assert 2 * encoding < tuned - frozen < 3 * encoding, "its pixels need no gradient"


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_costs_as_much_for_either_gradient_as_forward(kind: Any, groups: int) -> None:
    layer, picture = kind(4, 8, 3, stride=2, groups=groups), torch.randn(2, 4, 9, 9, requires_grad=True)
    with counted() as forward:
        found = layer(picture)
    with counted() as backward:
        found.sum().backward()
    assert backward.total == 2 * forward.total > 0


def test_the_pace_of_late_fusion_is_that_of_steps_which_read_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen text tower reads every text once, before the first step."""
    made, read = late(), list[int]()
    tower = type(made.model).pooled_texts

    def noting(self: Any, input_ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        read.append(len(input_ids))
        return tower(self, input_ids, *rest, **more)

    monkeypatch.setattr(type(made.model), "pooled_texts", noting)
    measure(made.model, made.processor, asked("late").stages[0], samples(8))
    assert read == [1], "all samples ask the same"


def test_late_fusion_has_no_tokens_that_a_budget_could_count() -> None:
    plan = {"data": {"train": "a", "test": "b"}, "budget": {"tokens": 800}, "grid": {"fusion": ["early", "late"]}}
    choices, skipped = expand(load_plan(plan), lambda: (4, 4))
    assert [choice.way for choice in choices] == ["mlp-early"]
    assert "no sequence whose tokens a budget could count; take samples, flops or minutes" in skipped[0].reason
