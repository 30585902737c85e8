"""Conversations become one text through the language model's own chat template, with every message's place known.

Labels must come from one tokenisation of one text. So the template is rendered once with marks instead of contents,
which tells where the contents stand; the text is then put together, and compared with what the template itself renders.
"""

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)
"""For language models without a chat template of their own (GPT-2 and other base models)."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A conversation's text and the character spans that the assistant wrote, without its end-of-turn mark."""

    text: str
    answers: list[tuple[int, int]]


def flatten(messages: list[Message]) -> list[Message]:
    """Messages with text-only contents: an image part becomes `<image>` and a line break before the text after it."""
    return [{**message, "content": _flatten_content(message["content"])} for message in messages]


def _flatten_content(content: Any) -> str:
    if isinstance(content, str):
        return content
    pieces = []
    for part in content:
        kind = part.get("type")
        if kind == "image":
            pieces.append(f"{IMAGE_TOKEN}\n")
        elif kind == "text":
            pieces.append(part["text"])
        else:
            raise ValueError(f"message part of type {kind!r} is unknown; use 'image' or 'text'")
    return "".join(pieces).removesuffix("\n") if pieces and pieces[-1] == f"{IMAGE_TOKEN}\n" else "".join(pieces)


def count_images(messages: list[Message]) -> int:
    """Image placeholders in a conversation."""
    return sum(message["content"].count(IMAGE_TOKEN) for message in flatten(messages))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool = False
) -> Rendered:
    """The conversation's text by the tokenizer's chat template, and where the answers stand in it.

    Raises:
        ValueError: the template refuses the conversation, or rewrites a message so that its place is not known.
    """
    messages = flatten(messages)
    text = _apply(tokenizer, messages, add_generation_prompt)
    if not any(message["role"] == "assistant" for message in messages):
        return Rendered(text, [])
    marked = [{**message, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)]
    skeleton = re.split("\ue000(\\d+)\ue001", _apply(tokenizer, marked, add_generation_prompt))
    for clean in (str, str.strip):
        composed, answers = _compose(skeleton, messages, clean)
        if composed == text:
            return Rendered(text, answers)
    raise ValueError(
        "the chat template rewrites the messages (as templates that drop earlier reasoning do), so the supervised "
        "tokens cannot be told; put the reasoning outside of the answers or give the tokenizer another chat_template"
    )


def _compose(skeleton: list[str], messages: list[Message], clean: Any) -> tuple[str, list[tuple[int, int]]]:
    text, answers = skeleton[0], []
    for index, literal in zip(map(int, skeleton[1::2]), skeleton[2::2], strict=True):
        start = len(text)
        text += clean(messages[index]["content"])
        if messages[index]["role"] == "assistant":
            answers.append((start, len(text)))
        text += literal
    return text, answers


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    """The template's text of flattened messages; a template that only reads lists of parts gets one part each."""
    text = _render(tokenizer, messages, add_generation_prompt)
    if all(message["content"].strip() in text for message in messages if message["role"] == "user"):
        return text
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    return _render(tokenizer, parts, add_generation_prompt)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
    blanks = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt, **blanks
        )
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
