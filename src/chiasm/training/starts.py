"""What a stage changes before its first step: gates that are opened, a connector that is solved for in closed form."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chiasm.connectors.closed_form import NothingToLearn
from chiasm.data.collation import load_pixels, whole_pictures
from chiasm.data.schema import Sample
from chiasm.data.splits import Subset
from chiasm.training.closed_form import cannot_start, caption_indices, is_slow, require_closed_form
from chiasm.training.context import Context
from chiasm.training.features import Features
from chiasm.training.schema import Stage
from chiasm.training.source import Source, nothing_left
from chiasm.training.stages import FreezePlan

CLOSED_FORM_SAMPLES = 4000
"""A closed-form start looks at no more samples than these, evenly spread over those that describe their pictures."""


def require_start(model: PreTrainedModel, stage: Stage, plan: FreezePlan) -> None:
    """Refuses a start that the model or the freeze plan does not allow.

    Raises:
        ValueError: there are no gates to open, no connector to solve for, or the part is not tuned in full.
    """
    if stage.gates == "open":
        if not hasattr(model, "cross_attention"):
            raise ValueError(
                f"stage {stage.name!r}: gates: open is for models with the part cross_attention; "
                "write gates: keep, or connect with fusion intermediate"
            )
        _require_full(stage, plan, "cross_attention", "gates: open")
    if stage.init == "closed_form":
        require_closed_form(model)
        _require_full(stage, plan, "connector", "init: closed_form")


def _require_full(stage: Stage, plan: FreezePlan, part: str, start: str) -> None:
    """A start changes a part's own weights, which only checkpoints of a part that is tuned in full hold."""
    if plan.states[part] != "full":
        raise ValueError(
            f"stage {stage.name!r}: {start} changes the part {part}, which is {plan.states[part]}; "
            f"tune {part} in full, or write {start.split(':')[0]}: keep"
        )


class Start:
    """The start of one stage.

    Args:
        source_of: samples as the stage reads them.
        features: its cache of encoded pictures, if it has one.
    """

    def __init__(
        self,
        context: Context,
        stage: Stage,
        plan: FreezePlan,
        model: PreTrainedModel,
        source_of: Callable[[Subset], Source],
        features: Features | None,
    ) -> None:
        self.context, self.stage, self.plan, self.model = context, stage, plan, model
        self.source_of, self.features = source_of, features

    def run(self) -> None:
        """Does what the stage asks for, of which `require_start` has seen that it can be done."""
        if self.stage.gates == "open":
            self.model.cross_attention.open_gates()
        if self.stage.init == "closed_form":
            self._solve_connector()
        elif self.stage.init == "auto" and self._is_new():
            try:
                self._solve_connector()
            except NothingToLearn:
                self._note("no two captions differ, so the connector starts as it is")

    def _is_new(self) -> bool:
        """Whether the stage is the first to train the connector, and it can start from captions in little time."""
        new = getattr(self.model.config, "fresh_connector", False) and self.plan.states["connector"] == "full"
        if not new or cannot_start(self.model):
            return False
        if slow := is_slow(self.model.connector):
            self._note("the connector is large and starts as it is; init: closed_form starts it from captions")
        return not slow

    def _note(self, text: str) -> None:
        note = f"stage {self.stage.name}: {text}"
        self.context.reporter.note(note)
        self.context.run.log.write("note", self.stage.name, 0, text=note)

    def _solve_connector(self) -> None:
        context, started = self.context, time.monotonic()
        chosen = caption_indices(context.samples, context.survey.usable)
        samples = self._readable(Subset(context.samples, chosen[:: -(-len(chosen) // CLOSED_FORM_SAMPLES)]))
        features_of = self.features.of if self.features is not None else self._encode
        with context.reporter.task("closed-form start of the connector", 1) as task:
            pictures, missed = context.closed_form(self.model, context.processor.tokenizer, samples, features_of)
            task.advance()
        seconds = round(time.monotonic() - started, 3)
        context.run.log.write("closed_form", self.stage.name, 0, pictures=pictures, missed=missed, seconds=seconds)

    def _readable(self, samples: Subset) -> Subset:
        """The samples whose pictures can be read, with these in the cache where there is one."""
        source = self.source_of(samples)
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
        return self.model.encode_images(whole_pictures(pixels).to(self.model.device))
