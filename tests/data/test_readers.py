"""Every format that people have gives the same samples; a broken file is one clear line; hold-outs are stable."""

import base64
import io
import json
import pickle
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chiasm.data.check import check
from chiasm.data.readers import read, read_split
from chiasm.data.rows import split_placeholders
from chiasm.data.schema import Sample, SampleError, text_of
from chiasm.data.splits import hold_out
from shapes import draw_artwork

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of one colour each."""
    for colour in COLOURS:
        Image.new("RGB", (6, 4), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def save(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def save_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def kinds(sample: Sample) -> list[Any]:
    """The first message with its parts in short: 'image' or the text."""
    content = sample.messages[0]["content"]
    return [content] if isinstance(content, str) else [part.get("text", "image") for part in content]


def colour_of(sample: Sample, index: int = 0) -> tuple[int, ...]:
    return sample.images[index].load().getpixel((0, 0))


LLAVA = [
    {
        "id": "a",
        "image": "red.png",
        "conversations": turns("<image>\nWhat colour?", "red"),
        "skill": "colour",
        "split_of": 3,
    },
    {"id": "b", "image": "green.png", "conversations": turns("What colour?\n<image>", "green", "Sure?", "yes")},
    {"id": 3, "images": ["blue.png", "red.png"], "conversations": turns("Is <image> like <image>?", "no")},
    {"conversations": turns("Two and two?", "four"), "image": ""},
]


@pytest.mark.parametrize("write", [save, save_lines])
def test_llava(folder: Path, write: Any) -> None:
    samples = read(write(folder / "data.txt", LLAVA))
    assert [sample.id for sample in samples] == ["a", "b", "3", "data:3"]
    assert kinds(samples[0]) == ["image", "What colour?"] and samples[0].answer == "red"
    assert samples[0].skill == "colour" and samples[0].meta == {"split_of": 3}
    assert kinds(samples[1]) == ["What colour?\n", "image"] and len(samples[1].messages) == 4
    assert kinds(samples[2]) == ["Is ", "image", " like ", "image", "?"]
    assert colour_of(samples[2]) == (0, 0, 255) and colour_of(samples[2], 1) == (255, 0, 0)
    assert samples[3].images == [] and kinds(samples[3]) == ["Two and two?"]
    assert samples[-1].id == "data:3" and [sample.id for sample in samples[1:3]] == ["b", "3"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>", ["image"]),
        ("<image>\n", ["image"]),
        ("<image>\r\nHi", ["image", "Hi"]),
        ("\n<image>\n<image>\nHi", ["image", "image", "Hi"]),
        ("A <image> B", ["A ", "image", " B"]),
        ("Hi\n<image>", ["Hi\n", "image"]),
    ],
)
def test_placeholders_may_stand_anywhere(text: str, parts: list[str]) -> None:
    assert [part.get("text", "image") for part in split_placeholders(text)] == parts
    assert split_placeholders("no picture\n") == "no picture\n"


def test_pictures_are_found_beside_the_file_in_images_or_under_the_image_root(folder: Path) -> None:
    row = {"image": "red.png", "caption": "Red."}
    (folder / "set" / "images").mkdir(parents=True)
    path = save(folder / "set" / "data.json", [row])
    assert colour_of(read(path, image_root=folder)[0]) == (255, 0, 0)
    Image.new("RGB", (2, 2), "green").save(folder / "set" / "images" / "red.png")
    assert colour_of(read(path)[0]) == (0, 128, 0)
    Image.new("RGB", (2, 2), "blue").save(folder / "set" / "red.png")
    assert colour_of(read(path)[0]) == (0, 0, 255)
    assert colour_of(read(save(folder / "set" / "data.json", [row | {"image": str(folder / "red.png")}]))[0]) == (
        255,
        0,
        0,
    )


def test_a_missing_picture_names_the_file_when_it_is_loaded(folder: Path) -> None:
    sample = read(save(folder / "d.json", [{"image": "no/such.png", "caption": "x"}]))[0]
    with pytest.raises(ValueError, match=r"no/such\.png: no such file"):
        sample.images[0].load()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "x", "image": "red.png", "conversations": turns("no mark", "a")}, "0 image placeholders .* 1 image$"),
        (
            {"id": "x", "image": "red.png", "conversations": turns("<image><image>", "a")},
            "2 image placeholders .* 1 image$",
        ),
        ({"id": "x", "conversations": turns("<image>?", "a")}, "1 image placeholder in .* 0 images"),
        ({"id": "x", "conversations": turns("only a question")}, "expected the assistant's answer"),
        ({"id": "x", "conversations": [{"from": "alien", "value": "hi"}]}, "from 'alien', expected one of human"),
        ({"id": "x", "conversations": [{"from": "human", "value": None}]}, "'value' is None, expected text"),
        ({"id": "x", "conversations": "hello"}, "'conversations' is 'hello', expected a list of objects"),
        ({"id": "x", "image": 7, "caption": "c"}, "not int"),
        ({"id": "x", "image": "https://a.b/c.png", "caption": "c"}, "is an address: download it"),
        ({"id": "x", "video": "a.mp4"}, "a row with id, video; expected one of conversations, messages"),
    ],
)
def test_a_bad_row_names_the_sample(folder: Path, row: dict, expected: str) -> None:
    with pytest.raises(SampleError, match=f"sample 'x': .*{expected}"):
        read(save(folder / "d.json", [row]))[0]


@pytest.mark.parametrize("name", ["iVBORw0KGgo" * 30, "red\0.png", "red\udc80.png", "data:image/png;base64,red.png"])
def test_what_cannot_be_a_files_name_is_the_problem_of_its_sample(folder: Path, name: str) -> None:
    rows = [{"id": "odd", "image": name, "caption": "x"}, {"id": "red", "image": "red.png", "caption": "x"}]
    (folder / "d.json").write_text(json.dumps(rows))
    report = check(read(folder / "d.json"))
    (problem,) = report.findings
    assert problem.id == "odd" and problem.reason.startswith("the picture ") and len(problem.reason) < 160
    assert report.summary().encode() and repr(name)[:60] in problem.reason


def test_pictures_in_base64(folder: Path) -> None:
    encoded = base64.b64encode((folder / "red.png").read_bytes()).decode()
    lines = base64.encodebytes((folder / "red.png").read_bytes()).decode()
    values = [encoded, lines, f"data:image/png;base64,{encoded}", {"bytes": encoded, "path": None}]
    samples = read(save(folder / "d.json", [{"image": value, "caption": "x"} for value in values]))
    assert [colour_of(sample) for sample in samples] == [(255, 0, 0)] * 4
    assert pickle.loads(pickle.dumps(samples[0])) == samples[0]
    jpeg = io.BytesIO()
    Image.new("RGB", (400, 300), "blue").save(jpeg, "jpeg")
    begins_with_a_slash = base64.b64encode(jpeg.getvalue()).decode()
    samples = read(save(folder / "d.json", [{"image": begins_with_a_slash, "caption": "x"}]))
    assert samples[0].images[0].load().size == (400, 300)
    (folder / "photos0001").write_bytes((folder / "red.png").read_bytes())
    names = ["photos0001", "photos0002"]
    kept = read(save(folder / "d.json", [{"image": name, "caption": "x"} for name in names]))
    assert [sample.images[0].path for sample in kept] == [folder / name for name in names]


def test_open_questions_are_read_on_request(folder: Path) -> None:
    path = save(folder / "d.json", [{"question": "Why?", "image": "red.png"}])
    with pytest.raises(SampleError):
        read(path)[0]
    assert read(path, answered=False)[0].question == "Why?"


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]


def test_chat_pairs_questions_and_captions(folder: Path) -> None:
    rows = [
        {"messages": CHAT, "images": ["red.png"]},
        {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}],
            "image": "red.png",
        },
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "red.png"}]}, CHAT[2]]},
        {
            "texts": [{"user": "What?", "assistant": "red"}, {"user": "Sure?", "assistant": "yes"}],
            "images": ["red.png"],
        },
        {"question": "What?", "answer": 7, "image": "red.png", "source": "vqa"},
        {"question": "What?", "answers": ["maroon", "red", "red"], "image": "red.png"},
        {"image": "red.png", "caption": "A red field."},
        {"image": "red.png", "text": "A red field."},
        {"image": "red.png", "caption": ["A red field.", "Red."]},
    ]
    samples = list(read(save(folder / "d.json", rows)))
    assert all(colour_of(sample) == (255, 0, 0) for sample in samples)
    assert [text_of(m["content"]) for m in samples[0].messages] == ["Be brief.", "What?", "red"]
    assert samples[0].messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert kinds(samples[1]) == ["image", "What?"] and kinds(samples[2]) == ["image"]
    assert kinds(samples[3]) == ["image", "What?"] and len(samples[3].messages) == 4
    assert samples[4].answer == "7" and samples[4].meta == {"source": "vqa"}
    assert samples[5].answer == "red" and samples[5].meta["answers"] == ["maroon", "red", "red"]
    assert [sample.answer for sample in samples[6:]] == ["A red field."] * 3
    assert samples[8].meta["caption"] == ["A red field.", "Red."]
    again = read(folder / "d.json")
    assert kinds(again[6]) == kinds(samples[6]) and kinds(samples[6])[0] == "image", (
        "the instruction is always the same"
    )


def test_hugging_face_datasets_in_memory_on_disk_and_parquet(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "id": ["r", "g"],
        "images": [[str(folder / "red.png")], [Image.open(folder / "green.png")]],
        "texts": [[{"user": "What?", "assistant": colour}] for colour in ("red", "green")],
    }
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(folder / "saved")
    data.to_parquet(folder / "data.parquet")
    both = datasets.DatasetDict({"train": data, "test": data.select([1])})
    both.save_to_disk(folder / "both")
    for source in (data, folder / "saved", str(folder / "data.parquet"), datasets.DatasetDict({"train": data})):
        samples = read(source)
        assert [sample.answer for sample in samples] == ["red", "green"] and samples[1].id == "g"
        assert [colour_of(sample) for sample in samples] == [(255, 0, 0), (0, 128, 0)]
    for source in (both, folder / "both"):
        assert [sample.id for sample in read(source, split="test")] == ["g"]
        with pytest.raises(ValueError, match="has the splits train, test, and 'dev' is not one of them"):
            read(source, split="dev")
        assert [sample.id for sample in read_split(source, "train")] == ["r", "g"]
    assert len(read_split(folder / "saved", "train")) == 2, "data without splits is read as a whole"
    save(folder / "plain.json", LLAVA)
    (folder / "mix.yaml").write_text("- path: plain.json\n- path: both\n")
    with pytest.raises(ValueError, match=r"mix.yaml: both has the splits train, test, and none .* in a YAML mixture"):
        read_split(folder / "mix.yaml", "train")
    with pytest.raises(ValueError, match="IterableDataset cannot be read by index"):
        read(data.to_iterable_dataset())
    captions = datasets.Dataset.from_dict({"image": [Image.open(folder / "blue.png")], "caption": ["Blue."]})
    assert colour_of(read(captions)[0]) == (0, 0, 255)
    messages = datasets.Dataset.from_dict(
        {"messages": [CHAT[1:]], "images": [[{"bytes": None, "path": str(folder / "red.png")}]]}
    )
    assert colour_of(read(messages)[0]) == (255, 0, 0) and read(messages)[0].answer == "red"


def test_datasets_is_imported_only_for_its_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read(save(folder / "d.json", LLAVA))[0].answer == "red"
    (folder / "hf").mkdir()
    (folder / "hf" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pip install 'chiasm\[data\]'"):
        read(folder / "hf")


def test_image_folder_with_metadata_and_its_splits(folder: Path) -> None:
    for split, colour in (("train", "red"), ("test", "blue")):
        (folder / "set" / split).mkdir(parents=True)
        (folder / f"{colour}.png").rename(folder / "set" / split / "1.png")
        save_lines(
            folder / "set" / split / "metadata.jsonl", [{"file_name": "1.png", "text": colour, "skill": "caption"}]
        )
    assert read(folder / "set" / "train")[0].skill == "caption"
    assert read(folder / "set", split="test")[0].answer == "blue"
    with pytest.raises(ValueError, match="set' has the splits train, test, and none was asked for: name one of them"):
        read(folder / "set")
    assert [sample.answer for sample in read_split(folder / "set", "train")] == ["red"]
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data file"):
        read(folder / "empty")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_webdataset_shards(folder: Path) -> None:
    red, blue = ((folder / f"{colour}.png").read_bytes() for colour in ("red", "blue"))
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0.tar", "w") as tar:
        add(tar, "000.png", red)
        add(tar, "000.txt", b"Red.\n")
        row = {"conversations": turns("<image> or <image>?", "both"), "id": "two", "image": "gone.png"}
        add(tar, "001.json", json.dumps(row).encode())
        add(tar, "001.a.png", red)
        add(tar, "001.b.PNG", blue)
        add(tar, "002.json", b"{broken")
    with tarfile.open(folder / "shards" / "1.tar", "w") as tar:
        add(tar, "000.png", blue)
        add(tar, "000.txt", "Blue: 파란색".encode())
    samples = read(folder / "shards")
    assert [samples[i].id for i in (0, 1, 3)] == ["000", "two", "000"] and len(samples) == 4
    assert samples[0].answer == "Red." and samples[3].answer == "Blue: 파란색"
    assert colour_of(samples[1]) == (255, 0, 0) and colour_of(samples[1], 1) == (0, 0, 255)
    with pytest.raises(SampleError, match=r"sample '002': .*0\.tar, member 002\.json"):
        samples[2]
    assert len(read(folder / "shards" / "1.tar")) == 1
    with tarfile.open(folder / "z.tar.gz", "w:gz") as tar:
        add(tar, "0.txt", b"x")
    with pytest.raises(ValueError, match="a compressed file: unpack it first"):
        read(folder / "z.tar.gz")


def test_members_of_shards_from_older_systems(folder: Path) -> None:
    """Names in a tar may be in any encoding; ids are written to logs."""
    with tarfile.open(folder / "old.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "\udcb0\udca1.png", (folder / "red.png").read_bytes())
        add(tar, "\udcb0\udca1.txt", b"Red.")
        add(tar, "\udcb0\udca2.txt", b"Nothing.")
    first, second = read(folder / "old.tar")
    assert (first.id, second.id) == (r"\udcb0\udca1", r"\udcb0\udca2") and colour_of(first) == (255, 0, 0)
    assert f"{first.images[0].name}".encode()


DAMAGE = {
    "a member": lambda shard, place: shard[: place + 700],
    "a header": lambda shard, place: shard[: place + 100],
    "between two": lambda shard, place: shard[:place],
    "bits of a header": lambda shard, place: shard[: place + 9] + bytes([shard[place + 9] ^ 4]) + shard[place + 10 :],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_keeps_its_samples_before_the_place(folder: Path, damage: str) -> None:
    """The place is where the picture of the fifth of ten samples begins, whose caption stands before it."""
    (folder / "shards").mkdir()
    for number in range(3):
        with tarfile.open(folder / "shards" / f"{number}.tar", "w") as tar:
            for index in range(10):
                add(tar, f"{number}{index}.txt", b"Red.")
                add(tar, f"{number}{index}.png", (folder / "red.png").read_bytes())
    shard = folder / "shards" / "1.tar"
    with tarfile.open(shard) as tar:
        place = tar.getmember("14.png").offset
    shard.write_bytes(DAMAGE[damage](shard.read_bytes(), place))
    samples = read(folder / "shards")
    assert len(samples) == 10 + 5 + 10 and samples[13].id == "13" and samples[15].id == "20"
    with pytest.raises(SampleError, match=r"sample '1\.tar': shard .*1\.tar is cut off or damaged at byte .*") as error:
        samples[14]
    assert "\n" not in str(error.value)
    report = check(samples)
    assert [(finding.kind, finding.index) for finding in report.findings] == [("damaged shard", 14)]
    train, held = hold_out(samples)
    assert len(train) + len(held) == 25
    with pytest.raises(ValueError, match=r"shard .*1\.tar is cut off or damaged at byte 0 "):
        read(cut(shard))


def cut(shard: Path) -> Path:
    """A shard of which only the first header is left."""
    shard.write_bytes(shard.read_bytes()[:600])
    return shard


def test_mixture(folder: Path) -> None:
    rows = [{"id": f"s{number}", "question": "Q?", "answer": "A"} for number in range(40)]
    save(folder / "a.json", rows)
    save(folder / "b.json", [{"id": "t", "question": "Q?", "answer": "B"}])
    mixture = folder / "mix.yaml"
    mixture.write_text("- {path: a.json, weight: 0.5}\n- {path: b.json, weight: 2}\n- path: b.json\n")
    samples = read(mixture)
    half = len(samples) - 3
    assert 10 < half < 30, "about half of the 40"
    assert [sample.answer for sample in samples] == ["A"] * half + ["B"] * 3
    assert [sample.id for sample in samples] == [sample.id for sample in read(mixture)]
    assert samples[-1].answer == "B"
    for text, expected in (
        ("- {path: a.json, weight: -1}", "weight of a.json is -1, expected a number above 0"),
        ("- {path: a.json, wieght: 2}", "unknown option 'wieght'"),
        ("path: a.json", "a mixture is a list of entries"),
        ("- {path: [", "not valid YAML"),
        ("- {path: no.json}", "no such file"),
    ):
        mixture.write_text(text)
        with pytest.raises(ValueError, match=expected):
            read(mixture)


def test_emoji_scenes_by_name(tmp_path: Path) -> None:
    artwork = draw_artwork(tmp_path)
    samples = read("emoji-scenes:test,size=7,language=ko", artwork=artwork)
    assert len(samples) == 7 and samples[0].meta["language"] == "ko" and samples[0].meta["split"] == "test"
    assert read("emoji-scenes", "test-unseen", artwork=artwork, size=3)[2].meta["split"] == "test-unseen"
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"- {{path: emoji-scenes, size: 5, artwork: {artwork}}}\n")
    assert len(read(mixture, "validation")) == 5
    for source, options, expected in (
        ("emoji-scenes:tset", {}, "split 'tset' is not one of train, validation"),
        ("emoji-scenes:test,size", {}, "'size' is not of the form name=value"),
        ("emoji-scenes:test,exact=yes", {}, "exact is 'yes', expected true or false"),
        ("emoji-scenes", {"siz": 3}, "unknown option 'siz'; this kind of data takes size"),
    ):
        with pytest.raises(ValueError, match=expected):
            read(source, artwork=artwork, **options)
    with pytest.raises(ValueError, match="names the split 'test', but 'train' was asked for"):
        read("emoji-scenes:test", "train", artwork=artwork)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_letters_of_a_name_may_be_taken_apart(form: Any, folder: Path) -> None:
    """macOS names files with Hangul in parts, keyboards write it whole."""
    (folder / "red.png").rename(folder / unicodedata.normalize(form, "고양이.png"))
    named = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], "고양이.png")
    assert colour_of(read(save(folder / "d.json", [{"image": named, "caption": "a"}]))[0]) == (255, 0, 0)


def test_byte_order_mark_and_unicode_names(folder: Path) -> None:
    Image.new("RGB", (2, 2), "red").save(folder / "고양이 🐈.png")
    rows = [
        {"id": "고양이-é", "image": "고양이 🐈.png", "caption": "빨간색 🐈"},
        {"image": "red.png", "caption": "zweite Ö"},
        {"image": "red.png", "caption": "third"},
    ]
    for text in (json.dumps(rows, ensure_ascii=False), "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)):
        (folder / "d.json").write_text("\ufeff" + text, encoding="utf-8")
        samples = read(folder / "d.json")
        assert samples[0].id == "고양이-é" and samples[0].answer == "빨간색 🐈"
        assert [sample.answer for sample in samples[1:]] == ["zweite Ö", "third"]
        assert colour_of(samples[0]) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"caption": "a"},\n {"caption": "b"},\n]', "line 3: not valid JSON: a comma before the closing bracket"),
        (b'[{"caption": "a"},\n {"caption": "b",}]', "line 2, column"),
        (b'[{"caption": "a"}\n {"caption": "b"}]', "line 2: not valid JSON: '{' after an item"),
        (b'[{"caption": "a"},\n {"capt', "line 2, column"),
        (b'[{"caption": "a"}', "the end of the file after an item"),
        (b"[]", "has no samples"),
        (b"", "an empty file; understood are a LLaVA JSON"),
        (b'{\n "caption": "a"\n}', "one JSON object: expected a list"),
        ('[{"caption": "é"}]'.encode("latin-1"), "not UTF-8"),
        (b"id,caption\n1,x\n", "a format that is not understood; understood are"),
        (b"\x89PNG\r\n\x1a\n", "a format that is not understood"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.json") as error:
        read(tmp_path / "data.json")
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_one_broken_line_or_item_spoils_only_itself(folder: Path) -> None:
    good = json.dumps({"question": "Q?", "answer": "A"})
    (folder / "d.jsonl").write_text(f"{good}\n\n{{broken\n{good}\n")
    samples = read(folder / "d.jsonl")
    assert samples[0].answer == samples[2].answer == "A"
    with pytest.raises(SampleError, match=r"d\.jsonl, line 3"):
        samples[1]
    (folder / "d.json").write_text(f"[{good}, 7]")
    with pytest.raises(SampleError, match="item 1: expected an object, not 7"):
        read(folder / "d.json")[1]


def test_what_is_not_data_is_refused(folder: Path) -> None:
    for source, expected in (
        (folder / "nothing.json", r"nothing\.json': no such file or folder; understood are"),
        (folder, "holds no data file"),
        (42, "data of type int is not understood"),
    ):
        with pytest.raises(ValueError, match=expected):
            read(source)
    with pytest.raises(ValueError, match="unknown option 'imageroot'; this kind of data takes image_root"):
        read(save(folder / "d.json", LLAVA), imageroot=folder)
    save(folder / "e.json", LLAVA)
    with pytest.raises(ValueError, match=r"holds d\.json, e\.json"):
        read(folder)


def test_a_list_of_samples_is_data(folder: Path) -> None:
    samples = list(read(save(folder / "d.json", LLAVA)))
    assert read(samples) is samples
    assert len(read(samples, split="train")) + len(read(samples, split="test")) == 4


def test_samples_can_be_sent_to_a_worker(folder: Path) -> None:
    samples = pickle.loads(pickle.dumps(read(save(folder / "d.json", LLAVA))))
    assert samples[0].images[0].load().size == (6, 4)


def test_hold_out_is_stable_disjoint_and_grows_with_the_data(folder: Path) -> None:
    rows = [{"id": f"s{number}", "question": "Q?", "answer": "A"} for number in range(400)]
    path = save(folder / "d.json", rows)
    train, held = read(path, split="train"), read(path, split="validation")
    ids, held_ids = {sample.id for sample in train}, {sample.id for sample in held}
    assert len(ids) + len(held_ids) == 400 and not ids & held_ids and 8 <= len(held_ids) <= 40
    assert {sample.id for sample in read(path, split="test")} == held_ids
    more = [{"id": f"new{number}", "question": "Q?", "answer": "A"} for number in range(1200)]
    grown_path = save(folder / "e.json", [*more, *rows[::-1]])
    for fraction in (0.05, 0.2, 0.4):
        before, after = (read(file, split="train", fraction=fraction, at_most=999) for file in (path, grown_path))
        assert {s.id for s in after if s.id.startswith("s")} == {s.id for s in before}
    assert len(read(path, split="validation", fraction=0.5, at_most=7)) == 7
    assert {sample.id for sample in read(path, split="validation", seed=1)} != held_ids
    with pytest.raises(ValueError, match="split is one of train, validation, test, not 'dev'"):
        read(path, split="dev")


def test_hold_out_keeps_one_id_together_and_both_sides_filled() -> None:
    samples = [Sample(name, [], []) for name in ("a", "a", "b", "b", "b")]
    kept, held = hold_out(samples)
    assert {sample.id for sample in kept} ^ {sample.id for sample in held} == {"a", "b"}
    with pytest.raises(ValueError, match="at least 2"):
        hold_out(samples[:2])
    with pytest.raises(ValueError, match="fraction 1"):
        hold_out(samples, fraction=1.0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"a turn is from \['human'\]"),
        ({"conversations": turns("\ud800", "x")}, "'value' is no text: it holds half a character"),
        ({"question": "Q?", "answer": "A", "answers": 5}, "'answers' is 5, expected a list"),
        ({"id": "x", "conversations": turns("Q?", "A"), "answers": "A"}, "sample 'x': 'answers' is 'A', expected a"),
        ({"messages": [], "answers": {"a": 1}}, "'answers' is {'a': 1}, expected a list"),
        ({"texts": [], "answers": [["A"]]}, r"'answers' is \['A'\], expected text"),
        (
            {"id": {"a": 1}, "question": "Q?", "answer": "A"},
            "sample 'd:0': 'id' is {'a': 1}, expected text or a number",
        ),
        ({"id": [1], "caption": "c"}, r"'id' is \[1\], expected text"),
        ({"id": "\udc80", "caption": "c"}, "sample 'd:0': 'id' is no text: it holds half a character"),
        ({"id": "x", "skill": ["count"], "caption": "c"}, r"sample 'x': 'skill' is \['count'\], expected text"),
    ],
)
def test_values_of_the_wrong_type_are_named(folder: Path, row: dict, expected: str) -> None:
    (folder / "d.json").write_text(json.dumps([row]))
    with pytest.raises(SampleError, match=expected):
        read(folder / "d.json")[0]


def test_the_pictures_of_a_mixture_lie_where_its_file_says(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.jsonl").write_text('{"image": "red.png", "caption": "red"}\n')
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "lists" / "mix.yaml").write_text("- {path: a.jsonl, image_root: ..}\n")
    assert colour_of(read(tmp_path / "lists" / "mix.yaml")[0]) == (255, 0, 0)


def test_a_mixture_of_itself_and_a_size_that_is_no_number_are_refused(folder: Path) -> None:
    (folder / "a.yaml").write_text("- path: b.yaml\n")
    (folder / "b.yaml").write_text("- path: a.yaml\n")
    with pytest.raises(ValueError, match="the mixture contains itself"):
        read(folder / "a.yaml")
    with pytest.raises(ValueError, match="size is 'x', expected a whole number"):
        read("emoji-scenes:train,size=x")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("max_pixels: abc", "max_pixels is 'abc', expected a whole number above 0"),
        ("max_pixels: -1", "max_pixels is -1, expected a whole number above 0"),
        ("image_root: 5", "image_root is 5, expected a folder"),
        ("answered: maybe", "answered is 'maybe', expected true or false"),
        ("split: validation, fraction: x", "fraction is 'x', expected a number between 0 and 1"),
        ("split: validation, at_most: 0.5", "at_most is 0.5, expected a whole number"),
    ],
)
def test_an_option_of_a_mixture_that_is_no_such_value_is_named(folder: Path, option: str, expected: str) -> None:
    save(folder / "a.json", [{"id": str(number), "question": "Q?", "answer": "A"} for number in range(3)])
    (folder / "m.yaml").write_text(f"- {{path: a.json, {option}}}\n")
    with pytest.raises(ValueError, match=expected):
        read(folder / "m.yaml")


def test_hold_out_of_mixtures_and_subsets_builds_no_sample(folder: Path) -> None:
    """Samples that cannot be used are left to those who take them: a hold-out only needs the ids."""
    rows: list[dict] = [{"id": f"s{number}", "question": "Q?", "answer": "A"} for number in range(30)]
    save(folder / "a.json", [*rows, {"id": "broken", "conversations": 7}])
    save(folder / "b.json", rows[:5])
    (folder / "mix.yaml").write_text("- {path: a.json, weight: 1.5}\n- {path: b.json, weight: 2}\n")
    mixture = read(folder / "mix.yaml")
    for samples in (mixture, mixture[3:], mixture[::-1]):
        kept, held = hold_out(samples, fraction=0.3)
        assert len(kept) + len(held) == len(samples) and not set(kept.ids()) & set(held.ids())
        assert held.ids() == [sample.id for sample in held]
    with pytest.raises(SampleError, match="'broken'"):
        list(mixture)
    save(folder / "all.json", [{"id": f"s{number}", "conversations": 7} for number in range(9)])
    kept, held = hold_out(read(folder / "all.json"), fraction=0.3)
    assert len(kept) + len(held) == 9
