"""A connector of one's own is tried on noise when it is connected: what it says of itself must be true."""

from typing import Any

import torch

from chiasm.connectors.base import Connector

PICTURES = 2


@torch.no_grad()
def try_out(name: str, connector: Connector) -> None:
    """Two pictures of noise through a connector, which stays as it is.

    Raises:
        ValueError: it fails on them, or gives other visual tokens than its `num_tokens` and `width` say, or such that
            are not finite.
    """
    parameter = next(connector.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(PICTURES, connector.num_features, connector.vision_width, generator=generator)
    inputs: dict[str, Any] = {"features": noise.to(parameter)}
    if connector.reads_instruction:
        words = torch.ones(PICTURES, 1, dtype=torch.long, device=parameter.device)
        inputs |= {"instruction_ids": words, "instruction_mask": words}
    given, modes = f"features {tuple(noise.shape)}", {module: module.training for module in connector.modules()}
    try:
        with torch.random.fork_rng():
            tokens = connector.eval()(**inputs)
    except Exception as error:
        raise ValueError(f"connector {name!r} fails on {given}: {type(error).__name__}: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    wanted = (PICTURES, connector.num_tokens, connector.width)
    found = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
    if found != wanted:
        raise ValueError(
            f"connector {name!r} makes {found} of {given}, expected {wanted}: pictures, its num_tokens, its width; "
            "mend its forward or its num_tokens"
        )
    if not tokens.isfinite().all():
        raise ValueError(f"connector {name!r} makes visual tokens of {given} that are not finite; mend its forward")
