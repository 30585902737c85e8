"""What one stage tells the log and the terminal: its plan, its steps, its validations, its warnings."""

from typing import Any

import torch
from transformers import PreTrainedModel

from chiasm.data.schema import SampleError
from chiasm.training.forgetting import in_words
from chiasm.training.log import RunLog, gate_fields, peak_memory, plan_fields
from chiasm.training.optimization import Taken
from chiasm.training.reporter import Reporter, Task
from chiasm.training.schema import Stage
from chiasm.training.stages import FreezePlan
from chiasm.training.validation import by_objective


class StageLog:
    def __init__(self, log: RunLog, reporter: Reporter, stage: Stage, model: PreTrainedModel) -> None:
        self.log, self.reporter, self.stage, self.model = log, reporter, stage, model
        self.left_out: set[str] = set()
        self.unanswered = ""
        self.cut = self.taken = 0

    def plan(self, plan: FreezePlan, first_step: int, num_steps: int, dtype: torch.dtype) -> None:
        self.reporter.plan(plan)
        about = {"steps": num_steps, "objectives": ", ".join(self.stage.objectives)}
        about["dtype"] = str(dtype).removeprefix("torch.")
        self.log.write("plan", self.stage.name, first_step, **about, **plan_fields(plan))

    def step(
        self,
        done: int,
        skipped: dict[str, SampleError],
        taken: Taken,
        rates: dict[str, float],
        seconds: float,
        task: Task,
    ) -> None:
        """`done`: steps so far, this one included."""
        loss = sum(taken.losses.values())
        self.left_out |= skipped.keys()
        self._count_cut(done, taken)
        for sample, error in skipped.items():
            self.log.write("skipped", self.stage.name, done, id=sample, reason=str(error))
        self.log.write(
            "step",
            self.stage.name,
            done,
            loss=loss if taken.samples else None,
            **by_objective(taken.losses),
            lr=rates,
            grad_norm=taken.norm,
            samples=taken.samples,
            skipped=len(skipped),
            cut=taken.cut,
            supervised_tokens=taken.supervised,
            samples_per_second=round(taken.samples / seconds, 3),
            tokens_per_second=round(taken.tokens / seconds, 1),
            peak_memory_bytes=peak_memory(self.model.device),
        )
        task.advance(1, f"loss {loss:.4f}, {taken.samples / seconds:.1f} samples/s")

    def _count_cut(self, done: int, taken: Taken) -> None:
        """Tells of the first sample that loses its end; the others are counted."""
        if taken.cut and not self.cut:
            such = "" if taken.example is None else f", such as {taken.example[0]!r} with {taken.example[1]} tokens"
            self.warn(
                done,
                f"samples longer than max_length (by default the model's context){such} lose the end of their answer, "
                "which is not learned; raise max_length, or shorten them",
            )
        self.cut, self.taken = self.cut + taken.cut, self.taken + taken.samples

    def validation(self, done: int, result: dict[str, Any], seconds: float) -> None:
        if (reason := result.get("unanswered", "")) not in ("", self.unanswered):
            self.unanswered = reason
            self.warn(done, f"no answers: {reason}")
        fields = {**result, **gate_fields(self.model), "seconds": round(seconds, 3)}
        self.log.write("validation", self.stage.name, done, **fields)
        right, wrong = result["loss"], result["shuffled_loss"]
        against = f", with wrong pictures {wrong:.4f}" if wrong is not None else ""
        drawn = f"; drawings found {result['drawn_recall']:.0%}" if "drawn_recall" in result else ""
        self.reporter.note(f"stage {self.stage.name}, step {done}: validation loss {right:.4f}{against}{drawn}")
        if done and wrong is not None and right >= wrong:
            self.warn(
                done, f"the pictures do not help: loss {right:.4f} with the right ones, {wrong:.4f} with wrong ones"
            )

    def warn(self, done: int, text: str) -> None:
        self.log.write("warning", self.stage.name, done, text=text)
        self.reporter.note(f"warning: stage {self.stage.name}: {text}")

    def forgetting(self, done: int, fields: dict[str, Any]) -> None:
        self.log.write("forgetting", self.stage.name, done, **fields)
        if words := in_words(fields):
            self.reporter.note(f"stage {self.stage.name}, since the run's start: {words}")

    def end(self, num_steps: int, seconds: float) -> None:
        took = {"seconds": round(seconds, 3)}
        self.log.write("stage_end", self.stage.name, num_steps, **took, **gate_fields(self.model))
        if self.left_out:
            self.reporter.note(f"stage {self.stage.name}: {left_out(len(self.left_out))}")
        if self.cut:
            self.reporter.note(f"stage {self.stage.name}: answers cut at their end: {self.cut} of {self.taken}")


def left_out(count: int) -> str:
    """What people are told of samples that are skipped."""
    return f"samples left out, since they cannot be used: {count}; log.jsonl says why"
