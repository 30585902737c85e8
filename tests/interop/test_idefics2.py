"""A transformers Idefics2 checkpoint gives the same logits and text here, for pictures of any size and number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Idefics2Config, Idefics2ForConditionalGeneration

import chiasm
import tiny
from contracts import check_equals_reference, check_saved_equals_loaded

LATENTS = 5


def reference(folder: Path, language: str = "llama", **changes: Any) -> Idefics2ForConditionalGeneration:
    sizes = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 5}
    text = tiny.language(language).config
    perceiver = {
        "hidden_size": text.hidden_size,
        "resampler_n_latents": LATENTS,
        "resampler_depth": 2,
        "resampler_n_heads": 6,
        "resampler_head_dim": 7,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3,
    }
    settings: dict[str, Any] = {
        "vision_config": sizes | {"image_size": 35, "patch_size": 7},
        "text_config": text.to_dict(),
        "perceiver_config": perceiver,
        "image_token_id": 260,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    torch.manual_seed(5)
    idefics2 = Idefics2ForConditionalGeneration(Idefics2Config(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in idefics2.model.connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    idefics2.save_pretrained(folder)
    return idefics2


def batch(counts: tuple[int, ...], size: tuple[int, int] = (35, 28), mask: bool = True) -> dict[str, torch.Tensor]:
    """Rows with these numbers of pictures; every picture has its own size and is padded to the largest."""
    pixels = torch.zeros(len(counts), max(counts), 3, *size)
    seen = torch.zeros(len(counts), max(counts), *size, dtype=torch.long)
    ids = torch.randint(0, 255, (len(counts), max(counts) * (LATENTS + 2) + 8))
    for row, count in enumerate(counts):
        for picture in range(count):
            height, width = size[0] - 3 * (row + picture), size[1] - 2 * picture
            pixels[row, picture, :, :height, :width] = torch.randn(3, height, width)
            seen[row, picture, :height, :width] = 1
            start = 2 + picture * (LATENTS + 2)
            ids[row, start : start + LATENTS] = 260
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs | ({"pixel_attention_mask": seen} if mask else {})


@pytest.mark.parametrize("language", ["llama", "qwen2"])
@pytest.mark.parametrize("counts", [(1,), (2, 1), (1, 3, 2)])
@pytest.mark.parametrize("mask", [True, False])
def test_numbers_and_sizes_of_pictures(language: str, counts: tuple[int, ...], mask: bool, tmp_path: Path) -> None:
    idefics2 = reference(tmp_path, language)
    vlm, inputs = chiasm.load(tmp_path), batch(counts, mask=mask)
    check_equals_reference(vlm.model, idefics2, inputs)
    check_saved_equals_loaded(vlm, inputs)


@pytest.mark.parametrize("size", [(35, 35), (14, 63), (50, 23)])
def test_pictures_of_other_proportions(size: tuple[int, int], tmp_path: Path) -> None:
    idefics2 = reference(tmp_path)
    model = chiasm.load(tmp_path).model
    for mask in (True, False):
        check_equals_reference(model, idefics2, batch((2,), size, mask))
