"""`compare`: runs the cells of a plan, here or in several processes, and reports on those that are finished."""

import os
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from chiasm.comparison.account import account, own_places, repeated
from chiasm.comparison.cell import ATTENTION, ERROR, EVALUATION, run_cell
from chiasm.comparison.choices import Choice, Grid, Skipped, expand
from chiasm.comparison.claims import judge
from chiasm.comparison.data import captions_to_find, data_of
from chiasm.comparison.plan import load_plan
from chiasm.comparison.quick import quickened, warning_of
from chiasm.comparison.report import write_report
from chiasm.comparison.results import write_results
from chiasm.comparison.same_cell import BUDGET, CELLS, RESULT, CellTakenError, Say, finished
from chiasm.comparison.schema import Plan
from chiasm.comparison.ways import without_few_shot
from chiasm.evaluation.evaluate import EvalResult
from chiasm.sources import resolve
from chiasm.sources.writing import whole_file
from chiasm.training.recipe import recipes_in
from chiasm.vision.encoder import load_vision

PLAN, REPORT = "plan.yaml", "report.html"


@dataclass(frozen=True)
class Comparison:
    """What a comparison left behind: the results of finished cells, what was skipped, and why cells failed."""

    output: Path
    results: list[dict[str, Any]]
    skipped: list[Skipped]
    failed: dict[str, str]

    @property
    def report(self) -> Path:
        return self.output / REPORT


