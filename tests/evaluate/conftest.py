from __future__ import annotations

import pytest
import torch

from stepquant.evaluate.networks.classifier import FeatureNet
from stepquant.evaluate.networks.reader import Extractor


@pytest.fixture(scope="session")
def extractor() -> Extractor:
    """A feature network with random weights."""
    torch.manual_seed(0)
    return Extractor("FD-C10", FeatureNet((8, 8, 12)).eval(), "abc", 32)
