"""`chiasm report RUN`: the report of a run's folder as it stands, whether it is finished, stopped or still going on."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from chiasm.data.readers import read
from chiasm.data.schema import Samples
from chiasm.data.splits import ids_of
from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.report import write_report
from chiasm.rgb import to_rgb
from chiasm.training.log import read_log
from chiasm.training.run import DRAWN, LOCK, LOG, MODEL

EVALUATION = "evaluation"


def report_run(
    run: str | Path, output: str | Path | None = None, data: Any = None, evaluation: str | Path | None = None
) -> Path:
    """Writes the report of a run and returns its path.

    Args:
        output: the page; by default `report.html` in the run's folder.
        data: held-out data of the run, for the pictures beside its answers.
        evaluation: what `chiasm eval -o` wrote; by default `evaluation` in the run's folder, if it is there.

    Raises:
        ValueError: the folder holds no run.
    """
    run = Path(run)
    if not (run / LOG).is_file():
        raise ValueError(f"{run} holds no run: there is no {LOG} in it; give the folder that chiasm train -o named")
    log = read_log(run / LOG)
    folder = Path(evaluation) if evaluation is not None else run / EVALUATION
    result = EvalResult.load(folder) if evaluation is not None or (folder / "results.jsonl").is_file() else None
    page, drawn = output or run / "report.html", run / DRAWN
    sheet = to_rgb(Image.open(drawn)) if drawn.is_file() else None
    return write_report(page, log, result, _info(run, log), _picture_of(data), sheet)


def status(run: Path, log: Sequence[Mapping[str, Any]]) -> str:
    """Whether a run is finished, going on or stopped, and where."""
    if (run / MODEL).is_dir():
        return "finished"
    planned = {event["stage"]: event.get("steps") for event in log if event["event"] == "plan"}
    stage = next(reversed(planned), None)
    where = ""
    if stage is not None:
        step = max((event["step"] for event in log if event["event"] == "step" and event["stage"] == stage), default=0)
        where = f" in stage {stage} at step {step} of {planned[stage]}"
    return ("going on" if _is_locked(run) else "stopped") + where


def _is_locked(run: Path) -> bool:
    if not (run / LOCK).is_file():
        return False
    try:
        with FileLock(run / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def _info(run: Path, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    start = next((event for event in log if event["event"] == "start"), {})
    plan: Any = next((event for event in reversed(log) if event["event"] == "plan" and "table" in event), {"table": []})
    parameters: dict[str, int] = {}
    for row in plan["table"]:
        parameters[row["part"]] = parameters.get(row["part"], 0) + row["parameters"]
    samples = f", {start['samples']:,} samples" if "samples" in start else ""
    return {
        "title": run.resolve().name,
        **start.get("model", {}),
        "parameters": parameters,
        "command": f"chiasm chat {shlex.quote(str(run / MODEL))} picture.jpg",
        "timings": {event["stage"]: event["seconds"] for event in log if event["event"] == "stage_end"},
        "data": f"{status(run, log)}{samples}",
        "machine": f"{start['device']}, torch {start['torch']}" if "device" in start else None,
    }


def _picture_of(data: Any) -> Callable[[str], Image.Image | None]:
    """Loads the picture of a sample by its id; samples that nobody asks for are not built."""
    samples: Samples = [] if data is None else read(data)
    places = {sample_id: index for index, sample_id in enumerate(ids_of(samples))}

    def picture(sample_id: str) -> Image.Image | None:
        shown = samples[places[sample_id]].images if sample_id in places else []
        return shown[0].load() if shown else None

    return picture
