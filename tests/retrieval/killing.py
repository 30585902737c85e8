"""A writer that is killed at random moments, and what must be true of its index afterwards.

    python tests/retrieval/killing.py 50

The writer says in a journal what it is about to do and, when the call has returned, that it is done. After every kill
the index must hold what was done, with or without the one thing that was under way, and every file must be whole.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from chiasm.retrieval.store import Snapshot, Store

WIDTH = 8


def vector(name: str) -> np.ndarray:
    return np.random.default_rng(int(name)).standard_normal((2, WIDTH)).astype("f4")


def shows(record: dict[str, str]) -> str:
    """Whose vector it is: that of another name where it was moved."""
    return record.get("shows", record["id"])


def write_for_ever(folder: Path, journal: Path, seed: int) -> None:
    """Adds, replaces, moves, deletes and compacts, until the end."""
    rng, store = random.Random(seed), Store(folder)
    with journal.open("a") as file:

        def say(**event: object) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())

        number = sum(1 for _ in journal.open()) * 10
        while True:
            with store.writing():
                state = store.snapshot()
                rows = [row for row in range(len(state)) if state.live[row]]
                kind = rng.choice(["add", "add", "move", "delete", "compact"])
                gone = rng.sample(rows, min(len(rows), 1 if kind == "move" else rng.randrange(3)))
                deleted = [state.records[row]["id"] for row in gone]
                count = {"add": rng.randrange(1, 6), "move": len(gone)}.get(kind, 0)
                new = [str(number := number + 1) for _ in range(count)]
                if kind == "compact":
                    deleted = []
                say(event="begin", new=new, deleted=deleted)
                if kind == "add":
                    store.append([{"id": name} for name in new], np.stack(list(map(vector, new))), gone)
                elif kind == "move" and gone:
                    shown = [shows(state.records[row]) for row in gone]
                    records = [{"id": name, "shows": other} for name, other in zip(new, shown, strict=True)]
                    store.append(records, state.take(np.array(gone)), gone)
                elif kind == "delete":
                    store.delete(gone)
                else:
                    store.compact()
                say(event="end")


def expected(journal: Path) -> list[set[str]]:
    """The states that the index may be in: what was acknowledged, and with the last thing begun."""
    state: set[str] = set()
    begun: dict | None = None
    for line in journal.read_text().splitlines():
        event = json.loads(line) if line.endswith("}") else {"event": "torn"}
        if event["event"] == "begin":
            begun = event
        elif begun is not None and event["event"] == "end":
            state = (state - set(begun["deleted"])) | set(begun["new"])
            begun = None
    return [state] if begun is None else [state, (state - set(begun["deleted"])) | set(begun["new"])]


def live(state: Snapshot) -> set[str]:
    names = {record["id"] for row, record in enumerate(state.records) if state.live[row]}
    for row in np.flatnonzero(state.live):
        assert np.array_equal(state.take(np.array([row]))[0], vector(shows(state.records[row]))), "a wrong vector"
    return names


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n")


def kill_often(folder: Path, rounds: int, seed: int = 0) -> tuple[int, int]:
    """Kills so many writers one after the other, checks after each, and returns the calls and pictures there were."""
    rng, index, journal = random.Random(seed), folder / "index", folder / "journal"
    Store.create(index, {})
    journal.touch()
    for number in range(rounds):
        child = os.fork()
        if child == 0:
            write_for_ever(index, journal, seed * 1000 + number)
        wanted = _lines(journal) + rng.randrange(1, 16)
        while _lines(journal) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = live(Store(index).snapshot(verify=True))
        allowed = expected(journal)
        assert found in allowed, f"round {number}: lost {allowed[0] - found}, too many {found - allowed[0]}"
        with journal.open("a") as file:  # what was under way has happened or not: the journal says which
            if len(allowed) == 2:
                events = [{"event": "end"}] if found == allowed[1] else [{"event": "begin", "new": [], "deleted": []}]
                file.write("".join("\n" + json.dumps(event) + "\n" for event in events))
    return journal.read_text().count('"end"'), len(found)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        left = kill_often(Path(folder), rounds, seed=int(time.time()))
    print(f"{rounds} kills: nothing that was acknowledged is lost, everything loads; {left[0]} calls, {left[1]} left")
