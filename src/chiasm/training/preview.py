"""`chiasm train --plan-only`: what a recipe would train, hold and take, before it does. The model stays as it is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.schema import Samples
from chiasm.data.splits import Subset
from chiasm.sources.cache import cache_folder, free_space
from chiasm.training.features import can_cache
from chiasm.training.fit import Fitted, fitted
from chiasm.training.log import plan_fields
from chiasm.training.pace import BATCHES, Pace, measure
from chiasm.training.precision import KEPT_PARTS, choose_dtype
from chiasm.training.reporter import Reporter, plan_table
from chiasm.training.schema import Recipe
from chiasm.training.source import split, survey
from chiasm.training.stages import ADAM_BYTES, GRADIENT_BYTES, FreezePlan, weight_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage holds at once. `copies`: of frozen weights, in the precision of the arithmetic; `activations`:
    what a batch keeps for its backward pass, None where no data was given to measure it."""

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        return self.weights + self.copies + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class StagePreview:
    """One stage. `steps`, `samples` and `seconds` are None where no data was given. `features`: bytes on disk of a
    frozen encoder's features for all pictures of the data, as if none were there yet."""

    plan: FreezePlan
    memory: Memory
    steps: int | None = None
    samples: int | None = None
    seconds_per_sample: float | None = None
    seconds: float | None = None
    features: int = 0

    def fields(self) -> dict[str, Any]:
        """The preview as plain values, as `--json` prints it."""
        names = ("steps", "samples", "seconds_per_sample", "seconds", "features")
        took = {key: getattr(self, key) for key in names}
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {"stage": self.plan.stage, **plan_fields(self.plan), "memory": memory, **took}


def preview(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Samples | None = None,
    reporter: Reporter | None = None,
    validation_samples: Samples | None = None,
) -> list[StagePreview]:
    """Every stage of a recipe.

    Args:
        samples: the training data, of which a few batches are taken to measure time and activations; as in training,
            a share of it is held out where there are no `validation_samples`.

    Raises:
        ValueError: a stage's plan does not fit the model, or a sample cannot be used.
    """
    found = None
    if samples is not None:
        samples, _ = split(samples, validation_samples, recipe)
        found = survey(samples, processor.num_image_tokens, recipe.skips_bad, reporter or Reporter("quiet"))
    return [_preview(stage, processor, samples) for stage in [*fitted(recipe, model, processor, samples, found)]]


def _preview(fit: Fitted, processor: ProcessorMixin, samples: Samples | None) -> StagePreview:
    stage, plan, learner, read = fit.stage, fit.plan, fit.learner, fit.read
    dtype = choose_dtype(stage.dtype, learner.model.device)
    if samples is None or read is None:
        return StagePreview(plan, _memory(learner.model, plan, dtype, None))
    samples = Subset(samples, read.usable)
    wanted = BATCHES * stage.batch_size
    few = Subset(samples, range(0, len(samples), max(1, len(samples) // wanted))[:wanted])
    pace = measure(fit.model, processor, stage, few, fit.number)
    steps = stage.num_steps(len(samples))
    visits = steps * stage.batch_size * stage.accumulate
    caches = can_cache(learner.model, stage, plan)
    encoded = min(visits, len(samples)) if caches else visits
    shown = sum(read.pictures) * encoded // len(samples) if caches else 0
    return StagePreview(
        plan,
        _memory(learner.model, plan, dtype, pace),
        steps,
        visits,
        pace.encode_seconds + pace.step_seconds,
        encoded * pace.encode_seconds + visits * pace.step_seconds,
        shown * pace.picture_bytes,
    )


def _memory(model: nn.Module, plan: FreezePlan, dtype: torch.dtype, pace: Pace | None) -> Memory:
    weights = copies = trained = 0
    four_bit = {f"{path}.base_layer.weight" for path in plan.four_bit}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        if plan.rates[name] is not None:
            trained, weights = trained + count, weights + 4 * count
        elif name in four_bit:
            weights += weight_bytes(parameter, in_four_bits=True)
        else:
            weights += weight_bytes(parameter)
            copied = parameter.dtype != dtype and name.split(".")[0] not in KEPT_PARTS
            copies += count * dtype.itemsize if copied else 0
    activations = None if pace is None else pace.activations
    return Memory(weights, copies, trained * GRADIENT_BYTES, trained * ADAM_BYTES, activations)


def print_preview(previews: Sequence[StagePreview], console: Console) -> None:
    """The same for people: a table and a line or two for each stage."""
    for stage in previews:
        console.print(plan_table(stage.plan))
        memory = {key: value for key, value in asdict(stage.memory).items() if value}
        listed = ", ".join(f"{key} {_megabytes(value)}" for key, value in memory.items())
        console.print(f"memory about {_megabytes(stage.memory.total)}: {listed}", highlight=False, soft_wrap=True)
        if stage.seconds is None:
            console.print("time and activations: pass --data to have them measured", highlight=False)
        else:
            console.print(
                f"time about {_duration(stage.seconds)}: {stage.steps:,} steps, {stage.samples:,} samples of "
                f"{1000 * (stage.seconds_per_sample or 0):,.0f} ms, measured on this machine",
                highlight=False,
                soft_wrap=True,
            )
        if stage.features:
            room, needed = free_space(), stage.features
            short = "; where they do not fit, every epoch encodes anew" if needed > room else ""
            console.print(
                f"disk at most about {_megabytes(needed)} for features of pictures in {cache_folder() / 'features'}, "
                f"{_megabytes(room)} are free{short}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _megabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
