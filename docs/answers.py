"""A demo's first eight test questions with its answers: `python docs/answers.py demo` renews answers.png."""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.demo import SKILLS, TESTS

OUTPUT = Path(__file__).parent / "answers.png"
SIDE, GAP, LINES, COLUMNS, SHOWN = 220, 16, 60, 4, 8
PAPER, INK, RIGHT, WRONG = "#ffffff", "#1c1c1c", "#1f7a3a", "#b3261e"


def draw(run: Path) -> Image.Image:
    """A sheet of the scenes, each with its question and the answer: green if right, else red beside the true one."""
    rows = [json.loads(line) for line in (run / "evaluation" / "results.jsonl").read_text("utf-8").splitlines()]
    scenes = EmojiScenes("test", size=TESTS, weights=SKILLS)
    height = GAP + -(-SHOWN // COLUMNS) * (SIDE + LINES + GAP)
    sheet = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), height), PAPER)
    pen, question, answer = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(17)
    for number, row in enumerate(rows[:SHOWN]):
        left = GAP + number % COLUMNS * (SIDE + GAP)
        top = GAP + number // COLUMNS * (SIDE + LINES + GAP)
        sheet.paste(scenes[number].images[0].load().resize((SIDE, SIDE)), (left, top))
        pen.text((left, top + SIDE + 8), row["question"], INK, question)
        said = row["answer"] if row["correct"] else f"{row['answer']} (it is {row['expected']})"
        pen.text((left, top + SIDE + 28), said, RIGHT if row["correct"] else WRONG, answer)
    return sheet


if __name__ == "__main__":
    draw(Path(sys.argv[1])).quantize(128).save(OUTPUT, optimize=True)
