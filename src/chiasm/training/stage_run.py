"""One stage of a run: an explicit loop over optimizer steps, with what stands before, between and after them.

Written for one process. For several, each takes its share of a step's batches, and the count of supervised tokens is
summed over them before the losses are divided by it (`StageRun._optimize`).
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.connectors import AffineConnector
from chiasm.data.collation import Batch, load_pixels
from chiasm.data.schema import Sample, SampleError
from chiasm.data.splits import Subset
from chiasm.fusion.adapters import merge_adapters, plain_name
from chiasm.fusion.late import LateFusionModel
from chiasm.training.attention import fast_attention
from chiasm.training.batches import WORKERS, Order, prefetch, seed_of
from chiasm.training.checkpoint import TrainingError, restore
from chiasm.training.closed_form import caption_indices
from chiasm.training.compiling import compiled_layers
from chiasm.training.features import Rows, stage_features
from chiasm.training.late_stage import give_answer_head, late_stage_model
from chiasm.training.log import Reporter, gate_fields, peak_memory, plan_fields
from chiasm.training.optimizer import StageOptimizer
from chiasm.training.precision import autocast, choose_dtype, stage_precision
from chiasm.training.run import Run
from chiasm.training.schema import Stage
from chiasm.training.source import Hope, Source, Survey, nothing_left, usable_samples
from chiasm.training.stage_model import StageModel, stage_model
from chiasm.training.stages import check_first_step, digests, enter, set_modes
from chiasm.training.validation import Generate, Validator, by_objective

SPARE_PICTURES = 8
NAMED = 8

CLOSED_FORM_SAMPLES = 4000
"""A closed-form start looks at no more samples than these, evenly spread over those that describe their pictures."""


@dataclass
class Context:
    """What all stages of a run share. `trained`: plain names of the weights that any stage has changed so far."""

    model: PreTrainedModel
    processor: ProcessorMixin
    samples: Sequence[Sample]
    survey: Survey
    held_out: Sequence[Sample]
    run: Run
    reporter: Reporter
    generate: Generate | None
    closed_form: Callable[..., Any]
    cache_root: Path | None
    trained: set[str] = field(default_factory=set)


class StageRun:
    """One stage of a run, from the freeze plan to the model folder."""

    def __init__(self, context: Context, number: int, stage: Stage, earlier: Sequence[Stage] = ()) -> None:
        """
        Args:
            earlier: the recipe's stages before this one.
        """
        self.context, self.number, self.stage = context, number, stage
        self.new_objectives = not earlier or earlier[-1].objectives != stage.objectives
        self.log, self.reporter = context.run.log, context.reporter
        if isinstance(context.model, LateFusionModel):
            if stage.objectives == ["answers"]:
                give_answer_head(context.model, stage, context.samples, context.survey.usable)
            self.learner: StageModel = late_stage_model(context.model, context.processor, stage)
        else:
            taught = [context.run.folder / other.name for other in earlier if other.reads_captions]
            self.learner = stage_model(context.model, context.processor, stage, number, taught[-1] if taught else None)
        self.model = self.learner.model
        self.device = self.model.device
        self.dtype = choose_dtype(stage.dtype, self.device)
        self.resumed = context.run.resumed_in(stage.name)
        self.first_step = self.resumed.position.step if self.resumed is not None else 0
        survey = context.survey.with_one_picture() if stage.shows_one_picture else context.survey
        self.order = Order(survey.usable, survey.lengths if stage.group_by_length else None, stage, number)
        self.left_out = len(context.survey.usable) - len(survey.usable)
        if not survey.usable:
            what = "captions" if stage.reads_captions else "questions"
            raise ValueError(f"stage {stage.name!r} reads {what} of one picture each, and the data has no such sample")
        self.num_steps = stage.num_steps(len(survey.usable))
        self.originals: dict[str, Tensor] = {}

    def run(self) -> None:
        began = time.monotonic()
        torch.manual_seed(seed_of(self.stage.seed, self.number))
        self.plan = enter(self.model, self.stage)
        self.reporter.plan(self.plan)
        about = {"steps": self.num_steps, "objectives": ", ".join(self.stage.objectives), "dtype": _name(self.dtype)}
        self.log.write("plan", self.stage.name, self.first_step, **about, **plan_fields(self.plan))
        if self.left_out:
            self._warn(self.first_step, f"{self.left_out} samples do not have exactly one picture and are left out")
        self._prepare_data()
        if self.stage.gates == "open" and self.resumed is None:
            self._open_gates()
        fresh = getattr(self.model.config, "fresh_connector", False) and self.plan.states["connector"] == "full"
        affine = isinstance(self.model.connector, AffineConnector) and fresh
        if self.resumed is None and (self.stage.init == "closed_form" or (self.stage.init == "auto" and affine)):
            self._start_in_closed_form()
        with ExitStack() as state:
            self.originals = state.enter_context(stage_precision(self.model, self.dtype))
            if "language" in self.plan.states:
                state.enter_context(fast_attention(self.model.language, self.dtype))
                state.enter_context(compiled_layers(self.model.language, self.stage.compile))
            self.optimizer = StageOptimizer(self.model, self.plan, self.stage, self.num_steps)
            if self.resumed is not None:
                restore(self._parameters(), self.resumed.weights, self.originals)
                self.optimizer.load_state_dict(self.resumed.optimizer)
            self._loop()
        self._finish(time.monotonic() - began)

    def _loop(self) -> None:
        """Steps from the first to the last, with what is due between them."""
        pool, hope = ThreadPoolExecutor(WORKERS), Hope(self.first_step, self.num_steps)
        task = self.reporter.task(f"stage {self.stage.name}", self.num_steps, self.first_step)
        with pool as self.pool, task as self.task, closing(self._prefetched()) as ready:
            if self.first_step == 0 and self.new_objectives:
                self._validate(0)
            started = saved = time.monotonic()
            for step, (batches, skipped) in enumerate(ready, self.first_step):
                done = step + 1
                losses, norm = self._optimize(step, batches)
                self._log_step(step, batches, skipped, losses, norm, time.monotonic() - started)
                hope.after(done, bool(batches), skipped)
                if done == self.num_steps or (self.stage.validation.every and done % self.stage.validation.every == 0):
                    self._validate(done)
                if done < self.num_steps and self.stage.checkpoint_due(done, time.monotonic() - saved):
                    self._save(done)
                    saved = time.monotonic()
                started = time.monotonic()

    def _optimize(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], float]:
        """One step over all batches of it, weighted by supervised tokens, or by samples where these are compared: k
        small batches equal one large one, but for the number of candidates that a sample is compared with.

        Returns:
            Loss of every objective, and the norm of the gradient.
        """
        torch.manual_seed(seed_of(self.stage.seed, self.number, step))
        check = step == self.first_step
        before = digests(self.model) if check else {}
        samples, tokens = sum(len(batch.ids) for batch in batches), sum(batch.supervised for batch in batches)
        losses: dict[str, float] = {}
        for batch in batches:
            inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
            with autocast(self.device, self.dtype):
                shares = self.learner.losses(inputs, samples, tokens)
            for name, share in shares.items():
                losses[name] = losses.get(name, 0.0) + share.item()
            _refuse_infinite("loss", sum(losses.values()), self.stage.name, step, [batch])
            torch.stack(list(shares.values())).sum().backward()
        norm = self.optimizer.step(step) if batches else 0.0
        _refuse_infinite("gradient", norm, self.stage.name, step, batches)
        if check and batches:
            for warning in check_first_step(self.model, self.plan, before, self.optimizer.factor(step)):
                self._warn(step + 1, warning)
        self.optimizer.zero_grad()
        return losses, norm

    def _prefetched(self) -> Generator[tuple[list[Batch], dict[str, SampleError]], None, None]:
        return prefetch(self._batches, self.first_step, self.num_steps)

    def _batches(self, step: int) -> tuple[list[Batch], dict[str, SampleError]]:
        """A step's batches, and the samples that were left out; runs in another thread, ahead of the steps."""
        made = [self.source.batch(indices, self.pool) for indices in self.order.step(step)]
        skipped = {sample: reason for _, reasons in made for sample, reason in reasons.items()}
        return [batch for batch, _ in made if batch is not None], skipped

    def _prepare_data(self) -> None:
        context, stage = self.context, self.stage
        self.features = stage_features(
            self.model, context.processor, stage, self.plan, self.dtype, self.reporter, context.cache_root
        )
        rows = None
        if self.features is not None:
            rows = self.features.fill(context.samples, self.order.visited(self.num_steps))
            self.features = self.features if rows is not None else None
        self.source = self._source(context.samples, rows)
        self.learner.prepare(context.samples, self.order.visited(self.num_steps), self.reporter)
        self.validator = None
        held_out = usable_samples(context.held_out, stage.validation.samples, stage.skip_bad)
        if stage.shows_one_picture:
            held_out = [sample for sample in held_out if len(sample.images) == 1]
        if held_out:
            others = [context.samples[index] for index in context.survey.usable[:SPARE_PICTURES]]
            self.validator = Validator(
                self.learner,
                self._source,
                held_out,
                others,
                stage.batch_size,
                stage.validation.answers,
                context.generate,
            )
            if not self.validator.right:
                self._warn(self.first_step, "no validation: none of the held-out samples can be used")
                self.validator = None
            elif not self.validator.controlled and any(sample.images for sample in held_out):
                self._warn(self.first_step, "no shuffled-image control: the data has no two different pictures")

    def _source(self, samples: Sequence[Sample], rows: Rows | None = None) -> Source:
        if rows is None and self.features is not None:
            rows = self.features.fill(samples, range(len(samples)))
        return Source(samples, self.learner, rows, self.stage.skip_bad)

    def _open_gates(self) -> None:
        if not hasattr(self.model, "cross_attention"):
            raise ValueError(
                f"stage {self.stage.name!r}: gates: open is for models with the part cross_attention; "
                "write gates: keep, or connect with fusion intermediate"
            )
        self._require_full("cross_attention", "gates: open")
        self.model.cross_attention.open_gates()

    def _require_full(self, part: str, start: str) -> None:
        """A start changes a part's own weights, which only checkpoints of a part that is tuned in full hold."""
        if self.plan.states[part] != "full":
            raise ValueError(
                f"stage {self.stage.name!r}: {start} changes the part {part}, which is {self.plan.states[part]}; "
                f"tune {part} in full, or write {start.split(':')[0]}: keep"
            )

    def _start_in_closed_form(self) -> None:
        self._require_full("connector", "init: closed_form")
        started = time.monotonic()
        chosen = caption_indices(self.context.samples, self.context.survey.usable)
        samples = self._readable(Subset(self.context.samples, chosen[:: -(-len(chosen) // CLOSED_FORM_SAMPLES)]))
        features_of = self.features.of if self.features is not None else self._encode
        with self.reporter.task("closed-form start of the connector", 1) as task:
            pictures = self.context.closed_form(self.model, self.context.processor.tokenizer, samples, features_of)
            task.advance()
        self.log.write(
            "closed_form", self.stage.name, 0, pictures=pictures, seconds=round(time.monotonic() - started, 3)
        )

    def _readable(self, samples: Subset) -> Subset:
        """The samples whose pictures can be read, with these in the cache where there is one."""
        source = self._source(samples)
        if not self.stage.skip_bad:
            return samples
        faults = {index: source.fault(index) for index in range(len(samples))}
        kept = [index for index, fault in faults.items() if fault is None]
        if not kept:
            raise nothing_left([fault for fault in faults.values() if fault is not None])
        return Subset(samples, kept)

    @torch.no_grad()
    def _encode(self, sample: Sample) -> Tensor:
        pixels = load_pixels(sample, self.context.processor)
        if pixels is None:
            raise ValueError(f"sample {sample.id!r} has no picture to encode")
        return self.model.encode_images(pixels.to(self.device))

    def _validate(self, done: int) -> None:
        if self.validator is None:
            return
        started = time.monotonic()
        self.model.eval()
        result = self.validator.run(self.dtype)
        set_modes(self.model, self.plan)
        if "unanswered" in result:
            self._warn(done, f"no answers: {result['unanswered']}")
        seconds = round(time.monotonic() - started, 3)
        self.log.write("validation", self.stage.name, done, **result, **gate_fields(self.model), seconds=seconds)
        right, wrong = result["loss"], result["shuffled_loss"]
        against = f", with wrong pictures {wrong:.4f}" if wrong is not None else ""
        self.reporter.note(f"stage {self.stage.name}, step {done}: validation loss {right:.4f}{against}")
        if done and wrong is not None and right >= wrong:
            self._warn(
                done, f"the pictures do not help: loss {right:.4f} with the right ones, {wrong:.4f} with wrong ones"
            )

    def _log_step(
        self,
        step: int,
        batches: list[Batch],
        skipped: dict[str, SampleError],
        losses: dict[str, float],
        norm: float,
        seconds: float,
    ) -> None:
        loss = sum(losses.values())
        samples, tokens = sum(len(b.ids) for b in batches), sum(b.tokens for b in batches)
        for sample, error in skipped.items():
            self.log.write("skipped", self.stage.name, step + 1, id=sample, reason=str(error))
        self.log.write(
            "step",
            self.stage.name,
            step + 1,
            loss=loss if batches else None,
            **by_objective(losses),
            lr=self.optimizer.rates(step),
            grad_norm=norm,
            samples=samples,
            skipped=len(skipped),
            supervised_tokens=sum(b.supervised for b in batches),
            samples_per_second=round(samples / seconds, 3),
            tokens_per_second=round(tokens / seconds, 1),
            peak_memory_bytes=peak_memory(self.device),
        )
        self.task.advance(1, f"loss {loss:.4f}, {samples / seconds:.1f} samples/s")

    def _warn(self, done: int, text: str) -> None:
        self.log.write("warning", self.stage.name, done, text=text)
        self.reporter.note(f"warning: stage {self.stage.name}: {text}")

    def _save(self, done: int) -> None:
        weights = self._weights()
        self.context.run.save(
            self.stage.name, done, False, weights, self.optimizer.state_dict(), self.stage.keep_checkpoints
        )

    def _weights(self) -> dict[str, Tensor]:
        """Everything that this stage or an earlier one trains; of frozen weights the originals, not the copies."""
        return {
            name: self.originals.get(name, parameter.data)
            for name, parameter in self._parameters().items()
            if name in self.plan.trainable or plain_name(name) in self.context.trained
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Of the generative model and of the stage's own, whose common ones are the same tensors."""
        own = dict(self.model.named_parameters())
        known = {id(parameter) for parameter in own.values()}
        return {name: p for name, p in self.context.model.named_parameters() if id(p) not in known} | own

    def _finish(self, seconds: float) -> None:
        """Merges adapters, and writes the stage's last checkpoint and its model folder.

        The checkpoint holds what later stages need. The model of a stage that reads captions has more than that (the
        text branch and the heads), so its folder is written first.
        """
        run, trained = self.context.run, self.context.trained
        changed = set(self.plan.trainable) | set(merge_adapters(self.model))
        trained |= changed & {plain_name(name) for name, _ in self.context.model.named_parameters()}
        self.model.requires_grad_(False).eval()
        self.originals = {}
        if "connector" not in self.plan.frozen_parts() and hasattr(self.context.model.config, "fresh_connector"):
            self.context.model.config.fresh_connector = False
        took = {"seconds": round(seconds, 3)}
        self.log.write("stage_end", self.stage.name, self.num_steps, **took, **gate_fields(self.model))
        if self.stage.reads_captions:
            run.save_model(self.stage.name, self.model, self.learner.processor)
        final = {name: p.data for name, p in self.context.model.named_parameters() if plain_name(name) in trained}
        run.save(self.stage.name, self.num_steps, True, final, {}, self.stage.keep_checkpoints)
        if not self.stage.reads_captions:
            run.save_model(self.stage.name, self.model, self.learner.processor)


def _refuse_infinite(what: str, value: float, stage: str, step: int, batches: list[Batch]) -> None:
    if math.isfinite(value):
        return
    ids = [sample for batch in batches for sample in batch.ids]
    listed = ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")
    raise TrainingError(
        f"stage {stage!r}, step {step + 1}: the {what} is {value} on the samples {listed}; "
        "lower lr, or look at these samples"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
