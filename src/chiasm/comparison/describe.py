"""A model in one screen: its parts, what is trainable in them, its visual tokens and what a prompt costs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from chiasm.comparison.cost import cost, parts
from chiasm.fusion.base import FusionModel
from chiasm.fusion.unified import UnifiedModel


def describe(model: FusionModel, images: int = 1, text_tokens: int = 64) -> dict[str, Any]:
    """JSON-able facts about a model."""
    config, costs = model.config, cost(model, images=images, text_tokens=text_tokens)
    unified = isinstance(model, UnifiedModel)
    rows, columns = model.vision.grid
    kinds = {
        "vision": config.vision_config.model_type,
        "connector": None if unified else config.connector["name"],
        "language": config.text_config.model_type,
        "cross_attention": "gated blocks",
    }
    return {
        "fusion": config.fusion,
        "parts": {part: {"kind": kinds[part], **_parameters(getattr(model, part))} for part in parts(model)},
        "connector": config.connector,
        "features": config.features,
        "patch_positions": config.patch_positions,
        "image_size": list(model.vision.image_size),
        "patches": rows * columns if unified else model.vision.num_patches,
        "tokens_per_image": rows * columns if unified else model.connector.num_tokens,
        "adapters": config.adapters or {},
        "prompt": {"images": images, "text_tokens": text_tokens},
        "cost": costs.to_dict(),
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
    costs, prompt = description["cost"], description["prompt"]
    console.print(
        f"{height}×{width} pixels → {description['patches']} patches → {description['tokens_per_image']} visual tokens"
    )
    console.print(
        f"a prompt with {prompt['images']} picture(s) and {prompt['text_tokens']} text tokens: "
        f"encode {costs['encode_flops'] / 1e9:.2f}, connect {costs['connect_flops'] / 1e9:.3f}, "
        f"prefill {costs['prefill_flops'] / 1e9:.1f} GFLOP; then {costs['decode_flops'] / 1e9:.2f} GFLOP a token; "
        f"KV cache {costs['kv_cache_bytes'] / 2**20:.1f} MiB",
        soft_wrap=True,
    )
