"""Models whose tokens have rows and columns share steps too: one decoder for pictures and words, or packed patches."""

from typing import Any

import pytest
import torch

import chiasm
import contracts
import tiny
from chiasm.generation.batched import BatchedDecoder
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine
from chiasm.generation.lean_decoder import LeanDecoder

VQ = {"name": "vq", "image_size": [24, 16], "levels": [4, 3], "width": 8, "depth": 1}


def connect(image_input: Any = "patches", **options: Any) -> chiasm.VLM:
    options = {"language": tiny.language(), "tokenizer": tiny.tokenizer()} | options
    return chiasm.connect(fusion="unified", image_input=image_input, **options)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("positions", ["raster", "rope2d+modality", "mrope"])
@pytest.mark.parametrize("image_input", ["patches", VQ])
def test_unified_models_answer_together_as_alone(
    image_input: Any, positions: str, attention: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHIASM_NATIVE", native)
    vlm = connect(image_input, positions=positions, attention=attention)
    contracts.check_engine_equals_generate(vlm, kind=LeanDecoder)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"qk_norm": "rms"}, LeanDecoder),
        ({"qk_norm": "layer"}, BatchedDecoder),
        ({"norm_order": "post"}, BatchedDecoder),
    ],
)
def test_norms_of_all_kinds(options: dict[str, Any], kind: type) -> None:
    torch.manual_seed(3)
    language = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4} | options
    contracts.check_engine_equals_generate(connect(language=language, positions="mrope"), kind=kind)


def test_a_picture_that_was_read_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = connect(positions="mrope")
    encoded, encode = [], vlm.model.encode_images

    def counted(pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        encoded.append(len(pixels))
        return encode(pixels, *rest)

    questions = ["What is it?", "What is it?", "What is that?"]
    expected = [vlm.chat(tiny.picture(), one, max_new_tokens=6) for one in questions]
    other = vlm.chat(tiny.picture(1), questions[0], max_new_tokens=6)
    monkeypatch.setattr(vlm.model, "encode_images", counted)
    engine = Engine(vlm.model, vlm.processor)
    decoding = Decoding(max_new_tokens=6)
    answers = [engine.submit(tiny.ask(one), [tiny.picture()], decoding).text().strip() for one in questions]
    assert answers == expected and len(encoded) == 1 and engine.stats().prefix_hits == 2
    assert engine.submit(tiny.ask(questions[0]), [tiny.picture(1)], decoding).text().strip() == other
    assert len(encoded) == 2
    engine.close()


@pytest.mark.parametrize("positions", ["raster", "mrope"])
@pytest.mark.parametrize(("image_input", "encode"), [("patches", "encode_images"), (VQ, "code_tokens")])
def test_a_new_picture_leaves_those_before_it_as_they_were_read(image_input: Any, encode: str, positions: str) -> None:
    contracts.check_a_new_picture(connect(image_input, positions=positions), encode)
