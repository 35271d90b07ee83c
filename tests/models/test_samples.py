"""Some samples of a call get what is theirs of every argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stepquant.models.denoiser import Denoiser
from stepquant.models.samples import samples_at
from tests.models.tiny import CASES


@pytest.mark.parametrize("name", ["animated", "z_image", "flux", "qwen_image", "size_conditioned", "pixart"])
def test_some_samples_alone_are_predicted_as_in_their_batch(name: str) -> None:
    """Rows of frames, lists, nested arguments, and arguments without a batch axis."""
    model, arguments, _ = CASES[name]()
    denoiser = Denoiser(model)
    with torch.no_grad():
        both = denoiser.predict(arguments)
        alone = [denoiser.predict(samples_at(arguments, torch.tensor([i]), denoiser.family)) for i in (1, 0)]
        turned = denoiser.predict(samples_at(arguments, torch.tensor([1, 0]), denoiser.family))
    for found in (torch.cat(alone), turned):
        torch.testing.assert_close(found, both.flip(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2), (
        "samples that are alike would hide whose rows are taken"
    )


def test_what_is_shared_stays_whole_though_it_has_as_many_rows() -> None:
    _, arguments, _ = CASES["flux"]()
    family = Denoiser(CASES["flux"]()[0]).family
    ids = torch.rand(2, 3)
    some = samples_at({**arguments, "img_ids": ids, "nothing": None}, torch.tensor([1]), family)
    assert some["img_ids"] is ids
    assert some["nothing"] is None
    assert len(some["hidden_states"]) == 1


def test_residuals_in_a_list_are_no_samples() -> None:
    """As many of them as there are samples: each has rows of its own."""
    model, arguments, _ = CASES["flux"]()
    residuals: Any = [torch.arange(2.0)[:, None, None] + place for place in (0, 10)]
    some = samples_at(
        {**arguments, "controlnet_block_samples": residuals}, torch.tensor([1]), Denoiser(model).family
    )
    found: list[Tensor] = tree_map(torch.flatten, some["controlnet_block_samples"])
    assert [one.tolist() for one in found] == [[1.0], [11.0]]
