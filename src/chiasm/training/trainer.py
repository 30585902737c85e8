"""Training: stages one after the other, each an explicit loop over optimizer steps (`chiasm.training.stage_run`).

A run is a function of the recipe, the model, the data and the step: order, dropout and learning rate are computed from
the step, so a run that was killed goes on bit for bit from its last checkpoint.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.collation import require_one_size
from chiasm.data.schema import Sample, SampleError
from chiasm.data.splits import hold_out
from chiasm.fusion.adapters import plain_name
from chiasm.fusion.late import LateFusionModel
from chiasm.training.checkpoint import restore
from chiasm.training.closed_form import closed_form as closed_form_start
from chiasm.training.context import Context
from chiasm.training.features import with_hint
from chiasm.training.fingerprint import model_fingerprint
from chiasm.training.forgetting import ForgettingProbe
from chiasm.training.late_stage import give_answer_head
from chiasm.training.log import Reporter
from chiasm.training.precision import choose_dtype
from chiasm.training.recipe import load_recipe
from chiasm.training.run import LOG, MODEL, fingerprint_of, open_run
from chiasm.training.schema import Recipe
from chiasm.training.source import survey
from chiasm.training.stage_run import StageRun
from chiasm.training.validation import Generate

HELD_OUT_SHARE = 0.05
FEWEST_HELD_OUT = 2


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind. `model` is a plain model folder; `stages` has one for every stage."""

    output: Path
    model: Path
    log: Path
    stages: dict[str, Path]


def train(
    recipe: str | Path | dict[str, Any] | Recipe,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    output: str | Path,
    *,
    validation_samples: Sequence[Sample] | None = None,
    overrides: Sequence[str] = (),
    generate: Generate | None = None,
    closed_form: Callable[..., Any] = closed_form_start,
    resume: bool = True,
    quiet: bool = False,
    cache_root: Path | None = None,
) -> TrainResult:
    """Trains a model in place by a recipe; a run that was stopped goes on where its last checkpoint stands.

    Args:
        recipe: a file, the name of one of Chiasm's own (`llava`), a dictionary, or a `Recipe`.
        model: any fusion: `model(**batch).loss` and parts told by parameter names are all that is needed of it.
        output: the run's folder (`chiasm.training.run`).
        validation_samples: by default 5 % of the samples are held out.
        overrides: `key=value` changes to the recipe, such as `stages.align.batch_size=8`.
        generate: answers a batch of (conversations, lists of pictures), for the answers that validation logs.
        closed_form: `init: closed_form`, called as `closed_form(model, tokenizer, samples, features_of)`.
        resume: False starts anew and removes the checkpoints of an earlier run in the folder.
        cache_root: where encoded pictures are kept; by default the user's cache.

    Raises:
        ValueError: the recipe, the data or the folder do not fit; one line that names the value and the fix.
        TrainingError: the loss is not finite, or a checkpoint cannot be written.
    """
    recipe, output = load_recipe(recipe, overrides), Path(output)
    was_training = model.training
    had_gradients = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    require_one_size(processor, model.vision.image_size)
    reporter = Reporter("quiet" if quiet else "auto")
    validates = any(stage.validation.samples for stage in recipe.stages)
    samples, held_out = _split(samples, validation_samples, validates)
    found = survey(samples, processor.num_image_tokens, any(stage.skip_bad for stage in recipe.stages), reporter)
    fingerprint = fingerprint_of(recipe, model_fingerprint(model), found.fingerprint, _processor_fingerprint(processor))
    environment: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "auto_dtype": str(choose_dtype("auto", model.device)),
    }
    with torch.random.fork_rng(), open_run(output, recipe, fingerprint, environment, resume, reporter) as run:
        context = Context(model, processor, samples, found, held_out, run, reporter, generate, closed_form, cache_root)
        if recipe.forgetting.measures:
            context.probe = ForgettingProbe(recipe.forgetting, model, processor, [*held_out] or samples)
        if run.resumed is None:
            counts: dict[str, Any] = {"samples": len(found.usable), "held_out": len(held_out), "bad": found.bad}
            run.log.write("start", **counts, **environment, model=_described(model))
            if context.probe is not None:
                run.log.write("forgetting", **context.probe.fields())
        else:
            context.trained = {plain_name(name) for name in run.resumed.weights}
            if run.resumed.position.finished:
                if isinstance(model, LateFusionModel) and any(n.startswith("answer_head.") for n in context.trained):
                    taught = next(stage for stage in recipe.stages if stage.objectives == ["answers"])
                    give_answer_head(model, taught, samples, found.usable)
                restore(dict(model.named_parameters()), run.resumed.weights, {})
                if not next(s for s in recipe.stages if s.name == run.resumed.position.stage).reads_captions:
                    run.save_model(run.resumed.position.stage, model, processor)
        for number, stage in enumerate(recipe.stages):
            if not run.is_done(stage.name):
                StageRun(context, number, stage, recipe.stages[:number]).run()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in had_gradients)
    model.train(was_training)
    return TrainResult(output, output / MODEL, output / LOG, {s.name: output / s.name for s in recipe.stages})


def _split(
    samples: Sequence[Sample], validation_samples: Sequence[Sample] | None, validates: bool
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    if validation_samples is not None or not validates or len(samples) < 2:
        return samples, validation_samples or []
    try:
        return hold_out(samples, max(HELD_OUT_SHARE, min(0.1, FEWEST_HELD_OUT / len(samples))))
    except SampleError as error:
        raise with_hint(error) from error


def _described(model: PreTrainedModel) -> dict[str, Any]:
    """What was connected, for the report."""
    config = model.config
    connector = getattr(config, "connector", None)
    return {
        "vision": config.vision_config.model_type,
        **({"connector": connector["name"]} if connector else {}),
        "language": config.get_text_config().model_type,
        "fusion": getattr(config, "fusion", "late"),
    }


def _processor_fingerprint(processor: ProcessorMixin) -> str:
    settings = [processor.image_processor.to_dict(), processor.tokenizer.chat_template, processor.num_image_tokens]
    settings += [processor.regions] if getattr(processor, "regions", None) else []
    return hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()
