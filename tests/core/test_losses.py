from __future__ import annotations

import pytest
import torch

from stepquant.core.losses import BlockLoss, Outputs, per_sample


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_images_are_summed_over_channels_and_averaged_over_pixels(p: float) -> None:
    out, target = pair(3, 4, 5, 6)
    expected = [sum((out[i, c] - target[i, c]).abs().pow(p).mean() for c in range(4)) for i in range(3)]
    torch.testing.assert_close(per_sample(out, target, p), torch.stack(expected))


def test_tokens_have_their_channels_last() -> None:
    out, target = pair(3, 7, 4)
    torch.testing.assert_close(per_sample(out, target), (out - target).square().sum(2).mean(1))


def test_weights_count_samples() -> None:
    out, target = pair(3, 4)
    weight = torch.tensor([0.0, 1.0, 2.0])
    each = (out - target).square().sum(1)
    torch.testing.assert_close(
        BlockLoss()(Outputs([out]), Outputs([target]), weight), (each[1] + 2 * each[2]) / 3
    )


def test_without_gamma_the_layers_do_not_count() -> None:
    (a, b), (c, d) = pair(3, 4, 2, 2), pair(3, 5)
    block = BlockLoss()(Outputs([a]), Outputs([b]))
    assert block == BlockLoss(layers=0.0)(Outputs([a], [c]), Outputs([b], [d])) == per_sample(a, b).mean()
    both = BlockLoss(layers=0.5)(Outputs([a], [c]), Outputs([b], [d]))
    torch.testing.assert_close(both, block + 0.5 * per_sample(c, d).mean())


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 7, 4), (3, 4), (3, 4, 2, 5, 6)])
def test_what_lies_along_the_target_is_the_error_of_a_prediction_that_shrank(shape: tuple[int, ...]) -> None:
    """The error of the nearest multiple of the target, which least squares finds; none where an error stands across it."""
    out, target = pair(*shape)
    shrunk = torch.stack(
        [
            t * torch.linalg.lstsq(t.reshape(-1, 1), o.reshape(-1, 1)).solution.item()
            for o, t in zip(out, target)
        ]
    )
    along = BlockLoss(along=3.0).each(Outputs([out]), Outputs([target])) - per_sample(out, target)
    torch.testing.assert_close(along, 3 * per_sample(shrunk, target))
    across = target + out - shrunk
    torch.testing.assert_close(
        BlockLoss(along=3.0).each(Outputs([across]), Outputs([target])), per_sample(across, target)
    )
