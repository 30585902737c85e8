"""The table of docs/convert.md, from the code's own tables; `python docs/convert_table.py --write` renews it."""

import sys
from pathlib import Path

from chiasm.connectors import CONNECTORS
from chiasm.fusion.config import FUSIONS
from chiasm.interop.convert import KINDS, ROUTES
from chiasm.interop.export.gguf_language import ARCHITECTURES

PAGE = Path(__file__).parent / "convert.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"

GGUF = {
    "mlp": "two layers with GELU, SigLIP or CLIP*",
    "linear": "SigLIP or CLIP*",
    "ldp": "24×24 patches of SigLIP or CLIP*",
}
"""Connectors that llama.cpp has a projector for, and on which condition."""


def table() -> str:
    """One row for each fusion and connector, and for what has none."""
    lines = ["| fusion | connector | transformers | vLLM | llama.cpp, ollama | ONNX |", "|---|---|---|---|---|---|"]
    for fusion in FUSIONS:
        if fusion == "unified":
            continue
        for name in CONNECTORS:
            kinds = {kind: attention for (f, attention, c), kind in ROUTES.items() if (f, c) == (fusion, name)}
            if fusion == "intermediate" and not kinds:
                continue
            lines.append(_row(fusion, name, kinds))
    lines.append("| intermediate | others | none | none | none | none |")
    lines.append("| late | CLIP's and SigLIP's own | clip, siglip (`AutoModel`) | none | none | none |")
    lines.append("| unified | none | none | none | none | none |")
    return "\n".join(lines)


def _row(fusion: str, name: str, kinds: dict[str, str]) -> str:
    into = "; ".join(
        f"**{kind}**{' with `attention: prefix`' if attention == 'prefix' else ''}: {KINDS[kind].holds}"
        for kind, attention in kinds.items()
    )
    vllm = "; ".join(f"{kind}: {KINDS[kind].vllm}" for kind in kinds)
    early = fusion == "early"
    gguf = GGUF.get(name, "none") if early else "none"
    return f"| {fusion} | `{name}` | {into or 'none'} | {vllm or 'none'} | {gguf} | {'yes' if early else 'none'} |"


def page() -> str:
    """The page with its table renewed."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    families = ", ".join(f"`{name}`" for name in ARCHITECTURES)
    return f"{before}{BEGIN}\n{table()}\n\nLanguage models in GGUF: {families}.\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
