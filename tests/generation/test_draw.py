"""Drawing writes codes only, as many as the grid has, and follows its words as far as guidance says."""

import pytest
import torch

import chiasm
import tiny
from chiasm.data.drawing import request
from chiasm.generation.draw import Brush, draw_codes, guide

VQ = {"name": "vq", "image_size": [24, 16], "levels": [4, 3], "width": 8, "depth": 1}


def connect(positions: str = "mrope", attention: str = "causal") -> chiasm.VLM:
    options = {"positions": positions, "attention": attention, "tokenizer": tiny.tokenizer()}
    return chiasm.connect(language=tiny.language(), fusion="unified", image_input=VQ, **options)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("positions", ["raster", "rope2d", "mrope+modality"])
def test_cached_drawing_is_the_full_forwards(positions: str, attention: str) -> None:
    """Greedy codes are the likeliest of a forward over the whole picture, which is masked and has positions as in
    training."""
    vlm = connect(positions, attention)
    prompts = ["two red apples", "a cat"]
    asked = [[request(prompt)] for prompt in prompts]
    codes = draw_codes(vlm.model, vlm.processor, asked, Brush(temperature=0, guidance=1.0))
    assert codes.shape == (2, 6) and int(codes.max()) < 12
    for prompt, row in zip(prompts, codes, strict=True):
        drawn = [
            {"role": "user", "content": f"Draw: {prompt}"},
            {"role": "assistant", "content": [{"type": "image"}]},
        ]
        inputs = vlm.processor.pad([vlm.processor.encode(drawn, 1)])
        assert ("token_type_ids" in inputs) == (attention == "prefix")
        places = inputs["input_ids"] == vlm.model.config.image_token_id
        first = vlm.model.settings.code_ids
        ids = inputs["input_ids"].masked_scatter(places, row + first)
        with torch.no_grad():
            types = {"token_type_ids": inputs["token_type_ids"]} if attention == "prefix" else {}
            logits = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), codes=True, **types).logits
        before = places.roll(-1, dims=1)
        assert torch.equal(logits[before][:, first : first + 12].argmax(dim=-1), row)


def test_pictures() -> None:
    vlm = connect()
    picture = vlm.draw("two red apples", seed=3, top_k=5)
    assert picture.size == (16, 24) and picture.mode == "RGB"
    assert picture.tobytes() == vlm.draw("two red apples", seed=3, top_k=5).tobytes()
    assert picture.tobytes() != vlm.draw("two red apples", seed=4, top_k=5).tobytes()


def test_guidance() -> None:
    logits = torch.randn(4, 7)
    assert torch.equal(guide(logits, 1.0), logits)
    torch.testing.assert_close(guide(logits, 0.0), logits[2:].log_softmax(-1))
    told, untold = logits[:2].log_softmax(-1), logits[2:].log_softmax(-1)
    torch.testing.assert_close(guide(logits, 3.0), untold + 3 * (told - untold))


def test_text_never_holds_codes() -> None:
    vlm = connect()
    with torch.no_grad():
        vlm.model.language.lm_head.weight[vlm.model.settings.code_ids :] *= 50
    tokens = vlm.model.generate(torch.randint(0, 250, (2, 5)), do_sample=False, max_new_tokens=9, pad_token_id=258)
    assert int(tokens.max()) < 260


def test_a_temperature_near_nothing_takes_the_likeliest_code() -> None:
    vlm = connect()
    asked = [[request("red")]]
    cold, coldest = (draw_codes(vlm.model, vlm.processor, asked, Brush(t, seed=1)) for t in (1e-40, 0))
    assert torch.equal(cold, coldest)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"this model \(fusion 'early'\) cannot draw; connect with fusion='unified'"):
        chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer()).draw("a cat")
    patches = chiasm.connect(language=tiny.language(), fusion="unified", tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match="cannot draw"):
        patches.draw("a cat")
    with pytest.raises(ValueError, match="temperature=-1, expected a finite number from 0 on"):
        Brush(temperature=-1)
