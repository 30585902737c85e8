"""The shuffled-image control shows every sample pictures that are not its own."""

from dataclasses import replace
from typing import Any

import helpers
import torch

from chiasm.data.drawing import drawn
from chiasm.data.schema import Sample
from chiasm.training.parallel import Engine
from chiasm.training.source import Source, usable_samples
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


def test_a_picture_that_two_samples_ask_for_is_drawn_once() -> None:
    asked = [replace(helpers.sample(index), messages=drawn(words)) for index, words in enumerate(("a", "b", "a", None))]
    model = helpers.unified(helpers.VQ)
    learner, wanted = AnswerModel(model.model, model.processor), list[list[Sample]]()

    def score(samples: list[Sample]) -> dict[str, float]:
        wanted.append(samples)
        return {"drawn_recall": 1.0}

    made = Validator(learner, lambda samples: Source(samples, learner), asked, [], 4, 0, None, 3, score)
    assert made.run(torch.float32)["drawn_recall"] == 1
    assert wanted == [asked[:2]]


class Shards(Engine):
    """An engine that needs all processes for a loss."""

    @property
    def asked(self) -> Engine:
        return self


def test_a_model_in_shards_says_what_it_leaves_out() -> None:
    asked = [replace(helpers.sample(index), messages=drawn(words)) for index, words in enumerate("ab")]
    model = helpers.unified(helpers.VQ)
    learner = AnswerModel(model.model, model.processor)

    def told(answers: int, drawings: int) -> dict[str, Any]:
        source, samples = (lambda samples: Source(samples, learner)), [*asked, *helpers.samples(4)]
        functions = (lambda *_: []), (lambda _: {})
        made = Validator(learner, source, samples, [], 4, answers, functions[0], drawings, functions[1])
        return made.run(torch.float32, Shards(learner))

    for answers, drawings, words in ((2, 2, "answers and draws"), (2, 0, "answers"), (0, 2, "draws")):
        assert told(answers, drawings)["unanswered"].startswith(f"a model in shards (fsdp) {words} nothing while")
    assert "unanswered" not in told(0, 0)


def test_without_pictures_there_is_no_control() -> None:
    made, _ = validator([helpers.sample(index, images=0) for index in range(3)], 2)
    result = made.run(torch.float32)
    assert result["shuffled_loss"] is None and result["answers"] == []


def test_few_samples_are_spread_over_the_data() -> None:
    """A mixture's data sets lie one behind the other, and validation looks at all of them."""
    chosen, _ = usable_samples(helpers.samples(20), 4, skip_bad=False)
    assert [sample.id for sample in chosen] == ["s0", "s5", "s10", "s15"]
    assert len(usable_samples(helpers.samples(3), 4, skip_bad=False)[0]) == 3
    assert usable_samples(helpers.samples(3), 0, skip_bad=False) == usable_samples([], 4, skip_bad=False) == ([], [])
    learner = AnswerModel((model := helpers.vlm()).model, model.processor)
    made = Validator(learner, lambda samples: Source(samples, learner), helpers.samples(8), [], 4, 2, None)
    assert [sample.id for sample in made.asked] == ["s0", "s4"]
