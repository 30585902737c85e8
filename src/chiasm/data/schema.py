"""One sample: chat messages with image parts, and the pictures they refer to, which are decoded when asked for."""

import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from chiasm.rgb import DAMAGE, to_rgb

ANY_SIZE = sys.maxsize  # Pillow's own limit, twice the next one, still holds
MAX_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB: Pillow's own warning level
ROLES = ("system", "user", "assistant")
DAMAGED_SHARD = "damaged shard"
"""The kind of a `Problem` behind which many samples are lost, not one."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a sample. `kind` is a key of `chiasm.data.check.KINDS`; `file` names the picture at fault."""

    kind: str
    reason: str
    file: str | None = None


class SampleError(ValueError):
    """A sample that cannot be used; the message names it and lists every `Problem`."""

    def __init__(self, sample_id: str, problems: list[Problem]) -> None:
        super().__init__(f"sample {sample_id!r}: " + "; ".join(problem.reason for problem in problems))
        self.sample_id = sample_id
        self.problems = problems

    @classmethod
    def of_picture(cls, sample_id: str, error: "ImageError") -> "SampleError":
        """Of a sample with a picture that cannot be used."""
        return cls(sample_id, [Problem(error.kind, str(error), error.name)])

    def __reduce__(self) -> tuple:
        return SampleError, (self.sample_id, self.problems)


class ImageError(ValueError):
    """A picture that is missing, broken or too large; the message names it. `kind` is a key of `check.KINDS`."""

    def __init__(self, kind: str, name: str, reason: str) -> None:
        super().__init__(f"picture {name}: {reason}")
        self.kind, self.name, self.reason = kind, name, reason

    def __reduce__(self) -> tuple:
        return ImageError, (self.kind, self.name, self.reason)


@dataclass(frozen=True)
class ByteRange:
    """`length` bytes from `offset` in a file: a member of an uncompressed tar."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclass(frozen=True)
class ImageRef:
    """A picture that is decoded by `load` and can be sent to another process.

    `source` is a file, encoded bytes, a byte range of a file, a picture in memory, or a picklable function that draws
    one. `name` stands for it in error messages. More than `max_pixels` pixels is an error before anything is decoded.
    """

    source: Path | bytes | ByteRange | Image.Image | Callable[[], Image.Image]
    name: str
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, value: Any, name: str = "in memory", max_pixels: int = MAX_PIXELS) -> "ImageRef":
        """From a path, encoded bytes, a `ByteRange`, a PIL picture or a drawing function; else ValueError."""
        if isinstance(value, str | Path):
            return cls(Path(value), str(value), max_pixels)
        if isinstance(value, bytes | ByteRange | Image.Image) or callable(value):
            return cls(value, name, max_pixels)
        raise ValueError(f"{name}: a picture is a path, bytes or a PIL picture, not {type(value).__name__}")

    @property
    def path(self) -> Path | None:
        """The picture's file, where it is one."""
        return self.source if isinstance(self.source, Path) else None

    def load(self) -> Image.Image:
        """The decoded picture: RGB, upright by its EXIF orientation, transparency over white. Raises ImageError."""
        if isinstance(self.source, Image.Image):
            return _own_rgb(self.source)
        if not isinstance(self.source, Path | bytes | ByteRange):
            return _own_rgb(self.source())
        self._refuse_pipes()
        try:
            with Image.open(self.source if isinstance(self.source, Path) else io.BytesIO(self._bytes())) as picture:
                if picture.width * picture.height > self.max_pixels:
                    raise ImageError("huge picture", self.name, self._too_large(picture.size))
                picture.load()
                return _own_rgb(picture)
        except FileNotFoundError:
            raise ImageError("missing picture", self.name, "no such file") from None
        except Image.DecompressionBombError:
            raise ImageError("huge picture", self.name, self._too_large(None)) from None
        except UnidentifiedImageError:
            reason = "is empty (0 bytes)" if self.num_bytes() == 0 else "is not a picture in a format that Pillow reads"
            raise ImageError("broken picture", self.name, reason) from None
        except ImageError:
            raise
        except DAMAGE as error:
            raise ImageError("broken picture", self.name, f"is truncated or damaged ({error})") from error

    def key(self) -> str:
        """The sha256 of the encoded bytes, or of mode, size and pixels for a picture that has none."""
        if isinstance(self.source, Path | bytes | ByteRange):
            return hashlib.sha256(self._bytes()).hexdigest()
        picture = self.source if isinstance(self.source, Image.Image) else self.source()
        digest = hashlib.sha256(f"{picture.mode} {picture.width}x{picture.height}\n".encode())
        digest.update(picture.tobytes())
        return digest.hexdigest()

    def num_bytes(self) -> int:
        """The size of the encoded picture; 0 for one in memory."""
        if isinstance(self.source, Path):
            return self.source.stat().st_size if self.source.is_file() else 0
        if isinstance(self.source, ByteRange):
            return self.source.length
        return len(self.source) if isinstance(self.source, bytes) else 0

    def _refuse_pipes(self) -> None:
        """Reading from a pipe or a device, whatever its name, would wait for ever."""
        if (
            isinstance(self.source, Path)
            and self.source.exists()
            and not (self.source.is_file() or self.source.is_dir())
        ):
            raise ImageError("broken picture", self.name, "is a pipe or a device, not a file")

    def _bytes(self) -> bytes:
        self._refuse_pipes()
        try:
            if isinstance(self.source, Path):
                return self.source.read_bytes()
            return self.source.read() if isinstance(self.source, ByteRange) else bytes(self.source)  # type: ignore[arg-type]
        except FileNotFoundError:
            raise ImageError("missing picture", self.name, "no such file") from None
        except OSError as error:
            raise ImageError("broken picture", self.name, f"cannot be read ({error.strerror})") from error

    def _too_large(self, size: tuple[int, int] | None) -> str:
        if size is None:
            return "has more pixels than Pillow opens: make it smaller"
        return f"has {size[0]}x{size[1]} pixels, the limit is {self.max_pixels:,}: make it smaller or raise max_pixels"


