"""One optimizer step: the losses of its batches, their gradients, the update, and what must hold of all three."""

import math
from dataclasses import dataclass, field
from functools import partial

import torch

from chiasm.data.collation import Batch
from chiasm.training.batches import seed_of
from chiasm.training.errors import TrainingError
from chiasm.training.optimizer import StageOptimizer
from chiasm.training.parallel import Engine
from chiasm.training.precision import autocast
from chiasm.training.schema import Stage
from chiasm.training.stages import FreezePlan, check_first_step, digests, require_reached
from chiasm.training.team import Team

NAMED = 8


@dataclass
class Taken:
    """What a step did in all processes: the loss of every objective, the norm of the gradient, counts, and warnings
    about the first one. `cut`: samples that lost the end of their answer; `example`: one of them, of this process."""

    losses: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    samples: int = 0
    supervised: int = 0
    tokens: int = 0
    cut: int = 0
    example: tuple[str, int] | None = None
    warnings: list[str] = field(default_factory=list)


class Optimization:
    """The steps of one stage.

    Args:
        number: the stage's place in the recipe.
        first_step: where it begins; the freeze plan is held against what this step does.
    """

    def __init__(
        self,
        engine: Engine,
        team: Team,
        plan: FreezePlan,
        optimizer: StageOptimizer,
        stage: Stage,
        number: int,
        first_step: int,
        dtype: torch.dtype,
    ) -> None:
        self.engine, self.team, self.plan, self.optimizer, self.stage = engine, team, plan, optimizer, stage
        self.number, self.first_step, self.dtype = number, first_step, dtype

    def take(self, step: int, batches: list[Batch]) -> Taken:
        """One step over all batches of it, weighted by supervised tokens, or by samples where these are compared: k
        small batches equal one large one, but for the number of candidates that a sample is compared with. Every
        process has its part of each batch, and all of them take the step that one process would take.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        torch.manual_seed(seed_of(self.stage.seed, self.number, step, *([self.team.rank] if self.team.rank else [])))
        check = step == self.first_step
        if check:
            self.engine.reshard()
        before = digests(self.engine.model) if check else {}
        counts = [[len(batch.ids), batch.supervised, batch.tokens, len(batch.cut)] for batch in batches]
        totals = self.team.sums([sum(column) for column in zip(*counts, strict=True)] or [0, 0, 0, 0])
        example = next((item for batch in batches for item in batch.cut.items()), None)
        samples, supervised, tokens, cut = map(int, totals)
        taken = Taken(samples=samples, supervised=supervised, tokens=tokens, cut=cut, example=example)
        if not taken.samples:
            return taken
        faulty = []
        for number, batch in enumerate(batches, 1):
            with self.engine.accumulate(last=number == len(batches)):
                finite = self._backward(batch, taken, check)
            faulty += [] if finite else [batch]
        taken.losses = dict(zip(taken.losses, self.team.sums(list(taken.losses.values())), strict=True))
        self._refuse_infinite("loss", sum(taken.losses.values()), step, faulty)
        taken.norm = self.optimizer.step(step)
        self._refuse_infinite("gradient", taken.norm, step, batches)
        if check:
            factor = self.optimizer.factor(step)
            taken.warnings = check_first_step(self.engine.model, self.plan, before, factor, self.stage.optimizer)
        self.optimizer.zero_grad()
        return taken

    def _backward(self, batch: Batch, taken: Taken, together: bool) -> bool:
        """Adds a batch's gradients and losses. DDP and FSDP average over processes what is a sum here.

        Args:
            together: all processes learn of a fault at once.

        Returns:
            Whether the loss is finite.

        Raises:
            ValueError: the loss depends on nothing that the plan trains.
        """
        device = self.engine.model.device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with autocast(device, self.dtype):
            shares = self.engine.losses(inputs, taken.samples, taken.supervised)
        for name, share in shares.items():
            taken.losses[name] = taken.losses.get(name, 0.0) + share.item()
        loss = torch.stack(list(shares.values())).sum()
        (self.team if together else Team()).all_do(partial(require_reached, loss, self.plan))
        (loss * self.team.size).backward()
        return math.isfinite(loss.item())

    def _refuse_infinite(self, what: str, value: float, step: int, batches: list[Batch]) -> None:
        """`batches`: this process's that may be at fault."""
        if math.isfinite(value):
            return
        ids = [sample for said in self.team.told([one for batch in batches for one in batch.ids]) for sample in said]
        listed = ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")
        self.team.stop_if_any(
            TrainingError(
                f"stage {self.stage.name!r}, step {step + 1}: the {what} is {value} on the samples {listed}; "
                "lower lr, or look at these samples; the last checkpoint is intact"
            )
        )
