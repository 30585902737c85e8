"""The comparison's page on made-up results: what it must say, and that it needs nothing but itself."""

from pathlib import Path
from typing import Any

from PIL import Image

from chiasm.comparison import plots
from chiasm.comparison.curves import Crossing
from chiasm.comparison.report import write_report
from chiasm.comparison.results import to_markdown, write_results
from chiasm.comparison.tables import crossing_table
from chiasm.comparison.timing import incomparable
from chiasm.evaluation.skills import summarise

SHAPE = {"patches": 16, "in_sequence": True, "matrices": 1000, "head": 10, "pair": 4, "kv_bytes": 8}
SHAPE |= {"cross_token": 0, "cross_look": 0, "cross_keys": 0, "cross_kept": 0}
INFO: dict[str, Any] = {
    "claims": [],
    "title": "A <b>title",
    "budget": "100 samples",
    "facts": ["a fact"],
    "warning": "",
    "command": "chiasm compare plan.yaml -o run",
}


def answers(right: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(20):
        score = float(number % 10 < right)
        row = {
            "id": str(number),
            "sample": f"s{number}",
            "skill": ["naming", "counting"][number % 2],
            "metric": "exact_match",
        }
        row |= {
            "question": f"What is {number}?",
            "expected": "cat",
            "references": ["cat"],
            "answer": "cat" if score else "<i>dog",
        }
        rows.append(row | {"score": score, "correct": bool(score), "contains": score, "control_score": 0.0})
    return rows


def result(way: str, right: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    closed = {"parameters": {"connector": 1000}, "visual_tokens": tokens, "connect_flops": 10, "prefill_flops": 10**9}
    closed |= {"encode_flops": 10**9, "decode_flops": 10**8, "kv_cache_bytes_per_image": 1024 * tokens}
    closed["connect_and_prefill_flops"] = 10**9 + 10
    label = way.partition("-")[0]
    choice = {"label": label, "connector": {"name": label}, "fusion": "early", "tokens": None, "tune": "lora"}
    return {
        "name": f"{way}-seed{seed}",
        "way": way,
        "choice": choice | {"positions": "auto", "seed": seed},
        "samples": 100,
        "seconds": {"train": 10.0 * tokens, "evaluate": 1.0},
        "closed_form": closed,
        "measured": {"first_token_seconds": 0.1 * tokens, "decode_tokens_per_second": 20.0},
        "shape": SHAPE | {"tokens": tokens, "grows": label == "mlp"},
        "training": {
            "steps": 25,
            "samples_per_second": 8.0,
            "peak_memory_bytes": 10**9,
            "trainable": {"connector": 1000},
            "curve": [[0, 3.0, 3.1], [25, 1.0, 2.0]],
        },
        "summary": summarise(answers(right)),
        "forgetting": {"perplexity": {"english": 20.0}, "perplexity_change": {"english": 1.0}},
        "diagnostics": {"knn_overlap": 0.8, "reconstruction_error": 0.3, "reconstruction_floor": 0.2},
        "attention": {"sample": "s0", "question": "What?", "answer": "cat"},
    }


def test_the_page_says_what_was_found_and_needs_no_network(tmp_path: Path) -> None:
    results = [result("mlp-early", 9, 16), result("mlp-early", 8, 16, seed=1), result("qformer-early", 3, 8)]
    told = {one["name"]: answers(right) for one, right in zip(results, (9, 8, 3), strict=True)}
    Image.new("RGB", (20, 20), "red").save(tmp_path / "attention.png")
    page = write_report(
        tmp_path / "report.html",
        results,
        told,
        INFO,
        lambda sample: Image.new("RGB", (9, 9), "blue"),
        {"mlp-early-seed0": tmp_path / "attention.png"},
        [("qformer-late", "late fusion pools")],
    ).read_text(encoding="utf-8")
    for part in (
        "Take mlp-early",
        "LLaVA-1.5",
        "BLIP-2",
        "16 (grows with the patches)",
        "8 (fixed)",
        "late fusion pools",
    ):
        assert part in page, part
    for heading in (
        "What accuracy costs",
        "Skill by skill",
        "How they learned",
        "As pictures grow",
        "Where they looked",
    ):
        assert heading in page, heading
    assert page.count('class="thumb"') == 13
    assert "from 9 patches of one picture on" in page
    assert "Which picture does a caption describe?" not in page
    assert "<i>dog" not in page
    assert "A <b>title" not in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_tables_are_written_beside_it(tmp_path: Path) -> None:
    results = [result("mlp-early", 9, 16), result("qformer-early", 3, 8)]
    write_results(tmp_path, results)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
    assert "recall" not in (tmp_path / "results.csv").read_text() + to_markdown(results)
    assert "| mlp-early-seed0 | 16 | 1,000 |" in to_markdown(results)


def page_of(results: list[dict[str, Any]], folder: Path, **more: Any) -> str:
    told = {one["name"]: answers(9) for one in results}
    return write_report(folder / "report.html", results, told, INFO | more).read_text(encoding="utf-8")


def test_the_page_tells_what_was_done_what_is_missing_and_which_ways_have_names(tmp_path: Path) -> None:
    done = [("asked", "300 questions"), ("seeds", "0, 1")]
    results = [result("mlp-early", 9, 16), result("qformer-early", 9, 8)]
    page = page_of(results, tmp_path, done=done, unfinished=["late-seed0"], named={"mlp-early": "2×2"})
    for part in ("What was done", "300 questions", "What is not finished", "late-seed0", "region names", "2×2"):
        assert part in page, part
    assert "ways with names are compared with ways without" in page
    assert "not in this plan" in page and "Fuyu, Chameleon" in page
    assert "fixed ones and cross-attention do not" not in page


def test_ways_that_cross_alike_share_a_row() -> None:
    found = [Crossing("prefill", dear, cheap, "patches", 9) for dear in ("linear", "mlp") for cheap in ("qformer", "p")]
    assert [row[1:3] for row in crossing_table([*found, Crossing("prefill", "linear", "q", "patches", 4)])["rows"]] == [
        ["linear, mlp", "qformer, p"],
        ["linear", "q"],
    ]


def test_times_that_cannot_be_compared_are_said(tmp_path: Path) -> None:
    steady, busy, jumping = (result(f"{label}-early", 9, 16) for label in ("mlp", "linear", "ldp"))
    for cell, load, high in ((steady, 0.0, 1.7), (busy, 1.2, 1.7), (jumping, 0.0, 3.0)):
        cell["measured"] |= {"first_token_seconds_low": 1.6, "first_token_seconds_high": high, "foreign_cores": load}
    assert incomparable({"mlp-early": [steady]}) == []
    page = page_of([steady, busy, jumping], tmp_path)
    assert page.count("(cores that they took): linear-early (1.2).") == 2
    assert page.count("spread by more than 20% between repeats: ldp-early.") == 2
    assert "1600 ms (1600–1700)" in page.replace("\u2060", "").replace("\u00a0", " ")
    every = " ".join(
        incomparable(
            {"linear-early": [busy], "ldp-early": [busy | {"measured": jumping["measured"] | {"foreign_cores": 0.4}}]}
        )
    )
    assert "while all of these were timed, on 0.4 to 1.2 cores" in every and "linear-early" not in every
    assert "spread was not kept" in page_of([result("mlp-early", 9, 16)], tmp_path)


def test_a_way_looks_the_same_in_every_figure() -> None:
    series = {"late": [], "early": [(1.0, 2.0), (2.0, 3.0)]}
    drawn = plots.lines(series, "x", "y", "lines")
    plane = plots.pareto(
        [plots.Point("late", 0, 0.5, 0.4, 0.6, 0), plots.Point("early", 9, 0.5, 0.4, 0.6, 1)], "x", "p"
    )
    assert drawn is not None and plane is not None
    for figure in (drawn, plane):
        assert "var(--control)" in figure and "var(--own)" not in figure


def test_what_has_no_place_in_a_figure_is_named(tmp_path: Path) -> None:
    early, late = result("mlp-early", 9, 16), result("mlp-late", 9, 1)
    late["choice"]["fusion"], late["shape"], late["attention"] = "late", None, None
    del late["measured"]["first_token_seconds"]
    Image.new("RGB", (20, 20), "red").save(tmp_path / "attention.png")
    told = {one["name"]: answers(9) for one in (early, late)}
    maps = {early["name"]: tmp_path / "attention.png"}
    page = write_report(tmp_path / "report.html", [early, late], told, INFO, attention=maps).read_text(encoding="utf-8")
    for part in ("an answer is chosen and not written", "Without a map", "nats an answer"):
        assert part in page and "mlp-late" in page.partition(part)[2][:200], part
    assert "A name is that of the connector and of the fusion" in page


def test_ways_that_took_other_numbers_of_steps_learn_over_shares_of_their_budget(tmp_path: Path) -> None:
    one, other = result("mlp-early", 9, 16), result("ldp-early", 9, 8)
    assert "% of the training on questions" not in page_of([one, other], tmp_path)
    other["training"] |= {"steps": 900, "curve": [[0, 3.0, 3.1], [900, 1.0, 2.0]]}
    assert page_of([one, other], tmp_path).count("% of the training on questions") >= 2


def test_lists_of_many_ways_are_not_cut(tmp_path: Path) -> None:
    many = [f"a-connector-of-a-long-name-{number}-early-seed0" for number in range(20)]
    assert ", ".join(many) in page_of([result("mlp-early", 9, 16)], tmp_path, unfinished=many)


def test_training_time_is_that_of_steps_where_all_cells_tell_it(tmp_path: Path) -> None:
    one, other = result("mlp-early", 9, 16), result("ldp-early", 9, 8)
    one["training"]["seconds"] = 7.0
    assert "without the encoding of pictures" not in page_of([one, other], tmp_path)
    other["training"]["seconds"] = 5.0
    assert "without the encoding of pictures" in page_of([one, other], tmp_path)
