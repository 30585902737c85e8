"""Pictures in a terminal: as they are where it has a protocol for them, else as coloured half-blocks."""

import base64
from collections.abc import Mapping
from io import BytesIO

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 48, 20
"""Cells that a picture takes at most; a cell is about twice as high as it is wide."""
PIXELS = 800
CHUNK = 4096
CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")})
KITTY = {"TERM": ("xterm-kitty", "xterm-ghostty"), "TERM_PROGRAM": ("ghostty",)}
ITERM = {"TERM_PROGRAM": ("iTerm.app", "WezTerm", "mintty"), "LC_TERMINAL": ("iTerm2",)}


def printable(text: str) -> str:
    """A text without control characters: nobody's words move the cursor or set the clipboard."""
    return text.translate(CONTROLS)


def protocol(environment: Mapping[str, str]) -> str:
    """`kitty`, `iterm` or `blocks`, by what the terminal says of itself; a multiplexer between hides the first two."""
    if environment.get("TMUX") or environment.get("STY"):
        return "blocks"
    if environment.get("KITTY_WINDOW_ID") or _says(environment, KITTY):
        return "kitty"
    return "iterm" if _says(environment, ITERM) else "blocks"


def _says(environment: Mapping[str, str], names: Mapping[str, tuple[str, ...]]) -> bool:
    return any(environment.get(name) in values for name, values in names.items())


def show(picture: Image.Image, console: Console, how: str) -> None:
    """Prints a picture; nothing where the output is no terminal."""
    if not console.is_terminal:
        return
    columns, rows = cells(picture, min(COLUMNS, console.width))
    if how == "blocks":
        console.print(half_blocks(picture, columns, rows))
        return
    file = BytesIO()
    small = picture.copy()
    small.thumbnail((PIXELS, PIXELS))
    small.save(file, "PNG")
    console.file.write({"kitty": kitty, "iterm": iterm}[how](file.getvalue(), columns) + "\n")
    console.file.flush()


def cells(picture: Image.Image, columns: int) -> tuple[int, int]:
    """Columns and rows of cells that keep a picture's shape."""
    ratio = picture.height / picture.width / 2
    rows = max(1, min(ROWS, round(columns * ratio)))
    return max(1, min(columns, round(rows / ratio))), rows


def half_blocks(picture: Image.Image, columns: int, rows: int) -> Text:
    """Two pixels in every cell: the upper one in the letter's colour, the lower one behind it."""
    small = picture.resize((columns, 2 * rows), Image.Resampling.LANCZOS)
    text = Text(no_wrap=True)
    for row in range(rows):
        for column in range(columns):
            upper, lower = (small.getpixel((column, 2 * row + below)) for below in (0, 1))
            text.append("▀", Style(color=_colour(upper), bgcolor=_colour(lower)))
        text.append("\n" if row < rows - 1 else "")
    return text


def _colour(pixel: object) -> Color:
    assert isinstance(pixel, tuple)
    return Color.from_rgb(*pixel)


def kitty(png: bytes, columns: int) -> str:
    """Kitty's graphics protocol: base64 in pieces, the first of which says what it is."""
    data = base64.b64encode(png).decode()
    pieces = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    heads = [f"a=T,f=100,c={columns},"] + [""] * (len(pieces) - 1)
    more = [1] * (len(pieces) - 1) + [0]
    return "".join(f"\x1b_G{head}m={m};{piece}\x1b\\" for head, m, piece in zip(heads, more, pieces, strict=True))


def iterm(png: bytes, columns: int) -> str:
    """iTerm2's inline images."""
    data = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={columns};preserveAspectRatio=1:{data}\x07"
