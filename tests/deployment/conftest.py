"""Use the same networks and images in every run, for any choice of tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
