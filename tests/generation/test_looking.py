"""Where a model looks: true to the attention that the model computes, and drawn so that one can read it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import chiasm
import contracts
import tiny
from chiasm.connectors import CONNECTORS
from chiasm.generation import heatmap
from chiasm.generation.attention import pieces
from tiny import picture


def connect(fusion: str, language: str = "llama", **options: Any) -> chiasm.VLM:
    vlm = chiasm.connect(tiny.vision(), tiny.language(language), fusion=fusion, tokenizer=tiny.tokenizer(), **options)
    contracts.open_gates(vlm.model, 1.0)
    return vlm


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector(fusion: str, connector: str) -> None:
    contracts.check_attention(connect(fusion, connector=connector), [picture(1), picture(2)], "What is this?")


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_every_language_model(fusion: str, language: str) -> None:
    contracts.check_attention(connect(fusion, language), [picture(1)], "What is this?")


def test_a_token_looks_from_where_it_was_chosen() -> None:
    """The first token of the answer is chosen at the prompt's last place: its weights are that place's."""
    vlm = connect("early", connector="linear")
    seen = vlm.attention(picture(), "What?", layers=[1], max_new_tokens=3)
    inputs = vlm.processor(messages=tiny.ask("What?"), images=[picture()])
    vlm.model.language.set_attn_implementation("eager")
    with torch.no_grad():
        weights = vlm.model(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(dim=0)
    visual = weights[inputs["input_ids"][0] == vlm.model.config.image_token_id]
    torch.testing.assert_close(seen.patches[0].flatten(), visual / visual.sum(), **contracts.TOLERANCE)


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
def test_the_words_of_the_question_come_first(fusion: str) -> None:
    vlm = connect(fusion)
    seen = vlm.attention(picture(), "What is it?", prompt_words=True, max_new_tokens=3)
    asked = len("What is it?".replace(" ", ""))
    assert "".join(seen.tokens[:asked]) == "Whatisit?" and len(seen.patches) == len(seen.tokens) > asked
    assert "".join(seen.tokens[asked:]).strip() == seen.answer and seen.tokens[asked].startswith(" ")


def test_examples_are_pictures_of_the_prompt_too() -> None:
    vlm = connect("early")
    seen = vlm.attention(picture(1), "What?", image=0, examples=[(picture(2), "What?", "a cat")], max_new_tokens=3)
    assert seen.picture.tobytes() == vlm.processor.image_processor.resize(picture(2)).tobytes()
    with pytest.raises(ValueError, match=r"attention to image 2, but the prompt has 2 image\(s\)"):
        vlm.attention(picture(1), "What?", image=2, examples=[(picture(2), "What?", "a cat")])
    with pytest.raises(ValueError, match=r"attention to image -1, but the prompt has 0 image\(s\)"):
        vlm.attention(None, "What?")


def test_an_error_leaves_the_model_as_it_was() -> None:
    vlm = connect("early")
    config = vlm.model.language.config
    before = config._attn_implementation

    def fail(module: Any, *_: Any) -> None:
        assert config._attn_implementation == before
        if module.config._attn_implementation == "eager":
            raise RuntimeError("out of memory")

    vlm.model.language.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        vlm.attention(picture(), "What?", max_new_tokens=2)
    assert config._attn_implementation == before


def test_pieces_are_whole_characters() -> None:
    tokenizer = tiny.tokenizer()
    text = "a 고양이!"
    found = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(found) == text and {"고", "양", "이", "a", "!"} <= set(found)


def test_words_are_put_together() -> None:
    assert heatmap.words([" top", " left", "-most", "", "!", " ", "\n", "x"]) == [
        ("top", [0]),
        ("left-most!", [1, 2, 3, 4]),
        ("x", [7]),
    ]


def test_a_spotlight_is_bright_where_the_weight_is() -> None:
    white = Image.new("RGB", (60, 60), "white")
    weights = torch.zeros(3, 3)
    weights[0, 2] = 1.0
    lit = heatmap.spotlight(white, weights)
    assert lit.getpixel((52, 8)) == (255, 255, 255) and max(lit.getpixel((8, 52))) < 180
    assert len(heatmap.spotlight(white, torch.full((3, 3), 1 / 9)).getcolors()) == 1
    unseen, even = (heatmap.spotlight(white, torch.full((3, 3), weight)).getpixel((9, 9)) for weight in (0.0, 1 / 9))
    dark, bright = lit.getextrema()[0]
    assert unseen[0] == dark < even[0] < bright  # everywhere alike is not nowhere


def test_the_grid_has_a_tile_for_every_word(tmp_path: Path) -> None:
    vlm = connect("intermediate")
    seen = vlm.attention(picture(), "What?", max_new_tokens=8)
    sheet = Image.open(seen.save(tmp_path / "new" / "out.png"))
    tiles = 1 + len(heatmap.words(seen.tokens))
    assert sheet.width >= min(tiles, heatmap.COLUMNS) * heatmap.SIDE
