"""`chiasm convert`: a Chiasm model as a checkpoint of another tool, or one line that says why it cannot be one.

Where a model goes is decided by tables of exact names: `TARGETS`, the tools; `ROUTES`, the kind of checkpoint that a
fusion and a connector become in transformers; `KINDS`, those kinds. The table in `docs/convert.md` is made of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from chiasm.connectors import connector_settings
from chiasm.fusion.base import FusionModel
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.late import LateFusionModel
from chiasm.interop.clip import export_late
from chiasm.interop.export.blip2 import export_blip2
from chiasm.interop.export.chameleon import export_chameleon
from chiasm.interop.export.check import check_folder, check_late, check_onnx
from chiasm.interop.export.fuyu import export_fuyu
from chiasm.interop.export.gguf import export_gguf
from chiasm.interop.export.idefics import export_idefics
from chiasm.interop.export.idefics2 import export_idefics2
from chiasm.interop.export.idefics3 import export_idefics3
from chiasm.interop.export.internvl import export_internvl
from chiasm.interop.export.llava import export_llava
from chiasm.interop.export.llava_next import export_llava_next
from chiasm.interop.export.paligemma import export_paligemma
from chiasm.interop.export.parts import Exported, in_float32, merged, resampled
from chiasm.interop.export.qwen2_vl import export_qwen2_vl
from chiasm.sources.writing import new_folder


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint of transformers.

    Args:
        export: makes one of a model and its processor, or refuses.
        holds: what such a checkpoint holds.
        vllm: what vLLM runs of it.
    """

    export: Callable[[Any, Any], Exported]
    holds: str
    vllm: str


KINDS = {
    "llava": Kind(
        export_llava,
        "an encoder whose hidden states LLaVA reads (CLIP, SigLIP, ViT, ...); `mlp` with 2 layers, `linear`",
        "CLIP and SigLIP encoders with `mlp`",
    ),
    "llava_next": Kind(
        export_llava_next,
        "the same with square pictures, no class token, and `tiles`",
        "CLIP and SigLIP encoders with `mlp`",
    ),
    "paligemma": Kind(export_paligemma, "SigLIP; `linear` with a bias; `attention: prefix`", "Gemma language models"),
    "internvl": Kind(export_internvl, "an InternVL encoder; `pixel_shuffle` with `projection: mlp`", "yes"),
    "blip-2": Kind(
        export_blip2,
        "a BLIP-2 encoder, class token kept; `qformer` with `norm_features: false`; becomes InstructBLIP where it "
        "reads the instruction",
        "BLIP-2 with OPT; not InstructBLIP",
    ),
    "idefics2": Kind(export_idefics2, "an Idefics2 encoder; `idefics2_resampler`", "no"),
    "idefics3": Kind(
        export_idefics3,
        "SigLIP, or an encoder of Idefics3 or SmolVLM; `pixel_shuffle` with `projection: linear`",
        "models with Idefics3's processor",
    ),
    "idefics": Kind(
        export_idefics,
        "CLIP, class token kept; Llama; `perceiver_resampler` or `linear` with `project: false`; Idefics' blocks",
        "no: it has no gated cross-attention; Chiasm's own server is the one to use",
    ),
    "qwen2_vl": Kind(export_qwen2_vl, "an encoder and a decoder that came from Qwen2-VL", "yes"),
    "chameleon": Kind(export_chameleon, "an image tokenizer and a decoder that came from Chameleon", "yes"),
    "fuyu": Kind(export_fuyu, "a decoder that came from Fuyu; weights without a processor", "yes"),
}

ROUTES = {
    ("early", "causal", "mlp"): "llava",
    ("early", "causal", "linear"): "llava",
    ("early", "causal", "mlp: tiles"): "llava_next",
    ("early", "causal", "linear: tiles"): "llava_next",
    ("early", "prefix", "linear"): "paligemma",
    ("early", "causal", "pixel_shuffle: mlp"): "internvl",
    ("early", "causal", "pixel_shuffle: linear"): "idefics3",
    ("early", "causal", "qformer"): "blip-2",
    ("early", "causal", "patch_merger"): "qwen2_vl",
    ("early", "causal", "idefics2_resampler"): "idefics2",
    ("intermediate", "causal", "perceiver_resampler"): "idefics",
    ("intermediate", "causal", "linear"): "idefics",
    ("unified", "causal", "vq"): "chameleon",
    ("unified", "causal", "patches"): "fuyu",
}
"""(fusion, attention, connector with its `WORD` or `tiles`, or unified fusion's image input) → kind."""

WORD = {"pixel_shuffle": "projection"}
"""Connector → an option by which its kind differs."""


@dataclass(frozen=True)
class Converted:
    """What a conversion has written.

    Args:
        kind: of checkpoint, such as `llava`.
        files: names in the folder.
        difference: between its logits and the model's, as a share of their spread; None where nothing compared them.
        notes: what is good to know before it is used.
    """

    kind: str
    folder: Path
    files: list[str]
    difference: float | None = None
    notes: list[str] = field(default_factory=list)


