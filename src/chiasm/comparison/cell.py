"""One cell of a comparison: connect, train, ask, measure; its folder holds `result.json` once all of that is done.

RUN/cells/NAME/run (a training run)   evaluation/   attention.png   result.json
A cell that was stopped goes on: the training run from its last checkpoint, the rest from its beginning.
"""

import copy
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from chiasm import api, vlm
from chiasm.comparison.answer_length import LEAST, answer_length
from chiasm.comparison.budget import samples_within
from chiasm.comparison.choices import Choice
from chiasm.comparison.data import captions_to_find, data_of, questions_of, read_source
from chiasm.comparison.diagnostics import diagnose
from chiasm.comparison.finding import find_pictures
from chiasm.comparison.inputs import inputs_of
from chiasm.comparison.measure import measure
from chiasm.comparison.peak_memory import peak_memory
from chiasm.comparison.same_cell import (
    BUDGET,
    CELLS,
    LENGTH,
    RESULT,
    RUN,
    Say,
    code_of,
    finished,
    forget_another,
    identity,
    taken,
)
from chiasm.comparison.schema import Plan
from chiasm.comparison.strategies import recipe_of
from chiasm.comparison.ways import FEW_SHOT
from chiasm.connecting.connect import connect
from chiasm.data.schema import Sample, Samples
from chiasm.dual_encoder import DualEncoder
from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.skills import summarise
from chiasm.generation.attention import WEIGHTS
from chiasm.language.adapter import keep_first_layers, load_language
from chiasm.sources import resolve
from chiasm.sources.writing import whole_file
from chiasm.training.closed_form import cannot_start, is_slow
from chiasm.training.log import read_log
from chiasm.training.precision import choose_dtype
from chiasm.training.recipe import load_recipe
from chiasm.training.run import LOG, RECIPE
from chiasm.training.schema import Recipe

ERROR, ATTENTION, EVALUATION = "error.txt", "attention.png", "evaluation"


