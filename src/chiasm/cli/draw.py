"""`draw`: a picture from words."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from chiasm.cli.app import Json, Model, app, emit, example, out, require_picture_name, require_words


@app.command(epilog=example("chiasm draw runs/unified/model 'Two apples on a blue background.' -o apples.png"))
def draw(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture's file.", show_default=False)],
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest codes.")] = 0.5,
    top_k: Annotated[int, typer.Option(help="Only of so many likeliest codes; 0 of all.")] = 0,
    guidance: Annotated[float, typer.Option(help="How strictly to follow the words; 1 as learned.")] = 1.5,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw a picture with a unified model whose pictures are codes."""
    from chiasm.vlm import load_vlm, ready_to_answer

    require_words(prompt, "the prompt", "say what to draw")
    require_picture_name(output, "-o")
    picture = ready_to_answer(load_vlm(model)).draw(
        prompt, temperature=temperature, top_k=top_k, guidance=guidance, seed=seed
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    if as_json:
        return emit({"prompt": prompt, "output": str(output), "size": list(picture.size)})
    out.print(f"drawn in {escape(str(output))}", highlight=False, soft_wrap=True)
    return None
