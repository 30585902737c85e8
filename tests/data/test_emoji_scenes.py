"""Emoji scenes are true, balanced, reproducible, and no conversation gives an answer away before it is asked for."""

import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from chiasm.data.emoji_drawing import SIDE, SIGN_HEIGHT
from chiasm.data.emoji_questions import SKILLS, World
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.data.emoji_vocabulary import (
    COLOURS,
    CORNERS,
    COUNTS,
    NUMBERS,
    OBJECTS,
    UNSEEN_NUMBERS,
    UNSEEN_OBJECTS,
    UNSEEN_WORDS,
    WORDS,
    has_final_consonant,
    name_of,
    plural,
    say,
    with_article,
)
from chiasm.data.readers import read
from chiasm.data.schema import Sample, text_of
from shapes import draw_artwork

NAMES = {name_of(code, "en") for code in (*OBJECTS, *UNSEEN_OBJECTS)}
PLURALS = {plural(name): name for name in NAMES}
PLACES = (*CORNERS, "middle")


@pytest.fixture(scope="session")
def artwork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_artwork(tmp_path_factory.mktemp("artwork"))


def turns(sample: Sample) -> list[tuple[str, str, str]]:
    """(skill, question, answer) of every turn."""
    texts = [text_of(message["content"]) for message in sample.messages]
    return list(zip(sample.meta["skills"], texts[::2], texts[1::2], strict=True))


def subject(question: str) -> tuple[str | None, str | None]:
    """(object name, place) that an English question speaks of."""
    place = next((place for place in PLACES if f"the {place}" in question), None)
    words = re.findall(r"[a-z]+", question)
    grams = [*words, *map(" ".join, pairwise(words))]
    names = [PLURALS.get(gram, gram if gram in NAMES else None) for gram in grams]
    return next((name for name in names if name), None), place


def truth(sample: Sample, skill: str, question: str) -> str | None:
    """The answer from the ground truth alone."""
    objects, (name, place) = sample.meta["objects"], subject(question)
    if skill == "naming":
        candidates = [o["name"] for o in objects if place is None or o["place"] == place]
    elif skill == "position":
        candidates = [o["place"] for o in objects if o["name"] == name]
    elif skill == "counting":
        candidates = [COUNTS[sum(o["name"] == name for o in objects)]]
    else:
        candidates = [sample.meta["background" if skill == "colour" else "sign"]]
    return candidates[0] if len(candidates) == 1 else None


@pytest.mark.parametrize("split", ["train", "validation", "test", "test-unseen"])
@pytest.mark.parametrize("questions", [1, 4])
def test_every_answer_is_the_only_true_one(artwork: Path, split: str, questions: int) -> None:
    for sample in EmojiScenes(split, size=150, questions_per_scene=questions, artwork=artwork):
        sample.validate()
        assert sample.skill == (sample.meta["skills"][0] if questions == 1 else None)
        for skill, question, answer in turns(sample):
            assert answer == truth(sample, skill, question), (sample.id, question, sample.meta)


def test_no_turn_tells_a_later_answer(artwork: Path) -> None:
    seen: Counter[str] = Counter()
    twice = 0
    for sample in EmojiScenes("train", size=400, questions_per_scene=6, artwork=artwork):
        told_names: set[str] = set()
        told_places: set[str] = set()
        counts: list[str] = []
        for number, (skill, question, answer) in enumerate(turns(sample)):
            name, place = subject(question)
            if skill == "naming":
                name = answer
            if skill == "position":
                place = answer
                assert not told_places, "every corner is still possible"
            if skill == "counting":
                assert number == len(counts) < 2, "counts come first, of two kinds at most"
                assert counts in ([], ["zero"], ["one"], ["two"]), "the first count leaves more than one answer"
                counts.append(answer)
            assert name not in told_names and place not in told_places, (sample.id, turns(sample))
            told_names |= {name} - {None}
            told_places |= {place} - {None}
            seen[skill] += 1
        twice += len(counts) == 2
        once = Counter(sample.meta["skills"])
        assert all(once[skill] <= 1 for skill in ("colour", "position", "reading"))
    assert set(seen) == set(SKILLS) and twice