def convert(
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    target: str,
    folder: str | Path,
    quantize: str | None = None,
    check: bool = True,
    inexact: bool = False,
) -> Converted:
    """Writes a model as a checkpoint of another tool.

    Args:
        target: a name of `TARGETS`.
        folder: a new one, which is there when the checkpoint is whole, or an empty one.
        quantize: of GGUF files, a name of `chiasm.interop.gguf.QUANTIZATIONS`.
        check: whether the folder is loaded again and compared with the model, which is not done with GGUF files.
        inexact: of GGUF files, whether they are written where llama.cpp is known to compute something else.

    Raises:
        ValueError: the tool has nothing that fits; the message says why and what would.
        OSError: the folder is not empty, cannot be written, or the disk is full.
    """
    if target not in TARGETS:
        raise ValueError(f"--to {target!r} is unknown; choose one of {', '.join(TARGETS)}")
    if quantize is not None and target != "gguf":
        raise ValueError(f"--quantize is for --to gguf, got --to {target}")
    if inexact and target != "gguf":
        raise ValueError(f"--inexact is for --to gguf, got --to {target}")
    if isinstance(model, FusionModel | LateFusionModel):
        model = merged(model)
    options = {"quantize": quantize, "inexact": inexact} if target == "gguf" else {"check": check}
    with new_folder(folder) as place:
        done = TARGETS[target](model, processor, place, **options)
    return replace(done, folder=Path(folder))


def route(model: PreTrainedModel) -> str:
    """The kind of checkpoint that a generative model becomes in transformers.

    Raises:
        ValueError: none.
    """
    config = model.config
    unified = config.fusion == "unified"
    word = "image input" if unified else "connector"
    key = (config.fusion, config.attention, model.vision.kind if unified else _connector(config))
    if key not in ROUTES:
        fitting = sorted({connector for fusion, _, connector in ROUTES if fusion == config.fusion})
        raise ValueError(
            f"transformers has no model with fusion {key[0]!r}, attention {key[1]!r} and {word} {key[2]!r}; "
            f"with this fusion it has {word}s {', '.join(fitting)}; "
            + ("--to onnx takes any connector" if config.fusion == "early" else "Chiasm's own server runs it")
        )
    return ROUTES[key]


def _connector(config: ChiasmConfig) -> str:
    """A connector as `ROUTES` names it."""
    settings = config.connector
    name = settings["name"]
    if config.tiles is not None:
        return f"{name}: tiles"
    return f"{name}: {connector_settings(settings)[WORD[name]]}" if name in WORD else name


def to_transformers(model: PreTrainedModel, processor: Any, folder: Path, check: bool = True) -> Converted:
    """A folder that transformers' Auto classes load without Chiasm."""
    if isinstance(model, LateFusionModel):
        return to_late(model, processor, folder, check)
    if not isinstance(model, FusionModel):
        raise ValueError(
            f"no checkpoint of transformers is written for a {model.config.model_type!r} model; late fusion of "
            "CLIP's or SigLIP's own towers becomes one"
        )
    kind = route(model)
    exported = KINDS[kind].export(resampled(model), processor)
    exported.model.save_pretrained(folder)
    notes = list(exported.notes)
    if exported.processor is not None:
        exported.processor.save_pretrained(folder)
    elif processor is None:
        notes.append("the model came without a processor, so the folder has none either")
    difference = check_folder(folder, model, processor, exported) if check else None
    return Converted(exported.model.config.model_type, folder, _files(folder), difference, notes)


def to_late(model: LateFusionModel, processor: Any, folder: Path, check: bool = True) -> Converted:
    """A CLIP or SigLIP folder of transformers."""
    theirs = export_late(resampled(model), processor, folder)
    difference = check_late(folder, model, processor) if check else None
    return Converted(theirs.config.model_type, folder, _files(folder), difference)


def to_gguf(
    model: PreTrainedModel, processor: Any, folder: Path, quantize: str | None = None, inexact: bool = False
) -> Converted:
    """`model.gguf` and `mmproj.gguf` for llama.cpp."""
    _require_generative(model, "GGUF")
    notes = export_gguf(resampled(model), processor, folder, quantize, inexact)
    return Converted("gguf", folder, _files(folder), None, notes)


def to_onnx(model: PreTrainedModel, processor: Any, folder: Path, check: bool = True) -> Converted:
    """Graphs for ONNX Runtime."""
    _require_generative(model, "ONNX")
    try:
        import onnxscript  # noqa: F401

        from chiasm.interop.export.onnx import export_onnx
    except ImportError as error:
        raise ValueError("the ONNX exporter is not installed; pip install 'chiasm[onnx]'") from error
    model, notes = in_float32(model)
    notes += export_onnx(model, processor, folder)
    return Converted("onnx", folder, _files(folder), check_onnx(folder, model) if check else None, notes)


TARGETS: dict[str, Callable[..., Converted]] = {"transformers": to_transformers, "gguf": to_gguf, "onnx": to_onnx}


def _require_generative(model: PreTrainedModel, target: str) -> None:
    if not isinstance(model, FusionModel):
        raise ValueError(f"{target} files are for models that answer, and this is a retrieval model; --to transformers")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
