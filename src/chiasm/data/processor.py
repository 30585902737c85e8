"""Conversations and pictures → model inputs: the chat template, the placeholders' expansion, and labels by spans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from chiasm.data.chat import IMAGE_TOKEN, Message, apart, count_images, render

IGNORE = -100

OPTIONS: dict[str, Any] = {
    "add_special_tokens": False,
    "token_types": False,
    "text_is_message": False,
    "image_boundary": None,
    "image_space": False,
    "image_tiles": 1,
}
"""Options of a processor that are stored with it, and what they are where an older file does not name them."""


class ChiasmProcessor(ProcessorMixin):
    """Images + messages → inputs of a Chiasm model.

    Args:
        image_processor: pictures → `pixel_values`.
        tokenizer: the language model's own tokenizer; `<image>` is added to it where it is missing.
        num_image_tokens: T, placeholders per picture; the model's `num_image_tokens`.
        add_special_tokens: whether the tokenizer's own marks (a BOS) frame a conversation whose template writes none.
        token_types: whether inputs have `token_type_ids`, 0 up to the first answer and 1 from there on.
        text_is_message: whether `text` is a user's message, which the chat template completes, and which gets its
            picture's placeholder where it has none.
        image_boundary: a token before and after a picture's placeholders; pictures side by side share the one between.
        image_space: whether a space parts a picture from a word that touches it (Idefics2).
        image_tiles: pictures that the image processor makes of one, each with T placeholders.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        chat_template: str | None = None,
        add_special_tokens: bool = False,
        token_types: bool = False,
        text_is_message: bool = False,
        image_boundary: str | None = None,
        image_space: bool = False,
        image_tiles: int = 1,
        **parts: Any,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} cannot tell which characters a token covers, which labels need; "
                "load the fast tokenizer of this model"
            )
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.num_image_tokens = num_image_tokens
        self.add_special_tokens = add_special_tokens
        self.token_types = token_types
        self.text_is_message = text_is_message
        self.image_boundary = image_boundary
        self.image_space = image_space
        self.image_tiles = image_tiles
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **parts)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> "ChiasmProcessor":
        """A saved processor from its loaded parts and its own settings."""
        image_processor, tokenizer = args
        options = {name: processor_dict.get(name, default) for name, default in OPTIONS.items()}
        return cls(image_processor, tokenizer, num_image_tokens=processor_dict["num_image_tokens"], **options)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        messages: Any = None,
        padding_side: str = "left",
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for a batch.

        Args:
            images: the batch's pictures in the order of their placeholders; flat, or one list for each conversation.
            text: rendered prompts with one `<image>` for each picture, or
            messages: one conversation, or a batch of them.
            padding_side: `left` to generate from the prompts, `right` to train on them.
        """
        for neutral in ("return_tensors", "padding"):
            kwargs.pop(neutral, None)
        if kwargs:
            raise TypeError(f"unknown processor arguments: {', '.join(kwargs)}")
        if (text is None) == (messages is None):
            raise ValueError("pass exactly one of text and messages")
        flat, counts = _flatten_images(images)
        if text is not None and self.text_is_message:
            texts = [text] if isinstance(text, str) else list(text)
            messages, text = _as_messages(texts, counts if counts is not None else [bool(flat)] * len(texts)), None
        if messages is not None:
            batch = [messages] if isinstance(messages[0], dict) else list(messages)
            counts = counts if counts is not None else _deal(batch, len(flat))
            if len(counts) != len(batch):
                raise ValueError(
                    f"{len(batch)} conversation(s) but {len(counts)} list(s) of images; pass one list each"
                )
            encoded = [
                self.encode(conversation, num_images=count, add_generation_prompt=add_generation_prompt)
                for conversation, count in zip(batch, counts, strict=True)
            ]
        else:
            prompts = [text] if isinstance(text, str) else list(text or [])
            counts = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
            _check_count(sum(counts), len(flat))
            if self.image_space:
                prompts = [apart(prompt) for prompt in prompts]
            encoded = [self.encode_text(prompt) for prompt in prompts]
        inputs = self.pad(encoded, side=padding_side)
        inputs.pop("labels", None)
        if flat:
            inputs |= self.pixels(flat, counts)
        return BatchFeature(inputs)

    @property
    def any_size(self) -> bool:
        """Whether pictures keep their own sizes: they then come in rows, with a mask."""
        return "pixel_attention_mask" in self.image_processor.model_input_names

    def pixels(self, flat: list[Any], counts: list[int]) -> dict[str, torch.Tensor]:
        """`pixel_values` `(I, 3, height, width)`; in rows `(B, I, ...)` with a mask where pictures keep their sizes."""
        if not self.any_size:
            return {"pixel_values": self.image_processor(flat)["pixel_values"]}
        rest = (load_image(str(item)) if isinstance(item, str | Path) else item for item in flat)
        groups = [[next(rest) for _ in range(count)] for count in counts]
        made = self.image_processor([group for group in groups if group], return_tensors="pt")
        rows = torch.tensor([row for row, count in enumerate(counts) if count])
        values = {name: torch.as_tensor(made[name]) for name in ("pixel_values", "pixel_attention_mask")}
        return {
            name: value.new_zeros(len(counts), *value.shape[1:]).index_copy(0, rows, value)
            for name, value in values.items()
        }

    def encode(
        self,
        messages: list[Message],
        num_images: int | None = None,
        supervise: bool = False,
        add_generation_prompt: bool = False,
    ) -> dict[str, list[int]]:
        """Token ids of one conversation, and labels on the assistant's words and their end-of-turn mark.

        Args:
            messages: the conversation; its last message is the answer when `supervise` is set.
            num_images: pictures that come with it; None skips the comparison with the placeholders.

        Raises:
            ValueError: too many or too few pictures, or nothing to supervise.
        """
        if num_images is not None:
            _check_count(count_images(messages), num_images)
        if self.image_space:
            messages = [{**message, "content": apart(message["content"])} for message in messages]
        rendered = render(self.tokenizer, messages, add_generation_prompt)
        special = self.add_special_tokens and not self._has_bos(rendered.text)
        encoded = self._tokenize(rendered.text, rendered.answers, special, supervise)
        wanted, tokens = count_images(messages), self.num_image_tokens * self.image_tiles
        found = encoded["input_ids"].count(self.image_token_id) // tokens
        if wanted != found:
            raise ValueError(f"the chat template turned {wanted} image placeholders into {found}; pass chat_template=")
        if supervise and all(label == IGNORE for label in encoded["labels"]):
            raise ValueError("no token is supervised: the conversation has no answer by the assistant")
        return encoded

    def encode_text(self, text: str) -> dict[str, list[int]]:
        """Token ids of a rendered prompt, with the tokenizer's own special tokens unless the prompt has them."""
        return self._tokenize(text, [], special=not self._has_bos(text))

    def _has_bos(self, text: str) -> bool:
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def _tokenize(
        self, text: str, answers: list[tuple[int, int]], special: bool = False, supervise: bool = False
    ) -> dict[str, list[int]]:
        plain = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
        answered = self._supervised(plain["input_ids"], plain["offset_mapping"], answers)
        ids: list[int] = []
        labels: list[int] = []
        types: list[int] = []
        end = None
        for token, learn, (start, stop) in zip(plain["input_ids"], answered, plain["offset_mapping"], strict=True):
            picture = token == self.image_token_id
            written = self._placeholders(shares_boundary=start == end) if picture else [token]
            end = stop if picture else None
            ids += written
            labels += [token if learn and supervise and not picture else IGNORE] * len(written)
            types += [int(learn or 1 in types[-1:])] * len(written)
        return {"input_ids": ids, "labels": labels} | ({"token_type_ids": types} if self.token_types else {})

    def _placeholders(self, shares_boundary: bool) -> list[int]:
        """A picture's tokens; one that stands right behind another picture begins with that one's boundary."""
        tile = [self.image_token_id] * self.num_image_tokens
        if self.image_boundary is None:
            return tile * self.image_tiles
        boundary = self.tokenizer.convert_tokens_to_ids(self.image_boundary)
        return [boundary] * (not shares_boundary) + [*tile, boundary] * self.image_tiles

    def _supervised(self, ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> list[bool]:
        """Which tokens cover an answer, or are the special token that closes it."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        marks = [False] * len(ids)
        for begin, end in answers:
            last = None
            for index, (start, stop) in enumerate(offsets):
                if stop > begin and start < end:
                    marks[index], last = True, index
                elif start >= end:
                    break
            if last is not None:
                for index in range(last + 1, min(last + 3, len(ids))):
                    if ids[index] in special:
                        marks[last + 1 : index + 1] = [True] * (index - last)
                        break
        return marks

    def end_of_turn_id(self) -> int | None:
        """The special token that closes an answer by the chat template: what generation must stop at."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        labels = [label for label in self.encode(probe, supervise=True)["labels"] if label != IGNORE]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return labels[-1] if labels[-1] in special else None

    def pad(self, encoded: list[dict[str, list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` as tensors `(B, S)`, padded on one side."""
        length = max(len(item["input_ids"]) for item in encoded)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

        def stack(rows: list[list[int]], fill: int) -> torch.Tensor:
            gaps = [[fill] * (length - len(row)) for row in rows]
            return torch.tensor([g + r if side == "left" else r + g for g, r in zip(gaps, rows, strict=True)])

        ids = [item["input_ids"] for item in encoded]
        padded = {
            "input_ids": stack(ids, pad_id),
            "attention_mask": stack([[1] * len(row) for row in ids], 0),
            "labels": stack([item["labels"] for item in encoded], IGNORE),
        }
        if self.token_types:
            padded["token_type_ids"] = stack([item["token_type_ids"] for item in encoded], 0)
        return padded

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        """A conversation's prompt; with `tokenize` and `return_dict`, the model inputs with its pictures."""
        add_generation_prompt = kwargs.pop("add_generation_prompt", False)
        batch = [conversation] if isinstance(conversation[0], dict) else conversation
        if not tokenize:
            texts = [render(self.tokenizer, messages, add_generation_prompt).text for messages in batch]
            return texts[0] if isinstance(conversation[0], dict) else texts
        images = [[p["image"] for m in c for p in m["content"] if isinstance(p, dict) and "image" in p] for c in batch]
        return self(images=images, messages=batch, add_generation_prompt=add_generation_prompt)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        more = {"token_type_ids": self.token_types, "pixel_attention_mask": self.any_size}
        return ["input_ids", "attention_mask", "pixel_values", *(name for name, given in more.items() if given)]


def _check_count(placeholders: int, images: int) -> None:
    if placeholders != images:
        raise ValueError(
            f"{placeholders} image placeholder(s) in the messages but {images} image(s) given; "
            f"write one {IMAGE_TOKEN} (or one image part) for each image"
        )


def _flatten_images(images: Any) -> tuple[list[Any], list[int] | None]:
    """A flat list of pictures, and their number for each conversation where the nesting tells it."""
    if images is None:
        return [], None
    if not isinstance(images, list | tuple):
        return [images], None
    if images and all(isinstance(item, list | tuple) or item is None for item in images):
        groups = [list(item or []) for item in images]
        return [image for group in groups for image in group], [len(group) for group in groups]
    return list(images), None


def _as_messages(texts: list[str], counts: list[int]) -> list[list[Message]]:
    """One user's message for each text; where no text has placeholders, as many as it has pictures come first."""
    if len(counts) == len(texts) and not any(IMAGE_TOKEN in text for text in texts):
        texts = [IMAGE_TOKEN * count + text for count, text in zip(counts, texts, strict=True)]
    return [[{"role": "user", "content": text}] for text in texts]


def _deal(batch: list[list[Message]], total: int) -> list[int]:
    """Flat pictures dealt to conversations by their placeholders."""
    counts = [count_images(messages) for messages in batch]
    _check_count(sum(counts), total)
    return counts
