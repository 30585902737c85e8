"""`init: closed_form`: from pictures and their captions to a connector that names things, in seconds."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm.connectors import Connector
from chiasm.connectors.closed_form import NothingToLearn, Ridge, is_exact, solve, start
from chiasm.connectors.fitting import FEWEST_STEPS, steps_within_reach
from chiasm.data.chat import IMAGE_TOKEN, flatten
from chiasm.data.schema import Sample, Samples
from chiasm.fusion.base import FusionModel
from chiasm.language.adapter import embedding_scale, embedding_width
from chiasm.positions.grid import WIDTH

WORD = re.compile(r"\w+")
PLACES = (("top", "bottom"), ("left", "right"))

ROUNDS = 4
"""Passes over the captions, each of which aligns patches and words better."""
CAPTION_WORDS = 5
"""Answers of at least so many words on average describe a picture; shorter ones leave most of it unsaid."""
FEWEST_CAPTIONS = 50
"""Where fewer pictures are described, short answers have to do."""
KEPT_BYTES = 2**29
"""Memory for the features to which connectors are fitted."""


class Started(NamedTuple):
    """How many pictures a connector was started from, and what share of the regression's variance it misses."""

    pictures: int
    missed: float


def cannot_start(model: PreTrainedModel) -> str | None:
    """Why the connector cannot start in closed form, None where it can."""
    connector, language = getattr(model, "connector", None), getattr(model, "language", None)
    if connector is None or language is None:
        return "the model has no connector in front of a language model"
    name = model.config.connector["name"]
    if connector.output is None or connector.width != embedding_width(language):
        return f"connector {name} does not end in a linear layer to the language model's width"
    if model.vision.features.resolution == "native":
        return "pictures keep their own size, so that their patches differ"
    return None


def require_closed_form(model: PreTrainedModel) -> None:
    """Refuses a model whose connector cannot start in closed form.

    Raises:
        ValueError: it cannot, and why.
    """
    if reason := cannot_start(model):
        raise ValueError(f"init: closed_form: {reason}; use init: keep")


def is_slow(connector: Connector) -> bool:
    """Whether a start takes longer than one that nobody asked for should."""
    return not is_exact(connector) and steps_within_reach(connector) < FEWEST_STEPS


def caption_indices(samples: Samples, indices: Sequence[int]) -> list[int]:
    """The samples to start from: those that describe their pictures, or all where hardly any does.

    What an answer leaves out is taken for absent, so "two" about a picture of eight things would teach what is wrong.
    """
    described = [index for index in indices if describes(samples[index])]
    return described if len(described) >= FEWEST_CAPTIONS else list(indices)


def describes(sample: Sample) -> bool:
    """Whether a sample's answers are sentences about its pictures."""
    answers = [m["content"] for m in flatten(sample.messages) if m["role"] == "assistant"]
    words = sum(len(WORD.findall(answer)) for answer in answers)
    return bool(sample.images) and words >= CAPTION_WORDS * len(answers)


def answer_words(sample: Sample) -> set[str]:
    """The distinct words that the assistant says in a sample, lower case."""
    answers = (m["content"] for m in flatten(sample.messages) if m["role"] == "assistant")
    return {word for answer in answers for word in WORD.findall(answer.lower())}


def words_by_picture(sample: Sample) -> list[set[str]]:
    """For every picture the distinct words that the assistant says of it: until a later turn shows another one."""
    words: list[set[str]] = []
    shown: list[set[str]] = []
    for message in flatten(sample.messages):
        if pictures := message["content"].count(IMAGE_TOKEN):
            shown = [set() for _ in range(pictures)]
            words += shown
        if message["role"] == "assistant":
            for said in shown:
                said |= set(WORD.findall(message["content"].replace(IMAGE_TOKEN, "").lower()))
    return words


def rarity(samples: Iterable[Sample]) -> dict[str, float]:
    """Inverse document frequency of every answer word: what every answer says tells nothing."""
    counts: Counter[str] = Counter()
    total = 0
    for sample in samples:
        counts.update(answer_words(sample))
        total += 1
    return {word: math.log(total / count) for word, count in counts.items()}


