"""These tests need the source distribution of transformers, which `make test-transformers` fetches and names."""

import pytest
from upstream import TESTS

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
