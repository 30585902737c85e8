"""What a server holds: models by name, and what their requests share."""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor

from chiasm.data.chat import IMAGE_TOKEN, Message
from chiasm.data.processor import ChiasmProcessor
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import EngineStats, Ticket
from chiasm.language.adapter import context_length
from chiasm.serving.body import Budget, Lease
from chiasm.serving.errors import ApiError, brief
from chiasm.serving.fetch import Fetcher
from chiasm.serving.metrics import Metrics
from chiasm.serving.names import Lookups
from chiasm.serving.plain import Plain, PlainTexts
from chiasm.serving.settings import Settings
from chiasm.serving.turn import Turn

T = TypeVar("T")
CHARACTERS_PER_TOKEN = 64
UNBOUNDED_CONTEXT = 32_768
"""For language models that name no context: T5 and its kin."""


class Answering(Protocol):
    """An engine."""

    @property
    def alive(self) -> bool: ...
    def check_room(self, count: int = 1) -> None: ...
    def submit_all(self, messages: list[Message], images: list[Any], decodings: Sequence[Decoding]) -> list[Ticket]: ...
    def stats(self) -> EngineStats: ...
    def close(self, finish: bool = True) -> None: ...


class Embedding(Protocol):
    """A dual encoder."""

    model: Any

    @property
    def processor(self) -> Any: ...
    def embed_images(self, images: Any) -> Tensor: ...
    def embed_texts(self, texts: str | Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class ChatModel:
    """A generative model, which an engine owns."""

    name: str
    model: Any
    processor: ChiasmProcessor
    engine: Answering
    created: int = field(default_factory=lambda: int(time.time()))

    kind: ClassVar[Literal["chat"]] = "chat"

    @property
    def characters(self) -> int:
        """More than these fit into no prompt."""
        return CHARACTERS_PER_TOKEN * (context_length(self.model.config) or UNBOUNDED_CONTEXT)

    @cached_property
    def plain(self) -> Plain:
        """Words without the special tokens of its chat and its pictures."""
        return Plain(self.processor.tokenizer, IMAGE_TOKEN, self.processor.image_token)

    @property
    def fingerprint(self) -> str:
        return "fp_" + hashlib.sha256(self.model.config.to_json_string().encode()).hexdigest()[:10]

    def describe(self) -> dict[str, Any]:
        config = self.model.config
        return {"fusion": config.fusion, "connector": (config.connector or {}).get("name")}


@dataclass(frozen=True)
class EmbeddingModel:
    """A retrieval model; its requests run one after the other."""

    name: str
    encoder: Embedding
    created: int = field(default_factory=lambda: int(time.time()))
    turn: Turn = field(default_factory=Turn)

    kind: ClassVar[Literal["embedding"]] = "embedding"

    @cached_property
    def plain(self) -> PlainTexts:
        """Texts without the special tokens of its tokenizer."""
        return PlainTexts(self.encoder.processor)

    def describe(self) -> dict[str, Any]:
        return {"fusion": "late"}


Served = ChatModel | EmbeddingModel


class Shared:
    """Models by name, settings, and the threads, memory and numbers that requests share.

    Attributes:
        pictured, formed, worded: turns of questions that are read and prepared, by what takes longest in them: their
            pictures, the form of their answers, or nothing, so that these wait for none of the others.
    """

    def __init__(self, models: Sequence[Served], settings: Settings, fetcher: Fetcher | None = None) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            names = [model.name for model in models]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two models have the name {twice!r}; give them names: NAME=MODEL")
        limits = settings.limits
        self.settings = settings
        self.budget = Budget(limits.memory_bytes)
        self._lookups = Lookups(limits.lookups, limits.line)
        self.fetch = fetcher or Fetcher(limits.body_bytes, limits.fetch_seconds, self._lookups)
        self.metrics = Metrics({model.name: model.engine for model in models if isinstance(model, ChatModel)})
        self.pictured, self.formed, self.worded = (Turn(limits.pending) for _ in range(3))
        self.looking = Turn()
        places = 3 * limits.pending + len(models) + 1
        self._threads = ThreadPoolExecutor(places, thread_name_prefix="chiasm-http")

    def chat_model(self, name: str) -> ChatModel:
        model = self.named(name)
        if not isinstance(model, ChatModel):
            raise ApiError(
                404,
                f"The model '{brief(name)}' gives embeddings and no answers.",
                param="model",
                code="unsupported_model",
            )
        return model

    def embedding_model(self, name: str) -> EmbeddingModel:
        model = self.named(name)
        if not isinstance(model, EmbeddingModel):
            raise ApiError(
                404,
                f"The model '{brief(name)}' gives answers and no embeddings.",
                param="model",
                code="unsupported_model",
            )
        return model

    def named(self, name: str) -> Served:
        if name not in self.models:
            known = ", ".join(repr(known) for known in self.models)
            raise ApiError(
                404,
                f"The model '{brief(name)}' does not exist; there is {known}.",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def broken(self) -> str | None:
        """The first model whose engine has stopped, if there is one."""
        chatting = (model for model in self.models.values() if isinstance(model, ChatModel))
        return next((model.name for model in chatting if not model.engine.alive), None)

    async def in_turn(self, turn: Turn, lease: Lease, function: Callable[..., T], *args: Any) -> T:
        """Runs what takes long beside the event loop, when its turn has come.

        Args:
            lease: of the request that it is for.

        Raises:
            ApiError: too many are in line.
        """
        return await turn.run(self._threads, self.settings.limits.line, lease.work, function, *args)

    async def prepared(
        self,
        turn: Turn,
        lease: Lease,
        function: Callable[..., T],
        *args: Any,
        abandoned: Callable[[T], object] | None = None,
    ) -> T:
        """The same for the questions of a chat, all of which may be in line.

        Args:
            abandoned: gets the result if nobody waits for it any more.
        """
        line = self.settings.limits.connections
        return await turn.run(self._threads, line, lease.work, function, *args, abandoned=abandoned)

    def close(self) -> None:
        """Ends when every answer that has begun is there."""
        for model in self.models.values():
            if isinstance(model, ChatModel):
                model.engine.close()
        self._threads.shutdown()
        self._lookups.close()
