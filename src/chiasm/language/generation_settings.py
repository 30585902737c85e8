"""Changes to a model's published settings of `generate`, after which they can still be saved."""

from typing import Any

from transformers import GenerationConfig

SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
UNREAD_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


def change(settings: GenerationConfig, **values: Any) -> None:
    """Sets fields, and drops those that the settings' own way of decoding does not read (Vicuna's `temperature` without
    `do_sample`): transformers saves such settings as they were published, but not once anything in them has changed."""
    idle: tuple[str, ...] = () if settings.do_sample else SAMPLING
    idle += () if (settings.num_beams or 1) > 1 else BEAMS
    idle += () if settings.return_dict_in_generate else UNREAD_OUTPUTS
    for name, value in (dict.fromkeys(idle) | values).items():
        setattr(settings, name, value)
