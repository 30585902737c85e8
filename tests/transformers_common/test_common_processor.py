"""transformers' common processor tests run on Chiasm's processor."""

import unittest
from typing import Any

import tiny
from upstream import upstream

from chiasm.data.processor import ChiasmProcessor
from chiasm.vision.image_processor import ChiasmImageProcessor

common: Any = upstream("test_processing_common")


class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = ChiasmProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return tiny.tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return ChiasmImageProcessor(30, [0.5] * 3, [0.5] * 3)

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"num_image_tokens": 3}