class WordEmbeddings:
    """Words as the language model's input embeddings, averaged over a word's tokens."""

    def __init__(self, model: FusionModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.table: Any = model.get_input_embeddings()
        self.tokenizer = tokenizer
        self.of = lru_cache(maxsize=50_000)(self._of)

    @torch.no_grad()
    def _of(self, word: str) -> Float[Tensor, " D_l"]:
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return self.table(torch.tensor(ids, device=self.table.weight.device)).float().mean(dim=0).cpu()


@torch.no_grad()
def closed_form(
    model: FusionModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    features_of: Callable[[Sample], Float[Tensor, "images N D_v"]],
) -> Started:
    """Initialises the model's connector from samples with pictures and answers.

    Args:
        features_of: patch features of a sample's pictures, from the feature cache or the encoder.

    Raises:
        NothingToLearn: no two pictures have captions that differ.
        ValueError: the connector cannot start in closed form.
    """
    require_closed_form(model)
    chosen = [sample for sample in samples if sample.images]
    weights = {word: weight for word, weight in sorted(rarity(chosen).items()) if weight > 0}
    number = {word: index for index, word in enumerate(weights)}
    embeddings = WordEmbeddings(model, tokenizer)
    kept = None if is_exact(model.connector) else Kept(sum(len(sample.images) for sample in chosen))
    ridge, pictures = None, 0
    for number_of_round in range(ROUNDS):
        if ridge is not None:
            ridge.align()
        pictures = 0
        for sample in chosen:
            encoded = features_of(sample)
            for features, said in zip(model.with_positions(encoded.float()), words_by_picture(sample), strict=True):
                if words := sorted(said & weights.keys()):
                    ridge = ridge or Ridge(features.shape[-1], len(number))
                    ridge.add(features, [number[w] for w in words], torch.tensor([weights[w] for w in words]))
                    pictures += 1
            if kept is not None and number_of_round == 0:
                kept.add(encoded)
    if ridge is None:
        raise NothingToLearn(
            "init: closed_form needs pictures with captions that differ; this data has none; use init: keep"
        )
    vocabulary = torch.stack([embeddings.of(word) for word in number])
    every = torch.arange(embeddings.table.weight.shape[0], device=embeddings.table.weight.device)
    mean_embedding = embeddings.table(every).float().mean(dim=0)
    where = _places(model, embeddings) if model.config.patch_positions == "grid" else (None, None)
    solution = solve(ridge, vocabulary, mean_embedding, embedding_scale(model.language), *where)
    features = None if kept is None else torch.cat(kept.features)
    with torch.enable_grad():
        return Started(pictures, start(model.connector, solution, features, model.with_positions))


class Kept:
    """Features of some of the pictures, evenly spread, in bounded memory."""

    def __init__(self, pictures: int) -> None:
        self.pictures, self.seen = pictures, 0
        self.features: list[Tensor] = []

    def add(self, features: Float[Tensor, "images N D_v"]) -> None:
        every = -(-self.pictures * features[0].nbytes // KEPT_BYTES)
        if len(chosen := features[-self.seen % every :: every]):
            self.features.append(chosen.to("cpu", copy=True))
        self.seen += len(features)


def _places(model: FusionModel, embeddings: WordEmbeddings) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N D_l"]]:
    """Coordinate channels of every patch, and the embeddings of the words for its row and column."""
    blank = torch.zeros(1, model.vision.num_patches, model.vision.width)
    halves = [torch.linspace(-1, 1, count) for count in model.vision.grid]
    down, across = (
        (-axis).clamp(min=0)[:, None] * embeddings.of(first) + axis.clamp(min=0)[:, None] * embeddings.of(last)
        for axis, (first, last) in zip(halves, PLACES, strict=True)
    )
    coordinates = model.with_positions(blank)[0, model.vision.num_prefix :, -WIDTH:]
    return coordinates, (down[:, None] + across[None]).flatten(0, 1)
