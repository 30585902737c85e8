"""A data set as training sees it: looked through once before the first step, then one prepared sample at a time."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

from torch import Tensor

from chiasm.data.collation import Batch, Item, load_pixels
from chiasm.data.schema import DAMAGED_SHARD, Sample, SampleError, Samples, text_of
from chiasm.data.splits import hold_out, spread
from chiasm.training.closed_form import describes
from chiasm.training.features import Rows, with_hint
from chiasm.training.fingerprint import PictureFile, files_fingerprint, sample_fingerprint
from chiasm.training.reporter import Reporter
from chiasm.training.schema import Recipe, Stage
from chiasm.training.stage_model import StageModel

CHARACTERS_PER_TOKEN = 4
STEPS_WITHOUT_SAMPLES = 8
HELD_OUT_SHARE = 0.05
FEWEST_HELD_OUT = 2


@dataclass(frozen=True)
class Survey:
    """What one pass over the data found. `lengths` (in tokens, estimated) and `pictures` are aligned with `usable`;
    `files` are the distinct ones that hold pictures."""

    usable: list[int]
    lengths: list[int]
    pictures: list[int]
    fingerprint: str
    bad: dict[int, str] = field(default_factory=dict)
    files: tuple[PictureFile, ...] = ()

    def with_pictures_for(self, stage: Stage) -> "Survey":
        """The samples with as many pictures as a stage's objectives can use."""
        return self._kept([stage.takes(count) for count in self.pictures])

    def of_stage(self, stage: Stage, samples: Samples) -> "Survey":
        """The samples that a stage reads.

        Raises:
            ValueError: there are none.
        """
        found = self.with_pictures_for(stage)
        if stage.data != "all":
            captions = stage.data == "captions"
            found = found._kept([describes(samples[index]) == captions for index in found.usable])
        if not found.usable:
            what: str = ("captions" if stage.reads_captions else "questions") if stage.data == "all" else stage.data
            what = "pictures" if stage.reads_pictures else what
            count = " of one picture each" if stage.shows_one_picture else ""
            raise ValueError(f"stage {stage.name!r} reads {what}{count}, and the data has no such sample")
        return found

    def _kept(self, keep: list[bool]) -> "Survey":
        names = ("usable", "lengths", "pictures")
        columns: dict[str, Any] = {name: list(compress(getattr(self, name), keep)) for name in names}
        return replace(self, **columns)


def split(samples: Samples, validation_samples: Samples | None, recipe: Recipe) -> tuple[Samples, Samples]:
    """What is trained on, and what is held out: a share of the data where nothing else is given."""
    if validation_samples is not None or not recipe.validates or len(samples) < 2:
        return samples, validation_samples or []
    try:
        return hold_out(samples, max(HELD_OUT_SHARE, min(0.1, FEWEST_HELD_OUT / len(samples))))
    except SampleError as error:
        raise with_hint(error) from error


def survey(samples: Samples, tokens_per_image: int, skip_bad: bool, reporter: Reporter) -> Survey:
    """Looks at every sample's text, without opening a picture.

    Raises:
        SampleError: a sample is unusable and `skip_bad` is not set.
        ValueError: no sample is left.
    """
    digest, files = hashlib.sha256(), dict[PictureFile, int]()
    usable, lengths, pictures, bad = [], [], [], dict[int, SampleError]()
    with reporter.task("reading the data", len(samples)) as task:
        for index in range(len(samples)):
            try:
                sample = samples[index].validate()
            except SampleError as error:
                if not skip_bad:
                    raise with_hint(error) from error
                bad[index] = error
                digest.update(b"bad")
                if any(problem.kind == DAMAGED_SHARD for problem in error.problems):
                    reporter.note(f"going on without what is lost: {error}")
            else:
                usable.append(index)
                lengths.append(_length(sample, tokens_per_image))
                pictures.append(len(sample.images))
                digest.update(sample_fingerprint(sample, files))
            task.advance()
    if not usable:
        raise nothing_left(list(bad.values())) if bad else ValueError("the data holds no samples")
    reasons = {index: str(error) for index, error in bad.items()}
    return Survey(usable, lengths, pictures, digest.hexdigest(), reasons, tuple(files))


