"""The bodies of answers, with OpenAI's fields."""

from typing import Literal

from pydantic import BaseModel


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


class Word(BaseModel):
    """A word of the answer, its place in it, and what it had of every patch, row by row."""

    text: str
    start: int
    end: int
    weights: list[float]


class AttentionAnswer(BaseModel):
    """The answer, the picture as the model's encoder received it, and its grid of patches.

    Args:
        queries: visual tokens where they have no place in the picture, and each sees all of it.
    """

    answer: str
    picture: str
    rows: int
    columns: int
    queries: int | None = None
    words: list[Word]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str]
