"""The instruction beside every picture, for connectors that read it (InstructBLIP, arXiv 2305.06500)."""

import copy
from typing import Any

import torch

from chiasm.data.chat import IMAGE_TOKEN, Message, flatten
from chiasm.data.padding import filler, mask_rows, pad_rows
from chiasm.data.processor import ChiasmProcessor


class InstructionProcessor(ChiasmProcessor):
    """A processor that adds `instruction_ids` and `instruction_mask`, one row for each picture.

    The instruction of a conversation's pictures is the text of its last user message.

    Args:
        instruction_tokenizer: the connector's own tokenizer; a copy of the language model's where it is None.
        instruction_length: tokens of the longest instruction; what is longer loses its end.
    """

    own_options = ("num_image_tokens", "instruction_length")

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        instruction_tokenizer: Any = None,
        num_image_tokens: int = 1,
        instruction_length: int = 128,
        chat_template: str | dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.instruction_length = instruction_length
        options["instruction_tokenizer"] = instruction_tokenizer or copy.deepcopy(tokenizer)
        super().__init__(image_processor, tokenizer, num_image_tokens, chat_template, **options)

    def encode(self, messages: list[Message], *args: Any, **kwargs: Any) -> dict[str, list[int]]:
        """Also the tokens of the instruction, as `instruction`."""
        users = [message["content"] for message in flatten(messages) if message["role"] == "user"]
        return {
            **super().encode(messages, *args, **kwargs),
            "instruction": self._instruction(users[-1] if users else ""),
        }

    def encode_text(self, text: str, *args: Any) -> dict[str, list[int]]:
        """The whole prompt is the instruction."""
        return {**super().encode_text(text, *args), "instruction": self._instruction(text)}

    def pad(self, encoded: list[dict[str, list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
        """Instructions are padded on the right, and repeated for every picture of their row."""
        padded = super().pad(encoded, side)
        pictures = [item["input_ids"].count(self.image_token_id) // self.num_image_tokens for item in encoded]
        rows = [item["instruction"] for item, count in zip(encoded, pictures, strict=True) for _ in range(count)]
        if rows:
            length = max(1, *map(len, rows))
            padded["instruction_ids"] = pad_rows(rows, filler(self.instruction_tokenizer), length=length)
            padded["instruction_mask"] = mask_rows(rows, length=length)
        return padded

    def _instruction(self, text: str) -> list[int]:
        words = text.replace(IMAGE_TOKEN, "").strip()
        ids: list[int] = self.instruction_tokenizer(words, truncation=True, max_length=self.instruction_length)[
            "input_ids"
        ]
        return ids

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "instruction_ids", "instruction_mask"]