def picture_fingerprint(found: Survey, reporter: Reporter) -> str:
    """Of the content of the picture files; they may have moved."""
    if not found.files:
        return ""
    with reporter.task("looking at the pictures", len(found.files)) as task:
        return files_fingerprint(found.files, task.advance)


def nothing_left(skipped: Sequence[SampleError]) -> ValueError:
    """The error for data of which every sample was skipped: how many, why, and the first."""
    kinds = Counter(error.problems[0].kind for error in skipped)
    reasons = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
    return ValueError(
        f"nothing to train on: all of the {len(skipped)} samples so far were skipped ({reasons}), the first being "
        f"{skipped[0]}; chiasm data check lists every such sample"
    )


class Hope:
    """Ends a stage whose first `STEPS_WITHOUT_SAMPLES` steps, or all of them, had no sample that could be used."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self.last = min(first_step + STEPS_WITHOUT_SAMPLES, num_steps)
        self.skipped: dict[str, SampleError] = {}
        self.justified = False

    def after(self, done: int, had_samples: bool, skipped: dict[str, SampleError]) -> None:
        """Told of every step; raises a ValueError when there is no hope left."""
        self.justified = self.justified or had_samples
        if not self.justified:
            self.skipped |= skipped
            if done >= self.last:
                raise nothing_left(list(self.skipped.values()))


def usable_samples(samples: Samples, at_most: int, skip_bad: bool) -> tuple[list[Sample], list[SampleError]]:
    """At most so many samples, evenly spread over a data set, for a mixture's parts lie one behind the other; and what
    is wrong with those that cannot be used, if these are skipped.

    Raises:
        ValueError: a sample is unusable and `skip_bad` is not set.
    """
    chosen, bad = [], []
    few = spread(samples, at_most)
    for index in range(len(few)):
        try:
            chosen.append(few[index].validate())
        except SampleError as error:
            if not skip_bad:
                raise with_hint(error) from error
            bad.append(error)
    return chosen, bad


def _length(sample: Sample, tokens_per_image: int) -> int:
    characters = sum(len(text_of(message["content"])) for message in sample.messages)
    return characters // CHARACTERS_PER_TOKEN + tokens_per_image * len(sample.images)


@dataclass(frozen=True)
class Source:
    """Prepares samples: text as tokens, pictures as cached features or as pixels."""

    samples: Samples
    learner: StageModel
    rows: Rows | None = None
    skip_bad: bool = False

    def batch(self, indices: Sequence[int], pool: ThreadPoolExecutor) -> tuple[Batch | None, dict[str, SampleError]]:
        """Samples as one batch, and what is wrong with those that were left out by their ids.

        Tokenizers are not safe in several threads, so only pictures are decoded in the pool.

        Raises:
            ValueError: a sample is unusable and `skip_bad` is not set.
        """
        skipped: dict[str, SampleError] = {}
        ready: list[tuple[int, Sample, dict[str, list[int]]]] = []
        for index in indices:
            try:
                sample = self.samples[index]
                ready.append((index, sample, self.learner.encode(sample)))
            except SampleError as error:
                self._leave_out(error, skipped)
        items = []
        for (_, sample, tokens), pictures in zip(ready, pool.map(self._pictures, ready), strict=True):
            if isinstance(pictures, SampleError):
                self._leave_out(pictures, skipped)
            else:
                items.append(Item(sample.id, tokens, pictures, self.rows is not None))
        return (self.learner.collate(items) if items else None), skipped

    def fault(self, index: int) -> SampleError | None:
        """What is wrong with a sample's pictures, if they cannot be read."""
        pictures = self._pictures((index, self.samples[index], {}))
        return pictures if isinstance(pictures, SampleError) else None

    def _pictures(self, ready: tuple[int, Sample, dict[str, list[int]]]) -> Tensor | SampleError | None:
        index, sample, _ = ready
        try:
            return load_pixels(sample, self.learner.processor) if self.rows is None else self.rows.read(index, sample)
        except SampleError as error:
            return error

    def _leave_out(self, error: SampleError, skipped: dict[str, SampleError]) -> None:
        if not self.skip_bad:
            raise with_hint(error) from error
        skipped[error.sample_id] = error
