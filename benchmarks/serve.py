"""A crowd at the door: so many clients at once with pictures, streams and questions, some of whom leave, against
`transformers serve` with the same checkpoint; then whether the server is as it was.

The checkpoint is a LLaVA of transformers with SmolLM2-135M-Instruct's weights and a random CLIP ViT-B/32 of 224 px (49
visual tokens); both servers read it. The clients that stay get answers of the same length from both.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image

import chiasm
from chiasm.interop.export.llava import export_llava
from measure import ForeignLoad, machine

PICTURES = 10
QUESTIONS = (
    "What is in this picture?",
    "Which colours do you see?",
    "Is it day or night?",
    "How many things are there?",
)
PATIENCE = 900.0


def checkpoint(folder: Path) -> None:
    """A LLaVA whose answers have no end of their own."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    vision = CLIPVisionModel(CLIPVisionConfig(patch_size=32)).eval()
    vlm = chiasm.connect(vision, "smollm2-135m-instruct", "mlp", dtype="float32", features={"layers": [-2]})
    exported = export_llava(vlm.model, vlm.processor)
    exported.model.generation_config.eos_token_id = None
    exported.model.save_pretrained(folder)
    exported.processor.save_pretrained(folder)


@dataclass
class Door:
    """A running server."""

    name: str
    process: subprocess.Popen
    url: str
    model: str

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
            if self.process.poll() is not None:
                break
        raise RuntimeError(f"{self.name} did not start")

    def memory(self) -> int:
        """The most memory that the process held, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def open_door(name: str, folder: Path, stack: ExitStack, weights: str, batching: bool) -> Door:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = [sys.executable, "-m", "chiasm", "serve", f"crowd={folder}", "--max-waiting", "256", "--weights", weights]
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    theirs += ["--continuous-batching"] * batching
    command = theirs if name == "transformers" else ours
    processor_only = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--port", str(port)], env=processor_only, **quietly)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return Door(name, process, f"http://127.0.0.1:{port}", str(folder) if name == "transformers" else "crowd")


def picture(seed: int) -> str:
    pixels = torch.randint(0, 256, (224, 224, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def question(number: int, model: str, tokens: int) -> dict[str, Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": picture(number % PICTURES)}},
        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "stream": True, "temperature": 0}


@dataclass
class Visit:
    """One client's: when its first piece came, when its answer was whole, what went wrong; nothing of one that left."""

    first: float | None = None
    whole: float | None = None
    wrong: str | None = None


async def visit(client: httpx.AsyncClient, door: Door, body: dict[str, Any], leaves: float | None) -> Visit:
    started, seen = time.perf_counter(), Visit()

    async def listen() -> None:
        async with client.stream("POST", f"{door.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                seen.wrong = f"status {response.status_code}"
                return
            async for line in response.aiter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if "error" in event:
                    seen.wrong = f"error {event['error'].get('code')}"
                    return
                if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                    seen.first = seen.first or time.perf_counter() - started
            seen.whole = time.perf_counter() - started

    try:
        await asyncio.wait_for(listen(), leaves)
    except TimeoutError:
        return Visit()
    except httpx.HTTPError as error:
        seen.wrong = type(error).__name__
    return seen


async def storm(door: Door, clients: int, leaving: float, tokens: int) -> tuple[float, list[Visit]]:
    """Seconds until everybody who stayed has an answer, and what each client saw."""
    chance = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client:
        started = time.perf_counter()
        leaves = [chance.uniform(0.1, 4.0) if chance.random() < leaving else None for _ in range(clients)]
        bodies = [question(number, door.model, tokens) for number in range(clients)]
        visits = await asyncio.gather(*(visit(client, door, *both) for both in zip(bodies, leaves, strict=True)))
        stayed = [seen for seen, left in zip(visits, leaves, strict=True) if left is None]
        return time.perf_counter() - started, stayed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--leaving", type=float, default=0.25, help="share of clients that leave early")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--weights", nargs="+", default=["float32"], help="of Chiasm's engine")
    parser.add_argument("--alone", action="store_true", help="without transformers serve")
    parser.add_argument("--continuous-batching", action="store_true", help="of transformers serve")
    parser.add_argument("--quick", action="store_true", help="eight clients, four tokens: shows that it runs")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.clients, chosen.tokens = 8, 4
    print(machine(torch.get_num_threads()))
    print("| server | answers | seconds | tokens/s | first token p50 / p95 | answer p50 / p95 | errors | memory |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "llava"
        checkpoint(folder)
        for weights in chosen.weights:
            _row("chiasm", folder, weights, chosen)
        if not chosen.alone:
            _row("transformers", folder, "float32", chosen)


def _row(name: str, folder: Path, weights: str, chosen: argparse.Namespace) -> None:
    with ExitStack() as stack:
        door = open_door(name, folder, stack, weights, chosen.continuous_batching)
        door.wait()
        asyncio.run(storm(door, 2, 0.0, 2))
        with ForeignLoad(door.process.pid) as foreign:
            seconds, visits = asyncio.run(storm(door, chosen.clients, chosen.leaving, chosen.tokens))
        whole = [seen for seen in visits if seen.whole is not None]
        wrong = [seen.wrong for seen in visits if seen.wrong]
        after = asyncio.run(storm(door, 1, 0.0, 2))[1][0]
        rate = len(whole) * chosen.tokens / seconds
        firsts, wholes = ([getattr(seen, part) or 0.0 for seen in whole] for part in ("first", "whole"))
        print(
            f"| {name} {weights} | {len(whole)} of {len(visits)} | {seconds:.1f} | {rate:.1f} "
            f"| {_percentiles(firsts)} | {_percentiles(wholes)} | {len(wrong)} | {door.memory() / 2**30:.2f} GiB |\n"
            f"  others' load {foreign.share:.0%}; one client afterwards: {after.whole or after.wrong}",
            flush=True,
        )


def _percentiles(values: list[float]) -> str:
    if len(values) < 2:
        return "–"
    return f"{statistics.median(values):.1f} s / {statistics.quantiles(values, n=20, method='inclusive')[-1]:.1f} s"


if __name__ == "__main__":
    main()
