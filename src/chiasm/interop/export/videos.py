"""Processors of models that read videos too, written without torchvision, which alone loads their class for videos."""

from typing import Any

from transformers import ProcessorMixin
from transformers.utils import PushToHubMixin

SHARED = (
    *("size", "image_mean", "image_std", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize"),
    *("patch_size", "merge_size", "temporal_patch_size"),
)
"""Settings that the processors for pictures and for videos both have."""

NOTE = (
    "AutoProcessor and pipeline need torchvision for this folder, for its model reads videos too; it is not installed "
    "here, so that the processor was compared before it was saved"
)


class VideoSettings(PushToHubMixin):
    """What a folder says of videos.

    Args:
        images: the processor for pictures, whose settings videos share.
        kind: transformers' class for videos.
    """

    _auto_class = None

    def __init__(self, images: Any, kind: str) -> None:
        self.images, self.kind = images, kind

    def to_dict(self) -> dict[str, Any]:
        told = self.images.to_dict()
        return {name: told[name] for name in SHARED if name in told} | {"video_processor_type": self.kind}


def of_pictures(family: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A class of processors that takes `VideoSettings` in place of a processor for videos, and is saved as `family`."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if not isinstance(argument, VideoSettings):
            return family.check_argument_for_proper_class(self, argument_name, argument)
        return None

    return type(family.__name__, (family,), {"check_argument_for_proper_class": check})
