"""Recall@k of a retrieval model: is a picture's caption among its first k candidates, and a caption's picture?

The nearest candidates by cosine may be read again by the matching head, as BLIP-2 does (arXiv 2301.12597).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiasm.data.captions import CaptionProcessor, caption_of, encode_caption
from chiasm.data.collation import load_pixels
from chiasm.data.schema import Sample
from chiasm.fusion.qformer_retrieval import QFormerRetrieval, query_similarity

KS = (1, 5, 10)
Recalls = dict[int, float]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls by k in both directions. `chance` is that of a random order; `reranked` says if matching had its say."""

    image_to_text: Recalls
    text_to_image: Recalls
    chance: Recalls
    samples: int
    reranked: bool


def recall(scores: Float[Tensor, "Q C"], right: Bool[Tensor, "Q C"], ks: Sequence[int] = KS) -> Recalls:
    """Share of the queries with a right candidate among the first k; of equal scores the wrong one counts first."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    ahead = ((scores >= best) & ~right).sum(dim=1)
    return {k: (ahead < k).float().mean().item() for k in ks}


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
    model: QFormerRetrieval,
    processor: CaptionProcessor,
    samples: Sequence[Sample],
    *,
    rerank: int = 0,
    ks: Sequence[int] = KS,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> RetrievalResult:
    """Every picture against every caption of the samples. A candidate is right if its caption or picture is the same.

    Args:
        rerank: candidates of each query that the matching head reads too; 0 leaves the order by cosine.

    Raises:
        SampleError: a sample has no caption, or not exactly one readable picture.
    """
    was_training = model.training
    model.eval()
    collection = _Collection(model, processor, samples, batch_size, progress)
    by_cosine = query_similarity(collection.images.float(), collection.texts.float())
    to_text, to_image = by_cosine, by_cosine.T
    if rerank:
        to_text = collection.rerank(by_cosine, rerank)
        to_image = collection.rerank(by_cosine.T, rerank, from_text=True)
    model.train(was_training)
    right = same_pairs(samples)
    return RetrievalResult(
        recall(to_text.cpu(), right, ks),
        recall(to_image.cpu(), right.T, ks),
        chance(right, ks),
        len(samples),
        bool(rerank),
    )


def same_pairs(samples: Sequence[Sample]) -> Bool[Tensor, "M M"]:
    """Which samples say the same or show the same."""
    said = [(caption_of(sample), sample.images[0].key()) for sample in samples]
    return torch.tensor([[text == other or key == shown for other, shown in said] for text, key in said])


class _Collection:
    """Samples that were looked at once: vectors of pictures and captions, and what the matching head reads."""

    def __init__(
        self,
        model: QFormerRetrieval,
        processor: CaptionProcessor,
        samples: Sequence[Sample],
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        self.model, self.batch_size = model, batch_size
        padded = processor.pad([encode_caption(sample, processor)["input_ids"] for sample in samples])
        self.ids, self.mask = (padded[name].to(model.device) for name in ("input_ids", "attention_mask"))
        features, images, texts = [], [], []
        for start in range(0, len(samples), batch_size):
            rows = slice(start, start + batch_size)
            pixels = [load_pixels(samples[index], processor) for index in range(*rows.indices(len(samples)))]
            features.append(model.encode_images(torch.cat([p for p in pixels if p is not None]).to(model.device)))
            images.append(model.embed_images(model.patches(image_features=features[-1])))
            texts.append(model.embed_texts(self.ids[rows], self.mask[rows]))
            if progress is not None:
                progress(min(start + batch_size, len(samples)), len(samples))
        self.features, self.images, self.texts = torch.cat(features), torch.cat(images), torch.cat(texts)

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
        logits = [
            self.model.match(self.model.patches(image_features=self.features[p]), self.ids[t], self.mask[t])[:, 1]
            for p, t in zip(pictures.split(self.batch_size), texts.split(self.batch_size), strict=True)
        ]
        return torch.cat(logits)