def compare(
    plan: str | Path | dict[str, Any] | Plan,
    output: str | Path,
    *,
    quick: bool = False,
    jobs: int = 0,
    only: Sequence[str] = (),
    say: Say = lambda text: None,
    quiet: bool = True,
) -> Comparison:
    """Connects, trains, asks and measures every cell of a plan that is not finished yet, and writes the report.

    Args:
        plan: a YAML file, the name of one that ships (`compare`), a dictionary, or a loaded plan.
        output: folder of the comparison; one that was stopped goes on.
        quick: a few samples of every cell, and the first layers of the language model.
        jobs: processes, each with one cell at a time; 0 runs the cells here, one after the other. Where `torchrun`
            started several of this one, every one has its share of the cells, and a process for each of them.
        only: names of cells, or of ways (a cell without its seed); by default all.
        say: takes a line on what is being done.
        quiet: whether training draws no bar.

    Raises:
        ValueError: the plan is wrong, a name is unknown, or the folder holds another plan's cells.
    """
    plan, output = load_plan(plan), Path(output)
    plan = quickened(plan) if quick else plan
    choices, skipped = cells_of(plan)
    chosen = select(choices, only)
    done = {choice.name for choice in choices if finished(plan, choice, output) is not None}
    place, number = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    jobs = max(jobs, int(number > 1))
    # a share is one of all cells, not of those that wait: a process that starts late finds fewer of them
    waiting = [choice for choice in chosen[place::number] if choice.name not in done]
    output.mkdir(parents=True, exist_ok=True)
    saved, text = output / PLAN, yaml.safe_dump(plan.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    if not saved.is_file() or saved.read_text(encoding="utf-8") != text:
        whole_file(saved, text)
    if warning := warning_of(plan):
        say(warning)
    for one in skipped:
        say(f"skipped {one.way}: {one.reason}")
    if jobs > 1 or (jobs and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1):
        _require_pace(plan, waiting, output)
    failed: dict[str, str] = {}
    if waiting:  # what is wrong for all cells is told before the first
        data_of(plan)
        captions_to_find(plan)
    if jobs:
        failed = _in_processes(waiting, saved, output, jobs, say)
    else:
        known: dict[str, Any] = {}
        for choice in waiting:
            try:
                run_cell(plan, choice, output, say, quiet, known)
            except CellTakenError as error:
                say(f"{choice.name}: {error}")
            except Exception:
                said = _noted(output, choice.name, traceback.format_exc())
                if only:
                    raise
                failed[choice.name] = _failed(output, choice.name, said, say)
    results, told = _finished(plan, choices, output), 0
    while len(results) > told and not (only and jobs == 0):  # again where another process ended a cell meanwhile
        told = len(results)
        write_all(output, plan, choices, results, skipped, failed)
        results = _finished(plan, choices, output)
    return Comparison(output, results, skipped, failed)


def _finished(plan: Plan, choices: Sequence[Choice], output: Path) -> list[dict[str, Any]]:
    return [result for choice in choices if (result := finished(plan, choice, output)) is not None]


def _require_pace(plan: Plan, waiting: Sequence[Choice], output: Path) -> None:
    """Refuses to measure paces while cells slow each other down."""
    unmeasured = [choice.name for choice in waiting if not (output / CELLS / choice.name / BUDGET).is_file()]
    if plan.budget.minutes is not None and unmeasured:
        raise ValueError(
            f"budget minutes: {plan.budget.minutes:g} is counted by the pace of a few steps, and cells that run beside "
            f"each other slow each other down, so {unmeasured[0]} would get too few samples; leave out --jobs, or take "
            "a budget of samples, tokens or flops"
        )


def write_all(
    output: Path,
    plan: Plan,
    choices: Sequence[Choice],
    results: list[dict[str, Any]],
    skipped: list[Skipped],
    failed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The tables and the report of what is finished of all cells, the `choices`."""
    folders = {result["name"]: output / CELLS / result["name"] for result in results}
    rows = {name: EvalResult.load(folder / EVALUATION).rows for name, folder in folders.items()}
    results = [dict(without_few_shot(result, rows[result["name"]])) for result in results]
    write_results(output, results)
    train, _, test = data_of(plan)
    pictures = {sample.id: sample.images[0] for sample in test if sample.images}
    finished_cells = f"{len(results)} of {len(choices)} cells"
    facts = [finished_cells, f"budget: {in_words(plan)}", f"{platform.machine()}, {os.cpu_count()} cores"]
    facts += dict.fromkeys(note for result in results for note in result.get("notes", ()))
    base = f"{plan.base.vision} + {plan.base.language}"
    write_report(
        output / REPORT,
        results,
        rows,
        {
            "title": plan.title,
            "budget": in_words(plan),
            "warning": warning_of(plan),
            "facts": [base, *facts],
            "claims": judge(plan.claims, results, rows),
            "command": repeated(choices, output / PLAN, output),
            "done": account(plan, choices, results, rows, train),
            "unfinished": [c.name for c in choices if c.name not in folders and c.name not in failed],
            "named": {c.way: "×".join(map(str, r)) for c in choices if (r := c.regions(plan.base)) is not None},
        },
        lambda sample: pictures[sample].load() if sample in pictures else None,
        {name: folder / ATTENTION for name, folder in folders.items()},
        [(one.way, one.reason) for one in skipped],
        list(failed.items()),
    )


def _operations(number: float) -> str:
    scales = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    scale, unit = next(((scale, unit) for scale, unit in scales if number >= scale), (1e3, "k"))
    return f"{number / scale:,.1f} {unit}FLOP"


def in_words(plan: Plan) -> str:
    """The budget as the report says it."""
    kind, amount = plan.budget.kind, plan.budget.amount
    words = {
        "samples": f"{amount:,.0f} training samples",
        "tokens": f"{amount:,.0f} training tokens",
        "flops": f"{_operations(amount)} of training",
        "minutes": f"{amount:g} minutes of training steps",
    }
    return f"{words[kind]} for every cell"


def places(plans: Sequence[str], output: Path) -> list[tuple[str, Path]]:
    """Every plan with its folder: one plan has the folder itself; of several, or of a folder of plans, each has one of
    its own in it, by the plan's name.

    Raises:
        ValueError: two plans have one name.
    """
    files = [[str(file) for file in recipes_in(plan)] or [plan] for plan in plans]
    if len(files) == 1 and files[0] == [plans[0]]:
        return [(plans[0], output)]
    named = [(file, output / Path(file).stem) for group in files for file in group]
    if len({folder for _, folder in named}) < len(named):
        raise ValueError(f"two of the plans {', '.join(file for file, _ in named)} have one name; rename a file")
    return named


def cells_of(plan: Plan) -> tuple[list[Choice], list[Skipped]]:
    """The plan's cells, and what was skipped."""
    return expand(plan, cache(lambda: encoder_grid(plan)))


def select(choices: Sequence[Choice], only: Sequence[str]) -> list[Choice]:
    """The cells that are named, or all."""
    unknown = [name for name in only if name not in {known for c in choices for known in (c.name, c.way)}]
    if unknown:
        raise ValueError(f"no cell is named {unknown[0]!r}; there are {', '.join(choice.name for choice in choices)}")
    return [choice for choice in choices if not only or choice.name in only or choice.way in only]


def job_list(
    plan_file: str, choices: Sequence[Choice], output: Path, quick: bool = False, only: Sequence[str] = ()
) -> list[str]:
    """One command for every cell, or those that are named, for any scheduler; the plan's own command then writes the
    report."""
    more = " --quick" if quick else ""
    base = f"{own_places(choices)}chiasm compare {shlex.quote(plan_file)} -o {shlex.quote(str(output))}{more}"
    return [f"{base} --here --only {shlex.quote(choice.name)}" for choice in select(choices, only)]


def encoder_grid(plan: Plan) -> Grid:
    """Rows and columns of patches that connectors receive."""
    features = plan.base.features or {}
    if (grid := features.get("grid")) is not None:
        return int(grid[0]), int(grid[1])
    return load_vision(resolve(plan.base.vision), features=features or None, image_size=plan.base.image_size).grid


def _noted(output: Path, name: str, everything: str) -> str:
    """Leaves all that a cell said when it failed in the cell's folder, and gives its last line."""
    everything = everything.strip()
    told = output / CELLS / name / ERROR
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(everything + "\n", encoding="utf-8")
    return everything.splitlines()[-1]


def _failed(output: Path, name: str, said: str, say: Say) -> str:
    say(f"{name}: failed: {said}; all of it: {output / CELLS / name / ERROR}")
    return said


def _in_processes(choices: Sequence[Choice], plan: Path, output: Path, jobs: int, say: Say) -> dict[str, str]:
    """Runs every cell in a process of its own, `jobs` at once; of those that failed it gives the last line and leaves
    all that they said in the cell's folder."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    together = ("RANK", "WORLD_SIZE")  # a cell's process is no part of a team, and keeps its own device by LOCAL_RANK
    environment = {"OMP_NUM_THREADS": threads, **{k: v for k, v in os.environ.items() if k not in together}}

    def run(choice: Choice) -> str | None:
        say(f"{choice.name}: started")
        told = output / CELLS / choice.name / ERROR
        told.unlink(missing_ok=True)
        command = [sys.executable, "-m", "chiasm", "compare", str(plan), "-o", str(output), "--only", choice.name]
        done = subprocess.run([*command, "--here"], env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            here = (output / CELLS / choice.name / RESULT).is_file()
            say(f"{choice.name}: {'finished' if here else 'another process is at work on it'}")
            return None
        if told.is_file():  # which has more than a user is told in one line
            return _failed(output, choice.name, told.read_text(encoding="utf-8").strip().splitlines()[-1], say)
        everything = done.stderr.strip() or done.stdout.strip() or "no message"
        return _failed(output, choice.name, _noted(output, choice.name, everything), say)

    with ThreadPoolExecutor(jobs) as pool:
        ended = dict(zip((choice.name for choice in choices), pool.map(run, choices), strict=True))
    return {name: said for name, said in ended.items() if said is not None}
