"""The table of docs/convert.md, from the code's own tables; `python docs/convert_table.py --write` renews it."""

import sys
from pathlib import Path

from chiasm.connectors import CONNECTORS
from chiasm.fusion.config import FUSIONS
from chiasm.fusion.unified_build import INPUTS as UNIFIED_INPUTS
from chiasm.interop.convert import KINDS, ROUTES
from chiasm.interop.export.gguf_language import ARCHITECTURES
from chiasm.interop.export.gguf_vision import CLASS_TOKEN, PROJECTORS, TOWERS

PAGE = Path(__file__).parent / "convert.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"

ENCODERS = ", ".join(
    f"`{name}`{' with `--inexact`*' if name in CLASS_TOKEN else ''}" for name in sorted(TOWERS, reverse=True)
)


def table() -> str:
    """One row for each fusion and connector, and for what has none."""
    lines = [
        "| fusion | connector, image input | transformers | vLLM | llama.cpp, ollama | ONNX |",
        "|---|---|---|---|---|---|",
    ]
    for fusion in FUSIONS:
        for name in UNIFIED_INPUTS if fusion == "unified" else CONNECTORS:
            routes = ((f, attention, c.partition(":")[0], kind) for (f, attention, c), kind in ROUTES.items())
            kinds = {kind: attention for f, attention, connector, kind in routes if (f, connector) == (fusion, name)}
            if fusion != "early" and not kinds:
                continue
            lines.append(_row(fusion, name, kinds))
    lines.append("| intermediate | others | none | none | none | none |")
    lines.append("| late | CLIP's and SigLIP's own | clip, siglip (`AutoModel`) | none | none | none |")
    return "\n".join(lines)


def _row(fusion: str, name: str, kinds: dict[str, str]) -> str:
    into = "; ".join(
        f"**{kind}**{' with `attention: prefix`' if attention == 'prefix' else ''}: {KINDS[kind].holds}"
        for kind, attention in kinds.items()
    )
    vllm = "; ".join(f"{kind}: {KINDS[kind].vllm}" for kind in kinds)
    early = fusion == "early"
    gguf = PROJECTORS[name].holds if early and name in PROJECTORS else "none"
    return f"| {fusion} | `{name}` | {into or 'none'} | {vllm or 'none'} | {gguf} | {'yes' if early else 'none'} |"


def page() -> str:
    """The page with its table renewed."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    families = ", ".join(f"`{name}`" for name in ARCHITECTURES)
    gguf = f"GGUF takes the encoders {ENCODERS}, and the language models {families}."
    return f"{before}{BEGIN}\n{table()}\n\n{gguf}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
