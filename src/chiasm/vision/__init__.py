"""Image → patch features."""

from transformers import AutoConfig, AutoModel

from chiasm.vision.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
