"""What emoji scenes are made of: objects, colours, places, counts and signs, and their words in English and Korean.

An object is the code point that names its file in the Twemoji artwork. Its name comes from the package `emoji` (Unicode
CLDR), but for the few that would be long or would speak of a face.
"""

from functools import cache

import emoji

LANGUAGES = ("en", "ko")


def _table(*lines: str) -> tuple[str, ...]:
    return tuple(entry for line in lines for entry in line.split())


OBJECTS = _table(  # mixed kinds on every line, so that any first n of them are varied
    "1f408 1f34e 1f68c 1f511 1f415 1f34c 1f6b2 1f3b8 1f418 1f353 1f680 2602 1f427 1f34d 1f681 1f388",
    "1f40b 1f349 26f5 1f528 1f404 1f34b 1f69c 1f4f7 1f438 1f955 1f691 1f4fa 1f989 1f344 2708 1f4a1",
    "1f993 1f355 1f3e0 1f451 1f40d 1f354 1fa91 1f514 1f419 1f369 1f33b 1f335 1f980 1f950 2603 2b50",
    "1f98b 1f968 1f3c0 1f916 1f422 1f36d 1fa9c 1f3ba 1f407 1f951 1f40c 1f346 1f416 1f577 1f992 1f413",
)
"""What `train`, `validation` and `test` show."""

UNSEEN_OBJECTS = _table(
    "1f9a9 1f350 1f695 1f941 1f998 1f9c1 1f6f6 2693 1f981 1f96a",
    "1f6f9 1f337 1f988 1f3c6 1f986 1fa81 1f42a 1f56f 1f994 1f392",
)
"""What only `test-unseen` shows."""

WORDS = _table(
    "OPEN STOP EXIT SALE CAFE BANK PARK HOTEL ZOO GYM MENU PUSH PULL SLOW FAST FREE NEW HOT COLD SHOP",
    "BOOK FILM MUSIC SPORT BEACH RIVER LAKE NORTH SOUTH EAST WATER MILK SUGAR SALT PORT GATE LIFT CLUB TOUR PLAZA",
)
UNSEEN_WORDS = _table("WEST RENT MAIL QUIET LUNCH STAFF HELLO TOOLS PAINT ROYAL RADIO TOWER SWIM PAPER WOOD JAZZ")
NUMBERS = tuple(str(number) for number in range(10, 1000) if number % 9 != 4)
UNSEEN_NUMBERS = tuple(str(number) for number in range(10, 1000) if number % 9 == 4)

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 214, 40),
    "green": (45, 150, 70),
    "blue": (40, 90, 210),
    "purple": (120, 50, 170),
    "pink": (250, 150, 200),
    "black": (24, 24, 24),
}
"""Backgrounds. White is not among them: objects have a white outline, so nothing vanishes on its own colour."""

CORNERS = ("top left", "top right", "bottom left", "bottom right")
MIDDLE = "middle"
COUNTS = ("zero", "one", "two", "three", "four")

_NAMES = {
    "en": {"1f34e": "apple"},
    "ko": {
        "1f34e": "사과",
        "1f438": "개구리",
        "1f916": "로봇",
        "1f981": "사자",
        "1f3c0": "농구공",
        "1f392": "배낭",
    },
}
_KOREAN = {
    "red": "빨간색",
    "orange": "주황색",
    "yellow": "노란색",
    "green": "초록색",
    "blue": "파란색",
    "purple": "보라색",
    "pink": "분홍색",
    "black": "검은색",
    "top left": "왼쪽 위",
    "top right": "오른쪽 위",
    "bottom left": "왼쪽 아래",
    "bottom right": "오른쪽 아래",
    "middle": "가운데",
    "zero": "없음",
    "one": "하나",
    "two": "둘",
    "three": "셋",
    "four": "넷",
}


@cache
def name_of(code: str, language: str) -> str:
    """An object's name, in lower case: ("1f408", "en") is "cat"."""
    if code in _NAMES[language]:
        return _NAMES[language][code]
    emoji.config.load_language(language)
    character = chr(int(code, 16))
    entry = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA[f"{character}\ufe0f"]
    return entry[language].strip(":").replace("_", " ")


def say(word: str, language: str) -> str:
    """A colour, place or count in `language`; the English words are the keys."""
    return _KOREAN[word] if language == "ko" else word


def with_article(name: str) -> str:
    """A cat, an owl."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """Cats, butterflies, boxes, matches, tomatoes."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "to")) else "s")


def has_final_consonant(word: str) -> bool:
    """Whether a Korean word ends in a consonant, which decides its particle."""
    return "가" <= word[-1] <= "힣" and (ord(word[-1]) - ord("가")) % 28 != 0
