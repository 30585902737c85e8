"""`convert`: a model for other tools."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from chiasm.cli.app import Json, Model, app, emit, example, out


@app.command(epilog=example("chiasm convert models/mine --to transformers -o models/mine-llava"))
def convert(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="transformers, gguf or onnx.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder.", show_default=False)],
    quantize: Annotated[
        str | None, typer.Option(help="Of GGUF: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; else as it is.")
    ] = None,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Of GGUF: write it where llama.cpp is known to compute something else.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Load the result again and compare it with the model.")] = True,
    as_json: Json = False,
) -> None:
    """Write a model as another tool's checkpoint, or say why there is none."""
    from chiasm.api import convert as convert_model

    if not check and to == "gguf":
        raise ValueError("--no-check is not for --to gguf, whose files are not compared; leave it out")
    done = convert_model(model, to, output, quantize=quantize, check=check, inexact=inexact)
    if as_json:
        return emit(
            {
                "kind": done.kind,
                "folder": str(output),
                "files": done.files,
                "difference": done.difference,
                "notes": done.notes,
            }
        )
    compared = "" if done.difference is None else f"; its logits differ by {done.difference:.1g} of their spread"
    out.print(f"{escape(str(output))}: {done.kind}, {len(done.files)} files{compared}", soft_wrap=True)
    for note in done.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    return None
