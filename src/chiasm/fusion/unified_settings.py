"""Settings of the unified transformer that are neither its decoder's nor its image input's: tokens, and the loss."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class UnifiedSettings:
    """`config.unified` of a checkpoint.

    Args:
        row_token_id: ends every row of patches; None where rows have no end.
        begin_token_id, end_token_id: frame a picture; None where there is no frame of our own.
        code_ids: of an image tokenizer, the token of the first code, behind which the others follow; or all of them.
        hide_codes: whether codes are hidden from the loss, as in Chameleon's checkpoints, which cannot draw.
        hide_marks: whether text is never continued with the tokens that frame pictures and end rows.
        z_loss: weight of the penalty on large logits, 1e-5 in Chameleon.
    """

    row_token_id: int | None = None
    begin_token_id: int | None = None
    end_token_id: int | None = None
    code_ids: int | list[int] | None = None
    hide_codes: bool = False
    hide_marks: bool = True
    z_loss: float = 0.0

    @classmethod
    def of(cls, settings: dict[str, Any] | None) -> "UnifiedSettings":
        """From a configuration's dictionary.

        Raises:
            ValueError: an unknown key.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(settings or {}) - set(known)):
            raise ValueError(f"config.unified has an unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
        return cls(**settings or {})

    @property
    def markers(self) -> list[int]:
        """Tokens that frame pictures and end their rows."""
        return [token for token in (self.row_token_id, self.begin_token_id, self.end_token_id) if token is not None]
