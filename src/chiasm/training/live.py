"""What a terminal shows under a stage's bar while it trains: the loss as a curve, rates, the last validation."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Characters of the curve, each the mean of as many steps as it takes."""
ANSWERS = 3


class Dashboard:
    """Hears the log's events and draws the newest ones."""

    def __init__(self) -> None:
        self.stage = ""
        self.losses: list[float] = []
        self.step: Mapping[str, Any] = {}
        self.validation: Mapping[str, Any] = {}
        self.forgetting: Mapping[str, Any] = {}

    def hear(self, event: Mapping[str, Any]) -> None:
        """Takes one line of the log."""
        if event.get("stage", self.stage) != self.stage:
            self.__init__()  # type: ignore[misc]
            self.stage = event["stage"]
        if event["event"] == "step":
            self.step = event
            self.losses += [event["loss"]] if event["loss"] is not None else []
        elif event["event"] == "validation":
            self.validation = event
        elif event["event"] == "forgetting":
            self.forgetting = event

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        if self.step:
            rates = ", ".join(f"{name} {rate:.1e}" for name, rate in self.step["lr"].items())
            memory = f"   memory {self.step['peak_memory_bytes'] / 1e9:.2f} GB"
            curve = f"{curve_of(self.losses)} {self.losses[-1]:.3f}" if self.losses else ""
            yield _line("loss", f"{curve}   lr {rates}{memory}")
        if self.validation:
            wrong = self.validation["shuffled_loss"]
            against = f", with wrong pictures {wrong:.3f}" if wrong is not None else ""
            yield _line("validation", f"{self.validation['loss']:.3f}{against} at step {self.validation['step']}")
            for gate in ("attention_gate", "feed_forward_gate"):
                values = self.validation.get("gates", {}).get(gate)
                if values:
                    yield _line(gate, " ".join(f"{value:+.2f}" for value in values))
            for answer in self.validation["answers"][:ANSWERS]:
                mark = "✓" if answer["correct"] else "✗"
                yield _line("", f"{mark} {_short(answer['question'])} → {_short(answer['answer'])}")
        if self.forgetting:
            yield _line("text perplexity", ", ".join(f"{k} {v:.2f}" for k, v in self.forgetting["perplexity"].items()))


def curve_of(values: list[float], width: int = WIDTH) -> str:
    """Values as a curve of one line; more than `width` are averaged."""
    count = min(width, len(values))
    pieces = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(piece) / len(piece) for piece in pieces]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def _line(name: str, text: str) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"  {name:<18}" if name else " " * 20, style="dim")
    return line.append(text)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 50 else f"{flat[:49]}…"
