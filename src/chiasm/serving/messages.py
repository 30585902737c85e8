"""Messages by role and their parts by type, each with what it may have and what it needs."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, Tag

from chiasm.serving.fields import FIRST, Absent, Ignored, Strict, Unused, by_kind, by_shape


class ImageUrl(Strict):
    url: str = Field(min_length=1, description="data:image/...;base64,... or, where the server allows it, http(s)")
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str
    image_url: Absent = None
    refusal: Absent = None
    prompt_cache_breakpoint: Ignored = None

    @property
    def words(self) -> str:
        return self.text


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    text: Absent = None
    refusal: Absent = None
    prompt_cache_breakpoint: Ignored = None

    @property
    def words(self) -> str:
        return ""


class RefusalPart(Strict):
    """A refusal is a text."""

    type: Literal["refusal"]
    refusal: str
    text: Absent = None
    image_url: Absent = None
    prompt_cache_breakpoint: Ignored = None

    @property
    def words(self) -> str:
        return self.refusal


WordPart = TextPart | RefusalPart
Part = WordPart | ImagePart
Texts = Annotated[TextPart, Tag("#text")] | Annotated[RefusalPart, Tag("#refusal")]
AnyPart = Annotated[Texts | Annotated[ImagePart, Tag("#image_url")], by_kind("type", "text", "image_url", "refusal")]
AnyWordPart = Annotated[Texts, by_kind("type", "text", "refusal", hint="; only a user's message has images")]
Words = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[AnyWordPart], FIRST, Tag("#parts")],
    by_shape((str, "#text"), (list, "#parts")),
]
Content = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[AnyPart], FIRST, Tag("#parts")],
    by_shape((str, "#text"), (list, "#parts")),
]


class Message(Strict):
    """What messages of every role have."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Sequence[Part] | None = None
    name: Ignored = None
    refusal: str | None = None
    annotations: Unused = None
    audio: Unused = None
    function_call: Unused = None
    tool_calls: Unused = None

    @property
    def said(self) -> str | Sequence[Part]:
        """Its content; of an assistant that refused its refusal."""
        return self.content or self.refusal or ""


class SystemMessage(Message):
    role: Literal["system"]
    content: Words
    refusal: Absent = None


class DeveloperMessage(Message):
    role: Literal["developer"]
    content: Words
    refusal: Absent = None


class UserMessage(Message):
    role: Literal["user"]
    content: Content
    refusal: Absent = None


class AssistantMessage(Message):
    """Its content may be missing, as clients leave it out where it called tools or refused; what they read out of an
    earlier answer comes back with it."""

    role: Literal["assistant"]
    content: Words | None = None
    refusal: str | None = Field(None, description="what it said in place of content")
    parsed: Ignored = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None


ChatMessage = Annotated[
    Annotated[UserMessage, Tag("#user")]
    | Annotated[AssistantMessage, Tag("#assistant")]
    | Annotated[SystemMessage, Tag("#system")]
    | Annotated[DeveloperMessage, Tag("#developer")],
    by_kind("role", "user", "assistant", "system", "developer"),
]
