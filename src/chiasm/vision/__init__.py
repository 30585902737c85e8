"""Image → patch features."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from chiasm.vision.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from chiasm.vision.image_processor import ChiasmImageProcessor
from chiasm.vision.image_tokenizer import ImageTokenizerConfig
from chiasm.vision.patches import PatchConfig, PatchImageProcessor

AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoImageProcessor.register(
    EfficientNetLiteConfig,
    image_processor_classes={"pil": ChiasmImageProcessor, "torchvision": ChiasmImageProcessor},
    exist_ok=True,
)
AutoConfig.register("chiasm_image_tokenizer", ImageTokenizerConfig, exist_ok=True)
AutoConfig.register("chiasm_patches", PatchConfig, exist_ok=True)
AutoImageProcessor.register(
    PatchConfig,
    image_processor_classes={"pil": PatchImageProcessor, "torchvision": PatchImageProcessor},
    exist_ok=True,
)