def test_the_conversation_so_far_does_not_shift_the_position(artwork: Path) -> None:
    by_count: dict[str, Counter[str]] = {}
    for sample in EmojiScenes("train", size=1200, questions_per_scene=3, artwork=artwork):
        answers = {skill: answer for skill, _, answer in turns(sample)}
        if "position" in answers:
            by_count.setdefault(answers.get("counting", "not asked"), Counter())[answers["position"]] += 1
    assert set(by_count) >= {"zero", "one", "two", "not asked"}
    for places in by_count.values():
        total = sum(places.values())
        assert max(places.values()) / total < 0.25 + 3 * (0.1875 / total) ** 0.5


@pytest.mark.parametrize("split", ["test", "test-unseen"])
def test_evaluation_is_exactly_balanced_and_chance_is_the_majority(artwork: Path, split: str) -> None:
    world = World.of(split == "test-unseen", 8)
    rounds = {"test": 80, "test-unseen": 160}[split]  # whole deals of every skill's answers
    scenes = EmojiScenes(split, size=5 * rounds, num_objects=8, artwork=artwork)
    answers: dict[str, Counter[str]] = {skill: Counter() for skill in SKILLS}
    for sample in scenes:
        answers[str(sample.skill)][sample.answer] += 1
    for skill, counts in answers.items():
        assert sum(counts.values()) == rounds
        assert scenes.chance(skill) == pytest.approx(counts.most_common(1)[0][1] / rounds), skill
    assert set(answers["counting"]) == set(COUNTS) and set(answers["position"]) == set(CORNERS)
    assert set(answers["colour"]) == set(COLOURS) and set(answers["naming"]) == {name_of(k, "en") for k in world.kinds}
    numbers = sum(count for sign, count in answers["reading"].items() if sign.isdigit())
    assert numbers == rounds // 2


def test_training_is_balanced_too(artwork: Path) -> None:
    answers: dict[str, Counter[str]] = {skill: Counter() for skill in SKILLS}
    for sample in EmojiScenes("train", size=1200, num_objects=16, artwork=artwork):
        for skill, _, answer in turns(sample):
            answers[skill][answer] += 1
    for skill, number in (("counting", 5), ("position", 4), ("colour", 8), ("naming", 16)):
        total = sum(answers[skill].values())
        assert len(answers[skill]) == number
        assert max(answers[skill].values()) / total < 1 / number + 4 * (1 / number / total) ** 0.5
    asked = Counter({skill: sum(counts.values()) for skill, counts in answers.items()})
    assert min(asked.values()) > 0.6 * max(asked.values()), asked


def test_counting_needs_the_name_not_the_number_of_objects(artwork: Path) -> None:
    scenes = EmojiScenes("test", size=500, weights={"counting": 1}, artwork=artwork)
    assert all(len(sample.meta["objects"]) == 4 and sample.skill == "counting" for sample in scenes)


def test_weights_choose_the_skills(artwork: Path) -> None:
    scenes = EmojiScenes("train", 1000, weights={"naming": 3, "colour": 1}, questions_per_scene=1, artwork=artwork)
    counts = Counter(sample.skill for sample in scenes)
    assert set(counts) == {"naming", "colour"} and 0.68 < counts["naming"] / 1000 < 0.82


