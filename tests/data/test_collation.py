"""Batches: every token counted, no picture cut, and an error names its sample with both counts."""

import pytest
import torch
from PIL import Image

import tiny
from chiasm.data.collation import Collator, Item, collate, encode_sample, load_pixels
from chiasm.data.labels import IGNORE, num_predicted
from chiasm.data.packing import collate_packed
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import ImageRef, Sample, SampleError
from chiasm.vision.image_processor import ChiasmImageProcessor

T = 4


@pytest.fixture
def processor() -> ChiasmProcessor:
    pictures = ChiasmImageProcessor(30, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    return ChiasmProcessor(pictures, tiny.tokenizer(), num_image_tokens=T)


def sample(images: int = 1, question: str = "what?", answer: str = "red", given: int | None = None) -> Sample:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    picture = ImageRef.of(Image.new("RGB", (30, 30), "red"))
    return Sample("s7", messages, [picture] * (images if given is None else given))


def item(processor: ChiasmProcessor, sample: Sample) -> Item:
    return Item(sample.id, encode_sample(sample, processor), load_pixels(sample, processor))


def test_a_batch_counts_what_is_in_it(processor: ChiasmProcessor) -> None:
    items = [item(processor, sample(images)) for images in (2, 0, 1)]
    batch = collate(items, processor)
    assert batch.inputs["pixel_values"].shape == (3, 3, 30, 30)
    assert int((batch.inputs["input_ids"] == processor.image_token_id).sum()) == 3 * T
    assert batch.tokens == int(batch.inputs["attention_mask"].sum()) == sum(len(i.tokens["input_ids"]) for i in items)
    answer = len(["r", "e", "d", "<|im_end|>"])
    assert batch.supervised == int((batch.inputs["labels"][:, 1:] != IGNORE).sum()) == 3 * answer
    longest = max(len(i.tokens["input_ids"]) for i in items)
    assert batch.inputs["input_ids"].shape == (3, longest) and batch.inputs["attention_mask"][1, -1] == 0


def test_text_alone_brings_no_pictures_and_features_keep_their_name(processor: ChiasmProcessor) -> None:
    tokens = encode_sample(sample(0), processor)
    assert set(collate([Item("a", tokens)], processor).inputs) == {"input_ids", "attention_mask", "labels"}
    features = torch.zeros(1, 9, 24)
    assert torch.equal(collate([Item("a", tokens, features, True)], processor).inputs["image_features"], features)


def test_a_long_text_is_cut_at_its_end(processor: ChiasmProcessor) -> None:
    whole = encode_sample(sample(answer="a" * 50), processor)
    cut = encode_sample(sample(answer="a" * 50), processor, max_length=len(whole["input_ids"]) - 10)
    assert cut["input_ids"] == whole["input_ids"][:-10] and cut["labels"] == whole["labels"][:-10]
    assert num_predicted(cut["labels"], False) > 0
    assert cut["whole"] == [len(whole["input_ids"])] and "whole" not in whole
    last = next(place for place, label in reversed([*enumerate(whole["labels"])]) if label != IGNORE)
    assert "whole" not in encode_sample(sample(answer="a" * 50), processor, last + 1), "nothing that is learned is lost"
    items = [Item("s7", cut), Item("s8", whole)]
    assert collate(items, processor).cut == collate_packed(items, processor).cut == {"s7": len(whole["input_ids"])}


def test_a_picture_is_never_cut_and_supervision_never_lost(processor: ChiasmProcessor) -> None:
    ids = encode_sample(sample(2), processor)["input_ids"]
    last_of_picture = max(place for place, token in enumerate(ids) if token == processor.image_token_id)
    with pytest.raises(
        SampleError, match=rf"sample 's7': {len(ids)} tokens, at most {last_of_picture} are allowed, and 1 of"
    ):
        encode_sample(sample(2), processor, max_length=last_of_picture)
    with pytest.raises(SampleError, match=rf"'s7': none of its {len(ids)} tokens is supervised after it was cut to"):
        encode_sample(sample(2), processor, max_length=last_of_picture + 1)


def test_too_many_or_too_few_pictures_name_the_sample_and_both_counts(processor: ChiasmProcessor) -> None:
    for given in (0, 3):
        with pytest.raises(SampleError, match=rf"sample 's7': 2 image placeholder\(s\) .* but {given} image"):
            encode_sample(sample(2, given=given), processor)


def test_a_picture_that_cannot_be_read_names_the_sample(processor: ChiasmProcessor) -> None:
    broken = Sample("s9", sample().messages, [ImageRef.of("/nowhere/cat.jpg")])
    with pytest.raises(SampleError, match=r"sample 's9': picture /nowhere/cat\.jpg: no such file"):
        load_pixels(broken, processor)


def test_rows_in_the_forms_of_other_trainers(processor: ChiasmProcessor) -> None:
    """TRL's rows have plain texts, which no picture stands in; of `prompt` and `completion` the latter is learned."""
    picture, collator = Image.new("RGB", (30, 30), "red"), Collator(processor)
    expected = collator([sample()])
    asked, said = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}
    placed = {"role": "user", "content": "<image>\nwhat?"}
    inline = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}
    rows = [
        {"messages": [asked, said], "images": [picture]},
        {"messages": [placed, said], "image": picture},
        {"messages": [inline, said]},
        {"prompt": [asked], "completion": [said], "images": [picture]},
    ]
    for row in rows:
        found = collator([row])
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    before = [asked, {"role": "assistant", "content": "blue"}, {"role": "user", "content": "sure?"}]
    (labels,) = collator([{"prompt": before, "completion": [said], "images": [picture]}])["labels"]
    words = processor.tokenizer.decode(labels[labels != IGNORE])
    assert words == "red<|im_end|>"
    both = {"messages": None, "prompt": before[:2], "completion": [before[2], said], "images": [picture]}
    assert torch.equal(collator([both])["labels"], labels[None]), "an empty column of messages is none"
    row = {"prompt": before[:1], "completion": [before[1], before[2], said], "images": [picture]}
    (labels,) = collator([row])["labels"]
    assert processor.tokenizer.decode(labels[labels != IGNORE]) == "blue<|im_end|>red<|im_end|>"
    for wrong in ({"text": "red", "images": [picture]}, {"prompt": "what?", "completion": "red"}):
        with pytest.raises(SampleError, match="expected messages, or prompt and completion as messages"):
            collator([wrong])
    with pytest.raises(SampleError, match="1 image placeholder in the messages, but 2 images"):
        collator([{"messages": [placed, said], "images": [picture, picture]}])


def test_a_prompt_is_not_learned_where_its_completion_is_cut_off(processor: ChiasmProcessor) -> None:
    said = [{"role": "assistant", "content": "blue"}, {"role": "user", "content": "sure?"}]
    row = {
        "prompt": [{"role": "user", "content": "what?"}, *said],
        "completion": [{"role": "assistant", "content": "red"}],
    }
    length = Collator(processor)([row])["input_ids"].shape[1]
    with pytest.raises(SampleError, match=f"none of its {length} tokens is supervised after it was cut"):
        Collator(processor, max_length=length - 12)([row])
