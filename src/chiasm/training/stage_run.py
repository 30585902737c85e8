"""One stage of a run: an explicit loop over optimizer steps, with what stands before, between and after them.

A start (`starts`), then steps (`optimization`), told by `stage_log` and kept by `stage_state`.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import torch

from chiasm.data.collation import Batch
from chiasm.data.schema import Sample, SampleError, Samples
from chiasm.training.attention import fast_attention
from chiasm.training.batches import WORKERS, Order, prefetch, seed_of
from chiasm.training.compiling import compiled_layers
from chiasm.training.context import Context
from chiasm.training.errors import TrainingError
from chiasm.training.features import Rows, stage_features
from chiasm.training.four_bit import four_bit_layers
from chiasm.training.gradient_checkpointing import checkpointed_layers
from chiasm.training.learner import learner_of
from chiasm.training.optimization import Optimization, Taken
from chiasm.training.optimizer import StageOptimizer
from chiasm.training.parallel import engine, on_cpu
from chiasm.training.precision import choose_dtype, stage_precision
from chiasm.training.schema import Stage
from chiasm.training.source import Hope, Source, usable_samples
from chiasm.training.stage_log import StageLog
from chiasm.training.stage_model import StageModel
from chiasm.training.stage_state import StageState
from chiasm.training.stages import enter, set_modes
from chiasm.training.starts import Start
from chiasm.training.termination import Terminated, hears_sigterm
from chiasm.training.validation import Validator

SPARE_PICTURES = 8


class StageRun:
    """One stage of a run, from the freeze plan to the model folder."""

    def __init__(self, context: Context, number: int, stage: Stage, earlier: Sequence[Stage] = ()) -> None:
        """
        Args:
            earlier: the recipe's stages before this one.
        """
        self.context, self.number, self.stage = context, number, stage
        self.new_objectives = not earlier or earlier[-1].objectives != stage.objectives
        self.learner = self._learner(earlier)
        self.model = self.learner.model
        self.log = StageLog(context.run.log, context.reporter, stage, self.model)
        self.team, self.device = context.team, self.model.device
        self.dtype = choose_dtype(stage.dtype, self.device)
        self.resumed = context.run.resumed_in(stage.name)
        self.first_step = self.resumed.position.step if self.resumed is not None else 0
        self.left_out = len(context.survey.usable) - len(context.survey.with_pictures_for(stage).usable)
        survey = context.survey.of_stage(stage, context.samples)
        self.shows_pictures = any(survey.pictures)
        self.order = Order(survey.usable, survey.lengths if stage.group_by_length else None, stage, number)
        self.num_steps = stage.num_steps(len(survey.usable))
        self.told_to_end = False

    def _learner(self, earlier: Sequence[Stage]) -> StageModel:
        """What the stage trains: the model itself, or a learner around it."""
        context, stage = self.context, self.stage
        taught = [context.run.folder / other.name for other in earlier if other.reads_captions]
        data = context.samples, context.survey.usable
        return learner_of(context.model, context.processor, stage, self.number, *data, taught[-1] if taught else None)

    def run(self) -> None:
        began = time.monotonic()
        torch.manual_seed(seed_of(self.stage.seed, self.number))
        self.plan = self.team.all_do(lambda: enter(self.model, self.stage))
        self.log.plan(self.plan, self.first_step, self.num_steps, self.dtype)
        if self.left_out:
            need = "a picture" if self.stage.reads_pictures else "exactly one picture"
            self.log.warn(self.first_step, f"{self.left_out} samples do not have {need} and are left out")
        if not self.shows_pictures:
            self.log.warn(self.first_step, "the data has no pictures, so only the language model can learn from it")
        self._prepare_data()
        if self.resumed is None:
            start = Start(self.context, self.stage, self.plan, self.model, self._source, self.features)
            self.team.all_do(start.run)
        with ExitStack() as context:
            if self.team.size > 1 and self.stage.parallel == "fsdp":
                context.enter_context(on_cpu(self.model))
            originals = context.enter_context(stage_precision(self.model, self.dtype))
            self.state = StageState(self.context, self.stage, self.learner, self.plan, originals)
            if self.resumed is not None:
                self.state.restore(self.resumed)
            context.enter_context(four_bit_layers(self.model, self.plan.four_bit, self.dtype, originals))
            self.engine = context.enter_context(engine(self.learner, self.team, self.stage.parallel, self.device))
            if "language" in self.plan.states:
                context.enter_context(fast_attention(self.engine.model.language, self.dtype))
                context.enter_context(compiled_layers(self.engine.model.language, self.stage.compile))
            context.enter_context(checkpointed_layers(self.engine.model, self.stage.gradient_checkpointing))
            self.optimizer = StageOptimizer(self.engine.model, self.plan, self.stage, self.num_steps)
            if self.resumed is not None:
                self.state.restore_moments(self.resumed, self.optimizer)
            self.steps = Optimization(
                self.engine,
                self.team,
                self.plan,
                self.optimizer,
                self.stage,
                self.number,
                self.first_step,
                self.dtype,
            )
            self._loop()
        self._finish(time.monotonic() - began)
        if self.told_to_end and self.stage.name != self.context.run.stages[-1]:
            raise Terminated(self.stage.name, self.num_steps)

    def _loop(self) -> None:
        """Steps from the first to the last, with what is due between them.

        Raises:
            Terminated: one of the processes was told to end, and the checkpoint is written.
        """
        pool, hope = ThreadPoolExecutor(WORKERS), Hope(self.first_step, self.num_steps)
        task = self.context.reporter.task(f"stage {self.stage.name}", self.num_steps, self.first_step)
        batches = closing(prefetch(self._batches, self.first_step, self.num_steps))
        with pool as self.pool, task as self.task, batches as ready, hears_sigterm() as told:
            if self.first_step == 0 and self.new_objectives:
                self._validate(0)
            started = saved = time.monotonic()
            for step in range(self.first_step, self.num_steps):
                done = step + 1
                own, skipped = self.team.all_do(lambda: next(ready))
                taken = self.steps.take(step, own)
                skipped = self._skipped_by_all(skipped)
                self._log_step(step, skipped, taken, time.monotonic() - started)
                hope.after(done, bool(taken.samples), skipped)
                if done == self.num_steps or (self.stage.validation.every and done % self.stage.validation.every == 0):
                    self._validate(done)
                due, self.told_to_end = self.team.agree(
                    self.stage.checkpoint_due(done, time.monotonic() - saved), told()
                )
                if done < self.num_steps and (due or self.told_to_end):
                    self.state.save(done, self.optimizer)
                    saved = time.monotonic()
                    if self.told_to_end:
                        raise Terminated(self.stage.name, done)
                started = time.monotonic()

    def _skipped_by_all(self, skipped: dict[str, SampleError]) -> dict[str, SampleError]:
        if self.team.size == 1 or not self.team.sums([len(skipped)])[0]:
            return skipped
        return {name: error for part in self.team.told(skipped) for name, error in part.items()}

    def _log_step(self, step: int, skipped: dict[str, SampleError], taken: Taken, seconds: float) -> None:
        for warning in taken.warnings:
            self.log.warn(step + 1, warning)
        self.log.step(step + 1, skipped, taken, self.optimizer.rates(step), seconds, self.task)

    def _batches(self, step: int) -> tuple[list[Batch], dict[str, SampleError]]:
        """This process's part of a step's batches, and the samples that were left out; runs in another thread, ahead
        of the steps. Where processes wait for each other, every one has as many batches."""
        made = [self.source.batch(self.team.share(indices), self.pool) for indices in self.order.step(step)]
        skipped = {sample: reason for _, reasons in made for sample, reason in reasons.items()}
        if self.team.size > 1:
            return [self.learner.filler() if batch is None else batch for batch, _ in made], skipped
        return [batch for batch, _ in made if batch is not None], skipped

    def _prepare_data(self) -> None:
        context, stage = self.context, self.stage
        self.features = stage_features(
            self.model, context.processor, stage, self.plan, self.dtype, context.reporter, context.cache_root
        )
        rows = None
        if (features := self.features) is not None:
            visited = self.order.visited(self.num_steps)
            if self.team.size > 1:
                self.team.all_do(lambda: features.fill(context.samples, self.team.share(visited), len(visited)))
                features.cache.refresh()
            rows = self.team.all_do(lambda: features.fill(context.samples, visited))
            self.features = self.features if rows is not None else None
        self.source = self._source(context.samples, rows)
        self.learner.prepare(context.samples, self.order.visited(self.num_steps), context.reporter)
        self.validator = self.team.all_do(self._validator)

    def _source(self, samples: Samples, rows: Rows | None = None) -> Source:
        if rows is None and self.features is not None:
            rows = self.features.fill(samples, range(len(samples)))
        return Source(samples, self.learner, rows, self.stage.skip_bad)

    def _validator(self) -> Validator | None:
        context, stage = self.context, self.stage
        held_out, bad = usable_samples(context.held_out, stage.validation.samples, stage.skip_bad)
        if bad:
            told = f"held-out samples left out, since they cannot be used: {len(bad)}, the first being {bad[0]}"
            self.log.warn(self.first_step, told)
        held_out = [sample for sample in held_out if stage.takes(len(sample.images))]
        if not held_out:
            return None
        held_out = self._readable(held_out)
        others = self._readable([context.samples[index] for index in context.survey.usable[:SPARE_PICTURES]])
        answers = stage.validation.answers, context.generate
        drawings = stage.validation.drawings, context.score_drawings
        validator = Validator(self.learner, self._source, held_out, others, stage.batch_size, *answers, *drawings)
        if not validator.right:
            self.log.warn(self.first_step, "no validation: none of the held-out samples can be used")
            return None
        if self.learner.controlled and not validator.controlled and any(sample.images for sample in held_out):
            self.log.warn(self.first_step, "no shuffled-image control: the data has no two different pictures")
        return validator

    def _readable(self, samples: list[Sample]) -> list[Sample]:
        """The samples whose pictures can be read, so that the control asks the same questions."""
        if not self.stage.skip_bad:
            return samples
        source = self._source(samples)
        return [sample for index, sample in enumerate(samples) if source.fault(index) is None]

    def _validate(self, done: int) -> None:
        if self.validator is None:
            return
        started = time.monotonic()
        self.engine.model.eval()
        result = self.validator.run(self.dtype, self.engine, self.team)
        set_modes(self.engine.model, self.plan)
        self.team.stop_if_any(self._infinite(done, result))
        self.log.validation(done, result, time.monotonic() - started)

    def _infinite(self, done: int, result: dict[str, Any]) -> TrainingError | None:
        wrong = next((key for key in ("loss", "shuffled_loss") if not math.isfinite(result[key] or 0.0)), None)
        if wrong is None:
            return None
        return TrainingError(
            f"stage {self.stage.name!r}, step {done}: the validation's {wrong} is {result[wrong]}; lower lr, or look "
            "at the held-out samples; the last checkpoint is intact"
        )

    def _finish(self, seconds: float) -> None:
        self.log.end(self.num_steps, seconds)
        if self.context.probe is not None:
            self.log.forgetting(self.num_steps, self.context.probe.fields())
        self.state.finish(self.num_steps)
