"""What a picture keeps is what its prompt keeps beyond the same question alone: with names of regions and marks."""

from typing import Any

import pytest

import chiasm
import tiny
from chiasm.comparison.cost import cost
from chiasm.comparison.curves import Shape, cache_bytes, prefill_flops
from chiasm.comparison.describe import describe
from chiasm.comparison.measure import measure
from chiasm.data.schema import ImageRef, Sample

PARTS: dict[str, Any] = {"tokenizer": tiny.tokenizer()}
CROSS = {"every": 2, "heads": 4, "kv_heads": 2, "head_dim": 10}


def model(kind: str) -> Any:
    if kind == "unified":
        marked = {"name": "patches", "patch_size": 8}
        return chiasm.connect(None, tiny.language(), fusion="unified", image_input=marked, **PARTS)
    more = {"regions": {"regions": (3, 3)}, "intermediate": {"fusion": "intermediate", "cross_attention": CROSS}}
    return chiasm.connect(tiny.vision(), tiny.language(), "mlp", **more.get(kind, {}), **PARTS)


@pytest.mark.parametrize("kind", ["regions", "early", "intermediate", "unified"])
def test_a_pictures_places_are_the_prompts_without_the_questions_own(kind: str) -> None:
    made = model(kind)
    sample = Sample("one", tiny.ask("What is it?"), [ImageRef.of(tiny.picture())])
    told = measure(made.model.eval(), made.processor, sample, repeats=1)
    content = [{"type": "text", "text": "What is it?"}]
    lengths = [
        len(made.processor(messages=[[{"role": "user", "content": begins + content}]], images=[shown])["input_ids"][0])
        for begins, shown in (([{"type": "image"}], [tiny.picture()]), ([], []))
    ]
    closed, measured, shape = told["closed_form"], told["measured"], Shape(**told["shape"])
    assert shape.names >= 9 if kind == "regions" else shape.names <= 1  # a line break behind the picture
    if kind != "unified":  # which reads this picture in its own size
        assert measured["kv_cache_bytes_per_image"] == closed["kv_cache_bytes_per_image"]
        assert cache_bytes(shape, shape.patches, 1, lengths[1]) == closed["kv_cache_bytes"]
        assert prefill_flops(shape, shape.patches, 1, lengths[1]) == closed["prefill_flops"]
        beside = 0 if shape.in_sequence else shape.cross_kept * closed["visual_tokens"]
        places = (lengths[0] - lengths[1]) * closed["kv_cache_bytes_per_token"]
        assert measured["kv_cache_bytes_per_image"] == places + beside
        return
    assert measured["kv_cache_bytes_per_image"] == (lengths[0] - lengths[1]) * closed["kv_cache_bytes_per_token"]
    usual = cost(made.model, text_tokens=lengths[1] + shape.names)
    assert cache_bytes(shape, shape.patches, 1, lengths[1]) == usual.kv_cache_bytes


def test_names_of_regions_are_counted_as_the_pictures() -> None:
    made, told = model("regions"), {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    places = made.processor(messages=[[told]], images=[tiny.picture()])["input_ids"].shape[1]
    alone = made.processor(messages=[[told | {"content": "What?"}]])["input_ids"].shape[1]
    costs = made.cost(images=1, text_tokens=alone)
    assert places == costs.sequence + 1, "the template's line break behind the picture is text"
    assert costs.sequence == alone + costs.visual_tokens + made.processor.region_tokens
    facts = describe(made.model, text_tokens=alone, names=made.region_tokens)
    assert facts["cost"]["sequence"] == costs.sequence
