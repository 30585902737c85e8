"""Samples become padded batches: every token counted, no picture cut, and an error names its sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from chiasm.data.labels import IGNORE, last_answers, num_predicted
from chiasm.data.pixels import keeps_sizes
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.rows import sample_of
from chiasm.data.schema import ImageError, ImageRef, Problem, Sample, SampleError


@dataclass(frozen=True)
class Item:
    """One sample as a batch needs it. `pictures`: patch features (I, N, D_v) if `encoded`, else pixels (I, 3, H, W)."""

    id: str
    tokens: dict[str, list[int]]
    pictures: Tensor | None = None
    encoded: bool = False


@dataclass(frozen=True)
class Batch:
    """Model inputs, and what is in them: samples by id, supervised and real tokens, and how many tokens those samples
    had that were too long and lost their end."""

    inputs: dict[str, Tensor]
    ids: list[str]
    supervised: int
    tokens: int
    cut: dict[str, int] = field(default_factory=dict)


def encode_sample(
    sample: Sample, processor: ChiasmProcessor, max_length: int | None = None, learned: int | None = None
) -> dict[str, list[int]]:
    """Token ids and labels of a sample; the end of a text that is too long is cut off, but never within a picture.
    `whole` is the number of tokens that it had, where some of those behind were supervised.

    Args:
        learned: so many of the assistant's messages, the last ones, are supervised; by default all.

    Raises:
        SampleError: the sample is not usable, or nothing supervised or not every picture is left within `max_length`.
    """
    try:
        tiles = processor.tiles_of(sample.images)
        tokens = processor.encode(sample.messages, num_images=len(sample.images), supervise=True, tiles=tiles)
    except SampleError:
        raise
    except ImageError as error:
        raise SampleError.of_picture(sample.id, error) from error
    except ValueError as error:
        raise SampleError(sample.id, [Problem("placeholders", str(error))]) from error
    if learned is not None:
        tokens["labels"] = last_answers(tokens["labels"], learned)
    ids, labels = tokens["input_ids"], tokens["labels"]
    if max_length is not None and len(ids) > max_length:
        lost = ids[max_length:].count(processor.image_token_id)
        if lost or processor.encoder_decoder:
            whose = f"{lost} of those beyond are a picture's" if lost else "all of them are the prompt's"
            reason = f"{len(ids)} tokens, at most {max_length} are allowed, and {whose}"
            raise SampleError(sample.id, [Problem("too long", reason)])
        tokens = {name: values[:max_length] for name, values in tokens.items()}
    if processor.encoder_decoder:
        tokens["labels"] = labels[:max_length]
    if num_predicted(tokens["labels"], processor.encoder_decoder) == 0:
        cut = len(tokens["labels"]) < len(labels)
        reason = f"none of its {len(ids)} tokens is supervised" + (f" after it was cut to {max_length}" if cut else "")
        raise SampleError(sample.id, [Problem("too long" if cut else "no answer", reason)])
    if any(label != IGNORE for label in labels[len(tokens["labels"]) :]):
        tokens["whole"] = [max(len(ids), len(labels))]
    return tokens


def require_one_size(processor: ProcessorMixin, size: tuple[int, int]) -> None:
    """Refuses a processor that does not make one picture of the encoder's size out of every picture."""
    images = processor.image_processor
    if keeps_sizes(images):
        raise ValueError(
            "training needs pictures of one size, but this model's image processor keeps their own; set "
            f"vlm.processor.image_processor = ChiasmImageProcessor({size}, {list(images.image_mean)}, "
            f"{list(images.image_std)}, resize_mode='pad') of chiasm.vision.image_processor, "
            "vlm.processor.image_tiles = 1, and save the model again"
        )
    if getattr(processor, "image_tiles", 1) != 1:
        raise ValueError(
            "training reads a picture as one, but this model's processor cuts it into tiles; "
            "set vlm.processor.image_tiles = 1 and save the model again"
        )


def load_pixels(sample: Sample, processor: ProcessorMixin) -> Tensor | None:
    """The pictures of a sample, decoded and resized: (I, 3, H, W), or (I, tiles, 3, H, W).

    Raises:
        SampleError: a picture is missing, broken or too large.
    """
    if not sample.images:
        return None
    try:
        pictures = [ref.load() for ref in sample.images]
    except ImageError as error:
        raise SampleError.of_picture(sample.id, error) from error
    return torch.as_tensor(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])


