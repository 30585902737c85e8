"""Regions: names of a picture's parts in the prompt, and visual tokens in their order."""

from pathlib import Path
from typing import Any

import pytest
import torch

import chiasm
import contracts
import tiny
from chiasm.positions.regions import region_order
from tiny import ask, picture


def connect(vision: str = "convnext", regions: tuple[int, int] = (1, 2), **options: Any) -> chiasm.VLM:
    return chiasm.connect(tiny.vision(vision), tiny.language(), tokenizer=tiny.tokenizer(), regions=regions, **options)


def test_order_goes_region_by_region() -> None:
    assert region_order((4, 4), (2, 2)) == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert region_order((2, 6), (1, 3)) == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert region_order((3, 3), (3, 3)) == list(range(9))
    with pytest.raises(ValueError, match="regions 2×2 do not divide the connector's grid of 3×3 visual tokens"):
        region_order((3, 3), (2, 2))


def test_prompt_names_the_regions() -> None:
    vlm = connect(regions=(2, 2))
    ids = vlm.processor.encode(ask("What?"), 1)["input_ids"]
    written = vlm.processor.tokenizer.decode([token for token in ids if token != vlm.processor.image_token_id])
    assert " top left top right bottom left bottom right\n" in written
    assert ids.count(vlm.processor.image_token_id) == vlm.model.num_image_tokens == 4


def test_tokens_stand_behind_their_regions_name() -> None:
    vlm, plain = connect(regions=(1, 2)), connect(regions=None)
    pixels = vlm.processor(messages=ask("What?"), images=[picture()])["pixel_values"]
    with torch.no_grad():
        tokens, rows = vlm.model.visual_tokens(pixels), plain.model.visual_tokens(pixels)
    assert torch.equal(tokens, rows[:, [0, 2, 1, 3]])


def test_contracts(tmp_path: Path) -> None:
    vlm = connect(regions=(1, 2))
    inputs = dict(vlm.processor(messages=[ask("What?"), ask("This?")], images=[[picture(1)], [picture(2)]]))
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_generation_strategies(vlm.model, inputs)
    contracts.check_attention(vlm, [picture(1), picture(2)], "Which?")
    vlm.save_pretrained(tmp_path)
    again = chiasm.load(tmp_path)
    assert isinstance(again, chiasm.VLM)
    assert again.chat([picture()], "What?", max_new_tokens=4) == vlm.chat([picture()], "What?", max_new_tokens=4)


def test_what_cannot_have_regions() -> None:
    with pytest.raises(ValueError, match="regions need a connector whose visual tokens form a grid, got 'qformer'"):
        connect(connector=tiny.connector("qformer"))
    with pytest.raises(ValueError, match="regions are for fusion 'early', got fusion 'intermediate'"):
        connect(fusion="intermediate")
    with pytest.raises(ValueError, match="regions 1×1, expected 1 to 3 rows"):
        connect(regions=(1, 1)).processor.encode(ask("What?"), 1)
