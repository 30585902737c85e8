"""One budget for every cell, as a number of samples: what a sample takes is counted, or measured."""

import copy
from statistics import fmean

import torch
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.comparison.flops import counted
from chiasm.comparison.schema import Budget
from chiasm.data.schema import Samples
from chiasm.data.splits import spread
from chiasm.fusion.late import LateFusionModel
from chiasm.training.learner import learner_of
from chiasm.training.pace import BATCHES, frozen_encoder, measure, one_item
from chiasm.training.reporter import Reporter
from chiasm.training.schema import Recipe, Stage
from chiasm.training.stages import enter

LENGTHS, STEPS = 64, 8
"""Samples, evenly spread, whose lengths stand for all, and those that go through a step to count its FLOPs."""


def samples_within(
    budget: Budget, model: PreTrainedModel, processor: ProcessorMixin, recipe: Recipe, samples: Samples
) -> int:
    """Samples of the recipe's last stage that the budget pays for, at least one batch.

    Raises:
        ValueError: the budget counts what this kind of model has not.
    """
    stage, number = recipe.stages[-1], len(recipe.stages) - 1
    if budget.samples is not None:
        return budget.samples
    if budget.minutes is not None:
        pace = measure(model, processor, stage, spread(samples, BATCHES * stage.batch_size), number)
        each = pace.step_seconds / 60
    elif budget.flops is not None:
        each = training_flops(model, processor, stage, samples, number)
    elif isinstance(model, LateFusionModel):
        raise ValueError("budget tokens is not counted for late fusion, which has no sequence; take samples or flops")
    else:
        learner = learner_of(model, processor, stage, number, samples)
        each = fmean(len(learner.encode(sample)["input_ids"]) for sample in spread(samples, LENGTHS))
    return max(stage.batch_size, int(budget.amount / each))


def training_flops(
    model: PreTrainedModel, processor: ProcessorMixin, stage: Stage, samples: Samples, number: int = 0
) -> float:
    """FLOPs of one sample of a stage, forward and backward: the mean of some that go through a copy of the model one by
    one. What runs once before the first step is not counted: a frozen encoder, and late fusion's frozen text tower.

    Args:
        number: the stage's place in its recipe.
    """
    learner = learner_of(copy.deepcopy(model), processor, stage, number, samples)
    model, few = learner.model, spread(samples, STEPS)
    encode = frozen_encoder(model, enter(model, stage))
    learner.prepare(few, range(len(few)), Reporter("quiet"))
    found = []
    for sample in few:
        batch = learner.collate([one_item(sample, learner, encode)])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
        with counted() as flops:
            losses = learner.losses(inputs, len(batch.ids), batch.supervised)
            torch.stack(list(losses.values())).sum().backward()
        found.append(flops.total)
        model.zero_grad()
    return fmean(found)
