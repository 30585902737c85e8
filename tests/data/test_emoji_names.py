"""Emoji names: pictures with names in two languages, and splits that share nothing. The artwork is made up."""

from pathlib import Path

import pytest
from PIL import Image

from chiasm.data.emoji_names import EmojiNames
from chiasm.data.readers import read

CODES = ("1f408", "1f34e", "1f68c", "1f511", "1f415", "1f34c", "1f6b2", "1f3b8", "1f418", "1f353", "2602", "1f427")


@pytest.fixture
def artwork(tmp_path: Path) -> Path:
    for number, code in enumerate((*CODES, "1f1e9-1f1ea", "1f3fb")):
        Image.new("RGBA", (72, 72), (number * 9, 200, 90, 255)).save(tmp_path / f"{code}.png")
    return tmp_path


def test_every_emoji_has_its_name_in_both_languages(artwork: Path) -> None:
    english, korean = EmojiNames(artwork=artwork), EmojiNames(language="ko", artwork=artwork)
    assert len(english) == len(CODES)
    names = {sample.meta["emoji"]: sample.answer for sample in english}
    assert names["1f408"] == "cat" and names["2602"] == "umbrella"
    assert {s.meta["emoji"]: s.answer for s in korean}["1f408"] == "고양이"
    picture = english[0].validate().images[0].load()
    assert picture.size == (224, 224) and picture.getpixel((0, 0)) != picture.getpixel((112, 112))


def test_splits_share_nothing_and_fill_the_whole(artwork: Path) -> None:
    parts = [{s.meta["emoji"] for s in EmojiNames(split, artwork=artwork)} for split in ("train", "test")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(CODES)
    assert len(EmojiNames(size=5, artwork=artwork)) == 5


def test_other_views_show_the_same_emoji_otherwise(artwork: Path) -> None:
    plain = EmojiNames(artwork=artwork)
    seen, new = (EmojiNames(artwork=artwork, seed=seed, views=3) for seed in (0, 1))
    assert len(seen) == 3 * len(plain) and len({sample.id for sample in (*plain, *seen, *new)}) == 7 * len(plain)
    pictures = {sample.images[0].key() for samples in (plain, seen, new) for sample in samples}
    assert len(pictures) == 7 * len(plain)
    assert [sample.answer for sample in seen[::3]] == [sample.answer for sample in plain]
    assert [sample.images[0].key() for sample in seen] == [
        sample.images[0].key() for sample in EmojiNames(artwork=artwork, seed=0, views=3)
    ]
    assert seen[-1].id == seen[len(seen) - 1].id and list(seen[3:6].ids()) == [sample.id for sample in seen[3:6]]


def test_it_is_read_by_name(artwork: Path) -> None:
    assert len(read(f"emoji-names:all,language=ko,artwork={artwork}")) == len(CODES)
    for source, told in [
        ("emoji-names:validation", "split is 'validation', expected one of all, train, test"),
        ("emoji-names:all,language=xx", "language is 'xx', expected one of en"),
        ("emoji-names:all,shots=3", "unknown option 'shots'"),
        ("emoji-names:all,size=0", "size is 0, expected a whole number above 0"),
        ("emoji-names:all,views=0,seed=1", "views is 0, expected a whole number above 0"),
        ("emoji-names:all,views=4", "views is 4, but without a seed there is one view alone; add seed=0"),
        ("emoji-names:all,seed=x", "seed is 'x', expected a whole number"),
    ]:
        with pytest.raises(ValueError, match=told):
            read(f"{source},artwork={artwork}")
