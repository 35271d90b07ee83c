import numpy as np
import pytest
import torch

from stepquant.core import ranges
from stepquant.core.affine import fake_quantize, scale_and_zero
from stepquant.core.grid import Grid, GridError
from stepquant.core.ranges import ema, lp_error, lp_search, lp_search_binned, minmax, percentile

SYMMETRIC, ASYMMETRIC = Grid.parse("int4/channel"), Grid.parse("uint8/tensor")


def heavy_tails(rows: int, elements: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, elements, generator=torch.Generator().manual_seed(seed))
    return x * x.abs()


def test_minmax_and_percentile_against_numpy() -> None:
    x = heavy_tails(3, 501)
    low, high = minmax(x, SYMMETRIC)
    assert np.array_equal(low, x.numpy().min(1))
    assert np.array_equal(high, x.numpy().max(1))
    low, high = percentile(x, SYMMETRIC, percent=97)
    assert np.allclose(high, np.percentile(x.numpy(), 97, axis=1), atol=1e-5)
    assert np.allclose(low, np.percentile(x.numpy(), 3, axis=1), atol=1e-5)


@pytest.mark.parametrize("grid", [SYMMETRIC, Grid.parse("int8/channel"), Grid.parse("uint4/tensor")], ids=str)
def test_lp_search_equals_brute_force(grid: Grid) -> None:
    x = heavy_tails(4, 257)
    low, high = lp_search(x, grid, p=2.4)
    for row in range(4):
        best = (float("inf"), 0.0)
        for index in range(1, 101):
            ends = x[row].min() * index / 100, x[row].max() * index / 100
            scale, zero_point = scale_and_zero(ends[0], ends[1], grid)
            error = (x[row] - fake_quantize(x[row], scale, zero_point, grid)).abs().pow(2.4).sum().item()
            best = min(best, (error, index / 100))
        scale, zero_point = scale_and_zero(low[row], high[row], grid)
        found = (x[row] - fake_quantize(x[row], scale, zero_point, grid)).abs().pow(2.4).sum().item()
        assert found == pytest.approx(best[0], rel=1e-5)


@pytest.mark.parametrize(
    "grid", [SYMMETRIC, Grid.parse("int8/channel"), Grid.parse("uint3/channel")], ids=str
)
@pytest.mark.parametrize("outermost", [1, 16])
def test_lp_search_finds_the_same_whatever_it_rules_out_early(grid: Grid, outermost: int) -> None:
    x = torch.cat([heavy_tails(6, 300), torch.zeros(1, 300), torch.randn(2, 300) + 4])
    for some, all_of_them in zip(lp_search(x, grid, outermost=outermost), lp_search(x, grid, outermost=300)):
        assert torch.equal(some, all_of_them)


def test_lp_search_finds_the_same_however_many_rows_it_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = heavy_tails(9, 300)
    whole = lp_search(x, SYMMETRIC)
    for few in (1, 2, 4):
        monkeypatch.setattr(ranges, "AT_ONCE", 300 * 2 * few)
        monkeypatch.setattr(ranges, "CACHED", 300 * few)
        assert all(map(torch.equal, lp_search(x, SYMMETRIC), whole))


GRIDS = ("int8/channel", "int4/channel", "uint8/channel", "uint3/channel", "int2/channel")


@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("p", [0.7, 2.0, 2.4, 5.0])
def test_lp_search_chooses_what_all_errors_say(text: str, p: float) -> None:
    """The first of the least of all errors, each taken of the whole row."""
    grid, noise = Grid.parse(text), torch.Generator().manual_seed(1)
    on_the_grid = torch.randint(-7, 8, (3, 900), generator=noise) * 0.5
    x = torch.cat([heavy_tails(4, 900), torch.randn(4, 900, generator=noise) * 1e-4, on_the_grid])
    x = torch.cat(
        [x, torch.zeros(1, 900), torch.randn(2, 900, generator=noise) + 9, torch.full((1, 900), 0.3)]
    )
    low, high = minmax(x, grid)
    fractions = torch.arange(100, 0, -1) / 100
    errors = torch.stack([lp_error(x, low * part, high * part, grid, p) for part in fractions])
    chosen = fractions[(errors == errors.amin(0)).long().argmax(0)]
    found = lp_search(x, grid, p=p)
    assert torch.equal(found[0], low * chosen)
    assert torch.equal(found[1], high * chosen)


@pytest.mark.parametrize(
    "grid", [ASYMMETRIC, Grid.parse("uint4/tensor"), Grid.parse("uint8/tensor/sym")], ids=str
)
def test_binned_search_is_as_good_as_the_exact_one(grid: Grid) -> None:
    x = heavy_tails(1, 20_000).abs() if grid.symmetric else heavy_tails(1, 20_000)

    def error(ends: tuple[torch.Tensor, torch.Tensor]) -> float:
        scale, zero_point = scale_and_zero(*ends, grid)
        return (x - fake_quantize(x, scale, zero_point, grid)).abs().pow(2.4).sum().item()

    exact, binned = error(lp_search(x, grid)), error(lp_search_binned(x, grid))
    assert binned <= exact * 1.01
    assert binned <= error(minmax(x, grid))


def test_binned_search_survives_constants() -> None:
    low, high = lp_search_binned(torch.full((1, 64), 3.0), ASYMMETRIC)
    assert (low.item(), high.item()) == (3.0, 3.0)
    with pytest.raises(GridError, match="one row"):
        lp_search_binned(torch.zeros(2, 4), ASYMMETRIC)


def test_ema_is_the_closed_form() -> None:
    values = [torch.tensor(float(v)) for v in (3, -1, 4, 1)]
    running = None
    for value in values:
        running = ema(running, value, 0.9)
    assert running.item() == pytest.approx(0.9**3 * 3 + 0.1 * (0.9**2 * -1 + 0.9 * 4 + 1))
