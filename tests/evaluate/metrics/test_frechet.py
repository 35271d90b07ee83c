from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.frechet import (
    MOST_BLOCKS,
    Statistics,
    add_block,
    change_interval,
    frechet,
    frechet_interval,
    jackknife_interval,
    merge,
    most_blocks,
)
from stepquant.evaluate.metrics.reference import Split, read_reference, to_tensors
from stepquant.evaluate.networks.reader import Extractor


def gaussian(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=generator) @ mix + shift


def by_sqrtm(a: Tensor, b: Tensor) -> float:
    """The distance in its textbook form, by scipy."""
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root))


def test_merged_statistics_are_those_of_all_rows_at_once() -> None:
    rows = gaussian(301, 7, 0, shift=1000.0)
    found = merge([Statistics.of(part) for part in rows.split(64)])
    assert found.count == 301
    np.testing.assert_allclose(found.mean.numpy(), rows.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance.numpy(), np.cov(rows.double().numpy(), rowvar=False), atol=1e-7, rtol=1e-6
    )


def test_blocks_stay_few_and_lose_nothing() -> None:
    rows = gaussian(1000, 3, 0)
    blocks: tuple[Statistics, ...] = ()
    for row in rows.split(2):
        blocks = add_block(blocks, Statistics.of(row))
    assert MOST_BLOCKS / 2 <= len(blocks) <= MOST_BLOCKS
    torch.testing.assert_close(merge(blocks).outer, rows.double().T @ rows.double())


@pytest.mark.parametrize(("count", "width"), [(400, 6), (50, 20), (12, 20)])
def test_distance_equals_the_matrix_square_root(count: int, width: int) -> None:
    """Also where there are fewer images than features, whose covariance is singular."""
    a, b = gaussian(count, width, 1), gaussian(count, width, 2, shift=0.3) * 1.4
    assert frechet(Statistics.of(a), Statistics.of(b)) == pytest.approx(by_sqrtm(a, b), rel=1e-3, abs=1e-4)


def test_distance_of_shifted_gaussians_is_the_square_of_the_shift() -> None:
    a = gaussian(500, 4, 3).double()  # a shift in float32 is rounded, differently on each processor
    assert frechet(Statistics.of(a), Statistics.of(a + 2.0)) == pytest.approx(4 * 2.0**2, rel=1e-9)
    assert frechet(Statistics.of(a), Statistics.of(a)) == pytest.approx(0, abs=1e-9)


def test_distance_equals_torchmetrics_with_our_network(extractor: Extractor) -> None:
    a, b = torch.rand(40, 3, 32, 32), torch.rand(40, 3, 32, 32) ** 2
    theirs = FrechetInceptionDistance(feature=extractor.net, normalize=False, input_img_size=(3, 32, 32))
    theirs.used_custom_model = True
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    ours = frechet(Statistics.of(extractor(b)), Statistics.of(extractor(a)))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_interval_is_as_wide_as_fresh_draws_scatter() -> None:
    data = Statistics.of(gaussian(5000, 6, 0))
    values, widths = [], []
    for seed in range(1, 41):
        blocks = tuple(Statistics.of(part) for part in gaussian(640, 6, seed, shift=0.2).split(16))
        low, high = frechet_interval(blocks, (data,), paired=False, resamples=60)
        value = frechet(merge(blocks), data)
        assert low <= value <= high
        values.append(value)
        widths.append((high - low) / 2)
    assert np.mean(widths) == pytest.approx(1.96 * np.std(values), rel=0.35)


def test_paired_interval_knows_that_images_come_from_the_same_seeds() -> None:
    rows = gaussian(640, 6, 5)
    a = tuple(Statistics.of(part) for part in rows.split(16))
    b = tuple(Statistics.of(part + 0.5) for part in rows.split(16))
    paired, loose = (frechet_interval(a, b, paired=paired) for paired in (True, False))
    assert paired[1] - paired[0] < 1e-6 < 1e-2 < loose[1] - loose[0]