def digest(artwork: Path) -> str:
    script = (
        "import hashlib; from chiasm.data.emoji_scenes import EmojiScenes\n"
        f"for split in ('train', 'test-unseen'):\n"
        f"    for sample in EmojiScenes(split, size=6, form='both', artwork={str(artwork)!r}):\n"
        "        print(sample.id, sample.messages, sample.meta, sample.images[0].key())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ})
    return run.stdout


def test_a_scene_is_the_same_in_every_process_and_order(artwork: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    first = digest(artwork)
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    assert digest(artwork) == first and len(first.splitlines()) == 12
    scenes = EmojiScenes("train", size=6, form="both", artwork=artwork)
    for index in (5, 0, 3):
        assert scenes[index].images[0].key() in first.splitlines()[index]
    assert EmojiScenes("train", size=50_000, form="both", artwork=artwork)[5].messages == scenes[5].messages
    assert scenes[-1].id == scenes[5].id and [s.id for s in scenes[1:3]] == [scenes[1].id, scenes[2].id]


def test_the_test_set_never_changes_unnoticed(artwork: Path) -> None:
    """If this fails, published numbers no longer compare: change the scenes only on purpose."""
    asked = [turns(sample)[0] for sample in EmojiScenes("test", size=5, artwork=artwork)]
    assert asked == GOLDEN


GOLDEN = [
    ("naming", "Which object is in the top right?", "tractor"),
    ("counting", "How many penguins are in the picture?", "one"),
    ("colour", "What color is the background?", "yellow"),
    ("position", "Where is the cow?", "top right"),
    ("reading", "What is written on the sign?", "SHOP"),
]


def test_splits_and_seeds_are_disjoint(artwork: Path) -> None:
    options = [("train", 0), ("train", 1), ("validation", 0), ("test", 0), ("test-unseen", 0)]
    keys = [{s.images[0].key() for s in EmojiScenes(split, 60, seed=seed, artwork=artwork)} for split, seed in options]
    assert all(len(split) == 60 for split in keys)
    assert len(set.union(*keys)) == 60 * len(options)


def test_unseen_means_unseen(artwork: Path) -> None:
    assert not set(OBJECTS) & set(UNSEEN_OBJECTS) and not set(WORDS) & set(UNSEEN_WORDS)
    assert not set(NUMBERS) & set(UNSEEN_NUMBERS) and len(NUMBERS) + len(UNSEEN_NUMBERS) == 990
    assert (len(set(OBJECTS)), len(set(UNSEEN_OBJECTS)), len(set(WORDS)), len(set(UNSEEN_WORDS))) == (64, 20, 40, 16)
    seen, unseen = (
        {o["name"] for s in EmojiScenes(split, 200, artwork=artwork) for o in s.meta["objects"]}
        for split in ("train", "test-unseen")
    )
    assert not seen & unseen and len(unseen) == 20


@pytest.mark.parametrize("language", ["en", "ko"])
def test_names_are_short_and_tell_objects_apart(language: str) -> None:
    names = [name_of(code, language) for code in (*OBJECTS, *UNSEEN_OBJECTS)]
    assert len(set(names)) == 84
    assert all(len(name.split()) <= 2 and name == name.lower() for name in names)
    assert not {word.lower() for word in (*WORDS, *UNSEEN_WORDS)} & set(names)


def test_grammar() -> None:
    assert [plural(n) for n in ("cat", "bus", "butterfly", "octopus", "sandwich", "key", "potato")] == [
        *("cats", "buses", "butterflies", "octopuses", "sandwiches", "keys", "potatoes")
    ]
    assert with_article("owl") == "an owl" and with_article("cat") == "a cat"
    assert has_final_consonant("뱀") and not has_final_consonant("개") and not has_final_consonant("42")


def test_objects_stay_in_their_places_and_clear_of_each_other_and_the_sign(artwork: Path) -> None:
    sizes = set()
    for sample in EmojiScenes("train", size=400, artwork=artwork):
        meta = sample.meta
        boxes = [o["box"] for o in meta["objects"]]
        for o in meta["objects"]:
            left, top, right, bottom = o["box"]
            sizes.add(right - left)
            assert right - left == bottom - top and 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
            x, y = (left + right) / 2, (top + bottom) / 2
            if o["place"] == "middle":
                assert abs(x - SIDE / 2) < 32 and abs(y - SIDE / 2) < 56
            else:
                assert (o["place"].startswith("top"), o["place"].endswith("left")) == (y < SIDE / 2, x < SIDE / 2)
        for number, (left, top, right, bottom) in enumerate(boxes):
            for a, b, c, d in boxes[:number]:
                assert right < a or c < left or bottom < b or d < top
        if meta["sign"]:
            assert min(b[1] for b in boxes) > SIGN_HEIGHT or max(b[3] for b in boxes) < SIDE - SIGN_HEIGHT
        assert 1 <= len(boxes) <= 4
    assert min(sizes) == 64 and max(sizes) == 100


def test_exact_scenes_vary_in_nothing_that_words_do_not_tell(artwork: Path) -> None:
    samples = read("emoji-scenes:train,size=40,form=all,exact=true", artwork=artwork)
    known: dict[tuple, list] = {}
    for sample in samples:
        picture = np.asarray(sample.images[0].load())
        assert picture[-1, -1].tolist() == list(COLOURS[sample.meta["background"]]) or sample.meta["sign"]
        assert (sample.meta["sign"] is not None) == ("reading" in sample.meta["skills"])
        for placed in sample.meta["objects"] if sample.meta["sign"] is None else []:
            assert known.setdefault(placed["place"], placed["box"]) == placed["box"]
    assert known.keys() == set(PLACES)


def test_what_the_ground_truth_says_is_in_the_pixels(artwork: Path) -> None:
    for sample in EmojiScenes("validation", size=60, artwork=artwork):
        pixels = np.asarray(sample.images[0].load()).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        background = np.array(COLOURS[sample.meta["background"]])
        plain = (abs(pixels - background) <= 8).all(-1)
        for o in sample.meta["objects"]:
            left, top, right, bottom = o["box"]
            assert (~plain[top:bottom, left:right]).mean() > 0.02
            plain[top - 2 : bottom + 2, left - 2 : right + 2] = True
        signs = [rows for rows in (slice(SIGN_HEIGHT), slice(-SIGN_HEIGHT, None)) if (pixels[rows, 0] == 255).all()]
        assert len(signs) == (sample.meta["sign"] is not None)
        for rows in signs:
            assert 200 < (pixels[rows].min(-1) < 128).sum() < 3000, "there is a text on the sign"
            plain[rows] = True
        assert plain.all(), "nothing else is there"


def test_signs_differ_where_their_texts_do(artwork: Path) -> None:
    strips: dict[str, set[bytes]] = {}
    for sample in EmojiScenes("test", size=60, weights={"reading": 1}, artwork=artwork):
        pixels = np.asarray(sample.images[0].load())
        strip = pixels[:SIGN_HEIGHT] if (pixels[:SIGN_HEIGHT, 0] == 255).all() else pixels[-SIGN_HEIGHT:]
        strips.setdefault(sample.answer, set()).add(strip.tobytes())
    assert all(len(looks) == 1 for looks in strips.values())
    assert len(set().union(*strips.values())) == len(strips)


def test_captions_are_complete_and_true(artwork: Path) -> None:
    for sample in EmojiScenes("train", size=300, form="caption", artwork=artwork):
        text, meta = sample.validate().answer, sample.meta
        assert sample.skill == "caption" and f"{meta['background']} background" in text
        assert (f"The sign says {meta['sign']}." in text) == (meta["sign"] is not None)
        lowered = text.lower()
        for name, number in Counter(o["name"] for o in meta["objects"]).items():
            placed = [
                f"{with_article(name)} in the {o['place']}" in lowered for o in meta["objects"] if o["name"] == name
            ]
            tallied = f"{COUNTS[number]} {plural(name)}" in lowered if number > 1 else with_article(name) in lowered
            assert all(placed) or tallied, text
    both = EmojiScenes("train", size=10, form="both", artwork=artwork)
    assert [sample.meta["skills"] == ["caption"] for sample in both] == [True, False] * 5


def test_korean_asks_and_answers_in_korean(artwork: Path) -> None:
    words = {say(word, "ko") for word in (*COUNTS, *COLOURS, *CORNERS)}
    names = {name_of(code, "ko") for code in OBJECTS}
    for english, korean in zip(
        EmojiScenes("test", 200, artwork=artwork), EmojiScenes("test", 200, language="ko", artwork=artwork), strict=True
    ):
        assert korean.images[0].key() == english.images[0].key(), "the same pictures in both languages"
        assert korean.skill == english.skill and re.search("[가-힣]", korean.question)
        assert korean.answer in words | names or korean.answer == english.answer == korean.meta["sign"]
    captions = [s.answer for s in EmojiScenes("train", 50, form="caption", language="ko", artwork=artwork)]
    assert all(text.endswith("니다.") for text in captions)


def test_written_scenes_read_back_the_same(artwork: Path, tmp_path: Path) -> None:
    scenes = EmojiScenes("test-unseen", size=6, questions_per_scene=2, artwork=artwork)
    seen: list[tuple[int, int]] = []
    path = scenes.write(tmp_path / "set", progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "set" / "data.json" and seen[-1] == (6, 6)
    for written, scene in zip(read(tmp_path / "set"), scenes, strict=True):
        assert (written.id, written.messages, written.skill, written.meta) == (
            *(scene.id, scene.messages, scene.skill, scene.meta),
        )
        assert written.images[0].load().tobytes() == scene.images[0].load().tobytes()


def test_samples_can_be_sent_to_a_worker(artwork: Path) -> None:
    scenes = EmojiScenes("train", size=3, artwork=artwork)
    assert pickle.loads(pickle.dumps(scenes))[2].images[0].key() == scenes[2].images[0].key()
    assert pickle.loads(pickle.dumps(scenes[2])).images[0].key() == scenes[2].images[0].key()


def test_mistakes_are_named(artwork: Path, tmp_path: Path) -> None:
    for options, expected in (
        ({"split": "dev"}, "split 'dev' is not one of train, validation, test, test-unseen"),
        ({"language": "fr"}, "language 'fr' is not one of en, ko"),
        ({"form": "poem"}, "form 'poem' is not one of questions, caption, both"),
        ({"size": 0}, "size is 0, expected at least 1"),
        ({"num_objects": 65}, "num_objects is 65, expected 8 to 64"),
        ({"questions_per_scene": 7}, "questions_per_scene is 7, expected 1 to 6"),
        ({"weights": {"smell": 1}}, "skill in weights 'smell' is not one of naming"),
        ({"weights": {"naming": 0}}, "weights are all 0"),
        ({"weights": {"naming": -1}}, "weight of naming is -1, expected at least 0"),
    ):
        with pytest.raises(ValueError, match=expected):
            EmojiScenes(artwork=artwork, **options)
    with pytest.raises(ValueError, match="skill 'smell' is not one of"):
        EmojiScenes(artwork=artwork).chance("smell")
    with pytest.raises(ValueError, match=r"no file .*\.png; expected Twemoji's 72x72 PNGs"):
        EmojiScenes(artwork=tmp_path)[0].images[0].load()


def test_a_small_vocabulary_shows_only_its_objects(artwork: Path) -> None:
    scenes = EmojiScenes("train", size=200, num_objects=8, questions_per_scene=6, artwork=artwork)
    assert {o["name"] for s in scenes for o in s.meta["objects"]} == {name_of(code, "en") for code in OBJECTS[:8]}
    assert scenes.chance("naming") == 1 / 8


@pytest.mark.weights
def test_every_object_of_the_real_artwork_stands_out_on_every_colour() -> None:
    from chiasm.data.emoji_drawing import Drawing, Placed, Scene

    artwork = EmojiScenes(size=1).artwork
    for code in (*OBJECTS, *UNSEEN_OBJECTS):
        for colour, shade in COLOURS.items():
            scene = Scene(colour, shade, (Placed(code, "middle", (80, 80, 144, 144)),))
            away = abs(np.asarray(Drawing(scene, artwork)()).astype(int) - shade).sum(-1)
            assert (away[80:144, 80:144] > 90).mean() > 0.08, (name_of(code, "en"), colour)


def test_drawings_are_captions_the_other_way_round(artwork: Path) -> None:
    drawn = EmojiScenes("train", size=200, form="drawing", artwork=artwork)
    captions = EmojiScenes("train", size=200, form="caption", artwork=artwork)
    without_words = 0
    for sample, other in zip(drawn, captions, strict=True):
        assert sample.validate().skill == "drawing" and sample.messages[1]["content"] == [{"type": "image"}]
        assert sample.meta["objects"] == other.meta["objects"]
        without_words += sample.question == "Draw a picture."
        assert sample.question in ("Draw a picture.", f"Draw: {other.answer}")
    assert 8 <= without_words <= 35
    every = EmojiScenes("train", size=8, form="all", artwork=artwork)
    kinds = [sample.skill for sample in every]
    assert kinds[::2] == ["drawing"] * 4 and "drawing" not in kinds[1::2]
    assert [kinds[3], kinds[7]] == ["caption"] * 2
    with pytest.raises(ValueError, match="shots=2 are examples of answers in words; form 'all' has none or few"):
        EmojiScenes("train", form="all", shots=2, artwork=artwork)
