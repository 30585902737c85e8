"""`compare`: many ways of connecting, trained and measured under one budget."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from chiasm.cli.app import Json, app, emit, err, example, out, require_folder


@app.command(epilog=example("chiasm compare compare -o runs/compared"))
def compare(
    plans: Annotated[
        list[str],
        typer.Argument(metavar="PLAN...", help="Plan files or names, or folders of them: claims.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the comparison.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="Seconds a cell: shows that all of it works.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with one cell at a time.")] = 1,
    only: Annotated[list[str], typer.Option(help="A cell, or all seeds of one; repeatable.")] = [],  # noqa: B006
    list_: Annotated[bool, typer.Option("--list", help="Print one command for every cell and stop.")] = False,
    here: Annotated[bool, typer.Option("--here", help="Run the cells in this process, one after the other.")] = False,
    as_json: Json = False,
) -> None:
    """Compare ways of connecting on your data and budget; a stopped comparison goes on where it was."""
    from chiasm.comparison import compare as comparing

    require_folder(output)
    if list_ and here:
        raise ValueError("--list runs no cell, so --here is not for it; leave one out")
    if jobs > 1 and (list_ or here):
        other = "--list" if list_ else "--here"
        raise ValueError(f"--jobs {jobs} is not for {other}, which starts no process; leave one out")
    places = comparing.places(plans, output)
    if only and len(places) > 1:
        raise ValueError(f"--only names cells of one plan, and here are {len(places)}; choose one")
    if list_:
        listed = [line for plan, folder in places for line in _listed(plan, folder, only, quick)]
        return emit(listed) if as_json else out.print("\n".join(listed), markup=False, highlight=False, soft_wrap=True)
    for plan, _ in places:
        comparing.load_plan(plan)
    jobs = 0 if here or (quick and jobs == 1 and not only) else jobs
    told = []
    for plan, folder in places:
        done = comparing.compare(plan, folder, quick=quick, jobs=jobs, only=only, say=_say, quiet=as_json)
        skipped = [{"way": one.way, "reason": one.reason} for one in done.skipped]
        report = {"report": str(done.report), "results": done.results, "skipped": skipped, "failed": done.failed}
        told.append(report)
        if done.results and not as_json:
            counted = f"{len(done.results)} cells" + (f", {len(done.failed)} failed" if done.failed else "")
            out.print(f"{counted}; report: {escape(str(done.report))}", soft_wrap=True)
    if as_json:
        emit(told[0] if places[0][1] == output else told)
    if any(one["failed"] for one in told):
        raise typer.Exit(1)
    return None


def _listed(plan: str, folder: Path, only: list[str], quick: bool) -> list[str]:
    from chiasm.comparison import compare as comparing
    from chiasm.comparison.quick import quickened

    loaded = comparing.load_plan(plan)
    choices, skipped = comparing.cells_of(quickened(loaded) if quick else loaded)
    for one in skipped:
        _say(f"skipped {one.way}: {one.reason}")
    return comparing.job_list(plan, choices, folder, quick, only)


def _say(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)
