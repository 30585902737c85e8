"""`train` and `evaluate` on a model and data given by name: what the command line and a notebook call."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chiasm.comparison.describe import cost_facts
from chiasm.data.captions import encode_caption
from chiasm.data.collation import encode_sample
from chiasm.data.few_shot import MOST_CANDIDATES, draw_examples
from chiasm.data.readers import read, read_split, read_train
from chiasm.data.schema import ImageError, Problem, Sample, SampleError, Samples
from chiasm.data.splits import spread
from chiasm.dual_encoder import DualEncoder
from chiasm.evaluation.drawing import drawing_fields, evaluate_drawings, known_requests, requests
from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.evaluate import evaluate as evaluate_answers
from chiasm.evaluation.kept import KeptAnswers, identity_of
from chiasm.evaluation.retrieval import evaluate_retrieval
from chiasm.evaluation.usable import of_one_picture, skipped_note, usable
from chiasm.evaluation.zero_shot import TEMPLATES, evaluate_zero_shot
from chiasm.fusion.late import LateFusionModel
from chiasm.generation.draw import can_draw
from chiasm.interop.convert import Converted
from chiasm.interop.convert import convert as convert_model
from chiasm.language.adapter import context_length
from chiasm.sources.writing import refuse_to_overwrite
from chiasm.training.features import with_hint
from chiasm.training.preview import StagePreview
from chiasm.training.preview import preview as preview_stages
from chiasm.training.recipe import load_recipe
from chiasm.training.reporter import Reporter
from chiasm.training.run import DRAWN
from chiasm.training.schema import Recipe
from chiasm.training.team import take_own_device
from chiasm.training.trainer import TrainResult
from chiasm.training.trainer import train as train_model
from chiasm.vlm import VLM, best_device, load, ready_to_answer

Progress = Callable[[int, int], None]
READ = {"answers": ("metric", "shots"), "retrieval": (), "zero-shot": ("templates",), "drawing": ("judge", "not_in")}
"""Task of `evaluate` → options that it alone reads."""


def convert(
    model: VLM | DualEncoder | str | Path,
    to: str,
    output: str | Path,
    *,
    quantize: str | None = None,
    check: bool = True,
    inexact: bool = False,
) -> Converted:
    """Writes a model as another tool's checkpoint (`chiasm.interop.convert`).

    Args:
        model: a loaded one, or its folder or hub id.
        to: `transformers`, `gguf` or `onnx`.
        output: a new folder, or an empty one.
        quantize: of GGUF files, such as `q8_0`.
        check: whether the result is loaded again and compared with the model.
        inexact: of GGUF files, whether they are written where llama.cpp is known to compute something else.
    """
    refuse_to_overwrite(output)
    loaded = load(model) if isinstance(model, str | Path) else model
    return convert_model(loaded.model, loaded._processor, to, output, quantize=quantize, check=check, inexact=inexact)


def train(
    recipe: str | Path | Recipe,
    model: VLM | DualEncoder | str | Path,
    data: Any,
    output: str | Path,
    *,
    validation_data: Any = None,
    overrides: Sequence[str] = (),
    resume: bool = True,
    quiet: bool = False,
    keep_models: bool = True,
) -> TrainResult:
    """Trains a model by a recipe; a run that was stopped goes on where its last checkpoint stands.

    Args:
        recipe: a file, the name of one that ships (`llava`), or a loaded one.
        model: a `VLM` or a `DualEncoder`, or the folder of one.
        data: anything that `chiasm.data.readers.read` understands; where it comes in splits, `train` is read.
        output: the run's folder.
        validation_data: held-out data, of splits `validation`; by default 5 % of what is read of `data`, the same ones
            in every run.
        overrides: `key=value` changes to the recipe, such as `stages.align.lr=1e-3`.
        keep_models: False leaves the model trained in memory, and on disk no more than a run needs that goes on.
    """
    take_own_device()
    vlm = _trainable(model)

    def generate(messages: list[Any], images: list[list[Any]]) -> list[str]:
        return vlm.generate(messages, images, max_new_tokens=32)

    def score_drawings(samples: Samples) -> dict[str, Any]:
        result = evaluate_drawings(vlm.model, vlm.processor, requests(samples)[0], control=False)
        if result.sheet is not None:
            result.sheet.save(Path(output) / DRAWN)
        return drawing_fields(result)

    return train_model(
        recipe,
        vlm.model,
        vlm.processor,
        read_split(data, "train"),
        output,
        validation_samples=None if validation_data is None else read_split(validation_data, "validation"),
        overrides=overrides,
        generate=generate,
        score_drawings=score_drawings if can_draw(vlm.model) else None,
        resume=resume,
        quiet=quiet,
        facts_of=partial(cost_facts, names=vlm.region_tokens if isinstance(vlm, VLM) else 0),
        keep_models=keep_models,
    )


def _trainable(model: VLM | DualEncoder | str | Path) -> Any:
    """The model, on the best device where it is loaded here."""
    loaded: Any = model if isinstance(model, VLM | DualEncoder) else load(model).to(best_device())
    if isinstance(loaded, DualEncoder) and not isinstance(loaded.model, LateFusionModel):
        raise ValueError(f"{model} is the retrieval model of a stage; train the model that the run left in RUN/model")
    return loaded


def encoder_of(model: str | Path, max_length: int | None = None) -> Callable[[Sample], Any]:
    """What makes a model's tokens of a sample as training does, or a SampleError; also of an answer that would be cut.

    Args:
        max_length: tokens of a sample; by default the model's context.
    """
    loaded = load(model)
    if isinstance(loaded, DualEncoder):
        if max_length is not None:
            raise ValueError(f"max_length={max_length}: {model} has two towers, which cut every text; leave it out")
        return partial(encode_caption, processor=loaded.processor)
    lengths = (length for length in (max_length, context_length(loaded.model.config)) if length is not None)
    longest = min(lengths, default=None)

    def encode(sample: Sample) -> dict[str, list[int]]:
        tokens = encode_sample(sample, loaded.processor, longest)
        if "whole" in tokens:
            reason = f"{tokens['whole'][0]} tokens, at most {longest} are learned: its answer loses its end"
            raise SampleError(sample.id, [Problem("cut answer", reason)])
        return tokens

    return encode


def preview(
    recipe: str | Path | Recipe,
    model: VLM | DualEncoder | str | Path,
    data: Any = None,
    *,
    validation_data: Any = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> list[StagePreview]:
    """What a recipe would train, hold and take, by stage; time and activations are measured where data is given."""
    vlm = _trainable(model)
    given = {"train": data, "validation": validation_data}
    samples, held_out = (None if source is None else read_split(source, split) for split, source in given.items())
    reporter = Reporter("quiet" if quiet else "auto")
    return preview_stages(load_recipe(recipe, overrides), vlm.model, vlm.processor, samples, reporter, held_out)


def evaluate(
    model: VLM | DualEncoder | str | Path,
    data: Any,
    *,
    task: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    control: bool = True,
    metric: str | None = None,
    shots: int = 0,
    shots_from: Any = None,
    templates: Sequence[str] = (),
    judge: DualEncoder | str | Path | None = None,
    not_in: Any = None,
    skip_bad: bool = False,
    answers: Path | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Scores a model's answers per skill, or how well it finds, beside the control that is shown another picture.

    Args:
        task: of a `DualEncoder`: `retrieval` (recall@k in both directions), `zero-shot` (which of all captions it is)
            or `answers`; by default `answers` where it has a head for them, else `retrieval`. Of a model that draws:
            `answers`, or `drawing` (how often a drawing is nearest to the picture that its words asked for).
        split: `validation`, `test` or another split of the data; by default all of it.
        limit: at most so many samples, evenly spread.
        shots: solved examples in front of every question, of its skill and from other samples.
        shots_from: the data that they are drawn from; by default the train split where there is one.
        templates: prompts for zero-shot classification, with `{}` where the label stands.
        judge: of drawings: a `DualEncoder` whose vectors tell nearness, beside the colours.
        not_in: of drawings: data whose requests are left out, such as what the model was trained on.
        skip_bad: look at every sample first and leave out those that cannot be used; the result names them.
        answers: a file that keeps written answers as they come; what the same model was asked before with the same
            pictures and settings is taken from it.

    Raises:
        ValueError: an unusable sample without `skip_bad`, or an option that the task does not read.
    """
    if shots_from is not None and not shots:
        raise ValueError("shots_from names the data of solved examples, but shots is 0; pass shots=4 or leave it out")
    vlm = model if isinstance(model, VLM | DualEncoder) else ready_to_answer(load(model))
    task, known = task or _task_of(vlm), _tasks_of(vlm)
    if task not in known:
        raise ValueError(f"task {task!r} is not one of this model; choose of {', '.join(known)}")
    _refuse_unread(task, metric=metric, shots=shots, templates=templates, judge=judge, not_in=not_in)
    if shots and isinstance(vlm, DualEncoder):
        raise ValueError(f"shots={shots}: a model of two towers reads one question and no examples; leave shots out")
    samples, asked = read(data, split=split), list[str]()
    if task == "drawing":
        samples, asked = requests(samples, () if not_in is None else known_requests(read(not_in)))
    given = samples = spread(samples, limit)
    samples, skipped = usable(given, progress) if skip_bad else (given, [])
    shown: dict[str, Any] = {"control": control, "batch_size": batch_size, "progress": progress}
    notes = skipped_note(skipped, len(given))
    try:
        if task in ("retrieval", "zero-shot"):
            samples, others = of_one_picture(samples)
            notes += others
        if task == "retrieval":
            result = evaluate_retrieval(vlm.model, vlm.processor, samples, **shown).evaluation(samples)
        elif task == "zero-shot":
            result = evaluate_zero_shot(vlm.model, vlm.processor, samples, tuple(templates) or TEMPLATES, **shown)
        elif task == "drawing":
            eye = None if judge is None else _judge(judge)
            result = evaluate_drawings(vlm.model, vlm.processor, samples, judge=eye, **shown)
        else:
            examples = _examples(data, samples, shots, shots_from, skip_bad)
            kept = None
            if answers is not None:
                kept = KeptAnswers(answers, identity_of(vlm.model, vlm.processor, max_new_tokens=max_new_tokens))
            generate = partial(vlm.generate, max_new_tokens=max_new_tokens)
            result = evaluate_answers(generate, samples, metric=metric, examples=examples, kept=kept, **shown)
    except (SampleError, ImageError) as error:
        if skip_bad:
            raise
        raise with_hint(error) from error
    result.skipped = skipped
    result.notes = [*asked, *notes, *result.notes]
    return result


