"""Fixtures; a folder's conftest.py imports those it wants."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random test data is the same on every run and in every order."""
    torch.manual_seed(0)
