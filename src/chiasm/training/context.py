"""What all stages of a run share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.schema import Samples
from chiasm.training.forgetting import ForgettingProbe
from chiasm.training.reporter import Reporter
from chiasm.training.run import Run
from chiasm.training.source import Survey
from chiasm.training.team import Team
from chiasm.training.validation import Generate, ScoreDrawings


@dataclass
class Context:
    """`trained`: plain names of the weights that any stage has changed so far."""

    model: PreTrainedModel
    processor: ProcessorMixin
    samples: Samples
    survey: Survey
    held_out: Samples
    run: Run
    reporter: Reporter
    generate: Generate | None
    score_drawings: ScoreDrawings | None
    closed_form: Callable[..., Any]
    cache_root: Path | None
    team: Team = field(default_factory=Team)
    trained: set[str] = field(default_factory=set)
    probe: ForgettingProbe | None = None
