"""Whether every stage of a recipe fits the model and the data: found out on a copy, before anything is trained."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.schema import Samples
from chiasm.fusion.late import LateFusionModel
from chiasm.training.compiling import require_compiler
from chiasm.training.features import can_cache
from chiasm.training.late_stage import give_answer_head
from chiasm.training.learner import learner_of
from chiasm.training.schema import Recipe, Stage
from chiasm.training.source import Survey
from chiasm.training.stage_model import StageModel
from chiasm.training.stages import FreezePlan, enter, nothing_reached
from chiasm.training.starts import require_start


@dataclass(frozen=True)
class Fitted:
    """A stage that fits. `model` is what it finds; `read` what it reads of the data, if there is any."""

    number: int
    stage: Stage
    model: PreTrainedModel
    learner: StageModel
    plan: FreezePlan
    read: Survey | None


def require_fit(
    recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, samples: Samples, found: Survey
) -> None:
    """Refuses a recipe of which any stage does not fit.

    Raises:
        ValueError: a stage's plan does not fit the model, or the data has nothing for it.
    """
    for _ in fitted(recipe, model, processor, samples, found):
        pass


def fitted(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Samples | None = None,
    found: Survey | None = None,
) -> Iterator[Fitted]:
    """Every stage, entered by a second module tree over the weights; the model stays as it is.

    Raises:
        ValueError: as `require_fit`.
    """
    model = _same_weights(model)
    for number, stage in enumerate(recipe.stages):
        read = None if found is None or samples is None else found.of_stage(stage, samples)
        usable = None if found is None else found.usable
        if isinstance(model, LateFusionModel) and stage.objectives == ["answers"] and samples is not None:
            model = _same_weights(model)
            give_answer_head(model, stage, samples, range(len(samples)) if usable is None else usable)
        learner = learner_of(_same_weights(model), processor, stage, number, samples, usable)
        plan = enter(learner.model, stage)
        _refuse_unread(learner.model, plan)
        can_cache(learner.model, stage, plan)
        require_start(learner.model, stage, plan)
        if stage.compile and "language" in plan.states:
            require_compiler(model.device)
        yield Fitted(number, stage, model, learner, plan, read)


def _refuse_unread(model: PreTrainedModel, plan: FreezePlan) -> None:
    """Refuses a plan that tunes only what an encoder's features do not depend on; a pooling may read more."""
    pools = getattr(model.config, "vision_pooling", None) == "own"
    if pools or not all(name.startswith("vision.") for name in plan.trainable):
        return
    if hasattr(model.vision, "unused_parameters"):
        unread = {f"vision.{name}" for name in model.vision.unused_parameters()}
        if unread.issuperset(plan.trainable):
            raise nothing_reached(plan)


def _same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same weights, which a plan may change without touching the model."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared | {id(buffer): buffer for buffer in model.buffers()})
