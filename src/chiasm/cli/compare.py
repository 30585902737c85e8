"""`compare`: many ways of connecting, trained and measured under one budget."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from chiasm.cli.app import Json, app, emit, err, example, out


@app.command(epilog=example("chiasm compare compare -o runs/compared"))
def compare(
    plan: Annotated[str, typer.Argument(help="A plan file, or the name of one that ships.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the comparison.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="A few samples: shows that all of it works.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with one cell at a time.")] = 1,
    only: Annotated[list[str], typer.Option(help="A cell, or all seeds of one; repeatable.")] = [],  # noqa: B006
    list_: Annotated[bool, typer.Option("--list", help="Print one command for every cell and stop.")] = False,
    here: Annotated[bool, typer.Option("--here", help="Run the cells in this process, one after the other.")] = False,
    as_json: Json = False,
) -> None:
    """Compare ways of connecting on your data and budget; a stopped comparison goes on where it was."""
    from chiasm.comparison import compare as comparing

    if list_ and here:
        raise ValueError("--list runs no cell, so --here is not for it; leave one out")
    if jobs > 1 and (list_ or here):
        other = "--list" if list_ else "--here"
        raise ValueError(f"--jobs {jobs} is not for {other}, which starts no process; leave one out")
    if list_:
        loaded = comparing.load_plan(plan)
        choices, skipped = comparing.cells_of(comparing.quickened(loaded) if quick else loaded)
        for one in skipped:
            err.print(f"skipped {one.way}: {one.reason}", markup=False, highlight=False, soft_wrap=True)
        jobs_ = comparing.job_list(plan, comparing.select(choices, only), output, quick)
        return emit(jobs_) if as_json else out.print("\n".join(jobs_), markup=False, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        err.print(text, markup=False, highlight=False, soft_wrap=True)

    done = comparing.compare(plan, output, quick=quick, jobs=0 if here else jobs, only=only, say=say, quiet=as_json)
    if as_json:
        skipped_ = [{"way": one.way, "reason": one.reason} for one in done.skipped]
        emit({"report": str(done.report), "results": done.results, "skipped": skipped_, "failed": done.failed})
    elif done.results:
        counted = f"{len(done.results)} cells" + (f", {len(done.failed)} failed" if done.failed else "")
        out.print(f"{counted}; report: {escape(str(done.report))}", soft_wrap=True)
    if done.failed:
        raise typer.Exit(1)
    return None
