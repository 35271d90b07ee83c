"""Where a layer makes the shift and scale of a norm, factors of its channels change nothing."""

from __future__ import annotations

import pytest
import torch

from stepquant.models.blocks.fold import folds
from stepquant.models.denoiser import Denoiser
from tests.models.tiny import CASES

COUNTS = {
    "class_transformer": 6,
    "sd3_dual": 13,
    "flux": 6,
    "qwen_image": 8,
    "cogvideox": 4,
    "hunyuan_video": 6,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_network_stays_the_same_with_factors_between_norms_and_their_readers(name: str) -> None:
    torch.manual_seed(0)
    model, given, _ = CASES[name]()
    denoiser, found = Denoiser(model), folds(model)
    readers = [path for fold in found for path in fold.readers]
    assert len(found) == COUNTS[name]
    assert len(readers) == len(set(readers)), "nobody has two factors"
    with torch.no_grad():
        want = denoiser.predict(given)
        factors = [0.3 + 2 * torch.rand(model.get_submodule(one.readers[0]).in_features) for one in found]
        for fold, times in zip(found, factors):
            for path in fold.readers:
                model.get_submodule(path).weight.div_(times)
        assert not torch.allclose(denoiser.predict(given), want, rtol=1e-2, atol=1e-2)
        for fold, times in zip(found, factors):
            for path, *places in fold.sources:
                maker = model.get_submodule(path)
                for place in places:
                    rows = slice(place * len(times), (place + 1) * len(times))
                    maker.weight[rows] *= times[:, None]
                    maker.bias[rows] *= times
                maker.bias[rows] += times - 1
        torch.testing.assert_close(denoiser.predict(given), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "pixart", "text_to_image", "plain"])
def test_where_modulation_is_shared_or_absent_there_is_nothing_to_fold(name: str) -> None:
    assert folds(CASES[name]()[0]) == []
