"""A Q-Former that reads the instruction works in connect, chat, generate, training and on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

import chiasm
import contracts
import tiny
from chiasm.data.collation import Item, collate, encode_sample
from chiasm.data.instruction import InstructionProcessor
from training import helpers


def connect(**options: Any) -> chiasm.VLM:
    return helpers.vlm(connector=tiny.connector("qformer", **{"instruction": True, **options}))


def ask(prompt: str, images: int = 1) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": prompt}]}]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (30, 30), (shade, 255 - shade, shade // 2))


def bert_folder(folder: Path) -> Path:
    config = BertConfig(
        vocab_size=300, hidden_size=18, num_hidden_layers=2, num_attention_heads=3, intermediate_size=30
    )
    BertModel(config).save_pretrained(folder)
    tiny.tokenizer(None).save_pretrained(folder)
    return folder


def test_the_processor_gives_one_instruction_for_each_picture() -> None:
    processor = connect().processor
    assert isinstance(processor, InstructionProcessor)
    talk = [*ask("First?"), {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    inputs = processor(
        messages=[ask("What is it?", 2), talk, ask("None", 0)], images=[[picture(1), picture(2)], [picture(3)], []]
    )
    words = [
        processor.instruction_tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["instruction_ids"], inputs["instruction_mask"], strict=True)
    ]
    assert words == ["What is it?", "What is it?", "Why?"]
    assert "instruction_ids" not in processor(messages=ask("Nothing", 0))
    raw = processor(text="<image>\nSee?", images=[picture(1)])
    assert processor.instruction_tokenizer.decode(raw["instruction_ids"][0]) == "See?"
    long = processor(messages=ask("word " * 100), images=[picture(1)])
    assert long["instruction_ids"].shape == (1, 128)


def test_the_instruction_changes_what_the_queries_read() -> None:
    vlm = connect()
    inputs = vlm.processor(messages=[ask("What?"), ask("This?")], images=[[picture(9)], [picture(9)]])
    first, second = vlm.model(**inputs).visual_tokens
    assert not torch.allclose(first, second, atol=1e-5)


def test_invariants() -> None:
    vlm = connect()
    inputs = dict(vlm.processor(messages=[ask("What?"), ask("This?")], images=[[picture(9)], [picture(200)]]))
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_cached_equals_full(vlm.model, inputs)
    messages = [ask("Short?"), ask("A longer question about two pictures?", 2), ask("No picture.", 0)]
    contracts.check_batched_equals_single(vlm, messages, [[picture(1)], [picture(2), picture(3)], []])
    beams = vlm.model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
    assert beams.shape[0] == 2


def test_training_gives_the_instruction_of_every_picture() -> None:
    vlm = connect()
    samples = helpers.samples(8)
    items = [
        Item(s.id, encode_sample(s, vlm.processor, 60), torch.zeros(len(s.images), 3, 30, 30) if s.images else None)
        for s in samples
    ]
    inputs = collate(items, vlm.processor).inputs
    assert inputs["instruction_ids"].shape[0] == inputs["pixel_values"].shape[0] == sum(len(s.images) for s in samples)
    without = [item for item, s in zip(items, samples, strict=True) if not s.images]
    loss = vlm.model.train()(**collate(without, vlm.processor).inputs).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in vlm.model.connector.parameters())


def test_a_training_run_with_cached_features(tmp_path: Path) -> None:
    vlm = connect()
    before = helpers.weights(vlm)
    helpers.run(tmp_path / "run", {"stages": [helpers.stage(cache_features=True)]}, vlm)
    moved = {name for name, value in helpers.weights(vlm).items() if not torch.equal(value, before[name])}
    assert "connector.words.weight" in moved and all(name.startswith("connector.") for name in moved)


def test_it_starts_from_bert_and_is_loaded_without_it(tmp_path: Path) -> None:
    source = bert_folder(tmp_path / "bert")
    options = {"name": "qformer", "init_from": str(source), "instruction": True, "num_queries": 4}
    vlm = helpers.vlm(connector=options)
    assert torch.equal(
        vlm.model.connector.blocks[1].self_attention.key.weight,
        BertModel.from_pretrained(source).encoder.layer[1].attention.self.key.weight,
    )
    assert vlm.model.config.connector["width"] == 18 and vlm.model.config.connector["vocabulary"] == 260
    words = vlm.model.get_input_embeddings().weight.square().mean().sqrt()
    inputs = dict(vlm.processor(messages=[ask("What?")], images=[[picture(9)]]))
    assert 0.3 < vlm.model(**inputs).visual_tokens.square().mean().sqrt() / words < 3.0
    contracts.check_saved_equals_loaded(vlm, inputs)
    vlm.save_pretrained(tmp_path / "saved")
    for file in source.iterdir():
        file.unlink()
    again = chiasm.load(tmp_path / "saved")
    assert again.chat(picture(3), "What?", max_new_tokens=3) == vlm.chat(picture(3), "What?", max_new_tokens=3)


def test_another_tokenizer_by_name(tmp_path: Path) -> None:
    small = tiny.tokenizer(None)
    small.add_tokens(["What"])
    small.save_pretrained(tmp_path / "words")
    vlm = connect(tokenizer=str(tmp_path / "words"))
    assert vlm.model.config.connector["vocabulary"] == len(small)
    vlm.save_pretrained(tmp_path / "saved")
    again = chiasm.load(tmp_path / "saved").processor
    inputs = again(messages=ask("What?"), images=[picture(9)])
    assert inputs["instruction_ids"].shape == (1, 2)
    with pytest.raises(ValueError, match="is not read without instruction: true"):
        connect(tokenizer=str(tmp_path / "words"), instruction=False)
