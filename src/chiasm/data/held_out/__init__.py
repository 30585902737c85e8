"""Short texts that no model was trained on: written for Chiasm, to measure what a language model still knows."""

from pathlib import Path

HELD_OUT_TEXTS = {
    name: (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8") for name in ("english", "korean")
}
