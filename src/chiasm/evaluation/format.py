"""Numbers and texts as people read them, in the terminal and in the report."""

import math

Number = int | float


def percent(value: Number | None) -> str:
    """A fraction for people: "71.4 %", or a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_range(low: Number | None, high: Number | None) -> str:
    """An interval for people: "66.0–76.2", or nothing for None."""
    return "" if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}"


def count(number: Number | None) -> str:
    """A number of things for people: 1234 → "1,234", 134515008 → "134.5 M"."""
    if number is None:
        return "–"
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if abs(number) >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:,.0f}"


def operations(number: Number | None) -> str:
    """Floating-point operations for people: "59.94 GFLOP", "3.10 MFLOP", "76.03 kFLOP"."""
    if number is None:
        return "–"
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1e9, "G"), (1e6, "M")) if abs(number) >= scale / 100), (1e3, "k")
    )
    return f"{number / scale:,.2f} {unit}FLOP"


def amount(number: Number | None, digits: int = 2) -> str:
    """A measured value for people, or a dash where there is none."""
    return "–" if number is None or not math.isfinite(number) else f"{number:,.{digits}f}"


def duration(seconds: Number | None) -> str:
    """Seconds for people: "0.8 s", "42 s", "3 min 05 s", "2 h 07 min"."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def latency(seconds: Number | None) -> str:
    """A short time for people: "0.4 ms", "120 ms", "8.2 s"."""
    if seconds is None or seconds >= 1:
        return duration(seconds)
    return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"


def clip(text: str, longest: int = 400) -> str:
    """The beginning of a text that is too long to show."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
