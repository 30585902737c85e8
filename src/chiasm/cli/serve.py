"""`serve`: models behind an OpenAI-compatible address, with a chat page."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from chiasm.cli.app import Json, Weights, app, err, example, out

KEYS = "CHIASM_API_KEYS"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@app.command(epilog=example("chiasm serve models/mine other=models/other"))
def serve(
    models: Annotated[
        list[str], typer.Argument(help="Model folders or hub ids, each with a name if you like: NAME=MODEL.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"A file with one key a line; the variable {KEYS} has more, with commas.")
    ] = None,
    allowed_host: Annotated[
        list[str], typer.Option(help="A name of this server in requests, behind a proxy; repeatable.")
    ] = [],  # noqa: B006
    origin: Annotated[list[str], typer.Option(help="A web origin whose pages may call; repeatable.")] = [],  # noqa: B006
    image_urls: Annotated[bool, typer.Option("--image-urls", help="Fetch pictures from public http(s) URLs.")] = False,
    temperature: Annotated[float, typer.Option(help="Of requests that name none; 0 takes the likeliest words.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 4096,
    max_images: Annotated[int, typer.Option(min=0, help="Most pictures in a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest picture.")] = 36_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 32,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered at the same time, by each model.")] = 8,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests in line, for each model; more get status 429.")
    ] = 128,
    weights: Weights = "float32",
    request_seconds: Annotated[float, typer.Option(min=1, help="Longest time for an answer.")] = 300,
    as_json: Json = False,
) -> None:
    """Answer OpenAI's API for one or several models, and show a chat page."""
    try:
        from chiasm.generation.decoding import Decoding
        from chiasm.serving.app import create_app
        from chiasm.serving.server import address_of, is_loopback, listen, run
        from chiasm.serving.settings import MIB, Limits, Settings
        from chiasm.vlm import is_retrieval
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed, which serving needs: pip install 'chiasm[serve]'") from error

    if weights != "float32" and all(is_retrieval(named(text)[1]) for text in models):
        raise ValueError(f"--weights {weights} is for models that answer; {models[0]} is a retrieval model")
    Decoding(temperature=temperature).check()
    limits = Limits(
        body_bytes=max_body * MIB,
        pixels=max_pixels,
        images=max_images,
        tokens=max_tokens,
        request_seconds=request_seconds,
    )
    keys = read_keys(api_key_file, os.environ.get(KEYS, ""))
    local = is_loopback(host)
    hosts = (*LOOPBACK, host, *allowed_host) if local or allowed_host else None
    settings = Settings(keys, hosts, tuple(origin), image_urls, temperature, limits)
    if not local and not keys:
        err.print(
            f"[yellow]anyone who reaches {escape(host)} can use this server; give it keys with --api-key-file[/yellow]",
            soft_wrap=True,
        )
    with listen(host, port) as listening:
        served = [_load(text, max_batch, max_waiting, weights) for text in models]
        api = create_app(served, settings)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            run(api, listening, limits, lambda: _announce(address_of(listening), [one.name for one in served], as_json))
        except KeyboardInterrupt:
            return


def read_keys(file: Path | None, variable: str) -> tuple[str, ...]:
    """Keys from a file, one a line, and from a variable.

    Raises:
        ValueError: a file without keys, or a key that no header can carry.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None else []
    from_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if file is not None and not from_file:
        raise ValueError(f"{file} holds no key; write one a line")
    keys = [*from_file, *(key.strip() for key in variable.split(",") if key.strip())]
    if wrong := [place for place, key in enumerate(keys, 1) if not key.isascii() or len(key.split()) != 1]:
        raise ValueError(f"API key {wrong[0]} of {len(keys)} has letters that no header can carry; use plain ASCII")
    return tuple(dict.fromkeys(keys))


def _load(text: str, max_batch: int, max_waiting: int, weights: str) -> Any:
    import chiasm
    from chiasm.generation.engine import Engine
    from chiasm.serving.served import ChatModel, EmbeddingModel
    from chiasm.vlm import best_device, ready_to_step

    name, source = named(text)
    with err.status(f"loading {escape(name)}"):
        loaded = chiasm.load(source)
        if not isinstance(loaded, chiasm.VLM):
            return EmbeddingModel(name, loaded.to(best_device()))
        vlm = ready_to_step(loaded, weights)
        engine = Engine(
            vlm.model,
            vlm.processor,
            max_batch=max_batch,
            max_waiting=max_waiting,
            weights=weights,
            release=weights != "float32",
        )
    return ChatModel(name, vlm.model, vlm.processor, engine)


def named(text: str) -> tuple[str, str]:
    """Name and place of a model: `NAME=MODEL`, a folder, which has its last part for a name, or a hub id."""
    name, equals, source = text.partition("=")
    if equals and name and source and "/" not in name:
        return name, source
    folder = Path(text)
    return (folder.resolve().name, text) if folder.is_dir() else (text, text)


def _announce(address: str, names: list[str], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"url": address, "models": names}) + "\n")
        sys.stdout.flush()
        return
    listed = escape(", ".join(names))
    out.print(f"[bold]{address}[/bold]      chat page: {listed}\n{address}/v1   for OpenAI clients", soft_wrap=True)
    out.print("[dim]Ctrl-C stops; answers that have begun are finished[/dim]")
