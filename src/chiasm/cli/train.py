"""`train`, `data check` and `demo`: learning, and what is learned from."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from chiasm.cli.app import DATA, Json, app, argument, data_app, emit, err, example, out, require_folder


@app.command(epilog=example("chiasm train llava --model models/mine --data data.json -o runs/a"))
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe file, or one that ships: connector, llava, lora, finetune_vision, full, blip2, internvl, "
            "flamingo, clip, siglip, late_vqa, unified.",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option("--model", help="Folder or hub id of the model to train.", show_default=False)],
    data: Annotated[str | None, typer.Option("--data", help=DATA)] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the run.", show_default=False)
    ] = None,
    validation_data: Annotated[str | None, typer.Option(help="Held-out data; else a share of --data.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Change the recipe: stages.align.lr=1e-3.")] = [],  # noqa: B006
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and count samples that cannot be used.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint.")] = True,
    plan_only: Annotated[
        bool,
        typer.Option("--plan-only", help="Show what would be trained, its memory and time, and stop."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model by the stages of a recipe; a stopped run goes on where it was."""
    from chiasm import api
    from chiasm.training.team import is_first

    overrides = [*set_, "skip_bad=true"] if skip_bad else set_
    if plan_only:
        if validation_data is not None and data is None:
            raise ValueError("--validation-data goes with --data; without it nothing is measured")
        given: dict[str, Any] = {"validation_data": validation_data, "overrides": overrides, "quiet": as_json}
        return _show_plan(api.preview(recipe, model, data, **given), as_json)
    if data is None or output is None:
        raise ValueError(
            "--data is missing: name what to train on" if data is None else "-o is missing: name the run's folder"
        )
    require_folder(output)
    result = api.train(
        recipe, model, data, output, validation_data=validation_data, overrides=overrides, resume=resume, quiet=as_json
    )
    if not is_first():
        return None
    if as_json:
        return emit({"model": str(result.model), "run": str(output)})
    answers = json.loads((result.model / "config.json").read_text())["model_type"] == "chiasm"
    hint = f"; talk to it: [bold]chiasm chat {argument(result.model)} PICTURE[/bold]" if answers else ""
    out.print(f"model: {escape(str(result.model))}{hint}", soft_wrap=True)
    return None


def _show_plan(stages: list[Any], as_json: bool) -> None:
    from chiasm.training.preview import print_preview

    if as_json:
        emit({"stages": [stage.fields() for stage in stages]})
    else:
        print_preview(stages, out)


@app.command(epilog=example("chiasm report runs/a"))
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run: finished, stopped or going on.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page; by default report.html in the run.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="The held-out data, for pictures beside answers.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What chiasm eval -o wrote; by default evaluation in the run, if there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a run: curves, gates, skills, forgetting, and answers as training went on."""
    from chiasm.evaluation.run_report import report_run

    page = report_run(run, output, data, evaluation)
    if as_json:
        emit({"report": str(page)})
    else:
        out.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


@data_app.command("check", epilog=example("chiasm data check data.json"))
def data_check(
    data: Annotated[str, typer.Argument(help=DATA, show_default=False)],
    split: Annotated[str | None, typer.Option(help="Of data in splits; by default train, as training does.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Find pictures with more pixels.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Find picture files with more bytes.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Find what this model cannot learn from, such as too long samples.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="With --model: tokens of a sample; by default the model's context.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find broken, truncated, huge, missing and mislabelled samples before training."""
    from chiasm.api import encoder_of
    from chiasm.data.check import check
    from chiasm.data.readers import read, read_split
    from chiasm.training.reporter import progress_bar

    if max_length is not None and model is None:
        raise ValueError(f"--max-length {max_length} is in a model's tokens; pass --model too")
    limits: dict[str, Any] = {"max_pixels": max_pixels, "max_bytes": max_bytes}
    encode = None if model is None else encoder_of(model, max_length)
    samples = read_split(data, "train") if split is None else read(data, split)
    with progress_bar("checking", err) as update:
        report = check(samples, encode=encode, progress=update, **limits)
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

    require_folder(output)
    summary = run_demo(output, quick=quick, seed=seed, console=err if as_json else out)
    if as_json:
        emit(summary)
