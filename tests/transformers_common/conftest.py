"""These tests need transformers' source distribution: `make test-transformers` fetches it and names its folder."""

import pytest
from upstream import TESTS, upstream

collect_ignore_glob = [] if TESTS else ["test_*.py"]

MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "all_flash_attn_test",
    "generate",
    "is_training_test",
    "order",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers that transformers' tests carry."""
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers")


KINDS = {
    "MODEL_MAPPING_NAMES": {
        "chiasm_decoder": "UnifiedDecoder",
        "chiasm_late": "LateFusionModel",
        "chiasm_qformer_retrieval": "QFormerRetrieval",
    },
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"chiasm_decoder": "UnifiedDecoderForCausalLM"},
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": {
        "chiasm": (
            "EarlyFusionModel",
            "EarlySeq2SeqModel",
            "IntermediateFusionModel",
            "PackedFusionModel",
            "UnifiedModel",
        )
    },
}
"""Table of transformers → model type → classes: by their names its tests tell what a class is for."""


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    common = upstream("test_modeling_common")
    for table, kinds in KINDS.items():
        for model_type, classes in kinds.items():
            monkeypatch.setitem(getattr(common, table), model_type, classes)
