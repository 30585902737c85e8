"""`torch.compile` with a way back: where the compiler fails at the first call, the function runs as it was."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

Note = Callable[[str], None]


def compiled(run: Callable[..., Any], note: Note | None = None) -> Callable[..., Any]:
    """A function, compiled if this machine can.

    Args:
        note: told in one line where it cannot; by default a warning says it.
    """
    attempt, usable = torch.compile(run), True

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal usable
        if usable:
            try:
                return attempt(*args, **kwargs)
            except Exception as error:
                reason = f"not compiled: {type(error).__name__}; is a C++ compiler installed?"
                note(reason) if note else warnings.warn(reason, stacklevel=3)
                usable = False
        return run(*args, **kwargs)

    return call
