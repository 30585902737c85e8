"""Models whose requests go one by one encode a picture once, too."""

from typing import Any

import pytest
import torch

import chiasm
import contracts
import tiny
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine
from chiasm.generation.sequential import SequentialDecoder


@pytest.mark.parametrize("connector", ["mlp", tiny.connector("qformer", instruction=True)])
def test_a_picture_is_encoded_once(connector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"fusion": "intermediate", "cross_attention": {"every": 1, "mask_attention": False}}
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer(), connector=connector, **options)
    contracts.open_gates(vlm.model, 1.0)
    questions = ["What is it?"] * 3 if connector != "mlp" else ["What is it?", "And where?", "Why?"]
    expected = [vlm.chat(tiny.picture(), question, max_new_tokens=6) for question in questions]
    encoded, encode = [], vlm.model.encode_images

    def counted(pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        encoded.append(len(pixels))
        return encode(pixels, *rest)

    monkeypatch.setattr(vlm.model, "encode_images", counted)
    engine = Engine(vlm.model, vlm.processor)
    assert isinstance(engine.decoder, SequentialDecoder)
    decoding = Decoding(max_new_tokens=6)
    answers = [engine.submit(tiny.ask(one), [tiny.picture()], decoding).text().strip() for one in questions]
    assert answers == expected and encoded == [1] and engine.stats().image_hits == 2
    pair = [tiny.picture(1), tiny.picture()]
    answer = engine.submit(tiny.ask(questions[0], 2), pair, decoding).text().strip()
    assert encoded == [1, 1]
    assert answer == vlm.chat(pair, questions[0], max_new_tokens=6)
    engine.close()
