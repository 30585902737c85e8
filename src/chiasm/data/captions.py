"""Pictures and captions → inputs of a retrieval model: its own tokens, one text for one picture."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from chiasm.data.collation import Batch, Item
from chiasm.data.options import NEUTRAL
from chiasm.data.padding import filler, mask_rows, pad_rows
from chiasm.data.schema import Problem, Sample, SampleError, text_of

FRAMES = ("both", "own")


class CaptionProcessor(ProcessorMixin):
    """Pictures + texts → `pixel_values`, `input_ids`, `attention_mask`.

    A text begins with the tokenizer's class token and ends with its separator, as BERT's does; tokenizers of language
    models lend their begin and end of text.

    Args:
        image_processor: pictures → `pixel_values`.
        tokenizer: of the text branch.
        text_length: tokens of the longest text; what is longer loses its end.
        frame: `both`, as said above, or `own`: what the tokenizer itself puts around a text.
        fixed_length: whether every text is filled up to `text_length` and the fill is read like words (SigLIP).
        lowercase: whether texts are read in lower case, whatever the tokenizer does (SigLIP).
    """

    num_image_tokens = 0
    """Pictures take no place in the text."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        text_length: int = 32,
        chat_template: str | None = None,
        frame: str = "both",
        fixed_length: bool = False,
        lowercase: bool = False,
    ) -> None:
        if frame not in FRAMES:
            raise ValueError(f"frame {frame!r} is unknown; choose one of {', '.join(FRAMES)}")
        ends = [tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
        starts = [tokenizer.cls_token_id, tokenizer.bos_token_id, *ends]
        self.start_token_id = next((token for token in starts if token is not None), None)
        self.end_token_id = next((token for token in ends if token is not None), None)
        if frame == "both" and (self.start_token_id is None or self.end_token_id is None):
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} has no token that begins or ends a text; add eos_token"
            )
        self.text_length, self.frame, self.fixed_length = text_length, frame, fixed_length
        self.lowercase = lowercase
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> "CaptionProcessor":
        """A saved processor from its loaded parts and its own settings."""
        told = processor_dict | kwargs
        parts = {name: kwargs.get(name, part) for name, part in zip(cls.get_attributes(), args, strict=True)}
        options = {name: told[name] for name in ("frame", "fixed_length", "lowercase") if name in told}
        return cls(**parts, text_length=told["text_length"], **options)

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Model inputs: pictures, texts, or both."""
        if unknown := [name for name in kwargs if name not in NEUTRAL]:
            raise TypeError(f"unknown processor arguments: {', '.join(unknown)}")
        inputs: dict[str, Any] = {}
        if text is not None:
            inputs |= self.pad([self.encode(one) for one in ([text] if isinstance(text, str) else text)])
        if images is not None:
            pictures = list(images) if isinstance(images, list | tuple) else [images]
            inputs["pixel_values"] = self.image_processor(pictures)["pixel_values"]
        return BatchFeature(inputs)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text with its first and last token.

        Raises:
            ValueError: it has no token at all, where the tokenizer puts nothing around it.
        """
        text = text.lower() if self.lowercase else text
        if self.frame == "own":
            tokens = self.tokenizer(text, truncation=True, max_length=self.text_length, verbose=False)["input_ids"]
            if not tokens:
                raise ValueError(f"text {text!r} has no tokens; write at least one word")
            return tokens
        words = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.start_token_id, *words[: self.text_length - 2], self.end_token_id]

    def pad(self, encoded: Sequence[list[int]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, padded on the right; of texts of fixed length no mask."""
        length = self.text_length if self.fixed_length else None
        padded = {"input_ids": pad_rows(encoded, filler(self.tokenizer), length=length)}
        return padded if self.fixed_length else padded | {"attention_mask": mask_rows(encoded)}

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", *([] if self.fixed_length else ["attention_mask"]), "pixel_values"]


def caption_of(sample: Sample) -> str:
    """The assistant's words."""
    said = (text_of(message["content"]).strip() for message in sample.messages if message["role"] == "assistant")
    return " ".join(words for words in said if words)


def encode_caption(sample: Sample, processor: CaptionProcessor) -> dict[str, list[int]]:
    """Token ids of a sample's caption.

    Raises:
        SampleError: it has no caption, or not exactly one picture.
    """
    caption = caption_of(sample)
    if len(sample.images) != 1:
        raise SampleError(sample.id, [Problem("placeholders", f"{pictures(len(sample.images))}, a caption needs one")])
    if not caption:
        raise SampleError(sample.id, [Problem("no answer", "the assistant says nothing, so it has no caption")])
    return {"input_ids": processor.encode(caption)}


def collate_captions(items: Sequence[Item], processor: CaptionProcessor) -> Batch:
    """Captions padded on the right, their pictures, and a number for each picture: equal where the pictures are."""
    inputs = processor.pad([item.tokens["input_ids"] for item in items])
    shown = [item.pictures for item in items if item.pictures is not None]
    inputs["image_features" if items[0].encoded else "pixel_values"] = torch.cat(shown)
    inputs["picture_ids"] = torch.tensor([picture_id(picture) for picture in shown])
    tokens = sum(len(item.tokens["input_ids"]) for item in items)
    return Batch(inputs, [item.id for item in items], supervised=tokens - len(items), tokens=tokens)


def text_ids(items: Sequence[Item]) -> Tensor:
    """A number for each text: equal where its tokens are."""
    return torch.tensor([text_id(item.tokens["input_ids"]) for item in items])


def text_id(tokens: Sequence[int]) -> int:
    """63 bits of a digest of a text's tokens."""
    return _digest(repr(list(tokens)).encode())


def picture_id(picture: Tensor) -> int:
    """63 bits of a digest of a picture's pixels or features."""
    return _digest(picture.contiguous().view(torch.uint8).numpy().tobytes())


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


def pictures(count: int) -> str:
    return "no picture" if count == 0 else f"{count} picture{'' if count == 1 else 's'}"
