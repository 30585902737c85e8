"""Solved examples: where they stand in a prompt, and which ones a question gets."""

from pathlib import Path

import pytest
from PIL import Image

from chiasm.data.drawing import drawn
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.data.few_shot import draw_examples, opening, put_first, solved
from chiasm.data.readers import read, read_train
from chiasm.data.schema import ImageRef, Sample, text_of
from shapes import draw_artwork


@pytest.fixture(scope="module")
def artwork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_artwork(tmp_path_factory.mktemp("artwork"))


def test_examples_become_turns() -> None:
    messages, pictures = solved(
        [("a.png", "What?", "a cat"), (["b.png", "c.png"], "Both?", "dogs"), (None, "1+1?", "2")]
    )
    assert pictures == ["a.png", "b.png", "c.png"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert [len(message["content"]) for message in messages[::2]] == [2, 3, 1]
    assert [message["content"] for message in messages[1::2]] == ["a cat", "dogs", "2"]
    for wrong, told in ((("a.png", "What?"), "example 2 has 2 parts"), ("a.png", "example 2 has 'a.png'")):
        with pytest.raises(ValueError, match=told):
            solved([("a.png", "What?", "a cat"), wrong])


def test_examples_stand_behind_the_system_message() -> None:
    system, turn, asked = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    assert put_first([turn], [system, asked]) == [system, turn, asked]
    assert put_first([turn], [asked]) == [turn, asked] and put_first([turn], []) == [turn]


def test_examples_are_of_the_skill_from_other_samples_and_always_the_same(artwork: Path) -> None:
    samples = list(EmojiScenes("test", size=10, artwork=artwork))
    pool = EmojiScenes("train", size=200, artwork=artwork)
    drawn = draw_examples(samples, pool, 4)
    assert drawn == draw_examples(samples[::-1], pool, 4)[::-1] != draw_examples(samples, pool, 4, seed=1)
    for sample, examples in zip(samples, drawn, strict=True):
        assert len({example.id for example in examples}) == 4
        assert {example.skill for example in examples} == {sample.skill}
        assert all(len(example.messages) == 2 and len(example.images) == 1 for example in examples)


def test_a_sample_is_never_its_own_example() -> None:
    def colour(sample_id: str, shade: int) -> Sample:
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Shade?"}]}
        picture = ImageRef.of(Image.new("RGB", (2, 2), (shade,) * 3), sample_id)
        return Sample(sample_id, [asked, {"role": "assistant", "content": str(shade)}], [picture], "shade")

    samples = [colour("a", 1), colour("b", 1), colour("c", 2), colour("d", 3)]
    drawn = draw_examples(samples, samples, 2)
    assert {example.id for example in drawn[0]} == {"c", "d"} == {example.id for example in drawn[1]}
    with pytest.raises(ValueError, match=r"'a' has 2 other sample.* of skill 'shade' to take 3 examples from"):
        draw_examples(samples, samples, 3)
    with pytest.raises(ValueError, match="shots is 0, expected 1 or more"):
        draw_examples(samples, samples, 0)


def test_an_example_answers_in_words() -> None:
    shown = [ImageRef.of(Image.new("RGB", (2, 2), (shade,) * 3), str(shade)) for shade in range(4)]
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Shade?"}]}]
    told = [Sample(f"t{i}", [*asked, {"role": "assistant", "content": str(i)}], [shown[i]]) for i in range(2)]
    requests = [Sample(f"d{i}", drawn("a shade"), [shown[i]]) for i in (2, 3)]
    for examples in draw_examples(told, [*requests, *told], 1):
        assert examples[0].id.startswith("t")
    with pytest.raises(ValueError, match="has 1 other sample"):
        draw_examples(told[:1], [*requests, *told], 2)


def test_an_opening_needs_nothing_before_it(artwork: Path) -> None:
    scene = EmojiScenes("train", size=1, questions_per_scene=3, artwork=artwork)[0]
    first = opening(scene)
    assert first.messages == scene.messages[:2] and first.skill == scene.meta["skills"][0]
    first.validate()


def test_the_train_split_lends_the_examples(artwork: Path, tmp_path: Path) -> None:
    pool = read_train(f"emoji-scenes:test,size=3,language=ko,shots=2,artwork={artwork}")
    assert len(pool) == 20_000 and pool[0].meta["split"] == "train" and pool[0].meta["language"] == "ko"
    path = EmojiScenes("test", size=12, artwork=artwork).write(tmp_path)
    assert {sample.id for sample in read_train(path)} == {sample.id for sample in read(path, "train")}


@pytest.mark.parametrize("form", ["questions", "caption", "both"])
def test_scenes_with_shots_interleave_pictures_and_text(artwork: Path, form: str) -> None:
    scenes = EmojiScenes("train", size=20, form=form, shots=3, artwork=artwork)
    for sample in scenes:
        sample.validate()
        assert len(sample.images) == 4 and len(sample.messages) == 8 and len(sample.meta["shots"]) == 3
        assert sample.meta["skills"] == [sample.skill] * 4
        assert len({ref.key() for ref in sample.images}) == 4
        assert [message["content"][0]["type"] for message in sample.messages[::2]] == ["image"] * 4
    assert [sample.id for sample in scenes] == list(scenes.ids())


def test_scenes_with_shots_are_scenes_of_their_own(artwork: Path) -> None:
    plain, few, many = (EmojiScenes("train", 12, shots=shots, artwork=artwork) for shots in (0, 2, 3))
    keys = [{ref.key() for sample in scenes for ref in sample.images} for scenes in (plain, few, many)]
    assert len(set.union(*keys)) == sum(map(len, keys)) == 12 * (1 + 3 + 4)
    assert [text_of(m["content"]) for m in few[5].messages] == [text_of(m["content"]) for m in few[5].messages]


def test_shots_may_be_of_mixed_skills(artwork: Path) -> None:
    mixed = EmojiScenes("train", size=40, shots=2, shot_skills="mixed", artwork=artwork)
    assert sum(len(set(sample.meta["skills"])) > 1 for sample in mixed) > 20
    weighed = EmojiScenes("train", 20, shots=2, shot_skills="mixed", weights={"colour": 1}, artwork=artwork)
    assert {skill for sample in weighed for skill in sample.meta["skills"]} == {"colour"}


def test_shots_by_name_in_a_mixture_and_written_out(artwork: Path, tmp_path: Path) -> None:
    assert len(read(f"emoji-scenes:test,size=3,shots=2,artwork={artwork}")[0].images) == 3
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"- {{path: emoji-scenes, size: 5, shots: 4, shot_skills: mixed, artwork: {artwork}}}\n")
    assert len(read(mixture)[0].images) == 5
    scenes = EmojiScenes("validation", size=3, shots=2, artwork=artwork)
    for written, scene in zip(read(scenes.write(tmp_path / "set")), scenes, strict=True):
        assert (written.id, written.messages, written.meta) == (scene.id, scene.messages, scene.meta)
        assert [ref.load().tobytes() for ref in written.images] == [ref.load().tobytes() for ref in scene.images]


def test_mistakes_about_shots_are_named(artwork: Path) -> None:
    for options, expected in (
        ({"shots": -1}, "shots is -1, expected 0 to 32"),
        ({"shots": 2, "questions_per_scene": 3}, "questions_per_scene is 3, expected 1 to 1"),
        ({"shot_skills": "other"}, "shot_skills 'other' is not one of same, mixed"),
    ):
        with pytest.raises(ValueError, match=expected):
            EmojiScenes(artwork=artwork, **options)
