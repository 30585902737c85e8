"""One row of a data set, in any of the layouts that people have, to one `Sample`.

| layout | keys |
| --- | --- |
| LLaVA | `conversations`: [{"from": "human" or "gpt", "value": text with `<image>`}], `image` or `images` |
| chat | `messages`: [{"role", "content"}], `images` |
| pairs | `texts`: [{"user", "assistant"}], `images` (before the first question) |
| question | `question`, `answer` (or `answers`: a list, the most frequent is the answer), `image` or `images` |
| caption | `caption` or `text` (of a list, the first; `meta` keeps the list), `image` or `images` |

Every layout may have `id` and `skill`; all other keys go to `Sample.meta`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from chiasm.data.schema import ImageRef, Problem, Sample, SampleError

PLACEHOLDER = "<image>"
INSTRUCTIONS = (
    "Describe the picture.",
    "What does the picture show?",
    "Write a caption for this picture.",
    "Say what you see.",
)
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_KEYS = ("image", "images", "file_name")

FindImage = Callable[[Any], ImageRef]


def sample_of(row: Mapping[str, Any], default_id: str, find_image: FindImage) -> Sample:
    """The sample that `row` describes, not yet validated.

    `find_image` turns a value of `image` / `images` into an `ImageRef`. SampleError for a row in no known layout.
    """
    whole, row = row, {key: value for key, value in row.items() if value is not None}
    sample_id = default_id
    try:
        sample_id = id_of(row, default_id)
        skill = _label(row, "skill")
        _check_answers(row)
    except ValueError as error:
        raise SampleError(sample_id, [Problem("unreadable row", str(error))]) from error
    layout = next((layout for layout in LAYOUTS if layout in row), None)
    if layout is None:
        found = f"a row with {', '.join(map(str, row)) or 'no keys'}; expected one of {', '.join(LAYOUTS)}"
        raise SampleError(sample_id, [Problem("unreadable row", found)])
    try:
        messages, inline, used = LAYOUTS[layout](row, sample_id)
        images = [find_image(value) for value in (*_images(row), *inline)]
    except SampleError:
        raise
    except ValueError as error:
        raise SampleError(sample_id, [Problem("unreadable row", str(error))]) from error
    meta = {key: value for key, value in whole.items() if key not in {"id", "skill", *IMAGE_KEYS, *used}}
    return Sample(sample_id, messages, images, skill, meta)


def id_of(row: Mapping[str, Any], default_id: str) -> str:
    """The row's own id, or the default where it has none. ValueError for an id that is no text or number."""
    return _label(row, "id") or default_id


def half_character(text: str) -> str | None:
    """What is wrong with a text that UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"it holds half a character ({error.reason})"
    return None


def split_placeholders(text: str) -> str | list[dict]:
    """Text with `<image>` in it to parts; a line break after a placeholder belongs to it. Other text stays text."""
    if PLACEHOLDER not in text:
        return text
    parts: list[dict] = []
    for number, piece in enumerate(text.strip().split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
            piece = piece.lstrip("\r\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _images(row: Mapping[str, Any]) -> Iterator[Any]:
    for key in IMAGE_KEYS:
        value = row.get(key)
        yield from value if isinstance(value, list | tuple) else [] if value in (None, "") else [value]


Converted = tuple[list[dict], list[Any], tuple[str, ...]]  # messages, pictures inside them, the keys that were used


def _llava(row: Mapping[str, Any], sample_id: str) -> Converted:
    messages = []
    for turn in _dicts(row["conversations"], "conversations"):
        speaker = turn.get("from")
        role = LLAVA_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            reason = f"a turn is from {speaker!r}, expected one of {', '.join(LLAVA_ROLES)}"
            raise SampleError(sample_id, [Problem("role", reason)])
        messages.append({"role": role, "content": split_placeholders(_text(turn.get("value"), "value"))})
    return messages, [], ("conversations",)


def _chat(row: Mapping[str, Any], sample_id: str) -> Converted:
    messages, inline = [], []
    for message in _dicts(row["messages"], "messages"):
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in _dicts(content, "content"):
                kind, known = part.get("type"), {key: value for key, value in part.items() if value is not None}
                inline += [known[key] for key in ("image", "path", "bytes") if kind == "image" and key in known]
                parts.append(
                    {"type": "image"} if kind == "image" else {k: known[k] for k in ("type", "text") if k in known}
                )
            messages.append({"role": message.get("role"), "content": parts})
        else:
            messages.append({"role": message.get("role"), "content": split_placeholders(_text(content, "content"))})
    return messages, inline, ("messages",)


def _pairs(row: Mapping[str, Any], sample_id: str) -> Converted:
    messages: list[dict] = []
    for pair in _dicts(row["texts"], "texts"):
        messages.append({"role": "user", "content": _text(pair.get("user"), "user")})
        messages.append({"role": "assistant", "content": _text(pair.get("assistant"), "assistant")})
    if messages:
        messages[0]["content"] = _with_images(row, messages[0]["content"])
    return messages, [], ("texts",)


def _question(row: Mapping[str, Any], sample_id: str) -> Converted:
    messages = [{"role": "user", "content": _with_images(row, _text(row["question"], "question"))}]
    answer = row.get("answer", row.get("answers"))
    if isinstance(answer, list) and answer:
        answer = Counter(map(str, answer)).most_common(1)[0][0]
    if answer is not None:
        messages.append({"role": "assistant", "content": _text(answer, "answer")})
    return messages, [], ("question", "answer")


def _caption(row: Mapping[str, Any], sample_id: str) -> Converted:
    used: tuple[str, ...]
    key = "caption" if "caption" in row else "text"
    caption, used = row[key], (key,)
    if isinstance(caption, list) and caption:
        caption, used = caption[0], ()
    instruction = INSTRUCTIONS[int(hashlib.sha256(sample_id.encode()).hexdigest(), 16) % len(INSTRUCTIONS)]
    question = {"role": "user", "content": _with_images(row, instruction)}
    return [question, {"role": "assistant", "content": _text(caption, key)}], [], used


LAYOUTS: dict[str, Callable[[Mapping[str, Any], str], Converted]] = {
    "conversations": _llava,
    "messages": _chat,
    "texts": _pairs,
    "question": _question,
    "caption": _caption,
    "text": _caption,
}


def _with_images(row: Mapping[str, Any], text: str) -> str | list[dict]:
    if PLACEHOLDER in text:
        return split_placeholders(text)
    images: list[dict] = [{"type": "image"} for _ in _images(row)]
    return [*images, {"type": "text", "text": text}] if images else text


def _dicts(value: Any, key: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{key!r} is {value!r:.60}, expected a list of objects")
    return value


def _check_answers(row: Mapping[str, Any]) -> None:
    if not isinstance(answers := row.get("answers", []), list):
        raise ValueError(f"'answers' is {answers!r:.60}, expected a list of texts")
    for answer in answers:
        _text(answer, "answers")


def _label(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, list | dict):
        raise ValueError(f"{key!r} is {value!r:.60}, expected text or a number")
    return None if value is None else _whole_text(str(value), key)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"{key!r} is {value!r:.60}, expected text")
    return _whole_text(str(value), key)


def _whole_text(text: str, key: str) -> str:
    if fault := half_character(text):
        raise ValueError(f"{key!r} is no text: {fault}")
    return text