@pytest.mark.parametrize("sizes", [(640,), (639, 1)])
@pytest.mark.parametrize("width", [6, 2048])
def test_one_block_has_no_interval(sizes: tuple[int, ...], width: int) -> None:
    """A width of zero would claim that the distance is known exactly."""
    blocks = tuple(Statistics.of(part) for part in gaussian(640, 6, 5).split(list(sizes)))
    wide = tuple(Statistics(b.count, b.total.new_zeros(width), b.outer) for b in blocks)
    assert frechet_interval(wide, wide, paired=True) == (None, None)


def test_wide_features_keep_few_blocks() -> None:
    assert [most_blocks(width) for width in (16, 256, 2048, 10_000)] == [64, 64, 8, 8]
    rows = gaussian(60, 2048, 1)
    blocks: tuple[Statistics, ...] = ()
    for row in rows.split(2):
        blocks = add_block(blocks, Statistics.of(row))
    assert len(blocks) <= 8
    assert merge(blocks).count == 60


def test_jackknife_is_as_wide_as_fresh_draws_scatter() -> None:
    data, values, widths = Statistics.of(gaussian(5000, 6, 0)), [], []
    for seed in range(1, 61):
        blocks = tuple(Statistics.of(part) for part in gaussian(640, 6, seed, shift=0.2).split(80))
        value = frechet(merge(blocks), data)
        low, high = jackknife_interval(value, blocks, (data,), paired=False)
        assert low <= value <= high
        values.append(value)
        widths.append((high - low) / 2)
    assert np.mean(widths) == pytest.approx(2.36 * np.std(values), rel=0.3)  # Student's t of 8 blocks
    low, high = jackknife_interval(0.0, blocks, blocks, paired=True)
    assert high < 1e-6


def test_change_is_as_wide_as_fresh_draws_scatter_and_narrower_than_the_distance() -> None:
    data, values, widths, alone = Statistics.of(gaussian(5000, 6, 0)), [], [], []
    for seed in range(1, 61):
        rows = gaussian(640, 6, seed, shift=0.2)
        noise = 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
        own, ours = (tuple(map(Statistics.of, x.split(16))) for x in (rows, rows + noise))
        value = frechet(merge(ours), data) - frechet(merge(own), data)
        low, high = change_interval(ours, own, data)
        assert low <= value <= high
        values.append(value)
        widths.append((high - low) / 2)
        low, high = jackknife_interval(9.0, ours, (data,), paired=False)
        alone.append((high - low) / 2)
    assert np.mean(widths) == pytest.approx(2.02 * np.std(values), rel=0.3)  # Student's t of 40 blocks
    assert np.mean(widths) < 0.5 * np.mean(alone)


def test_change_needs_more_than_one_block() -> None:
    blocks = tuple(map(Statistics.of, gaussian(20, 6, 1).split(16)))
    assert change_interval(blocks[:1], blocks[:1], blocks[0]) == (None, None)
    assert change_interval(blocks, blocks, blocks[0]) == (0, 0)


def test_reference_is_read_back_and_refused_for_another_network(extractor: Extractor, tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    rows = gaussian(300, 5, 7)
    made = Statistics.of(rows)
    save_file(
        to_tensors({"test": Split(made, rows[:9]), "train": Split(made)}), file, metadata={"extractor": "abc"}
    )
    found = read_reference(extractor, file)
    assert found["test"].statistics.count == 300
    torch.testing.assert_close(found["test"].statistics.covariance, made.covariance, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["test"].features, rows[:9], atol=2e-3, rtol=1e-3)
    assert found["train"].features is None
    with pytest.raises(EvaluationError, match="another extractor"):
        read_reference(Extractor("FD-C10", nn.Identity(), "other", 32), file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_reference(extractor, file)


def test_extractor_refuses_other_sizes(extractor: Extractor) -> None:
    with pytest.raises(EvaluationError, match="3x64x64"):
        extractor(torch.rand(2, 3, 64, 64))
    with pytest.raises(EvaluationError, match="two images"):
        _ = Statistics.of(torch.rand(1, 4)).covariance
