"""What a stage trains and by which losses, told by the model's fusion."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.schema import Samples
from chiasm.fusion.late import LateFusionModel
from chiasm.training.late_stage import give_answer_head, late_stage_model
from chiasm.training.schema import Stage
from chiasm.training.stage_model import StageModel, stage_model
from chiasm.training.tokenizer_stage import tokenizer_stage


def learner_of(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    number: int,
    samples: Samples | None,
    usable: Sequence[int] | None = None,
    taught: Path | None = None,
) -> StageModel:
    """The model itself, or a learner around it. New weights are a function of the stage's seed and the data.

    Args:
        samples: the training data, whose answers a new answer head knows.
        usable: indices of those that count; all where it is None.
        taught: the retrieval model of an earlier stage (`stage_model`).

    Raises:
        ValueError: the stage does not fit the model, or a new answer head has no data to know its answers from.
    """
    if stage.reads_pictures:
        return tokenizer_stage(model, processor, stage.name)
    if not isinstance(model, LateFusionModel):
        return stage_model(model, processor, stage, number, taught)
    if stage.objectives == ["answers"] and model.config.answer_head is None:
        if samples is None:
            raise ValueError(f"stage {stage.name!r} takes its answers from the data; pass --data")
        give_answer_head(model, stage, samples, range(len(samples)) if usable is None else usable)
    return late_stage_model(model, processor, stage)
