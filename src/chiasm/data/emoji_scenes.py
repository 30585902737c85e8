"""Emoji scenes: an endless, free, small data set whose every answer is known, to train with and to measure skills by.

Pictures are composed from the Twemoji artwork (CC-BY 4.0); each sample follows from (split, seed, index) alone. Skills:
naming, counting, colour, position, reading. `test-unseen` shows objects, words and numbers that no other split has.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from chiasm.data.dice import Dice
from chiasm.data.drawing import drawn
from chiasm.data.emoji_drawing import Drawing, Scene
from chiasm.data.emoji_questions import MAX_QUESTIONS, SKILLS, WORDINGS, World, ask, caption, choose_skills, compose
from chiasm.data.emoji_vocabulary import COLOURS, CORNERS, COUNTS, LANGUAGES, OBJECTS, name_of
from chiasm.data.rows import PLACEHOLDER
from chiasm.data.schema import ImageRef, Sample, Samples, text_of
from chiasm.data.splits import Subset

SPLITS = ("train", "validation", "test", "test-unseen")
FORMS = ("questions", "caption", "both", "drawing", "all")
IN_TURNS = {"both": ("caption", "questions"), "all": ("drawing", "questions", "drawing", "caption")}
"""Forms whose samples are of several kinds, in turns."""
WITHOUT_WORDS = 0.1
"""Share of drawings whose request has no words: what guidance is told from."""
MAX_SHOTS = 32
SHOT_SKILLS = ("same", "mixed")
Turns = list[tuple[str, str]]


class EmojiScenes(Samples):
    """`size` scenes by index.

    Args:
        split: "train", "validation" and "test" differ in their scenes; "test-unseen" has a vocabulary of its own.
        size: number of samples; None is 20,000 for training and 500 for the others.
        num_objects: the first so many of the vocabulary's 64 objects (at least 8); "test-unseen" always has its 20.
        language: of questions and answers: "en" or "ko". Signs are in Latin letters and digits in both.
        questions_per_scene: turns about one picture, at most 6; None is 3 for training and 1 for the others. With 1, a
            sample has a `skill`; outside of training the skills then take turns, with every answer equally often.
        form: "questions", "caption", "both" (every second sample is a caption), "drawing" (the caption is the request
            and the picture the answer; one request in ten has no words), or "all" (every second one is a drawing).
        weights: relative frequency of the skills in training; one that is left out is never asked. Default: all alike.
        artwork: folder of the 72x72 PNGs; None is the alias `twemoji`, fetched once.
        shots: solved examples, each with a picture of its own, in front of the question (one per scene): text and
            pictures interleaved, as Flamingo (arXiv 2204.14198) learns from.
        shot_skills: whether the examples are of the "same" skill as the question, or "mixed".
        exact: whether objects have one size and stand in the middle of their places, on a colour's exact shade, with a
            sign only where it is asked for: what is easiest to draw.
        places: whether every caption says where things are, so that its words tell the picture; else seven in ten do.

    `meta` of every sample: split, language, objects (name, emoji, place, box), background, sign, and the turns' skills;
    `shots` has the objects, background and sign of every example.
    """

    OPTIONS = (
        *("size", "seed", "num_objects", "language", "questions_per_scene", "form", "weights", "artwork"),
        *("shots", "shot_skills", "exact", "places"),
    )

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
        shots: int = 0,
        shot_skills: str = "same",
        exact: bool = False,
        places: bool = False,
    ) -> None:
        _expect("split", split, SPLITS)
        _expect("language", language, LANGUAGES)
        _expect("form", form, FORMS)
        _expect("shot_skills", shot_skills, SHOT_SKILLS)
        self.size = size if size is not None else 20_000 if split == "train" else 500
        self.turns = questions_per_scene or (3 if split == "train" and not shots else 1)
        self.weights = dict(weights) if weights is not None else dict.fromkeys(SKILLS, 1.0)
        _expect_between("size", self.size, 1, None)
        _expect_between("num_objects", num_objects, 8, len(OBJECTS))
        _expect_between("questions_per_scene", self.turns, 1, MAX_QUESTIONS if not shots else 1)
        _expect_between("shots", shots, 0, MAX_SHOTS)
        if shots and form in ("drawing", "all"):
            raise ValueError(f"shots={shots} are examples of answers in words; form {form!r} has none or few")
        for skill, weight in self.weights.items():
            _expect("skill in weights", skill, SKILLS)
            _expect_between(f"weight of {skill}", weight, 0, None)
        if not sum(self.weights.values()):
            raise ValueError("weights are all 0: no skill is left to ask about")
        self.split, self.seed, self.language, self.form = split, seed, language, form
        self.shots, self.shot_skills, self.exact, self.places = shots, shot_skills, exact, places
        self.world = World.of(split == "test-unseen", num_objects)
        folder = _twemoji() if artwork is None else Path(artwork)
        self.artwork = folder / "72x72" if (folder / "72x72").is_dir() else folder

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        index = range(len(self))[index]
        scenes = self._scenes(index)
        sample_id = self._id(index)
        images = [
            ImageRef.of(
                Drawing(scene, self.artwork), f"{number + 1} of {sample_id}" if self.shots else f"of {sample_id}"
            )
            for number, (scene, *_) in enumerate(scenes)
        ]
        asked = scenes[-1][2]
        skill = asked[0] if len(asked) == 1 else None
        messages = [message for _, turns, _ in scenes for message in _messages(turns)]
        if self._kind(index) == "drawing":
            skill, messages = "drawing", self._drawn(index, messages[-1]["content"])
        return Sample(sample_id, messages, images, skill, self._meta(scenes))

    def ids(self) -> Iterator[str]:
        """Every sample's id, without composing a scene."""
        return map(self._id, range(len(self)))

    def _id(self, index: int) -> str:
        shots = f"-{self.shots}-shot" if self.shots else ""
        return f"emoji-scenes-{self.split}-{self.seed}-{index}{shots}"

    def chance(self, skill: str) -> float:
        """The accuracy of always giving the same answer to a skill's questions."""
        return self.world.chance(skill)

    def write(self, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
        """Save as LLaVA JSON with PNGs (data.json and images/), which `read(folder)` takes; gives the JSON's path."""
        folder = Path(folder)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for index, sample in enumerate(self):
            files = [f"images/{sample.id}{f'-{n}' if self.shots else ''}.png" for n in range(len(sample.images))]
            for file, image in zip(files, sample.images, strict=True):
                image.load().save(folder / file)
            rows.append(_llava_row(sample, files))
            if progress:
                progress(index + 1, len(self))
        target = folder / "data.json"
        target.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        return target

    def _scenes(self, index: int) -> list[tuple[Scene, Turns, list[str]]]:
        """The examples' scenes and then the question's own, each with its turns and their skills."""
        shots = [f"{self.shots} shots"] if self.shots else []
        seed: tuple[str | int, ...] = ("emoji scenes", self.split, self.seed, index, *shots)
        dice, others = Dice(*seed), [Dice(*seed, number) for number in range(self.shots)]
        if self._kind(index) != "questions":
            return [self._caption(die) for die in (*others, dice)]
        skills, dealt = self._choose(dice, index // len(IN_TURNS.get(self.form, (self.form,))))
        asked = self._questions(dice, skills, dealt)
        return [*(self._example(die, skills) for die in others), asked]

    def _kind(self, index: int) -> str:
        turns = IN_TURNS.get(self.form, (self.form,))
        return turns[index % len(turns)]

    def _drawn(self, index: int, words: str) -> list[dict]:
        dice = Dice("emoji scenes drawn", self.split, self.seed, index)
        return drawn(None if dice.happens(WITHOUT_WORDS) else words)

    def _example(self, dice: Dice, skills: list[str]) -> tuple[Scene, Turns, list[str]]:
        if self.shot_skills == "mixed":
            skills, _ = choose_skills(dice, self.weights, 1)
        return self._questions(dice, skills, {})

    def _choose(self, dice: Dice, rank: int) -> tuple[list[str], dict[str, str]]:
        if self.split != "train" and self.turns == 1:
            return self._deal(rank)
        return choose_skills(dice, self.weights, self.turns)

    def _questions(self, dice: Dice, skills: list[str], dealt: dict[str, str]) -> tuple[Scene, Turns, list[str]]:
        scene, facts = compose(dice, skills, self.world, dealt, self.exact)
        return scene, [ask(fact, self.language, dice) for fact in facts], [fact.skill for fact in facts]

    def _caption(self, dice: Dice) -> tuple[Scene, Turns, list[str]]:
        scene, _ = compose(dice, [], self.world, {}, self.exact)
        instruction = dice.pick(WORDINGS[self.language]["caption"])
        return scene, [(instruction, caption(scene, self.language, dice, self.places))], ["caption"]

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

    def _meta(self, scenes: list[tuple[Scene, Turns, list[str]]]) -> dict[str, Any]:
        skills = [skill for _, _, asked in scenes for skill in asked]
        *examples, own = [self._contents(scene) for scene, *_ in scenes]
        known = {"split": self.split, "language": self.language, "skills": skills, **own}
        return known | ({"shots": examples} if examples else {})

    def _contents(self, scene: Scene) -> dict[str, Any]:
        objects = [
            {
                "name": name_of(placed.code, self.language),
                "emoji": chr(int(placed.code, 16)),
                "place": placed.place,
                "box": list(placed.box),
            }
            for placed in scene.objects
        ]
        return {"objects": objects, "background": scene.colour, "sign": scene.sign}


def _twemoji() -> Path:
    from chiasm.sources import pull

    return pull("twemoji")


@lru_cache(maxsize=64)
def _deck(answers: tuple[str, ...], *seed: str | int) -> list[str]:
    return Dice(*seed).shuffled(answers)


def _messages(turns: Turns) -> list[dict]:
    messages: list[dict] = []
    for question, answer in turns:
        content = question if messages else [{"type": "image"}, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _llava_row(sample: Sample, files: list[str]) -> dict[str, Any]:
    conversations = []
    for message in sample.messages:
        text = text_of(message["content"])
        value = text if isinstance(message["content"], str) else f"{PLACEHOLDER}\n{text}"
        conversations.append({"from": "human" if message["role"] == "user" else "gpt", "value": value})
    row = {"id": sample.id, "image": files if len(files) > 1 else files[0], "conversations": conversations}
    return row | ({"skill": sample.skill} if sample.skill else {}) | sample.meta


def _expect(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")


def _expect_between(what: str, value: int | float, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        raise ValueError(f"{what} is {value}, expected {f'{low} to {high}' if high is not None else f'at least {low}'}")
