"""`chiasm index` and `chiasm search`: pictures found by text or by picture."""

import os.path
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from chiasm.cli.app import (
    Json,
    app,
    argument,
    emit,
    err,
    example,
    names_a_picture,
    out,
    require_picture_name,
    require_words,
)

Conditions = Annotated[
    list[str], typer.Option("--where", help="Only pictures with this metadata: colour=red, 'year>=2020', 'tag in a,b'.")
]
OtherModel = Annotated[
    str | None, typer.Option("--model", help="Where the index's model is now, if it is not where it was.")
]

TOGETHER = 32
"""Pictures that are encoded together where nothing else is asked for."""


@app.command(epilog=example("chiasm index models/clip photos -o photos.index"))
def index(
    model: Annotated[
        str | None, typer.Argument(help="A retrieval model's folder or hub id.", show_default=False)
    ] = None,
    images: Annotated[
        str | None, typer.Argument(help="A folder of pictures, a quoted pattern, or a data set.", show_default=False)
    ] = None,
    location: Annotated[
        str,
        typer.Option("-o", "--index", help="The index: a folder, or http://host:6333/collection.", show_default=False),
    ] = ...,  # type: ignore[assignment]
    add: Annotated[str | None, typer.Option(help="Add these pictures by the index's own model.")] = None,
    metadata: Annotated[
        Path | None, typer.Option(help="JSON lines with file_name and more; else metadata.jsonl of the folder.")
    ] = None,
    delete: Annotated[list[str], typer.Option(help="Delete the picture with this id; repeatable.")] = [],  # noqa: B006
    delete_where: Annotated[list[str], typer.Option(help="Delete all pictures with this metadata.")] = [],  # noqa: B006
    list_: Annotated[bool, typer.Option("--list", help="List the pictures.")] = False,
    where: Conditions = [],  # noqa: B006
    compact: Annotated[bool, typer.Option("--compact", help="Give back the space of deleted pictures.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and name pictures that cannot be read.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Pictures encoded together; else 32.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Of a picture; a larger one is not read.")] = None,
    other_model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Make an index of pictures, or look after one.

    With a model and pictures: makes the index, or adds to it what is new. The same command again goes on where it was
    stopped. Without: one of --add, --delete, --delete-where, --list, --compact.
    """
    from chiasm.retrieval import Index, read_pictures

    asked = {
        "MODEL IMAGES": images is not None,
        "--add": add is not None,
        "--delete": bool(delete or delete_where),
        "--list": list_,
        "--compact": compact,
    }
    chosen = [name for name, wanted in asked.items() if wanted]
    if len(chosen) != 1 or (model is not None) != (images is not None):
        given = " and ".join(chosen) or ("MODEL alone" if model else "nothing to do")
        raise ValueError(f"chiasm index got {given}, expected one of {', '.join(asked)}")
    if where and not list_:
        raise ValueError("--where goes with --list; pictures are deleted by --delete-where")
    adds = {"--metadata": metadata, "--skip-bad": skip_bad or None, "--batch-size": batch_size, "--model": other_model}
    adds["--max-pixels"] = max_pixels
    unread = [] if add is not None else ["--model"] if images is not None else list(adds)
    if option := next((option for option in unread if adds[option] is not None), None):
        raise ValueError(f"{option} is not for {chosen[0]}, which does not read it; leave it out")
    if images is not None or add is not None:
        batch_size = TOGETHER if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"--batch-size is {batch_size}, expected at least 1")
        limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        items = read_pictures(str(images or add), metadata, **limit)
        opened = _opened(location, other_model) if model is None else _opened_or_made(location, model)
        return _add(opened, items, skip_bad, batch_size, as_json)
    found = Index.open(location)
    if list_:
        return _list(found, where, as_json)
    if compact:
        found.compact()
        return emit({"pictures": len(found)}) if as_json else out.print(f"{len(found)} pictures")
    gone = found.delete(delete, delete_where)
    if as_json:
        return emit({"deleted": gone, "pictures": len(found)})
    return out.print(f"deleted {len(gone)}; {len(found)} pictures are left")


@app.command(epilog=example("chiasm search photos.index 'a red car' -k 5 --sheet found.png"))
def search(
    location: Annotated[str, typer.Argument(metavar="INDEX", help="An index's folder or address.", show_default=False)],
    query: Annotated[str | None, typer.Argument(help="What the pictures should show.", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(help="Search by this picture instead of a text.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many pictures.")] = 10,
    where: Conditions = [],  # noqa: B006
    exclude_self: Annotated[
        bool, typer.Option("--exclude-self", help="With --image: leave out the very same picture.")
    ] = False,
    copies: Annotated[
        bool, typer.Option("--copies", help="Show the very same picture under each of its ids, not once.")
    ] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG that shows the pictures.")] = None,
    other_model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Find pictures by a text, or by a picture."""
    from chiasm.data.schema import ANY_SIZE, ImageRef
    from chiasm.retrieval import contact_sheet

    if (query is None) == (image is None):
        raise ValueError("give a text or --image, one of them")
    if query is not None:
        require_words(query, "the text", "say what to look for, or search by a picture with --image")
    if query is not None and names_a_picture(Path(query)) and os.path.isfile(query):
        raise ValueError(f"{query!r} is a file, not a text; search by the picture with --image {query}")
    if exclude_self and image is None:
        raise ValueError("--exclude-self goes with --image: a text is no picture of the index")
    if sheet is not None:
        require_picture_name(sheet, "--sheet")
    opened = _opened(location, other_model)
    if image is not None:
        picture = ImageRef.of(image, max_pixels=ANY_SIZE)
        hits = opened.search_images([picture], k, where, exclude_self, copies)[0]
    else:
        hits = opened.search(str(query), k, where, copies)
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(hits).save(sheet)
    if as_json:
        return emit([hit.to_dict() for hit in hits])
    for hit in hits:
        out.print(f"{hit.score:6.3f}  {hit.path or hit.id}", markup=False, highlight=False, soft_wrap=True)
    if not hits:
        out.print("nothing was found")
    return None


def _add(opened: Any, items: Any, skip_bad: bool, batch_size: int, as_json: bool) -> None:
    from chiasm.data.schema import ImageError, SampleError
    from chiasm.retrieval.pictures import in_words
    from chiasm.training.reporter import progress_bar

    with progress_bar("indexing", err) as update:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            update(min(done, items.count), items.count)

        try:
            report = opened.add(items, skip_bad=skip_bad, batch_size=batch_size, progress=progress)
        except (ImageError, SampleError) as error:
            raise ValueError(f"{error}; --skip-bad leaves such pictures out") from error
    if as_json:
        return emit(asdict(report) | {"left_out": items.left_out})
    if items.left_out:
        left_out = f"{in_words(items.left_out)}, which Pillow does not read; convert them"
        err.print(f"left out: {left_out}", soft_wrap=True, highlight=False)
    for reason in report.bad.values():
        err.print(f"skipped: {escape(reason)}", soft_wrap=True, highlight=False)
    search = f"chiasm search {argument(opened.location)} 'a red car'"
    return out.print(f"{report.summary()}; search it: [bold]{search}[/bold]", soft_wrap=True, highlight=False)


def _list(opened: Any, where: list[str], as_json: bool) -> None:
    items = list(opened.items(where))
    if as_json:
        rows = [{key: value for key, value in item.to_dict().items() if key != "score"} for item in items]
        return emit({"model": {key: opened.model[key] for key in ("source", "fingerprint")}, "pictures": rows})
    out.print(f"model {opened.model['source']}, {len(items)} pictures", markup=False, soft_wrap=True)
    for item in items:
        told = "  ".join(f"{key}={value}" for key, value in item.metadata.items())
        out.print(f"{item.id}  {told}".rstrip(), markup=False, highlight=False, soft_wrap=True)
    return None


def _opened(location: str, model: str | None) -> Any:
    """An index with its model."""
    from chiasm.retrieval.index import NOWHERE, Index

    found = Index.open(location)
    source = model or found.model["source"]
    if model is None and (Path(source).is_absolute() or source == NOWHERE) and not Path(source).exists():
        raise FileNotFoundError(f"index {location} was made by model {source}, which is not there; pass --model FOLDER")
    return _attached(found, _encoder(source))


def _attached(found: Any, encoder: Any) -> Any:
    found.attach(encoder)
    if found.note is not None:
        err.print(found.note, markup=False, soft_wrap=True, highlight=False)
    return found


def _opened_or_made(location: str, model: str) -> Any:
    from chiasm.retrieval import Index

    encoder = _encoder(model)
    try:
        found = Index.open(location)
    except FileNotFoundError:
        source = str(Path(model).resolve()) if Path(model).exists() else model
        return Index.create(location, encoder, source)
    return _attached(found, encoder)


def _encoder(model: str) -> Any:
    import chiasm
    from chiasm.vlm import best_device

    loaded = chiasm.load(model)
    if not isinstance(loaded, chiasm.DualEncoder):
        raise ValueError(
            f"{model} answers questions, it does not search; an index needs a retrieval model (fusion='late', CLIP, "
            "SigLIP, or the stage of BLIP-2 that learns captions)"
        )
    return loaded.to(best_device())
