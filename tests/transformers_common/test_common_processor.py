"""transformers' common processor tests run on Chiasm's processor."""

import unittest
from typing import Any

from upstream import upstream

import tiny
from chiasm.data.processor import ChiasmProcessor
from chiasm.vision.image_processor import ChiasmImageProcessor

common: Any = upstream("test_processing_common")


SIGNATURES = "a processor's own options stand in its signature, with their defaults"
ELSEWHERE = "what the tokenizer and the image processor do is told when they are made: a picture's tokens are never cut"
TEMPLATE = "the tokenizer's chat template is the processor's, under the same name"
SKIPPED = {
    "test_init_arguments_not_in_class_attributes": TEMPLATE,
    "test_apply_chat_template_assistant_mask": "labels tell the assistant's tokens: `encode(supervise=True)`",
    "test_chat_template_message_objects": "a picture's place is told to templates, not its address",
    "test_apply_chat_template_image_0": ELSEWHERE,
    "test_apply_chat_template_image_1": ELSEWHERE,
    "test_args_overlap_kwargs": "an option that the image processor does not know is an error",
    "test_init_arguments_not_in_processor_kwargs": SIGNATURES,
    "test_call_arguments_not_in_processor_kwargs": SIGNATURES,
    "test_call_arguments_default_none": SIGNATURES,
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": ELSEWHERE,
    "test_doubly_passed_kwargs_0_images": ELSEWHERE,
    "test_kwargs_overrides_default_subprocessor_kwargs_0_images": ELSEWHERE,
    "test_overlapping_text_image_kwargs_handling_0_images": ELSEWHERE,
    "test_structured_kwargs_nested_from_dict_0_images": ELSEWHERE,
    "test_subprocessor_defaults_preserved_by_kwargs_0_images": ELSEWHERE,
    "test_unstructured_kwargs_0_images": ELSEWHERE,
    "test_unstructured_kwargs_batched_0_images": ELSEWHERE,
}
"""Test of transformers → why it does not apply."""


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


for _name, _reason in SKIPPED.items():
    setattr(ProcessorTest, _name, unittest.skip(_reason)(getattr(ProcessorTest, _name)))
