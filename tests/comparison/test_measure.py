"""What a comparison counts while a model runs is what the closed form says, for every fusion."""

from typing import Any

import pytest
import test_report

import chiasm
import tiny
from chiasm.comparison.measure import measure
from chiasm.comparison.tables import costs
from chiasm.data.schema import ImageRef, Sample


def parts() -> dict[str, Any]:
    return {"vision": tiny.vision(), "language": tiny.language(), "tokenizer": tiny.tokenizer()}


CROSS = {"every": 2, "heads": 4, "kv_heads": 2, "head_dim": 10, "gated_feed_forward": True}


def sample() -> Sample:
    messages = [*tiny.ask("What is it?"), {"role": "assistant", "content": "A cat."}]
    return Sample("one", messages, [ImageRef.of(tiny.picture())])


def late(combine: str) -> Any:
    towers: Any = chiasm.connect(**parts(), fusion="late")
    towers.model.add_answer_head(["a cat", "a dog", "an owl"], combine=combine, hidden=9)
    return towers


MODELS: dict[str, Any] = {
    "early": lambda: chiasm.connect(**parts(), connector="mlp"),
    "early, of queries": lambda: chiasm.connect(**parts(), connector=tiny.connector("perceiver_resampler")),
    "intermediate": lambda: chiasm.connect(**parts(), fusion="intermediate", cross_attention=CROSS),
    "late head, mlp": lambda: late("mlp"),
    "late head, product": lambda: late("product"),
    "late head, concat": lambda: late("concat"),
    "unified, patches": lambda: chiasm.connect(
        **parts() | {"vision": None}, fusion="unified", image_input={"name": "patches", "patch_size": 8}
    ),
    "unified, codes": lambda: chiasm.connect(
        **parts() | {"vision": None},
        fusion="unified",
        image_input={"name": "vq", "image_size": 32, "factor": 8, "width": 16},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_decoded_token_costs_what_the_closed_form_says(name: str) -> None:
    made = MODELS[name]()
    told = measure(made.model.eval(), made.processor, sample(), repeats=1)
    closed, measured = told["closed_form"], told["measured"]
    assert measured["decode_flops"] == closed["decode_flops"] > 0
    assert measured["encode_flops"] == closed["encode_flops"]
    if not name.startswith("late"):
        wanted = closed["connect_and_prefill_flops"]
        assert measured["connect_and_prefill_flops"] == pytest.approx(wanted, rel=0.02)


def test_an_encoder_decoder_is_counted_too() -> None:
    made = chiasm.connect(**parts() | {"language": tiny.language("t5")}, connector="mlp")
    told = measure(made.model.eval(), made.processor, sample(), repeats=1)
    assert told["measured"]["decode_flops"] == told["closed_form"]["decode_flops"] > 0


def test_the_report_shows_both() -> None:
    cell = test_report.result("mlp-early", 9, 16)
    cell["measured"]["decode_flops"] = 2 * 10**8
    table = costs({"mlp-early": [cell]})
    shown = dict(zip(table["heads"], table["rows"][0], strict=True))
    assert shown["decode a token"] == "0.10 GFLOP; counted 0.20 GFLOP"