def run_cell(
    plan: Plan,
    choice: Choice,
    output: Path,
    say: Say = lambda text: None,
    quiet: bool = True,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs a cell, or reads its result where it is finished.

    Args:
        output: the comparison's folder.
        say: takes a line on what is being done.
        quiet: whether training draws no bar.
        known: what the cells of one process read from disk once, of which each takes a copy.

    Raises:
        ValueError: the folder holds the cell of another plan, data has changed since, or another process is at work
            on the cell.
    """
    folder = output / CELLS / choice.name
    folder.mkdir(parents=True, exist_ok=True)
    with taken(folder):
        done = finished(plan, choice, output)
        return _run(plan, choice, output, say, quiet, {} if known is None else known) if done is None else done


def _run(plan: Plan, choice: Choice, output: Path, say: Say, quiet: bool, known: dict[str, Any]) -> dict[str, Any]:
    folder = output / CELLS / choice.name
    inputs = inputs_of(plan, choice, output)
    forget_another(folder, plan, choice, inputs, say)
    seconds: dict[str, float] = {}
    say(f"{choice.name}: connect")
    with _clocked(seconds, "connect"):
        model = connect_cell(plan, choice, known)
        train, held_out, test = data_of(plan, choice)
        captions = captions_to_find(plan)
    recipe = _recipe(plan, choice, folder, model, train)
    say(f"{choice.name}: train on {recipe.stages[-1].samples:,} samples")
    with peak_memory(model.model.device) as peak:
        told: dict[str, Any] = {"validation_data": held_out, "quiet": quiet, "keep_models": plan.keep_models}
        api.train(recipe, model, train, folder / RUN, **told)
    log = read_log(folder / RUN / LOG)
    training = _training(log, peak.bytes)
    seconds["train"] = max(training["seconds"], sum(event["seconds"] for event in log if event["event"] == "stage_end"))
    say(f"{choice.name}: ask and measure")
    notes = [] if choice.named else [f"{choice.way}: base.regions do not divide its tokens, and have no names there"]
    with _clocked(seconds, "evaluate"):
        answers, length = _evaluate(plan, model, test, folder / EVALUATION, notes)
    model.model.eval()
    found = None
    if captions is not None:
        with _clocked(seconds, "retrieval"):
            found = find_pictures(model.model, model.processor, captions)
    shown = next(sample for sample in test if sample.images)
    asked = plan.evaluation
    result = {
        "name": choice.name,
        "way": choice.way,
        "choice": choice.to_dict(),
        "identity": identity(plan, choice),
        "code": code_of(choice),
        "inputs": inputs,
        LENGTH: length,
        "samples": recipe.stages[-1].samples,
        "seconds": seconds,
        **measure(model.model, model.processor, shown, asked.repeats),
        "training": training,
        "summary": answers.summary,
        "forgetting": next((event for event in reversed(log) if event["event"] == "forgetting"), None),
        "diagnostics": diagnose(model.model, model.processor, test, asked.pictures),
        "attention": _look(model, shown, folder, choice.way, notes),
        "retrieval": found,
        "notes": notes,
    }
    for note in notes:
        say(f"{choice.name}: {note}")
    whole_file(folder / RESULT, json.dumps(result, ensure_ascii=False, indent=1))
    (folder / ERROR).unlink(missing_ok=True)
    _tidy(folder / RUN, plan.keep_models)
    return result


@contextmanager
def _clocked(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds how long a phase takes."""
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started


def connect_cell(plan: Plan, choice: Choice, known: dict[str, Any]) -> Any:
    """The cell's model as it is before training, on the best device."""
    base, device = plan.base, vlm.best_device()
    dtype: Any = torch.float32 if choose_dtype("auto", device) == torch.float32 else "auto"
    options: dict[str, Any] = {"dtype": dtype, "seed": choice.seed}
    if choice.fusion == "unified":
        language = base.decoder or _language(plan, dtype, known)
        options |= {"image_input": base.image_input or "patches", "chat_template": base.chat_template}
        options |= {"positions": None if choice.positions == "auto" else choice.positions}
        options |= {"unified": None if choice.weights == "pretrained" else {"weights": choice.weights}}
        return connect(language=language, fusion="unified", **options).to(device)
    options |= {"features": base.features, "image_size": base.image_size}
    if choice.fusion == "late":
        return connect(base.vision, base.text, choice.connector, "late", **options).to(device)
    options |= {"regions": choice.regions(base), "chat_template": base.chat_template}
    options |= {"patch_positions": choice.positions if choice.positions in ("none", "grid") else "auto"}
    if choice.fusion == "intermediate":
        options["cross_attention"] = base.cross_attention
    return connect(base.vision, _language(plan, dtype, known), choice.connector, choice.fusion, **options).to(device)


def _language(plan: Plan, dtype: Any, known: dict[str, Any]) -> Any:
    """The language model's name; a copy of the model itself where only its first layers are wanted."""
    name, count = plan.base.language, plan.base.language_layers
    if count is None:
        return name
    if name not in known:
        known[name] = load_language(resolve(name), dtype=dtype)
        keep_first_layers(known[name], count)
    return copy.deepcopy(known[name])


def _recipe(plan: Plan, choice: Choice, folder: Path, model: Any, train: Samples) -> Recipe:
    """The cell's recipe, whose number of samples a resumed cell keeps."""
    how = plan.training.model_dump()
    starts = how["init"] == "auto" and choice.fusion in ("early", "intermediate") and not cannot_start(model.model)
    how["solved"] = starts and not is_slow(model.model.connector)
    captions, how["finds"] = plan.data.captions is not None, plan.evaluation.retrieval is not None

    def make(samples: int) -> Recipe:
        return load_recipe(recipe_of(choice.fusion, plan.strategy(choice.tune), samples, choice.seed, captions, **how))

    path = folder / BUDGET
    if not path.is_file():
        count = samples_within(plan.budget, model.model, model.processor, make(1), questions_of(plan, train))
        whole_file(path, json.dumps({"samples": count}))
    return make(json.loads(path.read_text(encoding="utf-8"))["samples"])


def _evaluate(plan: Plan, model: Any, test: Samples, folder: Path, notes: list[str]) -> tuple[EvalResult, int]:
    """The answers, and the tokens that one could have; what is cut of them is added to the notes."""
    how, late = plan.evaluation, isinstance(model, DualEncoder)
    length, cut = (LEAST, []) if late else answer_length(how.max_new_tokens, test, model.processor.tokenizer)
    told: dict[str, Any] = {"batch_size": how.batch_size, "max_new_tokens": length}
    told |= {"control": how.control, "metric": how.metric}
    result = api.evaluate(model, test, task="answers" if late else None, **told)
    if how.shots and not late:
        shown = api.evaluate(model, test, shots=how.shots, shots_from=read_source(plan.data.train), **told)
        again = [row | {"id": f"{row['id']} ({FEW_SHOT})", "skill": FEW_SHOT} for row in shown.rows]
        *skills, whole = result.summary
        summary, said = [*skills, *summarise(again), whole], list(dict.fromkeys([*result.notes, *shown.notes]))
        result = EvalResult([*result.rows, *again], summary, said)
    result.notes += cut
    notes += cut
    result.save(folder)
    return result, length


def _training(log: Sequence[dict[str, Any]], peak: int | None) -> dict[str, Any]:
    """What training took, and the learning curve of its last stage."""
    last = [event["stage"] for event in log if event["event"] == "plan"][-1]
    steps = [event for event in log if event["event"] == "step" and event["stage"] == last]
    rates = sorted(event["samples_per_second"] for event in steps)
    plan = next(event for event in reversed(log) if event["event"] == "plan" and "table" in event)
    return {
        "steps": max(event["step"] for event in steps),
        "seconds": _seconds(log),
        "samples_per_second": rates[len(rates) // 2],
        "peak_memory_bytes": peak,
        "trainable": {row["part"]: row["trainable"] for row in plan["table"]},
        "curve": [
            [event["step"], event["loss"], event["shuffled_loss"]]
            for event in log
            if event["event"] == "validation" and event["stage"] == last
        ],
        "gates": [openness(event["gates"]) for event in log if event["event"] == "validation" and "gates" in event],
    }


def _seconds(log: Sequence[dict[str, Any]]) -> float:
    """Of all steps and of a start in closed form, also of a run that went on after a stop; not of what all cells share,
    such as encoded pictures."""
    steps = [event for event in log if event["event"] == "step" and event["samples"]]
    solved = sum(event["seconds"] for event in log if event["event"] == "closed_form")
    return float(solved + sum(event["samples"] / event["samples_per_second"] for event in steps))


def openness(gates: dict[str, list[float]]) -> float:
    """How far gates are open, from 0 to 1: the mean over layers and both gates of each."""
    values = [abs(value) for name, layers in gates.items() if name.endswith("_gate") for value in layers]
    return fmean(values)


def _look(model: Any, sample: Sample, folder: Path, way: str, notes: list[str]) -> dict[str, Any] | None:
    """What the answer to one question looked at, as a picture in the cell's folder; None where it cannot be told. What
    goes wrong is added to the notes: a map is not worth a trained cell."""
    inner = model.model
    if isinstance(model, DualEncoder) or inner.config.fusion not in WEIGHTS or inner.config.is_encoder_decoder:
        return None
    try:
        seen = model.attention(sample.images[0].load(), sample.question.strip(), max_new_tokens=8)
    except NotImplementedError:  # of a connector that does not say where its tokens look
        return None
    except Exception as error:
        notes.append(f"{way}: no attention map: {type(error).__name__}: {error}")
        return None
    seen.overlay().save(folder / ATTENTION)
    return {"sample": sample.id, "question": sample.question.strip(), "answer": seen.answer}


def _tidy(run: Path, keep_model: bool) -> None:
    """Leaves the log, the recipe, and the model where it is wanted; checkpoints are of no use any more."""
    kept = {LOG, RECIPE, *(["model"] if keep_model else [])}
    for path in run.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)
