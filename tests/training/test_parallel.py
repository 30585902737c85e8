"""Two processes take the steps that one would take, whatever the stage trains, with whole copies or with shards."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import chiasm
from chiasm.training.log import read_log

FULL = {"tune": "full", "lr": 1e-2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "connector": {"connector": FULL},
    "encoder": {"connector": FULL, "vision": FULL},
    "lora": helpers.LORA,
    "everything": {"connector": FULL, "vision": FULL, "language": FULL},
}


def recipe(parts: dict[str, Any], fusion: str = "early", **settings: Any) -> dict[str, Any]:
    """Plain gradient descent on batches of 4, of which an epoch's last has one sample for two processes."""
    parts = {**helpers.FROZEN, **parts}
    settings = {"steps": 4, "accumulate": 2, "validation": {"samples": 4}, "optimizer": "sgd"} | settings
    return helpers.with_blocks({"stages": [helpers.stage(parts=parts, **settings)]}, fusion)


def compare(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    """Losses, counts and weights of two runs."""
    logs = [[e for e in read_log(run / "log.jsonl") if e["event"] in ("step", "validation")] for run in (one, other)]
    assert len(logs[0]) == len(logs[1]) > 0
    for ours, theirs in zip(*logs, strict=True):
        assert (ours["samples"], ours.get("supervised_tokens")) == (theirs["samples"], theirs.get("supervised_tokens"))
        assert abs(ours["loss"] - theirs["loss"]) < 10 * tolerance
    weights, expected = (helpers.weights(chiasm.load(run / "model")) for run in (one, other))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=tolerance), name


def jobs() -> dict[str, tuple[dict[str, Any], str]]:
    """Recipe and fusion of every run that is compared."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        for name, parts in STRATEGIES.items():
            found[f"{parallel}-{name}"] = (recipe(parts, parallel=parallel), "early")
        blocks = recipe({"connector": FULL}, "intermediate", parallel=parallel)
        found[f"{parallel}-intermediate"] = (blocks, "intermediate")
    return found


def work(folder: Path) -> None:
    """All runs, in one of two processes."""
    for name, (settings, fusion) in jobs().items():
        helpers.run(folder / name, settings, helpers.vlm(fusion=fusion), cache_root=folder / "features")


def spawn(call: str, *arguments: Any, size: int = 2, **environment: str) -> list[subprocess.Popen]:
    """A function of this file in several processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join(paths)} | environment
    code = f"import sys, pathlib, test_parallel; test_parallel.{call}(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit codes and what was said."""
    said = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs by two processes."""
    folder = tmp_path_factory.mktemp("two")
    for code, said in finish(spawn("work", folder)):
        assert code == 0, said
    return folder


@pytest.mark.parametrize("name", jobs())
def test_two_processes_equal_one(tmp_path: Path, together: Path, name: str) -> None:
    settings, fusion = jobs()[name]
    helpers.run(tmp_path / "one", settings, helpers.vlm(fusion=fusion))
    compare(together / name, tmp_path / "one")
