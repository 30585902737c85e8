"""Validation with its control: the same questions about a wrong picture must be harder, or nothing was seen."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from chiasm.data.collation import Batch
from chiasm.data.drawing import asked_in_words
from chiasm.data.schema import ImageError, Sample, Samples
from chiasm.language.adapter import ContextError
from chiasm.objectives.processes import alone
from chiasm.training.parallel import Engine
from chiasm.training.precision import autocast
from chiasm.training.source import Source
from chiasm.training.stage_model import StageModel
from chiasm.training.team import Team

Generate = Callable[[list[list[dict]], list[list[Image.Image]]], list[str]]
ScoreDrawings = Callable[[Sequence[Sample]], dict[str, Any]]
"""Draws what samples ask for; the scores for the log."""
IN_SHARDS = "a model in shards (fsdp) {} nothing while it trains; chiasm eval asks it afterwards"


class Validator:
    """Held-out samples as batches, once with their own pictures and once with wrong ones."""

    def __init__(
        self,
        learner: StageModel,
        source: Callable[[Samples], Source],
        samples: Samples,
        others: Samples,
        batch_size: int,
        num_answers: int,
        generate: Generate | None,
        num_drawings: int = 0,
        score_drawings: ScoreDrawings | None = None,
    ) -> None:
        """
        Args:
            source: prepares samples as training does.
            samples: the held-out samples.
            others: more samples whose pictures may serve as wrong ones.
            score_drawings: draws `num_drawings` of the pictures that held-out samples ask for, each words' once.
        """
        self.learner = learner
        swapped = with_wrong_pictures(samples, others) if learner.controlled else [None] * len(samples)
        kept = [index for index, sample in enumerate(swapped) if sample is not None]
        self.controlled = any(samples[index].images for index in kept)
        if self.controlled:
            samples = [samples[index] for index in kept]
        self.right = _batches(source(samples), batch_size)
        self.wrong = _batches(source([s for s in swapped if s is not None]), batch_size) if self.controlled else []
        self.generate = generate if learner.answers else None
        requests: dict[str, Sample] = {}
        for sample in samples:
            if (words := asked_in_words(sample)) is not None:
                requests.setdefault(words, sample)
        self.wanted = [*requests.values()][:num_drawings] if learner.answers else []
        self.score_drawings = score_drawings
        answered = [sample for sample in samples if sample.answer.strip()]
        self.asked = answered[:: max(1, len(answered) // max(1, num_answers))][:num_answers]
        self.num_samples = sum(len(batch.ids) for batch in self.right)

    def run(self, dtype: torch.dtype, engine: Engine | None = None, team: Team | None = None) -> dict[str, Any]:
        """The validation's fields in the log. Processes with whole models share the work; the first one answers."""
        team, asked = team or Team(), self.learner if engine is None else engine.asked
        right = mean_losses(asked, self.right, dtype, team)
        wrong = mean_losses(asked, self.wrong, dtype, team) if self.controlled else {}
        result: dict[str, Any] = {"loss": sum(right.values()), "samples": self.num_samples}
        result["shuffled_loss"] = sum(wrong.values()) if wrong else None
        result |= by_objective(right) | by_objective(wrong, "shuffled_loss")
        if isinstance(asked, Engine) or not team.first:
            left = self._left_out() if isinstance(asked, Engine) else ""
            return result | {"answers": []} | ({"unanswered": IN_SHARDS.format(left)} if left else {})
        result |= self.learner.measures(self.right)
        if self.score_drawings is not None and self.wanted:
            with autocast(self.learner.model.device, dtype):
                result |= self.score_drawings(self.wanted)
        try:
            result["answers"] = self._answers(dtype)
        except ContextError as error:
            result |= {"answers": [], "unanswered": str(error)}
        return result

    def _left_out(self) -> str:
        """What a validation that only computes losses does not do, in a word or two."""
        left = {"answers": self.generate and self.asked, "draws": self.score_drawings and self.wanted}
        return " and ".join(word for word, wanted in left.items() if wanted)

    def _answers(self, dtype: torch.dtype) -> list[dict[str, Any]]:
        if self.generate is None or not self.asked:
            return []
        asked, images = [], []
        for sample in self.asked:
            try:
                pictures = [ref.load() for ref in sample.images]
            except ImageError:
                continue
            asked.append(sample)
            images.append(pictures)
        if not asked:
            return []
        with autocast(self.learner.model.device, dtype):
            given = self.generate([sample.prompt for sample in asked], images)
        return [
            {
                "id": sample.id,
                "question": sample.question,
                "answer": answer,
                "expected": sample.answer,
                "correct": _plain(answer) == _plain(sample.answer),
                **({"skill": sample.skill} if sample.skill else {}),
            }
            for sample, answer in zip(asked, given, strict=True)
        ]


@torch.no_grad()
def mean_losses(
    learner: StageModel | Engine, batches: Sequence[Batch], dtype: torch.dtype, team: Team | None = None
) -> dict[str, float]:
    """Each objective's loss, per supervised token or per sample, over all batches.

    Negatives are drawn alike each time: the trainer seeds its random numbers again before every step.
    """
    torch.manual_seed(0)
    device = learner.model.device
    samples, tokens = sum(len(batch.ids) for batch in batches), sum(batch.supervised for batch in batches)
    team = Team() if team is None or isinstance(learner, Engine) else team
    losses: dict[str, float] = {}
    for batch in batches[team.rank :: team.size]:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with autocast(device, dtype), alone():
            shares = learner.losses(inputs, samples, tokens)
        for name, share in shares.items():
            losses[name] = losses.get(name, 0.0) + share.item()
    parts = team.told(losses)
    return {name: sum(part.get(name, 0.0) for part in parts) for part in parts for name in part}


def by_objective(losses: dict[str, float], prefix: str = "loss") -> dict[str, float]:
    """Fields of the log for several objectives: `loss_contrastive` and so on; one objective's loss is `loss` itself."""
    return {f"{prefix}_{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}


def with_wrong_pictures(samples: Samples, others: Samples) -> list[Sample | None]:
    """Every sample with as many pictures of another one, none of which is its own; None where there is no such other.

    Samples without pictures stay as they are.
    """
    pool = [*samples, *others]
    keys = [_keys(sample) for sample in pool]
    swapped: list[Sample | None] = []
    for index, sample in enumerate(samples):
        turned = [*range(index + 1, len(pool)), *range(index)]
        donors = (
            pool[other]
            for other in turned
            if len(pool[other].images) == len(sample.images) and not keys[other] & keys[index]
        )
        donor = next(donors, None) if sample.images else sample
        swapped.append(replace(sample, images=donor.images) if donor is not None else None)
    return swapped


def _keys(sample: Sample) -> set[str]:
    try:
        return {ref.key() for ref in sample.images}
    except ImageError:
        return set()


def _batches(source: Source, size: int) -> list[Batch]:
    with ThreadPoolExecutor(4) as pool:
        starts = range(0, len(source.samples), size)
        made = (source.batch(range(s, min(s + size, len(source.samples))), pool)[0] for s in starts)
        return [batch for batch in made if batch is not None]


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".!").strip().casefold()