def whole_pictures(pixels: Tensor) -> Tensor:
    """Pictures as a whole, (I, 3, H, W): of those in tiles the first."""
    return pixels[:, 0] if pixels.ndim == 5 else pixels


def collate(items: Sequence[Item], processor: ChiasmProcessor) -> Batch:
    """Items padded on the right, their pictures in the order of the placeholders."""
    return Batch(
        inputs=processor.pad([item.tokens for item in items], side="right") | stack_pictures(items),
        ids=[item.id for item in items],
        supervised=sum(num_predicted(item.tokens["labels"], processor.encoder_decoder) for item in items),
        tokens=sum(len(item.tokens["input_ids"]) for item in items),
        cut=cut_of(items),
    )


def cut_of(items: Sequence[Item]) -> dict[str, int]:
    """Items that lost their end, with the number of tokens that they had."""
    return {item.id: item.tokens["whole"][0] for item in items if "whole" in item.tokens}


def stack_pictures(items: Sequence[Item]) -> dict[str, Tensor]:
    """The input that holds the items' pictures, if they have any; those of fewer tiles are filled up with zeros."""
    pictures = [item.pictures for item in items if item.pictures is not None]
    name = "image_features" if any(item.encoded for item in items) else "pixel_values"
    if len({picture.shape[1] for picture in pictures if picture.ndim == 5}) > 1:
        pictures = [pad_sequence([tiles for one in pictures for tiles in one], batch_first=True)]
    return {name: torch.cat(pictures)} if pictures else {}


class Collator:
    """Rows as the inputs of one training step: for `transformers.Trainer` and TRL's `SFTTrainer`, as their
    `data_collator`.

    A row is a sample, or has `messages` (or TRL's `prompt` and `completion`, of which the completion is learned) and
    `images` (or one `image`). Pictures that no message places stand in front of the user's first words, as with TRL.

    Args:
        max_length: tokens of a sample; by default all.
        logits: ask the model for logits beside the loss, which TRL looks at.
    """

    def __init__(self, processor: ChiasmProcessor, max_length: int | None = None, logits: bool = False) -> None:
        self.processor, self.max_length, self.logits = processor, max_length, logits

    def __call__(self, rows: Sequence[Sample | dict[str, Any]]) -> dict[str, Any]:
        """Padded inputs with labels on the assistant's words.

        Raises:
            SampleError: a sample is not usable.
        """
        items = []
        for number, row in enumerate(rows):
            sample, learned = (row, None) if isinstance(row, Sample) else _sample_of_row(row, f"row {number}")
            tokens = encode_sample(sample.validate(), self.processor, self.max_length, learned)
            items.append(Item(sample.id, tokens, load_pixels(sample, self.processor)))
        return collate(items, self.processor).inputs | ({"return_logits": True} if self.logits else {})


def _sample_of_row(row: Mapping[str, Any], name: str) -> tuple[Sample, int | None]:
    """The sample, and how many of its answers are learned, where not all are."""
    one = row.get("image")
    pictures = row.get("images") or ([] if one is None else [one])
    messages, learned = (row["messages"], None) if row.get("messages") else _turns(row, name)
    told = {"id": row.get("id"), "messages": messages, "images": pictures}
    sample = sample_of(told, name, lambda picture: ImageRef.of(picture, f"in {name}"))
    contents = [message["content"] for message in sample.messages]
    placed = any(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)
    return sample if placed or not sample.images else _pictures_first(sample), learned


def _turns(row: Mapping[str, Any], name: str) -> tuple[list[dict[str, Any]], int]:
    turns = [row.get("prompt"), row.get("completion")]
    if not all(isinstance(turn, list) and turn and all(isinstance(one, dict) for one in turn) for turn in turns):
        reason = f"a row with {', '.join(row) or 'no keys'}; expected messages, or prompt and completion as messages"
        raise SampleError(name, [Problem("unreadable row", reason)])
    return [*row["prompt"], *row["completion"]], sum(said.get("role") == "assistant" for said in row["completion"])


def _pictures_first(sample: Sample) -> Sample:
    messages = list(sample.messages)
    place = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if place is not None:
        content = messages[place]["content"]
        words = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages[place] = {**messages[place], "content": [*[{"type": "image"}] * len(sample.images), *words]}
    return replace(sample, messages=messages)
