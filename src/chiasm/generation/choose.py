"""From logits to a token: penalties, biases, temperature and the cuts by rank and share, in transformers' order."""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from chiasm.generation.decoding import Decoding

SMALLEST = torch.finfo(torch.float32).tiny


def adjusted(logits: Float[Tensor, " V"], seen: Int[Tensor, " S"] | None, decoding: Decoding) -> Float[Tensor, " V"]:
    """Logits after the repetition penalty.

    Args:
        seen: tokens of the prompt and the answer, which the penalty is for.
    """
    logits = logits.float()
    if seen is None or decoding.repetition_penalty == 1.0:
        return logits
    seen = seen[seen < logits.shape[0]]  # a placeholder may lie beyond the vocabulary
    found, penalty = logits[seen], decoding.repetition_penalty
    return logits.index_put((seen,), torch.where(found < 0, found * penalty, found / penalty))


def biased(logits: Float[Tensor, " V"], answered: Sequence[int], decoding: Decoding) -> Float[Tensor, " V"]:
    """Logits with what a request adds to them: its own biases, and penalties of the tokens that the answer has."""
    if not decoding.biased:
        return logits
    change = dict(decoding.logit_bias)
    for token, times in Counter(answered).items():
        penalty = times * decoding.frequency_penalty + decoding.presence_penalty
        change[token] = change.get(token, 0.0) - penalty
    tokens = torch.tensor([*change], dtype=torch.long, device=logits.device)
    return logits.index_add(0, tokens, torch.tensor([*change.values()], dtype=logits.dtype, device=logits.device))


def choose(logits: Float[Tensor, " V"], decoding: Decoding, generator: torch.Generator | None) -> int:
    """The likeliest token, or one drawn from what temperature, `top_k`, `top_p` and `min_p` leave."""
    if decoding.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / max(decoding.temperature, SMALLEST)  # however small, the likeliest stays finite
    if 0 < decoding.top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(decoding.top_k).values[-1], -torch.inf)
    if decoding.top_p < 1:
        ordered, order = logits.sort()
        cut = ordered.softmax(dim=0).cumsum(dim=0) <= 1 - decoding.top_p
        cut[-1] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(0, order, cut), -torch.inf)
    if decoding.min_p > 0:
        shares = logits.softmax(dim=0)
        logits = logits.masked_fill(shares < decoding.min_p * shares.max(), -torch.inf)
    return int(torch.multinomial(logits.softmax(dim=0), 1, generator=generator))


class Biases(LogitsProcessor):
    """`biased` for `transformers.generate`.

    Args:
        start: tokens in front of the answers.
    """

    def __init__(self, decoding: Decoding, start: int) -> None:
        self.decoding, self.start = decoding, start

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        rows = zip(scores, input_ids[:, self.start :].tolist(), strict=True)
        return torch.stack([biased(row, answered, self.decoding) for row, answered in rows])


class Chooser(LogitsProcessor):
    """The same for `transformers.generate`, which then takes what was drawn for its likeliest; each row by itself."""

    def __init__(self, decoding: Decoding, device: torch.device, rows: int) -> None:
        self.decoding = decoding
        self.generators = [generator(decoding, device) for _ in range(rows)]

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        rows = zip(scores, self.generators, strict=True)
        chosen = torch.tensor([choose(row, self.decoding, own) for row, own in rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def generator(decoding: Decoding, device: torch.device) -> torch.Generator | None:
    """An answer's own random numbers, where it has a seed."""
    return None if decoding.seed is None else torch.Generator(device).manual_seed(decoding.seed)


def logprobs(logits: Float[Tensor, " V"], token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The chosen token's log-probability, and the likeliest tokens with theirs."""
    logs = logits.log_softmax(dim=0)
    best = logs.topk(min(count, logs.shape[0]))
    return logs[token].item(), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
