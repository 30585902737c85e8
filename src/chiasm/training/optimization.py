"""One optimizer step: the losses of its batches, their gradients, the update, and what must hold of all three."""

import math
from dataclasses import dataclass, field

import torch

from chiasm.data.collation import Batch
from chiasm.training.batches import seed_of
from chiasm.training.checkpoint import TrainingError
from chiasm.training.optimizer import StageOptimizer
from chiasm.training.precision import autocast
from chiasm.training.schema import Stage
from chiasm.training.stage_model import StageModel
from chiasm.training.stages import FreezePlan, check_first_step, digests

NAMED = 8


@dataclass
class Taken:
    """What a step did: the loss of every objective, the norm of the gradient, and warnings about the first one."""

    losses: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    warnings: list[str] = field(default_factory=list)


class Optimization:
    """The steps of one stage.

    Args:
        number: the stage's place in the recipe.
        first_step: where it begins; the freeze plan is held against what this step does.
    """

    def __init__(
        self,
        learner: StageModel,
        plan: FreezePlan,
        optimizer: StageOptimizer,
        stage: Stage,
        number: int,
        first_step: int,
        dtype: torch.dtype,
    ) -> None:
        self.learner, self.plan, self.optimizer, self.stage = learner, plan, optimizer, stage
        self.number, self.first_step, self.dtype = number, first_step, dtype

    def take(self, step: int, batches: list[Batch]) -> Taken:
        """One step over all batches of it, weighted by supervised tokens, or by samples where these are compared: k
        small batches equal one large one, but for the number of candidates that a sample is compared with.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        model, taken = self.learner.model, Taken()
        torch.manual_seed(seed_of(self.stage.seed, self.number, step))
        check = step == self.first_step
        before = digests(model) if check else {}
        samples, tokens = sum(len(batch.ids) for batch in batches), sum(batch.supervised for batch in batches)
        for batch in batches:
            self._backward(step, batch, samples, tokens, taken)
        taken.norm = self.optimizer.step(step) if batches else 0.0
        self._refuse_infinite("gradient", taken.norm, step, batches)
        if check and batches:
            taken.warnings = check_first_step(model, self.plan, before, self.optimizer.factor(step))
        self.optimizer.zero_grad()
        return taken

    def _backward(self, step: int, batch: Batch, samples: int, tokens: int, taken: Taken) -> None:
        device = self.learner.model.device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with autocast(device, self.dtype):
            shares = self.learner.losses(inputs, samples, tokens)
        for name, share in shares.items():
            taken.losses[name] = taken.losses.get(name, 0.0) + share.item()
        self._refuse_infinite("loss", sum(taken.losses.values()), step, [batch])
        torch.stack(list(shares.values())).sum().backward()

    def _refuse_infinite(self, what: str, value: float, step: int, batches: list[Batch]) -> None:
        if math.isfinite(value):
            return
        ids = [sample for batch in batches for sample in batch.ids]
        listed = ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")
        raise TrainingError(
            f"stage {self.stage.name!r}, step {step + 1}: the {what} is {value} on the samples {listed}; "
            "lower lr, or look at these samples"
        )
