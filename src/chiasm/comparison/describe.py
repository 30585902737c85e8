"""A model in one screen: its parts, what is trainable in them, its visual tokens and what a prompt costs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from chiasm.comparison.cost import cost, parts
from chiasm.comparison.seq2seq_cost import UnknownCostError
from chiasm.fusion.base import FusionModel
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.qformer_retrieval import QFormerRetrieval
from chiasm.fusion.sequence import PositionedModel

FIRST = ("encode", "connect", "prefill")
"""What is computed before the first token."""


def describe(
    model: FusionModel | LateFusionModel | QFormerRetrieval, images: int = 1, text_tokens: int = 64, names: int = 0
) -> dict[str, Any]:
    """JSON-able facts about a model; `names`: tokens of the names of a picture's regions."""
    if isinstance(model, LateFusionModel):
        return _describe_late(model)
    if isinstance(model, QFormerRetrieval):
        return _describe_retrieval(model)
    config = model.config
    positioned = isinstance(model, PositionedModel)
    rows, columns = model.vision.grid
    kinds = {
        "vision": config.vision_config.model_type,
        "connector": config.connector["name"] if config.connector else None,
        "language": config.text_config.model_type,
        "cross_attention": "gated blocks",
    }
    return {
        "fusion": config.fusion,
        "parts": {part: {"kind": kinds[part], **_parameters(getattr(model, part))} for part in parts(model)},
        "connector": config.connector,
        "features": config.features,
        "patch_positions": config.patch_positions,
        "regions": config.regions,
        "tiles": config.tiles,
        "image_size": list(model.vision.image_size),
        "patches": rows * columns * getattr(model.vision, "merge", 1) ** 2 if positioned else model.vision.num_patches,
        "tokens_per_image": rows * columns if positioned else _tokens_per_image(model),
        "adapters": config.adapters or {},
        "prompt": {"images": images, "text_tokens": text_tokens},
        "cost": _cost(model, images, text_tokens, names),
    }


def _tokens_per_image(model: FusionModel) -> int:
    """Visual tokens of a picture, in tiles of a large square one."""
    return model.num_image_tokens if model.config.tiles else model.connector.num_tokens


def cost_facts(model: Any, names: int = 0) -> dict[str, str]:
    """Rows of a model card: what a picture costs a generative model, with the `names` of its regions; nothing where it
    is not known."""
    told = _cost(model, 1, 64, names) if isinstance(model, FusionModel) else None
    if told is None:
        return {}
    first = sum(told[f"{part}_flops"] for part in FIRST)
    return {
        "visual tokens of a picture": f"{told['visual_tokens']:,}",
        "to the first token, a picture and 64 words": f"{first / 1e9:,.1f} GFLOP",
        "each further token": f"{told['decode_flops'] / 1e9:,.2f} GFLOP",
        "KV cache of that prompt": f"{told['kv_cache_bytes'] / 2**20:,.1f} MiB",
    }


def _cost(model: FusionModel, images: int, text_tokens: int, names: int) -> dict[str, Any] | None:
    try:
        return cost(model, images=images, text_tokens=text_tokens, names=names).to_dict()
    except UnknownCostError:
        return None


def _describe_late(model: LateFusionModel) -> dict[str, Any]:
    config: Any = model.config
    kinds = {
        "vision": config.vision_config.model_type,
        "connector": config.connector["name"],
        "language": config.text_config.model_type,
    }
    head = config.answer_head
    if head is not None:
        kinds["answer_head"] = f"{head['combine']}, {len(head['answers'])} answers"
    return {
        "fusion": "late",
        "parts": {part: {"kind": kind, **_parameters(getattr(model, part))} for part, kind in kinds.items()},
        "connector": config.connector,
        "features": config.features,
        "image_size": list(model.vision.image_size),
        "pooling": {"vision": config.vision_pooling, "text": config.text_pooling},
        "space": config.connector["space"] if config.connector["name"] != "none" else config.image_width,
        "logit_scale": model.connector.logit_scale.exp().item(),
        "logit_bias": None if model.connector.logit_bias is None else model.connector.logit_bias.item(),
        "adapters": config.adapters or {},
    }


def _describe_retrieval(model: QFormerRetrieval) -> dict[str, Any]:
    config = model.config
    kinds = {"vision": config.vision_config.model_type, "connector": "qformer, with its text branch and heads"}  # type: ignore[union-attr]
    return {
        "fusion": "late",
        "parts": {part: {"kind": kind, **_parameters(getattr(model, part))} for part, kind in kinds.items()},
        "connector": config.connector,
        "features": config.features,
        "patch_positions": config.patch_positions,
        "image_size": list(model.vision.image_size),
        "patches": model.vision.num_patches,
        "queries": model.connector.num_tokens,
        "space": config.space,
        "temperature": model.temperature.item(),
        "generation": config.generation,
        "adapters": config.adapters or {},
    }


def _parameters(part: Any) -> dict[str, Any]:
    parameters = list(part.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
    }


def print_description(description: dict[str, Any], console: Console) -> None:
    """The same as a table for people."""
    table = Table("part", "kind", "parameters", "trainable", "dtype", title=f"{description['fusion']} fusion")
    for part, facts in description["parts"].items():
        table.add_row(part, facts["kind"], f"{facts['parameters']:,}", f"{facts['trainable']:,}", facts["dtype"])
    console.print(table)
    height, width = description["image_size"]
    if "queries" in description:
        console.print(
            f"{height}×{width} pixels → {description['patches']} patches → {description['queries']} vectors, and a "
            f"text → one, of {description['space']} dimensions; the nearest vector's cosine / "
            f"{description['temperature']:.3f}, and a head that reads pairs",
            soft_wrap=True,
        )
        return
    if description["fusion"] == "late":
        pooling = description["pooling"]
        console.print(
            f"{height}×{width} pixels, pooled by {pooling['vision']}, and texts, pooled by {pooling['text']} → "
            f"{description['space']} dimensions; cosines × {description['logit_scale']:.2f}"
            + ("" if description["logit_bias"] is None else f" + {description['logit_bias']:.2f}"),
            soft_wrap=True,
        )
        return
    costs, prompt = description["cost"], description["prompt"]
    cut = " for each tile, for a large square picture" if description["tiles"] else ""
    console.print(
        f"{height}×{width} pixels → {description['patches']} patches{cut} → {description['tokens_per_image']} visual "
        "tokens"
    )
    if costs is None:
        console.print(f"what a prompt costs is not known of {description['parts']['language']['kind']}")
        return
    console.print(
        f"a prompt with {prompt['images']} picture(s) and {prompt['text_tokens']} text tokens: "
        f"encode {costs['encode_flops'] / 1e9:.2f}, connect {costs['connect_flops'] / 1e9:.3f}, "
        f"prefill {costs['prefill_flops'] / 1e9:.1f} GFLOP; then {costs['decode_flops'] / 1e9:.2f} GFLOP a token; "
        f"KV cache {costs['kv_cache_bytes'] / 2**20:.1f} MiB",
        soft_wrap=True,
    )
