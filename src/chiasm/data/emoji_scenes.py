"""Emoji scenes: an endless, free, small data set whose every answer is known, to train with and to measure skills by.

Pictures are composed from the Twemoji artwork (CC-BY 4.0); each sample follows from (split, seed, index) alone. Skills:
naming, counting, colour, position, reading. `test-unseen` shows objects, words and numbers that no other split has.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from chiasm.data.dice import Dice
from chiasm.data.emoji_drawing import Drawing, Scene
from chiasm.data.emoji_questions import MAX_QUESTIONS, SKILLS, WORDINGS, World, ask, caption, choose_skills, compose
from chiasm.data.emoji_vocabulary import COLOURS, CORNERS, COUNTS, LANGUAGES, OBJECTS, name_of
from chiasm.data.rows import PLACEHOLDER
from chiasm.data.schema import ImageRef, Sample, text_of
from chiasm.data.splits import Subset

SPLITS = ("train", "validation", "test", "test-unseen")
FORMS = ("questions", "caption", "both")


class EmojiScenes(Sequence[Sample]):
    """`size` scenes by index.

    Args:
        split: "train", "validation" and "test" differ in their scenes; "test-unseen" has a vocabulary of its own.
        size: number of samples; None is 20,000 for training and 500 for the others.
        num_objects: the first so many of the vocabulary's 64 objects (at least 8); "test-unseen" always has its 20.
        language: of questions and answers: "en" or "ko". Signs are in Latin letters and digits in both.
        questions_per_scene: turns about one picture, at most 6; None is 3 for training and 1 for the others. With 1, a
            sample has a `skill`; outside of training the skills then take turns, with every answer equally often.
        form: "questions", "caption", or "both" (every second sample is a caption).
        weights: relative frequency of the skills in training; one that is left out is never asked. Default: all alike.
        artwork: folder of the 72x72 PNGs; None is the alias `twemoji`, fetched once.

    `meta` of every sample: split, language, objects (name, emoji, place, box), background, sign, and the turns' skills.
    """

    OPTIONS = ("size", "seed", "num_objects", "language", "questions_per_scene", "form", "weights", "artwork")

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        seed: int = 0,
        num_objects: int = len(OBJECTS),
        language: str = "en",
        questions_per_scene: int | None = None,
        form: str = "questions",
        weights: Mapping[str, int | float] | None = None,
        artwork: str | Path | None = None,
    ) -> None:
        _expect("split", split, SPLITS)
        _expect("language", language, LANGUAGES)
        _expect("form", form, FORMS)
        self.size = size if size is not None else 20_000 if split == "train" else 500
        self.turns = questions_per_scene or (3 if split == "train" else 1)
        self.weights = dict(weights) if weights is not None else dict.fromkeys(SKILLS, 1.0)
        _expect_between("size", self.size, 1, None)
        _expect_between("num_objects", num_objects, 8, len(OBJECTS))
        _expect_between("questions_per_scene", self.turns, 1, MAX_QUESTIONS)
        for skill, weight in self.weights.items():
            _expect("skill in weights", skill, SKILLS)
            _expect_between(f"weight of {skill}", weight, 0, None)
        if not sum(self.weights.values()):
            raise ValueError("weights are all 0: no skill is left to ask about")
        self.split, self.seed, self.language, self.form = split, seed, language, form
        self.world = World.of(split == "test-unseen", num_objects)
        folder = _twemoji() if artwork is None else Path(artwork)
        self.artwork = folder / "72x72" if (folder / "72x72").is_dir() else folder

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        index = range(len(self))[index]
        dice = Dice("emoji scenes", self.split, self.seed, index)
        with_caption = self.form == "caption" or (self.form == "both" and index % 2 == 0)
        if with_caption:
            scene, turns, skills = self._caption(dice)
        else:
            scene, turns, skills = self._questions(dice, index // 2 if self.form == "both" else index)
        sample_id = f"emoji-scenes-{self.split}-{self.seed}-{index}"
        image = ImageRef.of(Drawing(scene, self.artwork), f"of {sample_id}")
        skill = skills[0] if len(skills) == 1 else None
        return Sample(sample_id, _messages(turns), [image], skill, self._meta(scene, skills))

    def chance(self, skill: str) -> float:
        """The accuracy of always giving the same answer to a skill's questions."""
        return self.world.chance(skill)

    def write(self, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
        """Save as LLaVA JSON with PNGs (data.json and images/), which `read(folder)` takes; gives the JSON's path."""
        folder = Path(folder)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for index, sample in enumerate(self):
            file = f"images/{sample.id}.png"
            sample.images[0].load().save(folder / file)
            rows.append(_llava_row(sample, file))
            if progress:
                progress(index + 1, len(self))
        target = folder / "data.json"
        target.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        return target

    def _questions(self, dice: Dice, rank: int) -> tuple[Scene, list[tuple[str, str]], list[str]]:
        if self.split != "train" and self.turns == 1:
            skills, dealt = self._deal(rank)
        else:
            skills, dealt = choose_skills(dice, self.weights, self.turns)
        scene, facts = compose(dice, skills, self.world, dealt)
        return scene, [ask(fact, self.language, dice) for fact in facts], [fact.skill for fact in facts]

    def _caption(self, dice: Dice) -> tuple[Scene, list[tuple[str, str]], list[str]]:
        scene, _ = compose(dice, [], self.world, {})
        instruction = dice.pick(WORDINGS[self.language]["caption"])
        return scene, [(instruction, caption(scene, self.language, dice))], ["caption"]

    def _deal(self, rank: int) -> tuple[list[str], dict[str, str]]:
        """The skill whose turn it is and its next answer: through all answers before any comes again."""
        skills = [skill for skill in SKILLS if self.weights.get(skill)]
        skill, rank = skills[rank % len(skills)], rank // len(skills)
        answers: tuple[str, ...] = {
            "naming": self.world.kinds,
            "counting": COUNTS,
            "colour": tuple(COLOURS),
            "position": CORNERS,
            "reading": self.world.numbers if rank % 2 else self.world.words,
        }[skill]
        deal, place = divmod(rank // 2 if skill == "reading" else rank, len(answers))
        return [skill], {skill: _deck(answers, "deck", self.split, self.seed, skill, deal)[place]}

    def _meta(self, scene: Scene, skills: list[str]) -> dict[str, Any]:
        objects = [
            {
                "name": name_of(placed.code, self.language),
                "emoji": chr(int(placed.code, 16)),
                "place": placed.place,
                "box": list(placed.box),
            }
            for placed in scene.objects
        ]
        known = {"split": self.split, "language": self.language, "skills": skills}
        return known | {"objects": objects, "background": scene.colour, "sign": scene.sign}


def _twemoji() -> Path:
    from chiasm.sources import pull

    return pull("twemoji")


@lru_cache(maxsize=64)
def _deck(answers: tuple[str, ...], *seed: str | int) -> list[str]:
    return Dice(*seed).shuffled(answers)


def _messages(turns: list[tuple[str, str]]) -> list[dict]:
    messages: list[dict] = []
    for question, answer in turns:
        content = question if messages else [{"type": "image"}, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _llava_row(sample: Sample, file: str) -> dict[str, Any]:
    conversations = []
    for number, message in enumerate(sample.messages):
        text = text_of(message["content"])
        value = f"{PLACEHOLDER}\n{text}" if number == 0 else text
        conversations.append({"from": "human" if message["role"] == "user" else "gpt", "value": value})
    row = {"id": sample.id, "image": file, "conversations": conversations}
    return row | ({"skill": sample.skill} if sample.skill else {}) | sample.meta


def _expect(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")


def _expect_between(what: str, value: int | float, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        raise ValueError(f"{what} is {value}, expected {f'{low} to {high}' if high is not None else f'at least {low}'}")
