from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

from benchmarks.learnt import check_learnt, untouched
from stepquant.errors import StepquantError
from stepquant.models import zoo
from tests.conftest import make_unet


def test_a_network_as_it_was_drawn_is_refused() -> None:
    model = make_unet()
    assert untouched(model) == 1
    with pytest.raises(StepquantError, match="'fresh' has hardly learnt"):
        check_learnt(model, "fresh")


def test_few_steps_of_little_change_are_no_learning() -> None:
    model = make_unet()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * weight.std(correction=0) * torch.randn(weight.shape))
    assert untouched(model) > 0.9


def test_the_embedded_model_has_learnt() -> None:
    model = UNet2DModel.from_pretrained(zoo.path("stepquant:characters"), subfolder="unet")
    assert untouched(model) < 0.1
    check_learnt(model, "characters")
