"""The bodies of requests: OpenAI's fields, and which of them mean something here."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from chiasm.serving.fields import (
    FIRST,
    Absent,
    Biases,
    Count,
    Ignored,
    Seed,
    Strict,
    Token,
    TopK,
    TopLogprobs,
    Unused,
    Whole,
    by_kind,
    by_shape,
)
from chiasm.serving.messages import AnyPart, ChatMessage


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]
    json_schema: Absent = None


class JsonFormat(Strict):
    type: Literal["json_object"]
    json_schema: Absent = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("#text")]
    | Annotated[JsonFormat, Tag("#json_object")]
    | Annotated[SchemaFormat, Tag("#json_schema")],
    by_kind("type", "text", "json_object", "json_schema"),
]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[
    Annotated[StopText, Tag("#text")] | Annotated[list[StopText], FIRST, Field(max_length=4), Tag("#texts")],
    by_shape((str, "#text"), (list, "#texts")),
]


def _needs(field: str, *empty: Any, other: str) -> dict[str, Any]:
    """JSON Schema's way to say that a field needs another to be true."""
    return {
        "anyOf": [
            {"properties": {field: {"enum": [None, *empty]}}},
            {"properties": {other: {"const": True}}, "required": [other]},
        ]
    }


class ChatRequest(Strict):
    """`POST /v1/chat/completions`. `top_k`, `min_p` and `repetition_penalty` come on top of OpenAI's."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [_needs("top_logprobs", 0, other="logprobs"), _needs("stream_options", other="stream")]
        }
    )

    model: str
    messages: Annotated[list[ChatMessage], FIRST] = Field(min_length=1, max_length=1024)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the likeliest token")
    top_k: TopK | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = None
    n: Count | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Unused = None
    tool_choice: Unused = None
    functions: Unused = None
    function_call: Unused = None
    audio: Unused = None
    moderation: Unused = None
    prediction: Unused = None
    web_search_options: Unused = None
    modalities: Annotated[list[Literal["text"]], FIRST] | None = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None


def _embeddable(value: Any) -> str | None:
    if isinstance(value, list):
        return "#tokens" if value and isinstance(value[0], int | float) else "#list"
    return "#text" if isinstance(value, str) else "#part" if isinstance(value, dict) else None


def _single(value: Any) -> str | None:
    return "#tokens" if isinstance(value, list) else _embeddable(value)


FULL: Any = Field(min_length=1)
Text = Annotated[str, FULL]
Tokens = Annotated[list[Token], FIRST, FULL]
EmbeddingInput = Annotated[
    Annotated[Text, Tag("#text")] | Annotated[AnyPart, Tag("#part")] | Annotated[Tokens, Tag("#tokens")],
    Discriminator(_single, "invalid_type", "expected text or part or tokens"),
]
EmbeddingInputs = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[AnyPart, Tag("#part")]
    | Annotated[Tokens, Tag("#tokens")]
    | Annotated[list[EmbeddingInput], FIRST, FULL, Tag("#list")],
    Discriminator(_embeddable, "invalid_type", "expected text or part or a list of them or tokens"),
]


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`: texts as OpenAI has them; pictures as the parts of chat messages."""

    model: str
    input: EmbeddingInputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: Ignored = None


class AttentionRequest(Strict):
    """`POST /api/attention`: a conversation whose last message is the answer that is looked at."""

    model: str
    messages: Annotated[list[ChatMessage], FIRST] = Field(min_length=2, max_length=1024)
    image: Whole = Field(-1, description="which of the conversation's pictures; by default the last")
