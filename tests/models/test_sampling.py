import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, LDMPipeline, VQModel

from stepquant.errors import UnknownNameError
from stepquant.models.generate import run, sample
from stepquant.models.sampling import SAMPLERS, Sampling, generators


def test_ddim_equals_the_pipeline_of_diffusers(pipeline: DDIMPipeline) -> None:
    expected = pipeline(
        batch_size=3, generator=generators([5, 6, 7]), num_inference_steps=4, output_type="np"
    ).images
    got = run(pipeline, [5, 6, 7], Sampling(4, "ddim"))
    assert torch.allclose(got.permute(0, 2, 3, 1), torch.from_numpy(expected), atol=1e-6)


def test_ddpm_equals_the_pipeline_of_diffusers(pipeline: DDIMPipeline) -> None:
    theirs = DDPMPipeline(pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config))
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        batch_size=2, generator=generators([1, 2]), num_inference_steps=5, output_type="np"
    ).images
    assert torch.allclose(
        run(pipeline, [1, 2], Sampling(5, "ddpm")).permute(0, 2, 3, 1), torch.from_numpy(expected), atol=1e-6
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_and_a_seed_is_one_trajectory(pipeline: DDIMPipeline, sampler: str) -> None:
    together = run(pipeline, [3, 4], Sampling(5, sampler))
    assert torch.isfinite(together).all()
    assert together.shape == (2, 3, 8, 8)
    assert torch.allclose(run(pipeline, [4], Sampling(5, sampler)), together[1:], atol=1e-4)


def test_batches_cover_all_seeds(pipeline: DDIMPipeline) -> None:
    images = torch.cat(list(sample(pipeline, range(5), Sampling(2), batch=2)))
    assert images.shape[0] == 5


def test_unknown_sampler(pipeline: DDIMPipeline) -> None:
    with pytest.raises(UnknownNameError, match="euler"):
        run(pipeline, [0], Sampling(2, "eular"))


def test_latents_are_decoded(pipeline: DDIMPipeline) -> None:
    torch.manual_seed(0)
    decoder = VQModel(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                      up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, num_vq_embeddings=32, norm_num_groups=4)  # fmt: skip
    latent = LDMPipeline(decoder.eval(), pipeline.unet, pipeline.scheduler)
    latent.set_progress_bar_config(disable=True)
    expected = latent(
        batch_size=2, generator=generators([1, 2]), num_inference_steps=3, output_type="np"
    ).images
    got = run(latent, [1, 2], Sampling(3, "ddim"))
    assert got.shape == (2, 3, 16, 16)
    assert torch.allclose(got.permute(0, 2, 3, 1), torch.from_numpy(expected), atol=1e-5)
