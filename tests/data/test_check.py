"""The check names every unusable sample, with its file and the reason, and nothing else."""

import json
from pathlib import Path

import pytest
from PIL import Image

from chiasm.data.check import KINDS, CheckReport, check
from chiasm.data.readers import read
from chiasm.data.schema import ImageRef, Problem, Sample, SampleError


class Words:
    """Tokenizes by words."""

    def encode(self, text: str) -> list[str]:
        return text.split()


def caption(number: int, image: str, **extra: object) -> dict:
    return {"id": f"s{number}", "image": image, "caption": "A field."} | extra


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data file where only samples 0 and 1 can be used."""
    Image.effect_noise((64, 64), 100).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:900])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>")
    Image.new("1", (3000, 3000)).save(tmp_path / "large.png")
    rows = [
        caption(0, "good.png"),
        caption(1, "good.png"),
        caption(2, "cut.png"),
        caption(3, "empty.jpg"),
        caption(4, "page.jpg"),
        caption(5, "gone.png"),
        caption(6, "large.png"),
        caption(7, "good.png", caption="one two three four five six seven eight nine"),
        caption(8, "good.png", caption=" "),
        {"id": "s9", "image": "good.png", "conversations": [{"from": "human", "value": "<image><image>"}]},
        {"id": "s10", "conversations": [{"from": "robot", "value": "hi"}]},
        {"id": "s11", "picture": "good.png"},
        caption(0, "good.png"),
        "nonsense",
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def look(data: Path, **options: object) -> CheckReport:
    return check(read(data), tokenizer=Words(), max_tokens=14, tokens_per_image=2, max_pixels=1_000_000, **options)


def test_every_fault_is_found_once_and_named(data: Path) -> None:
    report = look(data)
    found = {(finding.index, finding.kind) for finding in report.findings}
    assert found == {
        (2, "broken picture"),
        (3, "broken picture"),
        (4, "broken picture"),
        (5, "missing picture"),
        (6, "huge picture"),
        (7, "too long"),
        (8, "no answer"),
        (9, "placeholders"),
        (9, "no answer"),
        (10, "role"),
        (11, "unreadable row"),
        (12, "duplicate id"),
        (13, "unreadable row"),
    }
    by_id = {finding.id: finding for finding in report.findings}
    assert by_id["s2"].file == str(data.parent / "cut.png") and "truncated" in by_id["s2"].reason
    assert "0 bytes" in by_id["s3"].reason and "not a picture" in by_id["s4"].reason
    assert by_id["s6"].reason.startswith("has 3000x3000 pixels, the limit is 1,000,000")
    assert "x 2 for pictures, the limit is 14" in by_id["s7"].reason
    assert by_id["data:13"].kind == "unreadable row"
    assert report.samples == 14 and report.images == 9, "pictures of the samples that could be built"
    assert not report.ok and "s0" not in report.bad_ids() and len(report.bad_ids()) == 11
    assert {finding.kind for finding in report.findings} <= set(KINDS)


def test_the_report_is_machine_readable_and_has_a_summary(data: Path) -> None:
    report = look(data)
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["samples"] == 14 and facts["ok"] is False and facts["counts"]["broken picture"] == 3
    assert facts["findings"][0]["id"] == "s2" and facts["findings"][0]["file"].endswith("cut.png")
    summary = report.summary(at_most=2)
    assert summary.startswith("14 samples, 9 pictures: 11 samples cannot be used")
    assert (
        "broken picture: 3 (truncated" in summary and "... and 1 more" in summary and "cut.png: is truncated" in summary
    )


def test_limits_of_bytes_and_of_pixels(data: Path) -> None:
    samples = read(data)[:2]
    assert check(samples).ok
    assert [finding.kind for finding in check(samples, max_bytes=100).findings] == ["huge picture"] * 2
    assert [finding.kind for finding in check(samples, max_pixels=4095).findings] == ["huge picture"] * 2
    assert check(samples, max_pixels=4096).ok


def test_a_duplicate_id_alone_is_a_warning(data: Path) -> None:
    sample = read(data)[0]
    report = check([sample, sample])
    assert (
        report.ok and report.to_dict()["counts"] == {"duplicate id": 1} and "number 2 with this id" in report.summary()
    )


def test_progress_and_threads_do_not_change_the_report(data: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert look(data, threads=1, progress=lambda done, total: seen.append((done, total))) == look(data, threads=4)
    assert seen == [(number, 14) for number in range(1, 15)]


def test_a_picture_that_many_samples_show_is_decoded_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = ImageRef.load

    def counted(ref: ImageRef) -> Image.Image:
        loads.append(ref.name)
        return load(ref)

    monkeypatch.setattr(ImageRef, "load", counted)
    assert check([read(data)[0]] * 5, threads=1).images == 5
    assert len(loads) == 1


def test_samples_made_in_memory_are_checked_too() -> None:
    ask = {"role": "user", "content": [{"type": "image"}]}
    good = Sample("good", [ask, {"role": "assistant", "content": "x"}], [ImageRef.of(Image.new("RGB", (2, 2)))])
    bad = Sample("bad", [ask], [])
    report = check([good, bad])
    assert report.bad_ids() == ["bad"] and len(report.findings) == 2
    assert check([bad], answered=False).to_dict()["counts"] == {"placeholders": 1}


def test_a_token_limit_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="belong together"):
        check([], max_tokens=5)


def test_what_a_model_cannot_learn_from_is_found_too(data: Path) -> None:
    def encode(sample: Sample) -> None:
        if sample.id == "s1":
            raise SampleError(sample.id, [Problem("too long", "9 tokens, at most 8 are allowed")])

    found = {(finding.index, finding.kind) for finding in check(read(data), encode=encode).findings}
    assert found - {(finding.index, finding.kind) for finding in check(read(data)).findings} == {(1, "too long")}
