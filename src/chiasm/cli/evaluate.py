"""`eval`: how well a model answers, or finds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from chiasm.cli.app import Data, Json, Model, app, argument, emit, err, example, out, require_folder

LONGEST = 64


@app.command("eval", epilog=example("chiasm eval runs/a/model --data test.json"))
def evaluate(
    model: Model,
    data: Data,
    task: Annotated[
        str | None,
        typer.Option(help="Of two towers: retrieval, zero-shot or answers. Of a model that draws: answers or drawing."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="validation, test, ...; by default everything.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many samples, evenly spread.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for results.jsonl and summary.json; a stopped one goes on there."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer that is written; else 64.")] = None,
    control: Annotated[bool, typer.Option(help="Ask again with another sample's picture.")] = True,
    metric: Annotated[str | None, typer.Option(help="One metric for all; by default chosen per skill.")] = None,
    shots: Annotated[int, typer.Option(help="Solved examples of the same skill in front of every question.")] = 0,
    shots_from: Annotated[
        str | None, typer.Option(help="Data that the examples are drawn from; by default the train split.")
    ] = None,
    template: Annotated[
        list[str], typer.Option(help="Zero-shot: a prompt with {} where the label stands; repeatable.")
    ] = [],  # noqa: B006
    judge: Annotated[
        str | None, typer.Option(help="Drawing: two towers that tell which pictures are near, beside their colours.")
    ] = None,
    not_in: Annotated[
        str | None,
        typer.Option(help="Drawing: leave out the requests of this data, such as what the model was trained on."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another model, or the -o folder of its evaluation, to compare with on the same questions."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip, count and name samples that cannot be used.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a model's answers per skill, what it finds or what it draws, with intervals, beside a wrong picture's."""
    from chiasm import api
    from chiasm.evaluation.evaluate import EvalResult
    from chiasm.evaluation.kept import ANSWERS
    from chiasm.evaluation.skills import caption_lines, to_table
    from chiasm.training.reporter import progress_bar
    from chiasm.vlm import is_retrieval

    if output is not None:
        require_folder(output)
    scored = against is not None and (Path(against) / "results.jsonl").is_file()
    if against is not None and not scored:
        is_retrieval(against)  # refuses what is no model, before anything is asked
    _refuse_unread([model] if against is None or scored else [model, against], max_new_tokens, shots, task)
    asked: dict[str, Any] = {
        "split": split,
        "limit": limit,
        "batch_size": batch_size,
        "max_new_tokens": LONGEST if max_new_tokens is None else max_new_tokens,
        "metric": metric,
        "shots": shots,
        "shots_from": shots_from,
        "task": task,
        "templates": template,
        "judge": judge,
        "not_in": not_in,
        "skip_bad": skip_bad,
        "answers": None if output is None else output / ANSWERS,
    }
    other = None
    with _told_where(output):
        with progress_bar("drawing" if task == "drawing" else "answering", err) as update:
            result = api.evaluate(model, data, control=control, progress=update, **asked)
        if output is not None:
            result.save(output)
        if against is not None and scored:
            other = EvalResult.load(against)
        elif against is not None:
            with progress_bar("answering, the other model", err) as update:
                other = api.evaluate(against, data, control=False, progress=update, **asked)
    compared = {} if other is None else _compare(result, other, model, str(against))
    if as_json:
        plain = {key: value for key, value in compared.items() if key != "table"}
        return emit({"summary": result.summary, "notes": result.notes, "skipped": result.skipped, **plain})
    out.print(to_table(result.summary))
    for note in (*caption_lines(result.summary), *result.notes):
        out.print(note, markup=False, soft_wrap=True)
    if compared:
        out.print(compared["table"])
        out.print(compared["verdict"], markup=False, highlight=False, soft_wrap=True)
    return None


@contextmanager
def _told_where(output: Path | None) -> Iterator[None]:
    """Says where a stopped evaluation goes on; afterwards the answers that it kept for that are not needed."""
    from chiasm.evaluation.kept import ANSWERS

    try:
        yield
    except KeyboardInterrupt:
        if output is not None:
            err.print(f"stopped; the same command goes on from the answers in {argument(output)}", soft_wrap=True)
        raise
    if output is not None:
        (output / ANSWERS).unlink(missing_ok=True)


def _refuse_unread(models: list[str], max_new_tokens: int | None, shots: int, task: str | None) -> None:
    """Refuses options that the models do not read, before one of them is asked anything."""
    from chiasm.vlm import is_retrieval

    if max_new_tokens is None and not shots:
        return
    if task == "drawing" and max_new_tokens is not None:
        raise ValueError(f"--max-new-tokens {max_new_tokens} is for answers in words, --task drawing writes none")
    finding = [model for model in models if is_retrieval(model)]
    if finding and shots:
        raise ValueError(f"--shots {shots} is for models that read examples; {finding[0]} is a retrieval model")
    if len(finding) == len(models) and max_new_tokens is not None:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} is for models that write answers; {finding[0]} is a retrieval model"
        )


def _compare(result: Any, other: Any, model: str, against: str) -> dict[str, Any]:
    from chiasm.evaluation import paired

    names = (model, against)
    rows = paired.compare(result, other)
    return {
        "against": against,
        "comparison": rows,
        "verdict": paired.verdict(rows[-1], *names),
        "table": paired.to_table(rows, *names),
    }
