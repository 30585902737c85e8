"""Training: stages one after the other, each an explicit loop over optimizer steps (`chiasm.training.stage_run`).

A run is a function of the recipe, the model, the data and the step: order, dropout and learning rate are computed from
the step, so a run that was killed goes on bit for bit from its last checkpoint.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.collation import require_one_size
from chiasm.data.schema import Samples
from chiasm.fusion.adapters import plain_name
from chiasm.fusion.late import LateFusionModel
from chiasm.language.released import require_trainable
from chiasm.training.checkpoint import WEIGHTS, restore
from chiasm.training.closed_form import closed_form as closed_form_start
from chiasm.training.context import Context
from chiasm.training.fingerprint import model_fingerprint
from chiasm.training.fit import require_fit
from chiasm.training.forgetting import ForgettingProbe
from chiasm.training.late_stage import give_answer_head
from chiasm.training.precision import choose_dtype
from chiasm.training.recipe import load_recipe
from chiasm.training.reporter import Reporter
from chiasm.training.run import LOG, MODEL, FactsOf, open_run
from chiasm.training.same_run import fingerprint_of
from chiasm.training.schema import Recipe
from chiasm.training.selection import teaches_speech
from chiasm.training.source import picture_fingerprint, split, survey
from chiasm.training.stage_log import left_out
from chiasm.training.stage_run import StageRun
from chiasm.training.team import Team, processes
from chiasm.training.validation import Generate, ScoreDrawings


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
    samples: Samples,
    output: str | Path,
    *,
    validation_samples: Samples | None = None,
    overrides: Sequence[str] = (),
    generate: Generate | None = None,
    score_drawings: ScoreDrawings | None = None,
    closed_form: Callable[..., Any] = closed_form_start,
    resume: bool = True,
    quiet: bool = False,
    cache_root: Path | None = None,
    facts_of: FactsOf | None = None,
    keep_models: bool = True,
) -> TrainResult:
    """Trains a model in place by a recipe; a run that was stopped goes on where its last checkpoint stands.

    Args:
        recipe: a file, the name of one of Chiasm's own (`llava`), a dictionary, or a `Recipe`.
        model: any fusion: `model(**batch).loss` and parts told by parameter names are all that is needed of it.
        output: the run's folder (`chiasm.training.run`).
        validation_samples: by default 5 % of the samples are held out.
        overrides: `key=value` changes to the recipe, such as `stages.align.batch_size=8`.
        generate: answers a batch of (conversations, lists of pictures), for the answers that validation logs.
        score_drawings: draws what held-out samples ask for, for the scores that validation logs.
        closed_form: `init: closed_form`, called as `closed_form(model, tokenizer, samples, features_of)`.
        resume: False starts anew and removes the checkpoints of an earlier run in the folder.
        cache_root: where encoded pictures are kept; by default the user's cache.
        facts_of: a model's rows in its card beside those that are known here, such as its cost.
        keep_models: False leaves the model trained in memory, and on disk no more than a run needs that goes on.

    Raises:
        RuntimeError: an engine with `release=True` has taken the model's weights.
        ValueError: the recipe, the data or the folder do not fit; one line that names the value and the fix.
        TrainingError: the loss is not finite, or a checkpoint cannot be written.
        SystemExit: SIGTERM came, in the main thread; the run is saved and the code is 143.
    """
    require_trainable(model)
    output, was_training = Path(output), model.training
    had_gradients = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with processes(model.device) as team, torch.random.fork_rng():
        reporter = Reporter("auto" if team.first and not quiet else "quiet")
        loaded = team.all_do(lambda: load_recipe(recipe, overrides))
        team.all_do(lambda: require_one_size(processor, model.vision.image_size))
        kept, held_out = team.all_do(lambda: split(samples, validation_samples, loaded))
        found = team.all_do(lambda: survey(kept, processor.num_image_tokens, loaded.skips_bad, reporter))
        team.all_do(lambda: require_fit(loaded, model, processor, kept, found))
        pictures, processing = picture_fingerprint(found, reporter), _processor_fingerprint(processor)
        seen = fingerprint_of(loaded, model_fingerprint(model), found.fingerprint, pictures, processing)
        _require_one_mind(team, seen)
        environment = _environment(model, team)
        with open_run(output, loaded, seen, environment, resume, reporter, team) as run:
            run.facts_of, run.keeps_models = facts_of or run.facts_of, keep_models
            context = Context(
                model,
                processor,
                kept,
                found,
                held_out,
                run,
                reporter,
                generate,
                score_drawings,
                closed_form,
                cache_root,
                team,
            )
            if loaded.forgetting.measures and team.first:
                shown = held_out if len(held_out) else kept
                context.probe = ForgettingProbe(loaded.forgetting, model, processor, shown)
            _begin(context, loaded, environment)
            for number, stage in enumerate(loaded.stages):
                if not run.is_done(stage.name):
                    earlier = loaded.stages[:number]
                    team.all_do(partial(StageRun, context, number, stage, earlier)).run()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in had_gradients)
    model.train(was_training)
    return TrainResult(output, output / MODEL, output / LOG, {s.name: output / s.name for s in loaded.stages})


def _begin(context: Context, recipe: Recipe, environment: dict[str, Any]) -> None:
    """The first line of the log, or the weights that the run goes on with."""
    run, model = context.run, context.model
    if run.resumed is None:
        bad = context.survey.bad
        counts: dict[str, Any] = {"samples": len(context.survey.usable), "held_out": len(context.held_out), "bad": bad}
        run.log.write("start", **counts, **environment, model=_described(model))
        if bad:
            context.reporter.note(left_out(len(bad)))
        if context.probe is not None:
            run.log.write("forgetting", **context.probe.fields())
        return
    context.trained = {plain_name(name) for name in run.resumed.names(WEIGHTS)}
    position = run.resumed.position
    if any(teaches_speech(model, stage) for stage in recipe.stages[: run.stages.index(position.stage) + 1]):
        model.config.fresh_connector = False
    if isinstance(model, LateFusionModel) and any(name.startswith("answer_head.") for name in context.trained):
        taught = next(stage for stage in recipe.stages if stage.objectives == ["answers"])
        give_answer_head(model, taught, context.samples, context.survey.usable)
    if position.finished:
        restore(dict(model.named_parameters()), run.resumed, {})
        if not run.keeps_models:
            return
        if not next(stage for stage in recipe.stages if stage.name == position.stage).reads_captions:
            run.save_stage(position.stage, model, context.processor)
        run.save_result(position.stage, model, context.processor)
        return
    # Features of a frozen part are made before the stage's first step, from what earlier stages have made of it.
    known = {name: parameter.data for name, parameter in model.named_parameters()}
    names = {name: plain_name(name) for name in run.resumed.names(WEIGHTS)}
    run.resumed.read_into(WEIGHTS, {name: known[plain] for name, plain in names.items() if plain in known})


def _environment(model: PreTrainedModel, team: Team) -> dict[str, Any]:
    """What results may depend on in their last bits."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "auto_dtype": str(choose_dtype("auto", model.device)),
        "processes": team.size,
    }


def _require_one_mind(team: Team, seen: dict[str, Any]) -> None:
    """Refuses processes that see another recipe, model or data than the first."""
    said = team.told(seen)
    other = next((rank for rank, one in enumerate(said) if one != said[0]), None)
    if other is not None:
        key = next(key for key in seen if said[other][key] != said[0][key])
        fault = ValueError(
            f"process {other} sees another {key.removesuffix('s')} than process 0; give every machine the same files"
        )
        team.stop_if_any(fault)


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
