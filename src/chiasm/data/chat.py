"""Conversations become one text through the language model's own chat template, with every message's place known.

Labels must come from one tokenisation of one text. So the template is rendered once with marks instead of contents,
which tells where the contents stand; the text is then put together, and compared with what the template itself renders.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)
"""For language models without a chat template of their own (GPT-2 and other base models)."""

LEAN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
)
"""A question, a line break, an answer, the end of text. The language model's own marks are about half of every short
turn."""

ENCODER_DECODER_TEMPLATE = (
    "{% for message in messages %}{{ ('' if loop.first else '\n') + message['content'] }}{% endfor %}{{ eos_token }}"
)
"""For encoder–decoders without a chat template: a prompt ends as the texts do that their encoders were trained on."""

TEMPLATES = {"plain": PLAIN_TEMPLATE, "lean": LEAN_TEMPLATE}
"""Chat templates that have a name."""

CLEANED = (str, str.strip, str.lstrip, str.rstrip)
"""How templates take a message's words. Mistral's take the user's as they are, and trim the assistant's."""

Message = dict[str, Any]
Told = Mapping[str, Any]
"""`chat_template`, in place of the tokenizer's own, and what a template is told beside the messages."""
NOTHING: Told = MappingProxyType({})


@dataclass(frozen=True)
class Rendered:
    """A conversation's text and the character spans that the assistant wrote, without its end-of-turn mark."""

    text: str
    answers: list[tuple[int, int]]


def user_message(prompt: str, num_images: int) -> list[Message]:
    """One user turn: the pictures first, then the words."""
    parts: list[dict[str, str]] = [{"type": "image"}] * num_images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


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


def parts(messages: list[Message]) -> list[Message]:
    """Messages whose contents are lists of parts; an `<image>` inside a text becomes a part of its own."""
    return [{**message, "content": _split_content(message["content"])} for message in messages]


def _split_content(content: Any) -> list[dict[str, str]]:
    split: list[dict[str, str]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part.get("type") != "text":
            split.append({"type": part["type"]})
            continue
        first, *others = part["text"].split(IMAGE_TOKEN)
        split += [{"type": "text", "text": first}] if first else []
        for text in others:
            split.append({"type": "image"})
            text = text.removeprefix("\n")
            split += [{"type": "text", "text": text}] if text else []
    return split


def apart(content: Any) -> Any:
    """A text or a message's content in which a space parts a picture from the word that it touches."""
    if isinstance(content, str):
        return re.sub(f"{IMAGE_TOKEN}(?=[^\\s<])", f"{IMAGE_TOKEN} ", content)
    spaced, before = [], None
    for part in content:
        if part.get("type") == "text":
            touches = before == "image" and re.match(r"[^\s<]", part["text"])
            part = {**part, "text": " " * bool(touches) + apart(part["text"])}
        before = part.get("type")
        spaced.append(part)
    return spaced


def template_of(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> str:
    """A chat template, or one of the tokenizer's by its name; by default the tokenizer's own, or a plain one."""
    if wanted is None and not tokenizer.chat_template:
        return PLAIN_TEMPLATE
    template: str = tokenizer.get_chat_template(wanted)
    return template


def names_in(template: str) -> set[str]:
    """All names in a chat template, among them those of what it can be told."""
    return {word for _, kind, word in Environment().lex(template) if kind == "name"}


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool = False,
    told: Told = NOTHING,
    find: bool = True,
) -> Rendered:
    """The conversation's text by a chat template, and where the answers stand in it.

    Args:
        find: whether the answers' places are wanted; a template may rewrite what nobody learns.

    Raises:
        ValueError: the template refuses the conversation, or rewrites a message so that its place is not known.
    """
    told = {**told, "add_generation_prompt": add_generation_prompt}
    arranged, text = _arrange(tokenizer, messages, told)
    if not find or not any(message["role"] == "assistant" for message in arranged):
        return Rendered(text, [])
    texts = [(message["role"], text) for message in arranged for text in _texts(message)]
    skeleton = re.split("\ue000(\\d+)\ue001", _render(tokenizer, _marked(arranged), told))
    for cleaned in ((str,), (str.strip,), CLEANED):
        answers = _compose(text, skeleton, texts, cleaned)
        if answers is not None:
            return Rendered(text, answers)
    raise ValueError(
        "the chat template rewrites the messages (as templates that drop earlier reasoning do), so the supervised "
        "tokens cannot be told; put the reasoning outside of the answers or give the tokenizer another chat_template"
    )


def _texts(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _marked(arranged: list[Message]) -> list[Message]:
    """The same messages with a numbered mark in place of every text."""
    numbers = count()

    def mark(content: Any) -> Any:
        if isinstance(content, str):
            return f"\ue000{next(numbers)}\ue001"
        return [{**part, "text": mark(part["text"])} if part["type"] == "text" else part for part in content]

    return [{**message, "content": mark(message["content"])} for message in arranged]


def _compose(
    text: str, skeleton: list[str], texts: list[tuple[str, str]], cleaned: Sequence[Callable[[str], str]]
) -> list[tuple[int, int]] | None:
    """The answers' places in a text that is put together of a skeleton and messages, each of which the template took
    in one of these ways; None where it is not."""
    if not text.startswith(skeleton[0]):
        return None
    place, answers = len(skeleton[0]), []
    for index, literal in zip(map(int, skeleton[1::2]), skeleton[2::2], strict=True):
        role, words = texts[index]
        said = next((said for clean in cleaned if text.startswith((said := clean(words)) + literal, place)), None)
        if said is None:
            return None
        if role == "assistant":
            answers.append((place, place + len(said)))
        place += len(said) + len(literal)
    return answers if place == len(text) else None


def _arrange(tokenizer: PreTrainedTokenizerBase, messages: list[Message], told: Told) -> tuple[list[Message], str]:
    """The conversation in the form that the template reads, and the template's text of it.

    A template that places pictures itself gets them as parts. Others get text alone, with `<image>` in it: as a string,
    or as one part where they read lists only.
    """
    flat = flatten(messages)
    if IMAGE_TOKEN in template_of(tokenizer, told.get("chat_template")):
        whole = parts(messages)
        try:
            text = _render(tokenizer, whole, told)
        except ValueError:
            text = ""
        raw = any(mark in text for mark in ("{'type': ", '{"type": '))
        if text.count(IMAGE_TOKEN) == count_images(messages) and not raw and _holds(text, whole):
            return whole, text
    refused = None
    try:
        text = _render(tokenizer, flat, told)
        if _holds(text, flat):
            return flat, text
    except ValueError as error:
        refused = error
    single = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in flat]
    try:
        return single, _render(tokenizer, single, told)
    except ValueError as error:
        raise refused or error from None


def _holds(text: str, arranged: list[Message]) -> bool:
    """Whether the users' words are in a rendered text."""
    return all(words.strip() in text for message in arranged if message["role"] == "user" for words in _texts(message))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], told: Told) -> str:
    template = template_of(tokenizer, told.get("chat_template"))
    blanks = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **blanks | {**told, "chat_template": template})
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
