"""Encoders without weights to speak of: a picture's mean colour, and texts that name colours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


class ColourEncoder:
    """Mean colours as vectors: K of them where `several` (of the picture's quarters by height), else one."""

    def __init__(self, several: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Linear(3, 5)
        self.several, self.looked_at = several, 0

    def embed_images(self, images: Any) -> Tensor:
        self.looked_at += len(images)
        return torch.stack([self._look(image) for image in images])

    def prepare(self, image: Any) -> Any:
        return image

    def embed_prepared(self, prepared: Sequence[Any]) -> Tensor:
        return self.embed_images(prepared)

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        names = [texts] if isinstance(texts, str) else texts
        return self._project(torch.tensor([COLOURS[name.split()[-1]] for name in names]).float())

    def _look(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).float()
        parts = pixels.chunk(self.several or 1)
        vectors = self._project(torch.stack([part.mean(dim=(0, 1)) for part in parts]))
        return vectors if self.several else vectors[0]

    @torch.no_grad()
    def _project(self, colours: Tensor) -> Tensor:
        return self.model(colours / 128 - 1)


def paint(folder: Path, count: int, start: int = 0) -> list[Path]:
    """Pictures of one colour each, all different, with their colours in `metadata.jsonl`."""
    folder.mkdir(exist_ok=True)
    paths = []
    with (folder / "metadata.jsonl").open("a") as file:
        for number in range(start, start + count):
            name = list(COLOURS)[number % len(COLOURS)]
            shade = tuple(max(0, channel - number // len(COLOURS)) for channel in COLOURS[name])
            paths.append(folder / f"{number:03}.png")
            Image.new("RGB", (16, 16), shade).save(paths[-1])
            file.write(f'{{"file_name": "{number:03}.png", "colour": "{name}", "number": {number}}}\n')
    return paths
