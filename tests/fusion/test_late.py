"""Late fusion: every pair of towers connects, scores, saves and loads; padding and company change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5Model

import chiasm
import contracts
import tiny
from chiasm.language.text_tower import is_causal, load_text
from chiasm.vision.image_processor import ChiasmImageProcessor

CONNECTORS = {
    "linear": {"name": "linear", "space": 9},
    "mlp": {"name": "mlp", "space": 9, "hidden": 7, "logit_bias": -10.0},
}


TEXTS = {"bert": tiny.bert, **{family: lambda f=family: tiny.language(f) for family in tiny.LANGUAGE_FAMILIES}}


def encoder(vision: str = "clip", text: str = "bert", connector: Any = "linear", **options: Any) -> chiasm.DualEncoder:
    size = 64 if vision == "convnext" else 30
    given: dict[str, Any] = {
        "tokenizer": tiny.tokenizer(),
        "image_processor": ChiasmImageProcessor(size, [0.5] * 3, [0.5] * 3),
    }
    if isinstance(connector, str):
        connector = CONNECTORS.get(connector, connector)
    return chiasm.connect(tiny.vision(vision), TEXTS[text](), connector, "late", **given, **options)


@pytest.mark.parametrize(
    ("vision", "text"),
    [*((family, "bert") for family in tiny.VISION_FAMILIES), *(("siglip", text) for text in TEXTS if text != "bert")],
)
def test_every_tower_keeps_the_contract(vision: str, text: str) -> None:
    for connector in CONNECTORS:
        contracts.check_dual_encoder(encoder(vision, text, connector))


@pytest.mark.parametrize(("text", "pooling"), [("bert", "mean"), ("llama", "last"), ("gemma3", "last")])
def test_pooling_suits_the_tower(text: str, pooling: str) -> None:
    made = encoder(text=text)
    assert made.model.config.text_pooling == pooling and is_causal(made.model.language) == (pooling == "last")
    assert made.processor.frame == ("both" if pooling == "last" else "own")


@pytest.mark.parametrize("vision", ["mean", "cls", "own"])
@pytest.mark.parametrize("text", ["mean", "cls", "last", "own"])
def test_pooling_by_name(vision: str, text: str) -> None:
    made = encoder(pooling={"vision": vision, "text": text})
    contracts.check_dual_encoder(made)
    assert (made.model.language.pooler is None) == (text != "own")
    ids = torch.tensor([[5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad():
        found = made.model.pooled_texts(ids, mask)
        output = made.model.language(input_ids=ids, attention_mask=mask)
    states = output.last_hidden_state[0]
    by_hand = {"mean": states[:3].mean(dim=0), "cls": states[0], "last": states[2], "own": output.pooler_output}
    torch.testing.assert_close(found[0], by_hand[text].reshape(-1), rtol=1e-5, atol=1e-5)


def test_what_a_sentence_encoder_says_of_its_pooling(tmp_path: Path) -> None:
    tiny.bert().save_pretrained(tmp_path)
    assert load_text(str(tmp_path))[1] == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert load_text(str(tmp_path))[1] == "cls"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pooling": {"text": "max"}}, "pooling 'max' is unknown; choose one of auto, mean, cls, last, own"),
        ({"pooling": {"sound": "mean"}}, "unknown key 'sound'"),
        ({"vision": "convnext", "pooling": {"vision": "cls"}}, "no class|class token"),
        ({"vision": "convnext", "pooling": {"vision": "own"}}, "vision_pooling 'own' is for clip_vision_model"),
        ({"text": "llama", "pooling": {"text": "own"}}, "pooling 'own' is for text encoders that pool by themselves"),
        ({"connector": "qformer"}, "does not project into a shared space"),
        ({"connector": {"name": "linear", "depth": 2}}, "has no option 'depth'"),
        ({"connector": {"name": "linear", "space": 0}}, "has space=0, expected at least 1"),
        ({"connector": {"name": "linear", "bias": "no"}}, "has bias='no', expected bool"),
        ({"connector": {"name": "none"}, "text": "llama"}, "'none' needs towers of one width"),
        ({"cross_attention": {}}, "cross_attention= is not for fusion 'late'"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        encoder(**options)


def test_encoder_decoders_and_models_without_words_are_refused() -> None:
    t5 = T5Model(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="a 't5' model is no text tower"):
        chiasm.connect(tiny.vision(), t5, fusion="late")
    with pytest.raises(ValueError, match="'clip_vision_model' model is no text tower"):
        chiasm.connect(tiny.vision(), tiny.vision(), fusion="late")


def test_pairs_have_a_probability_where_scores_have_a_bias() -> None:
    pictures, texts = [tiny.picture(0), tiny.picture(1)], ["red", "green"]
    made = encoder(connector="mlp")
    connector = made.model.connector
    with torch.no_grad():
        expected = (
            made.score(pictures, texts).diagonal() * connector.logit_scale.exp() + connector.logit_bias
        ).sigmoid()
    torch.testing.assert_close(made.match(pictures, texts), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="scores have no bias"):
        encoder().match(pictures, texts)
    with pytest.raises(ValueError, match=r"2 picture\(s\) but 1 text\(s\)"):
        made.match(pictures, "red")
    with pytest.raises(ValueError, match="no answer head"):
        made.answer(pictures, texts)


def test_presets() -> None:
    plain, sigmoid = (encoder(connector=None, preset=preset) for preset in ("clip", "siglip"))
    assert plain.model.connector.logit_bias is None and sigmoid.model.connector.logit_bias.item() == -10
    assert sigmoid.model.connector.logit_scale.exp().item() == pytest.approx(10, rel=1e-4)
