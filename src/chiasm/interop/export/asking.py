"""How a processor of transformers is given a conversation: by its chat template, or as its class wants it instead."""

import re
from typing import Any

from PIL import Image

Messages = list[dict[str, Any]]


def by_template(processor: Any, messages: Messages, picture: Image.Image) -> Any:
    """As most are."""
    asked = [{**message, "content": [_shown(part, picture) for part in message["content"]]} for message in messages]
    return processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def by_prompt(processor: Any, messages: Messages, picture: Image.Image) -> Any:
    """Those whose class takes no chat template."""
    return processor(images=[picture], text=_prompt(processor, messages), return_tensors="pt")


def by_pieces(processor: Any, messages: Messages, picture: Image.Image) -> Any:
    """Idefics', which takes texts and pictures in turn, and begins a text itself."""
    prompt = _prompt(processor, messages).removeprefix(processor.tokenizer.bos_token)
    pieces = [picture if piece == "<image>" else piece for piece in re.split("(<image>)", prompt)]
    return processor(text=[pieces], add_end_of_utterance_token=False, return_tensors="pt")


PROMPT_NOTE = (
    "this processor takes no chat template: write the prompt with processor.tokenizer.apply_chat_template("
    "messages, add_generation_prompt=True, tokenize=False), and call processor(images=..., text=prompt)"
)
ONE_PICTURE_NOTE = (
    "this processor puts one picture in front of all words: its template refuses a conversation with more pictures, or "
    "with a system turn or other words in front of one"
)
PIECES_NOTE = (
    "Idefics' processor takes no chat template, but texts and pictures in turn: processor(text=['User:', picture, "
    "'What?<end_of_utterance>\\nAssistant:'], add_end_of_utterance_token=False)"
)


def _shown(part: dict[str, Any], picture: Image.Image) -> dict[str, Any]:
    return {**part, "image": picture} if part["type"] == "image" else part


def _prompt(processor: Any, messages: Messages) -> str:
    text: str = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text
