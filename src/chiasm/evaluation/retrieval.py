"""Recall@k of a retrieval model: is a picture's caption among its first k candidates, and a caption's picture?

The control takes another sample's picture for each: what is found then too, was not found by looking. The nearest
candidates by cosine may be read again by a Q-Former's matching head, as BLIP-2 does (arXiv 2301.12597).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiasm.data.captions import CaptionProcessor, caption_of, encode_caption
from chiasm.data.collation import load_pixels
from chiasm.data.schema import Samples
from chiasm.evaluation.evaluate import EvalResult, check, names_of
from chiasm.evaluation.skills import Row, wilson
from chiasm.evaluation.wrong_pictures import wrong_pictures
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.qformer_retrieval import QFormerRetrieval

KS = (1, 5, 10)
Recalls = dict[int, float]
RetrievalModel = QFormerRetrieval | LateFusionModel
TO_TEXT, TO_IMAGE = "image → text", "text → image"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls by k in both directions. `chance` is that of a random order; `reranked` says if matching had its say.

    `hits`: direction and k → for each query whether it found; `control`: the same with another sample's picture.
    """

    image_to_text: Recalls
    text_to_image: Recalls
    chance: Recalls
    samples: int
    reranked: bool
    hits: dict[tuple[str, int], list[bool]] = field(default_factory=dict)
    control: dict[tuple[str, int], list[bool]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def evaluation(self, samples: Samples) -> EvalResult:
        """As `chiasm eval` shows it: a line for each direction and k with its interval and the control's, and a row for
        each query, scored by the first k."""
        summary = [
            proportion(f"{direction}, recall@{k}", found, self.control.get((direction, k), []), self.chance[k])
            for (direction, k), found in self.hits.items()
        ]
        names, rows = names_of(samples), list[Row]()
        for way in (TO_TEXT, TO_IMAGE):
            hits = {f"recall@{k}": found for (direction, k), found in self.hits.items() if direction == way}
            first = next(iter(hits))
            for index, sample in enumerate(samples):
                found = {name: those[index] for name, those in hits.items()}
                asked = {"id": f"{names[index]}, {way}", "sample": sample.id, "skill": f"{way}, {first}"}
                rows.append(outcome(asked, caption_of(sample), first, found[first]) | found)
        return EvalResult(rows, summary, self.notes)


def proportion(name: str, found: Sequence[bool], control: Sequence[bool], by_chance: float) -> Row:
    """A summary row of a share with its interval, beside that of the control."""
    row: dict[str, Any] = {"skill": name, "metric": "share", "n": len(found), "chance": by_chance}
    for prefix, hits in (("", found), ("control_", control)):
        low, high = wilson(sum(hits), len(hits)) if hits else (None, None)
        row |= {
            f"{prefix}accuracy": sum(hits) / len(hits) if hits else None,
            f"{prefix}low": low,
            f"{prefix}high": high,
        }
    return row | {"control_n": len(control)}


def outcome(asked: Row, caption: str, metric: str, found: bool) -> Row:
    """A row of results about one query, as `paired.compare` reads it."""
    told = {"question": "", "references": [caption], "metric": metric}
    return {**asked, **told, "correct": found, "score": float(found)}


def recall(scores: Float[Tensor, "Q C"], right: Bool[Tensor, "Q C"], ks: Sequence[int] = KS) -> Recalls:
    """Share of the queries with a right candidate among the first k; of equal scores the wrong one counts first."""
    return {k: found.sum().item() / len(found) for k, found in found_within(scores, right, ks).items()}


def found_within(
    scores: Float[Tensor, "Q C"], right: Bool[Tensor, "Q C"], ks: Sequence[int] = KS
) -> dict[int, Bool[Tensor, " Q"]]:
    """For each k, which queries have a right one among the first k; of equal scores the wrong one counts first."""
    ahead = places_of(scores, right)
    return {k: ahead < k for k in ks}


def places_of(scores: Float[Tensor, "Q C"], right: Bool[Tensor, "Q C"]) -> Int[Tensor, " Q"]:
    """How many wrong candidates stand before the first right one, those of equal score and of none (NaN) with them."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~right).sum(dim=1)


def chance(right: Bool[Tensor, "Q C"], ks: Sequence[int] = KS) -> Recalls:
    """Expected recall of a random order."""
    count, candidates = right.sum(dim=1).double(), right.shape[1]
    missed = torch.ones_like(count)
    found: Recalls = {}
    for place in range(min(max(ks), candidates)):
        missed = missed * ((candidates - count - place) / (candidates - place)).clamp(min=0)
        if place + 1 in ks:
            found[place + 1] = (1 - missed).mean().item()
    return {k: found.get(k, 1.0) for k in ks}


@torch.no_grad()
def evaluate_retrieval(
    model: RetrievalModel,
    processor: CaptionProcessor,
    samples: Samples,
    *,
    rerank: int = 0,
    control: bool = True,
    ks: Sequence[int] = KS,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> RetrievalResult:
    """Every picture against every caption of the samples. A candidate is right if its caption or picture is the same.

    Args:
        rerank: candidates of each query that the matching head reads too; 0 leaves the order by cosine.
        control: also with another sample's picture in the place of each.

    Raises:
        SampleError: a sample has no caption, or not exactly one readable picture.
        ValueError: no samples, or rerank with a model that has no matching head.
    """
    check(samples, batch_size)
    if rerank and not isinstance(model, QFormerRetrieval):
        raise ValueError(f"rerank={rerank} needs a matching head, which a late-fusion model has not; leave it out")
    was_training = model.training
    model.eval()
    collection = _Collection(model, processor, samples, batch_size, progress, bool(rerank))
    by_cosine = model.similarity(collection.images.float(), collection.texts.float())
    to_text, to_image = by_cosine, by_cosine.T
    if rerank:
        to_text = collection.rerank(by_cosine, rerank)
        to_image = collection.rerank(by_cosine.T, rerank, from_text=True)
    model.train(was_training)
    right, scores = same_pairs(samples), {TO_TEXT: to_text.cpu(), TO_IMAGE: to_image.cpu()}
    hits = {(way, k): found.tolist() for way, s in scores.items() for k, found in found_within(s, right, ks).items()}
    to_texts, to_images = (recall(scores[way], right, ks) for way in (TO_TEXT, TO_IMAGE))
    others, notes = _control(scores, right, samples, ks) if control else ({}, [])
    return RetrievalResult(to_texts, to_images, chance(right, ks), len(samples), bool(rerank), hits, others, notes)


def _control(
    scores: dict[str, Tensor], right: Bool[Tensor, "M M"], samples: Samples, ks: Sequence[int]
) -> tuple[dict[tuple[str, int], list[bool]], list[str]]:
    """What is found where another sample's picture stands in for each one's own."""
    donors, notes = wrong_pictures(samples)
    if not donors:
        return {}, notes
    asked, shown = list(donors), list(donors.values())
    swapped = {TO_TEXT: (scores[TO_TEXT][shown], right[asked]), TO_IMAGE: (scores[TO_IMAGE][asked], right[shown])}
    hits = {(way, k): found.tolist() for way, pair in swapped.items() for k, found in found_within(*pair, ks).items()}
    return hits, notes


def same_pairs(samples: Samples) -> Bool[Tensor, "M M"]:
    """Which samples say the same or show the same."""
    said, shown = _numbers(map(caption_of, samples)), _numbers(sample.images[0].key() for sample in samples)
    return (said[:, None] == said) | (shown[:, None] == shown)


def _numbers(values: Iterable[str]) -> Int[Tensor, " M"]:
    """A number for each value: equal where they are."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(value, len(known)) for value in values])


class _Collection:
    """Samples that were looked at once: vectors of pictures and captions, and what the matching head reads."""

    def __init__(
        self,
        model: RetrievalModel,
        processor: CaptionProcessor,
        samples: Samples,
        batch_size: int,
        progress: Progress | None,
        keep_features: bool,
    ) -> None:
        self.model, self.batch_size = model, batch_size
        padded = processor.pad([encode_caption(sample, processor)["input_ids"] for sample in samples])
        self.tokens = {name: tensor.to(model.device) for name, tensor in padded.items()}
        kept, images, texts = list[Tensor](), [], []
        for start in range(0, len(samples), batch_size):
            rows = slice(start, start + batch_size)
            pixels = [load_pixels(samples[index], processor) for index in range(*rows.indices(len(samples)))]
            features = model.encode_images(torch.cat([p for p in pixels if p is not None]).to(model.device))
            images.append(model.embed_images(model.patches(image_features=features)))
            kept += [features] if keep_features else []
            texts.append(model.embed_texts(**{name: tensor[rows] for name, tensor in self.tokens.items()}))
            if progress is not None:
                progress(min(start + batch_size, len(samples)), len(samples))
        self.images, self.texts = torch.cat(images), torch.cat(texts)
        self.features = torch.cat(kept) if kept else None

    def rerank(self, scores: Float[Tensor, "Q C"], count: int, from_text: bool = False) -> Float[Tensor, "Q C"]:
        """The first `count` candidates of each query by cosine plus the logit of a match; all others behind them."""
        near, candidates = scores.topk(min(count, scores.shape[1]), dim=1)
        queries = torch.arange(len(scores), device=scores.device).repeat_interleave(candidates.shape[1])
        pictures, texts = queries, candidates.flatten()
        if from_text:
            pictures, texts = texts, pictures
        found = torch.full_like(scores, -torch.inf)
        return found.scatter(1, candidates, near + self._logits(pictures, texts).view_as(near))

    def _logits(self, pictures: Int[Tensor, " P"], texts: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
        model: Any = self.model
        assert self.features is not None
        logits = [
            model.match(model.patches(image_features=self.features[p]), **{n: t[rows] for n, t in self.tokens.items()})
            for p, rows in zip(pictures.split(self.batch_size), texts.split(self.batch_size), strict=True)
        ]
        return torch.cat(logits)[:, 1]
