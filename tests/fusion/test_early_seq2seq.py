"""Early fusion with an encoder–decoder: connected like any other, and it keeps the family's invariants."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import chiasm
import contracts
import tiny
from chiasm.connectors import CONNECTORS
from chiasm.data.labels import IGNORE
from chiasm.fusion.adapters import add_adapter
from chiasm.fusion.early_seq2seq import EarlySeq2SeqModel
from chiasm.generation.decode import end_tokens
from chiasm.generation.sequential import SequentialDecoder
from tiny import ask, picture


def connect(language: Any = "t5", vision: str = "clip", **options: Any) -> chiasm.VLM:
    """A connected model whose answers depend on what it reads, which fresh weights of this kind hardly make them."""
    given = tiny.language(language) if isinstance(language, str) else language
    torch.manual_seed(5)
    for name, parameter in given.named_parameters():
        if parameter.ndim > 1 and "shared" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return chiasm.connect(tiny.vision(vision), given, tokenizer=tiny.tokenizer(), **options)


def batch(vlm: chiasm.VLM) -> dict[str, Tensor]:
    """Two prompts with a picture each, and the beginning of an answer."""
    prompts = vlm.processor(messages=[ask("What?"), ask("And this?")], images=[[picture(1)], [picture(2)]])
    return {**prompts, "decoder_input_ids": torch.tensor([[257, 65, 66], [257, 67, 68]])}


@pytest.mark.parametrize("language", tiny.ENCODER_DECODERS)
@pytest.mark.parametrize("vision", ["clip", "convnext"])
def test_every_pair(vision: str, language: str) -> None:
    vlm = connect(language, vision)
    assert isinstance(vlm.model, EarlySeq2SeqModel)
    inputs = batch(vlm)
    prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_cached_equals_full(vlm.model, prompt)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_embeddings_equal_tokens(vlm.model, inputs)
    contracts.check_generation_strategies(vlm.model, prompt)
    contracts.check_attention_implementations(vlm.model, lambda model: model(**inputs).logits)


@pytest.mark.parametrize("language", tiny.ENCODER_DECODERS)
def test_batches_and_the_engine_answer_as_one_would_alone(language: str) -> None:
    vlm = connect(language)
    messages = [ask("Short?"), ask("A longer question about two?", 2), [{"role": "user", "content": "No picture."}]]
    contracts.check_batched_equals_single(vlm, messages, [[picture(1)], [picture(2), picture(3)], []])
    contracts.check_engine_equals_generate(vlm, kind=SequentialDecoder)


@pytest.mark.parametrize("language", tiny.ENCODER_DECODERS)
def test_text_alone_is_the_language_model(language: str) -> None:
    vlm, words = connect(language), torch.randint(0, 250, (2, 9))
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words), "decoder_input_ids": words[:, :4]}
    with torch.no_grad():
        assert torch.equal(vlm.model(**inputs).logits, vlm.model.language(**inputs).logits)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector(connector: str) -> None:
    vlm = connect(connector=tiny.connector(connector))
    contracts.check_saved_equals_loaded(vlm, batch(vlm))


def test_parts_of_different_precision_and_adapters() -> None:
    vlm = connect()
    vlm.model.language.to(torch.bfloat16)
    vlm.model.connector.to(torch.bfloat16)
    contracts.check_part_dtypes_survive(vlm, batch(vlm))
    add_adapter(vlm.model, "language", rank=2)
    contracts.check_part_dtypes_survive(vlm, batch(vlm))


@pytest.mark.parametrize("language", tiny.ENCODER_DECODERS)
def test_a_folder_is_connected_with_all_its_weights(language: str, tmp_path: Path) -> None:
    """BART's folders also load as a causal model, whose weights are then new ones."""
    saved = tiny.language(language, seed=3)
    saved.save_pretrained(tmp_path)
    found = chiasm.connect(tiny.vision(), str(tmp_path), tokenizer=tiny.tokenizer()).model.language
    assert type(found) is type(saved)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_stops_and_starts_survive_saving(tmp_path: Path) -> None:
    vlm = connect()
    vlm.model.generation_config.eos_token_id = [256, 257]
    vlm.save_pretrained(tmp_path)
    again = chiasm.load(tmp_path)
    assert again.processor.encoder_decoder
    assert end_tokens(again.model) == end_tokens(vlm.model) == {256, 257}
    assert again.chat(picture(1), "What?", max_new_tokens=9) == vlm.chat(picture(1), "What?", max_new_tokens=9)


@pytest.mark.parametrize("language", tiny.ENCODER_DECODERS)
@pytest.mark.parametrize("template", [None, tiny.CHATML])
def test_the_decoder_learns_the_last_answer(language: str, template: str | None) -> None:
    """Behind the prompt that generation asks; and the loss is that of its own tokens, however they are counted."""
    words = tiny.tokenizer(template)
    vlm = chiasm.connect(tiny.vision(), tiny.language(language), tokenizer=words)
    talk = [*ask("What?"), {"role": "assistant", "content": "a"}, {"role": "user", "content": "And?"}]
    asked = vlm.processor(messages=talk, images=[picture()])["input_ids"][0].tolist()
    learned = vlm.processor.encode([*talk, {"role": "assistant", "content": "red"}], supervise=True)
    assert learned["input_ids"] == asked
    text = words.decode(learned["labels"])
    assert text == ("red" + (words.eos_token if template is None else "<|im_end|>"))
    if template is None:
        assert asked[-1] == words.eos_token_id
    inputs = batch(vlm)
    del inputs["decoder_input_ids"]
    labels = torch.tensor([[65, 66, 257], [67, 257, IGNORE]])
    mean = vlm.model(**inputs, labels=labels)
    torch.testing.assert_close(vlm.model(**inputs, labels=labels, num_items_in_batch=10).loss, mean.loss * 5 / 10)
    nothing = vlm.model(**inputs, labels=torch.full_like(labels, IGNORE), num_items_in_batch=10).loss
    assert nothing.item() == 0.0


@pytest.mark.parametrize("options", [{"fusion": "intermediate"}, {"fusion": "unified"}, {"attention": "prefix"}])
def test_other_ways_are_refused_in_one_line(options: dict[str, Any]) -> None:
    vision = {} if options.get("fusion") == "unified" else {"vision": tiny.vision()}
    way = next(iter(options.values()))
    told = rf"^language=T5ForConditionalGeneration \(model type 't5'\) is an encoder-decoder, but \w+ '{way}' takes .*"
    with pytest.raises(ValueError, match=told):
        chiasm.connect(**vision, language=tiny.language("t5"), tokenizer=tiny.tokenizer(), **options)
