"""Positions equal plain counting on text and Qwen2-VL's on pictures and videos."""

from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel, Qwen2VLRotaryEmbedding, apply_rotary_pos_emb

from chiasm.positions.rotary import axes_of, frequencies, rotate, rotation
from chiasm.positions.sequence import AXES, sequence_positions, split_positions

TEXT = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 1, "num_attention_heads": 3}
TEXT |= {"num_key_value_heads": 1, "vocab_size": 50}
SECTIONS = [2, 1, 3]


def _config() -> Qwen2VLConfig:
    rope = {"rope_type": "default", "rope_theta": 9000.0, "mrope_section": SECTIONS}
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 2, "hidden_size": 36, "spatial_merge_size": 1}
    return Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision)


def _batch() -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Text, a picture, text, a video, text; and, padded on the left, two pictures with a word between them."""
    first = [0] * 3 + [1] * 6 + [0] * 2 + [2] * 12 + [0]
    second = [1] * 10 + [0] + [1] * 3 + [0] * 4
    kinds = torch.tensor([first, [0] * (len(first) - len(second)) + second])
    mask = torch.ones_like(kinds)
    mask[1, : len(first) - len(second)] = 0
    return kinds, mask, [(1, 2, 3), (2, 3, 2), (1, 2, 5), (1, 3, 1)]


def test_mrope_is_qwen2_vls() -> None:
    kinds, mask, grids = _batch()
    with torch.device("meta"):
        model = Qwen2VLModel(_config())
    images, videos = torch.tensor([grids[0], grids[2], grids[3]]), torch.tensor([grids[1]])
    theirs, _ = model.get_rope_index(torch.zeros_like(kinds), kinds, images, videos, mask)
    ours = sequence_positions("mrope", kinds > 0, grids, mask)
    assert torch.equal(ours, theirs)


def test_the_rotation_is_qwen2_vls() -> None:
    config = _config().text_config
    config.head_dim = 12
    positions = torch.randint(0, 40, (3, 2, 7))
    query = torch.randn(2, 3, 7, 12)
    cos, sin = Qwen2VLRotaryEmbedding(config)(query, positions)
    theirs, _ = apply_rotary_pos_emb(query, query, cos, sin)
    inverse, scale = frequencies(config, torch.device("cpu"), positions)
    ours = rotate(query, *rotation(positions, inverse, axes_of("mrope", 6, SECTIONS), scale))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", AXES)
def test_text_alone_turns_as_by_one_count(kind: str) -> None:
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    positions = sequence_positions(kind, torch.zeros(2, 9, dtype=torch.bool), [], mask)
    assert positions.shape == (AXES[kind], 2, 9)
    assert torch.equal(positions[-1], torch.tensor([[*range(9)], [0] * 4 + [*range(5)]]))
    inverse = torch.rand(6)
    ours = rotation(positions, inverse, axes_of(kind, 6))
    plain = rotation(positions[-1:], inverse, axes_of("raster", 6))
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_rope2d_has_rows_and_columns() -> None:
    kinds, mask, grids = _batch()
    two = sequence_positions("rope2d", kinds > 0, grids, mask)
    assert torch.equal(two, sequence_positions("mrope", kinds > 0, grids, mask)[1:])
    assert two[:, 0, 3:9].tolist() == [[3, 3, 3, 4, 4, 4], [3, 4, 5, 3, 4, 5]]
    assert two[0, 0, 9] == 6


def test_pictures_side_by_side_need_no_text_between_them() -> None:
    visual = torch.tensor([[False, *[True] * 10, False]])
    positions = sequence_positions("mrope", visual, [(1, 2, 3), (1, 2, 2)])
    assert positions[0, 0].tolist() == [0, *[1] * 6, *[4] * 4, 6]


def test_grids_must_fit() -> None:
    visual = torch.tensor([[False, True, True, True]])
    with pytest.raises(ValueError, match=r"3 visual tokens stand side by side, but the next picture's grid is"):
        sequence_positions("mrope", visual, [(1, 2, 2)])
    with pytest.raises(ValueError, match="2 pictures have a grid, but only 1 stand in the text"):
        sequence_positions("mrope", visual, [(1, 1, 3), (1, 1, 1)])
    with pytest.raises(ValueError, match=r"rope_sections \[1, 1, 1\] must be three numbers that sum to half"):
        axes_of("mrope", 6, [1, 1, 1])


def test_one_word_chooses() -> None:
    assert split_positions("mrope+modality") == ("mrope", True)
    assert split_positions("raster") == ("raster", False)
    with pytest.raises(ValueError, match="positions 'alibi' is unknown; choose one of raster, "):
        split_positions("alibi")
