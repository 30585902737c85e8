"""`chat`: one answer, or a conversation in the terminal."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from chiasm.cli.app import Json, Model, Weights, app, emit, example, out, require_picture_name, require_words


@app.command(epilog=example("chiasm chat models/mine cat.jpg -p 'What is this?'"))
def chat(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Pictures for the first question.", show_default=False)] = [],  # noqa: B006
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Ask once and leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    solved: Annotated[
        list[str], typer.Option("--example", help="A solved example: 'cat.png|What is this?|a cat'; repeatable.")
    ] = [],  # noqa: B006
    show_attention: Annotated[
        Path | None, typer.Option(help="With -p: write a PNG of where each word of the answer looked.")
    ] = None,
    weights: Weights = "float32",
    as_json: Json = False,
) -> None:
    """Ask about pictures: one answer with -p, otherwise a conversation."""
    from chiasm.conversation import answer, converse, engine_of
    from chiasm.generation.decoding import Decoding
    from chiasm.terminal import printable
    from chiasm.vlm import load_vlm, ready_to_step

    if prompt is not None:
        require_words(prompt, "-p", "write a question, or leave -p out for a conversation")
    if show_attention is not None:
        require_picture_name(show_attention, "--show-attention")
    examples = [_example(text) for text in solved]
    missing = [
        str(path) for path in (*images, *(path for shown, *_ in examples for path in shown)) if not path.is_file()
    ]
    if missing:
        raise FileNotFoundError(f"no such picture: {missing[0]}")
    if show_attention is not None and (prompt is None or not images):
        raise ValueError("--show-attention is for one answer about a picture; give a picture and -p")
    if as_json and prompt is None:
        raise ValueError("--json is for one answer; give -p")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    Decoding(**options).check()
    options["examples"] = examples
    vlm = ready_to_step(load_vlm(model), weights)
    if prompt is None:
        with engine_of(vlm, weights) as engine:
            return converse(engine, images, options, out)
    if show_attention is None:
        said = answer(vlm, images, prompt, options, weights)
    else:
        with nullcontext() if weights == "float32" else engine_of(vlm, weights):
            seen = vlm.attention(images, prompt, **options)
        seen.save(show_attention)
        said = iter([seen.answer])
    if as_json:
        return emit({"prompt": prompt, "images": list(map(str, images)), "answer": "".join(said)})
    shown = printable if sys.stdout.isatty() else str
    for piece in said:
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return None


def _example(text: str) -> tuple[list[Path], str, str]:
    """`picture|question|answer`; any number of pictures may stand in front."""
    parts = [part.strip() for part in text.split("|")]
    if len(parts) < 3:
        raise ValueError(f"--example {text!r} has {len(parts)} part(s), expected picture|question|answer")
    return [Path(part) for part in parts[:-2] if part], parts[-2], parts[-1]
