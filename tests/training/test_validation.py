"""The shuffled-image control shows every sample pictures that are not its own."""

import helpers
import torch

from chiasm.data.schema import Sample
from chiasm.training.source import Source
from chiasm.training.stage_model import AnswerModel
from chiasm.training.validation import Validator, mean_losses, with_wrong_pictures


def keys(sample: Sample) -> set[str]:
    return {ref.key() for ref in sample.images}


def test_wrong_pictures_are_as_many_and_none_of_the_own() -> None:
    data = [*helpers.samples(12), helpers.sample(0), helpers.sample(4, images=2)]
    swapped = with_wrong_pictures(data, [])
    for sample, other in zip(data, swapped, strict=True):
        assert other is not None and other.messages == sample.messages and len(other.images) == len(sample.images)
        assert not keys(sample) & keys(other)


def test_a_picture_without_another_has_no_control_unless_others_lend_one() -> None:
    data = [helpers.sample(0), helpers.sample(0)]
    assert with_wrong_pictures(data, []) == [None, None]
    lent = with_wrong_pictures(data, [helpers.sample(1)])
    assert all(sample is not None and keys(sample) == keys(helpers.sample(1)) for sample in lent)
    assert with_wrong_pictures([helpers.sample(0, images=0)], []) == [helpers.sample(0, images=0)]


def validator(data: list[Sample], size: int) -> tuple[Validator, torch.nn.Module]:
    model = helpers.vlm()
    learner = AnswerModel(model.model, model.processor)
    return Validator(learner, lambda samples: Source(samples, learner), data, [], size, 0, None), model.model


def test_the_loss_is_per_supervised_token_whatever_the_batches() -> None:
    data = helpers.samples(12)
    losses = []
    for size in (1, 5, 12):
        made, model = validator(data, size)
        losses.append(made.run(torch.float32))
    assert made.controlled and losses[0]["samples"] == 12
    for one in losses[1:]:
        assert abs(one["loss"] - losses[0]["loss"]) < 1e-5
        assert abs(one["shuffled_loss"] - losses[0]["shuffled_loss"]) < 1e-5
    made, model = validator(data, 12)
    with torch.no_grad():
        direct = model(**made.right[0].inputs).loss
    assert abs(mean_losses(made.learner, made.right, torch.float32)["next_token"] - direct.item()) < 1e-5


def test_without_pictures_there_is_no_control() -> None:
    made, _ = validator([helpers.sample(index, images=0) for index in range(3)], 2)
    result = made.run(torch.float32)
    assert result["shuffled_loss"] is None and result["answers"] == []
