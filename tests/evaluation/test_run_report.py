"""The report page: complete, self-contained, small, and whole whatever the model answered."""

import re
from collections import Counter
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.schema import ImageRef, Sample
from chiasm.evaluation.evaluate import EvalResult, evaluate
from chiasm.evaluation.format import clip, count, duration, latency, operations
from chiasm.evaluation.plots import loss_curves, thumbnail
from chiasm.evaluation.report import _share, write_report

HOSTILE = (
    "</style></svg><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' $\\frac{ & {{ 7*7 }} \u202e]]>"
)


class Page(HTMLParser):
    """The page's start tags with their attributes, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f" {data}"


def picture(shade: int, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (shade, shade, shade))


def samples(n: int, skills: tuple[str, ...] = ("naming", "색")) -> list[Sample]:
    return [
        Sample(
            f"s{i}",
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Question {i}?"}]},
                {"role": "assistant", "content": f"answer {i}"},
            ],
            [ImageRef(picture(i % 256), str(i))],
            skills[i % len(skills)],
        )
        for i in range(n)
    ]


def result_of(answer: str, n: int = 4, **more) -> EvalResult:
    return evaluate(lambda messages, images: [answer] * len(messages), samples(n, **more))


def a_log(stage: str = "align", text: str = "a cat") -> list[dict]:
    told = {"id": "s0", "question": f"{text}?", "answer": text, "expected": "a dog", "correct": False}
    log: list[dict] = [
        {"event": "plan", "time": 0.0, "stage": stage, "step": 0, "parts": {"connector": "finetune 1e-3"}}
    ]
    for step in range(1, 41):
        log.append({"event": "step", "time": 3.0 * step, "stage": stage, "step": step, "loss": 4 / step, "lr": {}})
        log[-1] |= {"samples_per_second": 12.5, "tokens_per_second": 3400.0, "peak_memory_bytes": 1_500_000_000}
        if step % 20 == 0:
            event = {"event": "validation", "time": 3.0 * step, "stage": stage, "step": step}
            log.append(event | {"loss": 1.25, "shuffled_loss": 2.75, "answers": [told]})
    return log


def test_gates_are_drawn_where_there_are_any(tmp_path) -> None:
    log = a_log() + a_log("fuse")
    for number, event in enumerate(event for event in log[len(log) // 2 :] if event["event"] == "validation"):
        event["gates"] = {"layers": [3, 7], "attention_gate": [0.1 * number, -0.2], "feed_forward_gate": [0.3, 0.0]}
    page = write(tmp_path, log, None, INFO)
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert labels.count("How far the gates of every layer are open") == 1
    assert "attention, earlier" in page.text and "attention, earlier" not in write(tmp_path, a_log(), None, INFO).text


INFO = {
    "title": "A run",
    "vision": "efficientnet-lite0",
    "connector": "mlp",
    "language": "smollm2-135m-instruct",
    "fusion": "early",
    "visual_tokens": 49,
    "parameters": {"vision": 3_400_000, "connector": 1234, "language": 134_515_008, "cross_attention": 5},
    "timings": {"encode": 75.0, "train": 396.0},
    "data": "emoji scenes",
    "machine": "2 cores",
}


def write(tmp_path, *arguments, **more) -> Page:
    return Page(write_report(tmp_path / "run" / "report.html", *arguments, **more).read_text(encoding="utf-8"))


def test_the_page_shows_everything(tmp_path) -> None:
    page = write(tmp_path, a_log() + a_log("instruct"), result_of("answer 1"), INFO, lambda sample_id: picture(9))
    shown = [
        "efficientnet-lite0",
        "mlp",
        "smollm2-135m-instruct",
        "early fusion",
        "49 visual tokens",
        "134.5 M parameters",
    ]
    shown += [
        "5 in cross_attention",
        "finetune 1e-3",
        "align",
        "instruct",
        "12.5",
        "3,400",
        "1.50 GB",
        "1.250",
        "2.750",
    ]
    shown += ["naming", "색", "25.0 %", "✓ right", "✗ wrong", "expected: answer 0", "a cat", "6 min 36 s", "2 min 00 s"]
    shown += [f"chiasm chat {tmp_path}/run/model picture.jpg", "another picture: answer 1", "emoji scenes"]
    assert [text for text in shown if text not in page.text] == []
    assert sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in page.tags) == 3
    assert sum(tag == "img" for tag, _ in page.tags) == 4 + 1


def test_nothing_to_show_is_still_a_page(tmp_path) -> None:
    page = write(tmp_path, [], None, {})
    assert "chiasm chat" in page.text
    assert [tag for tag, _ in page.tags if tag in ("svg", "table", "img")] == []
    only_steps = [
        {"event": "step", "stage": "s", "step": 1, "loss": 2.0},
        {"event": "stage_end", "stage": "s", "seconds": 61},
    ]
    assert "1 min 01 s" in write(tmp_path, only_steps, None, {}).text


def test_no_script_no_network_no_id_twice(tmp_path) -> None:
    page = write(tmp_path, a_log() + a_log("instruct"), result_of("x"), INFO, lambda sample_id: picture(9))
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/webp;base64,")), (tag, attributes)
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "url(h" not in (tmp_path / "run" / "report.html").read_text().replace("url(#", "")
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, times in ids.items() if times > 1] == []


def test_hostile_text_is_text(tmp_path) -> None:
    info = dict.fromkeys(INFO, HOSTILE) | {"parameters": {HOSTILE: 1}, "timings": {HOSTILE: 1.0}, "visual_tokens": 1}
    info |= {"stages": [{"name": HOSTILE, "parts": {HOSTILE: HOSTILE}, "data": HOSTILE}], "command": HOSTILE}
    result = result_of(HOSTILE, skills=(HOSTILE, "b"))
    result.notes.append(HOSTILE)
    page = write(tmp_path, a_log(HOSTILE, HOSTILE), result, info, lambda sample_id: picture(9))
    names = {tag for tag, _ in page.tags}
    assert "script" not in names and "7*7" in page.text
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert not [a["src"] for tag, a in page.tags if tag == "img" and not (a["src"] or "").startswith("data:")]
    assert page.text.count("<script>alert(1)</script>") > 20


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=12, max_size=12))
def test_no_answer_changes_the_structure(tmp_path, answers: list[str]) -> None:
    plain, strange = result_of("x", 12), result_of("x", 12)
    for row, answer in zip(strange.rows, answers, strict=True):
        row["answer"] = row["control_answer"] = row["question"] = answer
    pages = [write(tmp_path, [], EvalResult(result.rows, []), {}) for result in (plain, strange)]
    assert [tag for tag, _ in pages[0].tags] == [tag for tag, _ in pages[1].tags]


def test_a_lone_surrogate_and_an_empty_answer(tmp_path) -> None:
    result = result_of("")
    result.rows[0]["answer"] = "\ud800"
    assert "(nothing)" in write(tmp_path, [], result, {}).text


def test_noise_in_ninety_six_pictures_stays_under_three_megabytes(tmp_path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    path = write_report(tmp_path / "report.html", [], result_of("x", 200), {}, lambda sample_id: noise)
    assert path.stat().st_size < 3_000_000
    assert path.read_text().count("<img ") == 96


def test_pictures_of_every_kind_and_none(tmp_path) -> None:
    assert thumbnail(lambda sample_id: None, "s") is None
    assert thumbnail({}.__getitem__, "s") is None

    def broken(sample_id: str) -> Image.Image:
        raise OSError("truncated")

    assert thumbnail(broken, "s") is None
    for mode in ("RGBA", "P", "L", "1", "I;16", "CMYK"):
        assert (thumbnail(lambda sample_id, mode=mode: Image.new(mode, (2000, 1)), "s") or "").startswith(
            "data:image/webp"
        )
    original = picture(3, 900)
    thumbnail(lambda sample_id: original, "s")
    assert original.size == (900, 900)
    assert "no picture" in write(tmp_path, [], result_of("x"), {}).text


def test_unknown_keys_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown key 'visoin', expected some of title, vision"):
        write_report(tmp_path / "r.html", [], None, {"visoin": "x"})
    with pytest.raises(ValueError, match="unknown key 'freeze'"):
        write_report(tmp_path / "r.html", [], None, {"stages": [{"freeze": True}]})


def test_the_verdict_follows_the_interval(tmp_path) -> None:
    told = {f"Question {i}?": f"answer {i}" for i in range(30)}
    shade = {f"Question {i}?": (i, i, i) for i in range(30)}

    def seeing(messages, images):
        questions = [message[-1]["content"][-1]["text"] for message in messages]
        pairs = zip(questions, images, strict=True)
        return [told[question] if shown[0].getpixel((0, 0)) == shade[question] else "?" for question, shown in pairs]

    assert (
        "The model looks: the right picture adds 100.0 points"
        in write(tmp_path, [], evaluate(seeing, samples(30)), {}).text
    )
    blind = write(tmp_path, [], result_of("answer 1"), {}).text
    assert "No evidence that the model looks" in blind
    assert "No evidence yet that the picture helps with: naming, 색." in blind


def test_a_resumed_log_counts_every_step_once_and_skips_what_is_not_a_number(tmp_path) -> None:
    log = a_log()
    page = write(
        tmp_path, [*log, *log[20:], {"event": "step", "stage": "align", "step": 41, "loss": float("nan")}], None, {}
    )
    assert "NaN" not in page.text and "nan" not in page.text
    assert loss_curves([(1, float("nan"))], [], "x") is None
    assert loss_curves([], [{"step": 1, "loss": 2.0}], "x") is not None
    long = loss_curves([(step, 1 / step) for step in range(1, 100_001)], [], "x")
    assert long is not None and len(long) < 60_000


def test_nothing_global_changes(tmp_path) -> None:
    before = dict(matplotlib.rcParams)
    write(tmp_path, a_log(), result_of("x", skills=("色",)), INFO)
    assert dict(matplotlib.rcParams) == before


def test_the_wall_gives_every_skill_its_places() -> None:
    assert _share(10, [100, 2, 100]) == [4, 2, 4]
    assert _share(10, [3, 2]) == [3, 2]
    assert _share(2, [5, 5, 5]) == [1, 1, 0]


def test_numbers_for_people() -> None:
    assert [count(n) for n in (None, 0, 1234, 999_999, 134_515_008, 7e9)] == [
        "–",
        "0",
        "1,234",
        "999,999",
        "134.5 M",
        "7.0 B",
    ]
    assert [latency(s) for s in (None, 0.0004, 0.12, 8.2)] == ["–", "0.4 ms", "120 ms", "8.2 s"]
    assert [duration(s) for s in (None, 0.84, 9.96, 59.4, 59.6, 185, 3599.7, 7620)] == [
        "–",
        "0.8 s",
        "10 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]
    assert clip("abc", 3) == "abc" and clip("abcd", 3) == "ab…"
    assert not re.search(r"\s…", clip("ab cd", 4))


def test_operations_of_a_tiny_model_are_not_nothing() -> None:
    assert [operations(n) for n in (59.94e9, 0.02e9, 3.1e6, 76_032, None)] == [
        *("59.94 GFLOP", "0.02 GFLOP", "3.10 MFLOP", "0.08 MFLOP", "–")
    ]
