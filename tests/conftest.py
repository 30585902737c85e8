"""One seed and one thread for every test; weights are asked for only by the tests that are marked so."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