def _own_rgb(picture: Image.Image) -> Image.Image:
    """A copy as upright, opaque RGB."""
    rgb = to_rgb(picture)
    return rgb.copy() if rgb is picture else rgb


@dataclass(frozen=True)
class Sample:
    """A conversation about pictures.

    `messages`: {"role": "system" | "user" | "assistant", "content": str or parts}, a part being {"type": "image"} or
    {"type": "text", "text": ...}; the n-th image part stands for `images[n]`. For training and scoring the last message
    is the assistant's: the answer. `skill` groups scores. `meta` holds whatever else the data said about the sample.
    """

    id: str
    messages: list[dict]
    images: list[ImageRef] = field(default_factory=list)
    skill: str | None = None
    meta: dict = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The text of the last message, which is the assistant's."""
        return text_of(self.messages[-1]["content"])

    @property
    def prompt(self) -> list[dict]:
        """The messages before the answer."""
        return self.messages[:-1]

    @property
    def question(self) -> str:
        """The text of the last user message."""
        return next(text_of(m["content"]) for m in reversed(self.messages) if m["role"] == "user")

    def validate(self, answered: bool = True) -> "Sample":
        """Itself, or a SampleError with everything that `problems` finds."""
        problems = self.problems(answered)
        if problems:
            raise SampleError(self.id, problems)
        return self

    def problems(self, answered: bool = True) -> list[Problem]:
        """What makes the sample unusable, without opening a picture. `answered`: the last message must be an answer."""
        problems = list(_content_problems(self.messages))
        if problems:
            return problems
        placeholders = sum(part["type"] == "image" for part in _parts(self.messages))
        if placeholders != len(self.images):
            counts = (
                f"{_count(placeholders, 'image placeholder')} in the messages, but {_count(len(self.images), 'image')}"
            )
            problems.append(Problem("placeholders", counts))
        problems += _order_problems([message["role"] for message in self.messages], answered)
        problems += _empty_problems(self.messages)
        return problems


if TYPE_CHECKING:
    Samples = Sequence[Sample]
else:
    Samples = Sequence  # a run-time type checker takes items out of a `Sequence[Sample]`, which builds them


def text_of(content: Any) -> str:
    """The text of one message's content, its image parts left out."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _parts(messages: list[dict]) -> Iterator[dict]:
    for message in messages:
        if not isinstance(message["content"], str):
            yield from message["content"]


def _content_problems(messages: list[dict]) -> Iterator[Problem]:
    if not messages:
        yield Problem("empty", "no messages")
    for number, message in enumerate(messages, 1):
        if message.get("role") not in ROLES:
            yield Problem(
                "role", f"message {number} has the role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
            )
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            yield Problem("empty", f"message {number} has the content {content!r}, expected text or a list of parts")
            continue
        for part in content:
            known = isinstance(part, dict) and (
                part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))
            )
            if not known:
                form = '{"type": "image"} or {"type": "text", "text": ...}'
                yield Problem("empty", f"message {number} has the part {part!r:.80}, expected {form}")


def _order_problems(roles: list[str], answered: bool) -> Iterator[Problem]:
    turns = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            where = len(roles) - len(turns) + number + 1
            yield Problem(
                "role", f"message {where} is the {role}'s, expected the {expected}'s (user and assistant alternate)"
            )
            return
    if answered and roles[-1] != "assistant":
        yield Problem("no answer", f"the last message is the {roles[-1]}'s, expected the assistant's answer")


def _empty_problems(messages: list[dict]) -> Iterator[Problem]:
    for number, message in enumerate(messages, 1):
        has_image = any(part["type"] == "image" for part in _parts([message]))
        if text_of(message["content"]).strip() or (has_image and message["role"] != "system"):
            continue
        if message["role"] == "assistant":
            yield Problem("no answer", f"message {number}, the assistant's, has no text")
        else:
            yield Problem("empty", f"message {number}, the {message['role']}'s, is empty")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
