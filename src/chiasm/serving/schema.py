"""The bodies of requests and answers: OpenAI's fields, and which of them mean something here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MOST_FIELDS = 100
"""Of an object that has names of its own: more are not gone through one by one."""
FIRST: Any = Field(fail_fast=True)
"""Of a list the first mistake is told: to collect a hundred thousand of them would take seconds."""


class Strict(BaseModel):
    """A field that is not known is refused, as OpenAI does; a number is no text, and a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "more than {most} fields", {"most": MOST_FIELDS})
        return value


def _unused(value: Any) -> None:
    """A field of OpenAI's that changes nothing here when it is empty, and is refused when it is not."""
    if value not in (None, [], {}, False, 0, "auto", "none", "default"):
        raise PydanticCustomError("unsupported_parameter", "not supported")


Unused = Annotated[None, BeforeValidator(_unused, json_schema_input_type=None)]
Ignored = Any
"""A field of OpenAI's that tells the service about the caller and does not change the answer."""


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
TopK = Annotated[int, Field(ge=0, le=2**31), BeforeValidator(_whole)]
TopLogprobs = Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_whole)]


class ImageUrl(Strict):
    url: str = Field(min_length=1, description="data:image/...;base64,... or, where the server allows it, http(s)")
    detail: Literal["auto", "low", "high", "original"] | None = None


class Part(Strict):
    """`{"type": "text", "text": ...}` or `{"type": "image_url", "image_url": {"url": ...}}`; a refusal is a text."""

    type: Literal["text", "image_url", "refusal"]
    text: str | None = None
    image_url: ImageUrl | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: Ignored = None

    @property
    def words(self) -> str:
        return self.text or self.refusal or ""


def _shape(*tags: tuple[type, str]) -> Any:
    """A discriminator by the JSON type of a value."""

    def tag(value: Any) -> str | None:
        return next((name for kind, name in tags if isinstance(value, kind)), None)

    names = " or ".join(name.removeprefix("#") for _, name in tags)
    return Discriminator(tag, "invalid_type", f"expected {names}")


Content = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[Part], FIRST, Tag("#parts")],
    _shape((str, "#text"), (list, "#parts")),
]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = Field(None, description="of an assistant it may be missing")
    name: Ignored = None
    refusal: str | None = Field(None, description="what an assistant said in place of content")
    annotations: Unused = None
    audio: Unused = None
    function_call: Unused = None
    tool_calls: Unused = None

    @property
    def said(self) -> str | list[Part] | None:
        """Its content, of an assistant that refused its refusal; None where it should have content and has none."""
        return (self.content or self.refusal or "") if self.role == "assistant" else self.content


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Stop = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[str], FIRST, Tag("#texts")],
    _shape((str, "#text"), (list, "#texts")),
]


class ChatRequest(Strict):
    """`POST /v1/chat/completions`. `top_k`, `min_p` and `repetition_penalty` come on top of OpenAI's."""

    model: str
    messages: Annotated[list[ChatMessage], FIRST] = Field(min_length=1, max_length=1024)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the likeliest token")
    top_k: TopK | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    n: Count | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Unused = None
    presence_penalty: Unused = None
    logit_bias: Unused = None
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


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: Answer
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str


EmbeddingInput = Annotated[
    Annotated[str, Tag("#text")] | Annotated[Part, Tag("#part")] | Annotated[list[Whole], FIRST, Tag("#tokens")],
    _shape((str, "#text"), (dict, "#part"), (list, "#tokens")),
]
EmbeddingInputs = Annotated[
    Annotated[str, Tag("#text")]
    | Annotated[Part, Tag("#part")]
    | Annotated[list[EmbeddingInput | Whole], FIRST, Tag("#list")],
    _shape((str, "#text"), (dict, "#part"), (list, "#list")),
]


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`: texts as OpenAI has them; pictures as the parts of chat messages."""

    model: str
    input: EmbeddingInputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: Ignored = None


class EmbeddingItem(BaseModel):
    """`shape` is there where a picture has several vectors; they follow each other in `embedding`."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    shape: list[int] | None = None


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "chiasm"
    kind: Literal["chat", "embedding"]
    fusion: str
    connector: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class AttentionRequest(Strict):
    """`POST /api/attention`: a conversation whose last message is the answer that is looked at."""

    model: str
    messages: Annotated[list[ChatMessage], FIRST] = Field(min_length=2, max_length=1024)
    image: Whole = Field(-1, description="which of the conversation's pictures; by default the last")


class Word(BaseModel):
    """A word of the answer, its place in it, and what it had of every patch, row by row."""

    text: str
    start: int
    end: int
    weights: list[float]


class AttentionAnswer(BaseModel):
    answer: str
    picture: str
    rows: int
    columns: int
    words: list[Word]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str]