def _refuse_unread(task: str, **given: Any) -> None:
    if named := next((name for name, value in given.items() if value and name not in READ[task]), None):
        raise ValueError(f"{named}={given[named]!r} is not for task {task!r}, which does not read it; leave it out")


def _examples(data: Any, samples: Samples, shots: int, shots_from: Any, skip_bad: bool) -> Sequence[Samples] | None:
    if not shots:
        return None
    pool = read(shots_from) if shots_from is not None else read_train(data)
    return draw_examples(samples, usable(spread(pool, MOST_CANDIDATES))[0] if skip_bad else pool, shots)


def _tasks_of(model: VLM | DualEncoder) -> tuple[str, ...]:
    if isinstance(model, DualEncoder):
        return ("answers", "retrieval", "zero-shot")
    return ("answers", "drawing") if can_draw(model.model) else ("answers",)


def _task_of(model: VLM | DualEncoder) -> str:
    answers = isinstance(model, VLM) or getattr(model.model.config, "answer_head", None) is not None
    return "answers" if answers else "retrieval"


def _judge(model: DualEncoder | str | Path) -> Any:
    """Pictures → a vector of length 1 each, by a model of two towers."""
    encoder = model if isinstance(model, DualEncoder) else ready_to_answer(load(model))
    if not isinstance(encoder, DualEncoder) or not isinstance(encoder.model, LateFusionModel):
        raise ValueError(f"judge {model} gives no vector a picture; name a model of two towers (fusion late)")
    return encoder.embed_images
