"""One budget for every cell, as a number of samples: what a sample takes is counted in closed form, or measured."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from chiasm.comparison.cost import encode_flops, language_flops
from chiasm.comparison.schema import Budget
from chiasm.comparison.seq2seq_cost import seq2seq_cost
from chiasm.data.schema import Sample
from chiasm.fusion.base import FusionModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.training.learner import learner_of
from chiasm.training.pace import BATCHES, measure
from chiasm.training.schema import Recipe

COUNTED = 64
"""Samples, evenly spread, whose lengths stand for all."""


def samples_within(
    budget: Budget, model: PreTrainedModel, processor: ProcessorMixin, recipe: Recipe, samples: Sequence[Sample]
) -> int:
    """Samples of the recipe's last stage that the budget pays for, at least one batch.

    Raises:
        ValueError: the budget counts what this kind of model has not.
    """
    stage = recipe.stages[-1]
    if budget.samples is not None:
        return budget.samples
    step = max(1, len(samples) // COUNTED)
    shown = [samples[index] for index in range(0, len(samples), step)][:COUNTED]
    if budget.minutes is not None:
        few = shown[: BATCHES * stage.batch_size]
        pace = measure(model, processor, stage, few, len(recipe.stages) - 1)
        return max(stage.batch_size, int(60 * budget.minutes / pace.step_seconds))
    if not isinstance(model, FusionModel):
        raise ValueError(f"budget {budget.kind} is not counted for late fusion, which has no sequence; take samples")
    learner = learner_of(model, processor, stage, len(recipe.stages) - 1, shown)
    encoded = [learner.encode(sample) for sample in shown]
    lengths = [len(tokens["input_ids"]) for tokens in encoded]
    if budget.tokens is not None:
        return max(stage.batch_size, int(budget.tokens / fmean(lengths)))
    pictures = fmean(len(sample.images) for sample in shown)
    tuned = {name: plan.tune for name, plan in stage.parts.items()}
    answer = fmean(len(tokens["labels"]) for tokens in encoded)
    each = training_flops(model, fmean(lengths), pictures, tuned, answer)
    return max(stage.batch_size, int(budget.amount / each))


def training_flops(
    model: FusionModel, places: float, pictures: float, tuned: Mapping[str, str], answer: float = 1
) -> int:
    """FLOPs of one sample of training: a forward, the gradients of what comes behind the first thing that learns, and
    those of weights that learn themselves. A frozen encoder is not counted: it runs once for all cells.

    Args:
        places: of the sample in the sequence.
        tuned: part -> how it is tuned.
        answer: tokens of the answer where a decoder of its own reads them.
    """
    length = round(places)
    if model.config.is_encoder_decoder:
        once = seq2seq_cost(model.language, length)
        language = once.prefill_flops + max(0, round(answer) - 1) * once.decode_flops
    else:
        language = language_flops(model, new=length, context=length, logits=length)
    total = language * (3 if tuned.get("language") == "full" else 2)
    if hasattr(model, "connector"):
        total += round(3 * pictures * model.connector.flops())
    if isinstance(model, IntermediateFusionModel):
        seen = max(1, round(pictures)) * model.connector.num_tokens
        total += 3 * (model.cross_attention.flops(length, seen) + model.cross_attention.keys_values_flops(seen))
    if tuned.get("vision", "frozen") != "frozen":
        flops: Any = getattr(model.vision, "flops", None)
        total += 3 * round(pictures) * (flops() if flops is not None else encode_flops(model.vision))
    return total
