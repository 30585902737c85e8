"""Image → patch features."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from chiasm.vision.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from chiasm.vision.image_processor import ChiasmImageProcessor

AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoImageProcessor.register(
    EfficientNetLiteConfig,
    image_processor_classes={"pil": ChiasmImageProcessor, "torchvision": ChiasmImageProcessor},
    exist_ok=True,
)
