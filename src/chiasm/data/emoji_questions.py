"""Questions about an emoji scene, each about one fact that nothing else in the conversation tells, and captions.

The facts come first and the scene is built around them, so every answer of a skill is equally frequent. In a
conversation no answer follows from an earlier turn: what one turn names or asks about, no other turn does; counts are
the first turns (a crowd of four leaves little else to ask, which would tell), of two kinds at most (and of one after
three of a kind), and the position comes before names (after two named corners an object could only be in the others).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chiasm.data.dice import Dice
from chiasm.data.emoji_drawing import Placed, Scene, box_in, exact_box
from chiasm.data.emoji_vocabulary import (
    COLOURS,
    CORNERS,
    COUNTS,
    MIDDLE,
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

SKILLS = ("naming", "counting", "colour", "position", "reading")
MAX_QUESTIONS = 6
OFTEN = {"naming": len(CORNERS), "counting": 2}
"""Skills that one scene can be asked about more than once, and how often at most."""


@dataclass(frozen=True)
class World:
    """What the scenes of a split can show: object kinds, and words and numbers for signs."""

    kinds: tuple[str, ...]
    words: tuple[str, ...]
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, unseen: bool, num_objects: int) -> "World":
        if unseen:
            return cls(UNSEEN_OBJECTS, UNSEEN_WORDS, UNSEEN_NUMBERS)
        return cls(OBJECTS[:num_objects], WORDS, NUMBERS)

    def chance(self, skill: str) -> float:
        """The accuracy of the best constant answer: every answer is equally likely, but half the signs are words."""
        options = {
            "naming": len(self.kinds),
            "counting": len(COUNTS),
            "colour": len(COLOURS),
            "position": len(CORNERS),
            "reading": 2 * len(self.words),
        }
        if skill not in options:
            raise ValueError(f"skill {skill!r} is not one of {', '.join(SKILLS)}")
        return 1 / options[skill]


@dataclass(frozen=True)
class Fact:
    """An answer and what it is about: naming a place, counting or position an object's code, else nothing.

    `answer` is a code for naming, else an English word or the sign's text. Naming without a place: the only object.
    """

    skill: str
    answer: str
    about: str = ""


def choose_skills(dice: Dice, weights: Mapping[str, int | float], number: int) -> tuple[list[str], dict[str, str]]:
    """Up to `number` skills by weight that one scene can be asked about, and the count if it is among them.

    A corner serves one question. The count is drawn regardless of the rest, so corners that it fills give their turn to
    colour or reading, or to nothing where four of a kind leave nothing to ask.
    """
    chosen: list[str] = []
    while len(chosen) < number:
        corners_asked = sum(skill in ("naming", "position") for skill in chosen)
        open_skills = {
            skill: weight
            for skill, weight in weights.items()
            if weight
            and chosen.count(skill) < OFTEN.get(skill, 1)
            and (skill not in ("naming", "position") or corners_asked < 4)
        }
        if not open_skills:
            break
        chosen.append(dice.weighted(open_skills))
    if "counting" not in chosen:
        return chosen, {}
    count = dice.below(len(COUNTS))
    asked = [skill for skill in chosen if skill in ("naming", "position")]
    spare = [skill for skill in ("colour", "reading") if weights.get(skill) and skill not in chosen]
    for skill in asked[len(CORNERS) - count :]:
        chosen.remove(skill)
        if spare:
            chosen.append(spare.pop(dice.below(len(spare))))
    return chosen, {"counting": COUNTS[count]}


def compose(
    dice: Dice, skills: Sequence[str], world: World, dealt: Mapping[str, str], exact: bool = False
) -> tuple[Scene, list[Fact]]:
    """A scene with a fact for each skill (of `choose_skills`), in the order of asking; answers are dealt or drawn.

    A second count is of what fills the scene; where nothing or one thing alone can, it is not asked.
    """
    used = [dealt["naming"]] if "naming" in dealt else []

    def new_kind() -> str:
        while (kind := dice.pick(world.kinds)) in used:
            pass
        used.append(kind)
        return kind

    sign_anyway = not exact and "reading" not in skills and dice.happens(0.3)
    sign = dealt.get("reading") or _sign(dice, world) if "reading" in skills or sign_anyway else None
    colour = dealt.get("colour") or dice.pick(tuple(COLOURS))
    free, kinds, facts = dice.shuffled(CORNERS), {}, []
    if "counting" in skills:
        counted, count = new_kind(), dealt.get("counting") or dice.pick(COUNTS)
        kinds = {free.pop(): counted for _ in range(COUNTS.index(count))}
        facts.append(Fact("counting", count, counted))
    if "position" in skills:
        place = dealt.get("position", free[-1])
        free.remove(place)
        kinds[place] = new_kind()
        facts.append(Fact("position", place, kinds[place]))
    named = {free.pop(): dealt.get("naming") or new_kind() for skill in skills if skill == "naming"}
    kinds |= named
    others = len(free) if "counting" in skills else dice.below(len(free) + 1)
    filler = ""
    for place in free[: others if kinds else max(others, 1)]:
        filler = filler if filler and dice.happens(0.5) else new_kind()
        kinds[place] = filler
    if filler and skills.count("counting") == 2 and COUNTS.index(facts[0].answer) < len(CORNERS) - 1:
        facts.insert(1, Fact("counting", COUNTS[list(kinds.values()).count(filler)], filler))
    if len(kinds) == 1 and "position" not in skills and "counting" not in skills and dice.happens(0.5):
        kinds = {MIDDLE: next(iter(kinds.values()))}
        named = kinds if named else named
    alone = len(kinds) == 1 and sign is None and (MIDDLE in kinds or dice.happens(0.5))
    facts += [Fact("naming", kind, "" if alone else place) for place, kind in named.items()]
    for skill, answer in (("colour", colour), ("reading", sign)):
        if skill in skills:
            first = sum(fact.skill == "counting" for fact in facts)
            facts.insert(first + dice.below(len(facts) - first + 1), Fact(skill, str(answer)))
    return _arrange(dice, colour, kinds, sign, exact), facts


def _arrange(dice: Dice, colour: str, kinds: Mapping[str, str], sign: str | None, exact: bool) -> Scene:
    red, green, blue = (min(255, max(0, channel + (0 if exact else dice.below(17) - 8))) for channel in COLOURS[colour])
    on_top = dice.happens(0.5)
    places = [place for place in (*CORNERS, MIDDLE) if place in kinds]
    signed = sign is not None
    boxes = [exact_box(place, signed, on_top) if exact else box_in(place, dice, signed, on_top) for place in places]
    objects = tuple(Placed(kinds[place], place, box) for place, box in zip(places, boxes, strict=True))
    return Scene(colour, (red, green, blue), objects, sign, sign is not None and on_top)


def _sign(dice: Dice, world: World) -> str:
    return dice.pick(world.words if dice.happens(0.5) else world.numbers)


WORDINGS = {
    "en": {
        "naming": (
            "What is in the {place}?",
            "What do you see in the {place}?",
            "Which object is in the {place}?",
            "Name the object in the {place}.",
        ),
        "alone": (
            "What is in the picture?",
            "What does the picture show?",
            "Which object is in the picture?",
            "Name the object in the picture.",
        ),
        "counting": (
            "How many {names} are there?",
            "How many {names} do you see?",
            "How many {names} are in the picture?",
            "Count the {names}.",
        ),
        "colour": (
            "What colour is the background?",
            "What color is the background?",
            "Which colour does the background have?",
            "Name the colour of the background.",
        ),
        "position": (
            "Where is the {name}?",
            "In which corner is the {name}?",
            "Where in the picture is the {name}?",
            "In which part of the picture is the {name}?",
        ),
        "reading": (
            "What does the sign say?",
            "What is written on the sign?",
            "Which text is on the sign?",
            "Read the sign.",
        ),
        "caption": ("Describe the picture.", "What does the picture show?", "Write a caption for this picture."),
    },
    "ko": {
        "naming": ("{place}에 무엇이 있나요?", "{place}에 있는 것은 무엇인가요?", "{place}에는 무엇이 보이나요?"),
        "alone": ("그림에 무엇이 있나요?", "그림에 있는 것은 무엇인가요?", "무엇이 보이나요?"),
        "counting": (
            "{name}{topic} 모두 몇인가요?",
            "그림에 있는 {name}의 수는 몇인가요?",
            "{name}의 수를 세어 보세요.",
        ),
        "colour": ("배경은 무슨 색인가요?", "배경색은 무엇인가요?", "배경의 색을 말해 보세요."),
        "position": (
            "{name}{topic} 어디에 있나요?",
            "{name}의 위치는 어디인가요?",
            "{name}{subject} 어느 쪽에 있나요?",
        ),
        "reading": ("표지판에 뭐라고 적혀 있나요?", "표지판의 글자는 무엇인가요?", "표지판을 읽어 보세요."),
        "caption": ("그림을 설명해 보세요.", "그림에 대해 말해 보세요."),
    },
}


def ask(fact: Fact, language: str, dice: Dice) -> tuple[str, str]:
    """The question, in one of several wordings, and its answer."""
    wordings = WORDINGS[language]["alone" if fact.skill == "naming" and not fact.about else fact.skill]
    words = {}
    if fact.skill == "naming" and fact.about:
        words = {"place": say(fact.about, language)}
    elif fact.about:
        name = name_of(fact.about, language)
        particles = ("은", "이") if has_final_consonant(name) else ("는", "가")
        words = {"name": name, "names": plural(name), "topic": particles[0], "subject": particles[1]}
    return dice.pick(wordings).format(**words), answer_text(fact, language)


def answer_text(fact: Fact, language: str) -> str:
    if fact.skill == "naming":
        return name_of(fact.answer, language)
    return fact.answer if fact.skill == "reading" else say(fact.answer, language)


def caption(scene: Scene, language: str, dice: Dice, places: bool = False) -> str:
    """Everything in the scene in one or two sentences: each object with its place, or how many of each there are, which
    three in ten say but where `places` are always told."""
    with_places = dice.happens(0.7) or places
    if language == "ko":
        return _korean_caption(scene, with_places)
    if with_places:
        things = [f"{with_article(name_of(o.code, 'en'))} in the {o.place}" for o in scene.objects]
    else:
        things = [
            with_article(name_of(code, "en")) if number == 1 else f"{COUNTS[number]} {plural(name_of(code, 'en'))}"
            for code, number in _tally(scene)
        ]
    listed = " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))
    text = f"{listed[0].upper()}{listed[1:]} on {with_article(scene.colour)} background."
    return text if scene.sign is None else f"{text} The sign says {scene.sign}."


def _korean_caption(scene: Scene, with_places: bool) -> str:
    if with_places:
        things = [f"{say(o.place, 'ko')}에 {name_of(o.code, 'ko')}" for o in scene.objects]
    else:
        things = [f"{name_of(code, 'ko')} {say(COUNTS[number], 'ko')}" for code, number in _tally(scene)]
    subject = "이" if has_final_consonant(things[-1]) else "가"
    text = f"{say(scene.colour, 'ko')} 배경의 {', '.join(things)}{subject} 있습니다."
    if not with_places:
        text = text.replace("배경의", "배경에", 1)
    return text if scene.sign is None else f"{text} 표지판의 글자는 {scene.sign}입니다."


def _tally(scene: Scene) -> list[tuple[str, int]]:
    return list(Counter(placed.code for placed in scene.objects).items())
