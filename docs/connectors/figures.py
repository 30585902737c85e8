"""Draws one SVG for every connector: patches on the left, what is done to them, visual tokens on the right.

    python docs/connectors/figures.py

The marked patches are those that the marked token sees, as the connector's own `attention` says.
"""

from pathlib import Path
from xml.sax.saxutils import escape

import torch

from chiasm.connectors import build_connector

HERE = Path(__file__).parent
GRID = (14, 14)
STEPS: dict[str, list[tuple[str, str]]] = {
    "linear": [("Linear", "768 → 576")],
    "mlp": [("Linear", "768 → 576"), ("GELU", ""), ("Linear", "576 → 576")],
    "pixel_shuffle": [("2 × 2 side by side", "4 · 768 = 3072"), ("LayerNorm", ""), ("MLP", "3072 → 576 → 576")],
    "patch_merger": [("LayerNorm", ""), ("2 × 2 side by side", "4 · 768 = 3072"), ("MLP", "3072 → 3072 → 576")],
    "avg_pool": [("mean of 2 × 2", "no parameters"), ("MLP", "768 → 576 → 576")],
    "ldp": [("MLP", "768 → 576 → 576"), ("mean of 2 × 2", "no parameters"), ("+ 3 × 3 depth-wise", "tells the place")],
    "c_abstractor": [
        ("3 blocks", "convolutions, 1024"),
        ("mean of 2 × 2", "no parameters"),
        ("3 blocks", "convolutions, 1024"),
        ("MLP", "1024 → 576 → 576"),
    ],
    "token_packer": [
        ("coarse queries", "bilinear, 7 × 7"),
        ("attention", "in the 2 × 2 region"),
        ("MLP", "1024 → 576 → 576"),
    ],
    "qformer": [
        ("32 queries", "learned, 768"),
        ("self-attention", "12 layers"),
        ("cross-attention", "every second layer"),
        ("Linear", "768 → 576"),
    ],
    "perceiver_resampler": [
        ("64 latents", "learned, 768"),
        ("attend, MLP", "6 layers"),
        ("LayerNorm, Linear", "768 → 576"),
    ],
    "idefics2_resampler": [
        ("gated MLP", "768 → 2304 → 576"),
        ("64 latents", "attend, MLP: 3 layers"),
        ("RMSNorm", "576"),
    ],
}
STYLE = """<style>
    .box { fill: #fff3df; stroke: #b35900; stroke-width: 1.5 }
    .patch { fill: #d9e0ea } .seen { fill: #e0a030 } .token { fill: #b9cdea } .marked { fill: #b35900 }
    .small { font-size: 12px; fill: #55617a } text { fill: #1b2436 }
    .arrow { stroke: #33415c; stroke-width: 1.5; fill: none; marker-end: url(#head) }
  </style>
  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">\
<path d="M0 0 8 4 0 8z" fill="#33415c"/></marker></defs>"""


def cells(x: float, y: float, grid: tuple[int, int], size: float, plain: str, marked: str, which: set[int]) -> str:
    """Squares in rows, some of them marked."""
    side = size - 1.5
    paths: dict[str, str] = {plain: "", marked: ""}
    for index in range(grid[0] * grid[1]):
        left, top = x + index % grid[1] * size, y + index // grid[1] * size
        paths[marked if index in which else plain] += f"M{left:g} {top:g}h{side:g}v{side:g}h-{side:g}z"
    return "\n  ".join(f'<path class="{kind}" d="{path}"/>' for kind, path in paths.items() if path)


def arrow(x: float, length: float = 26) -> str:
    return f'<path class="arrow" d="M{x} 98H{x + length}"/>'


def text(x: float, y: float, words: str, small: bool = False) -> str:
    kind = ' class="small"' if small else ""
    return f'<text{kind} x="{x}" y="{y}" text-anchor="middle">{escape(words)}</text>'


def draw(name: str) -> str:
    """The figure of one connector."""
    torch.manual_seed(0)
    connector = build_connector(name, 768, 576, GRID)
    shape = connector.token_grid
    middle = connector.num_tokens // 2 if shape is None else shape[0] // 2 * shape[1] + shape[1] // 2
    with torch.no_grad():
        seen = connector.attention(torch.randn(1, GRID[0] * GRID[1], 768))[0, middle] > 0
    parts = [cells(24, 28, GRID, 10, "patch", "seen", set(seen.nonzero().flatten().tolist()))]
    parts += [text(94, 190, "196 patches, 768 wide", small=True), arrow(172)]
    x = 204
    for title, detail in STEPS[name]:
        width = max(len(title) * 8.4, len(detail) * 6.6) + 24
        centre = x + width / 2
        parts.append(f'<rect class="box" x="{x:.0f}" y="68" width="{width:.0f}" height="60" rx="6"/>')
        parts.append(text(round(centre), 95 if detail else 103, title))
        parts += [text(round(centre), 114, detail, small=True)] if detail else []
        x += width
        parts.append(arrow(round(x) + 3))
        x += 34
    grid = shape or (connector.num_tokens // 8, 8)
    size = 140 / max(grid)
    parts.append(cells(x, 28, grid, size, "token", "marked", {middle}))
    parts.append(text(round(x) + 70, 190, f"{connector.num_tokens} visual tokens, 576 wide", small=True))
    total = round(x) + 170
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} 206" width="{total}" '
        'font-family="system-ui, -apple-system, \'Segoe UI\', sans-serif" font-size="14">\n  '
        f'{STYLE}\n  <rect width="{total}" height="206" rx="10" fill="#f6f8fb"/>\n  {body}\n</svg>\n'
    )


if __name__ == "__main__":
    for name in STEPS:
        (HERE / f"{name}.svg").write_text(draw(name))
