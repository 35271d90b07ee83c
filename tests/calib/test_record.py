from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from stepquant.calib import record as recording
from stepquant.calib.pick import Pick, every, one_each
from stepquant.calib.record import Source, trajectory_seed
from stepquant.calib.synthetic import from_images, from_noise
from stepquant.errors import CalibrationError, StepquantError
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling, scheduler_of


def spy(source: Source, seed: int) -> list[tuple[torch.Tensor, int]]:
    """(x, t) of every call of one trajectory, by a hook of our own."""
    calls: list[tuple[torch.Tensor, int]] = []
    model = Denoiser.of(source.pipeline).model
    handle = model.register_forward_pre_hook(lambda _, args: calls.append((args[0].clone(), int(args[1]))))
    run(source.pipeline, [seed], source.sampling)
    handle.remove()
    return calls


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
def test_records_are_what_the_network_received(source: Source, sampler: str) -> None:
    source = replace(source, sampling=Sampling(source.sampling.steps, sampler))
    picks = one_each(torch.tensor([9, 0, 4, 4, 2]))
    data = source.record(picks)
    batch = data.take(range(len(data)))
    assert sorted(zip(batch.trajectory.tolist(), batch.step.tolist())) == sorted(picks)
    for row in range(len(batch)):
        x, t = spy(source, trajectory_seed(source.seed, int(batch.trajectory[row])))[int(batch.step[row])]
        assert torch.allclose(batch.arguments["sample"][row], x[0], atol=1e-4)
        assert int(batch.arguments["timestep"][row]) == t


def test_several_steps_of_each_trajectory(source: Source) -> None:
    data = source.record(every(3, (1, 5, 9)))
    assert len(data) == 9
    assert sorted(data.steps().tolist()) == [1, 1, 1, 5, 5, 5, 9, 9, 9]
    assert sum(len(batch) for batch in data.batches(4)) == 9, "the remainder is not dropped"


def test_an_interrupted_recording_goes_on_and_ends_the_same(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    picks = every(12, (2, 7))
    whole = replace(source, cache=source.cache / "whole").record(picks)
    original, seen = recording.record_batch, []

    def fails_in_the_middle(*args: Any) -> Any:
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(recording, "record_batch", fails_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        source.record(picks)
    resumed = source.record(picks)
    assert len(seen) == 4, "the finished first batch was not recorded again"
    assert [shard.read_bytes() for shard in resumed.shards] == [shard.read_bytes() for shard in whole.shards]
    assert resumed.index == whole.index
    source.record(picks)
    assert len(seen) == 4, "a complete recording is read from the cache"


def test_other_settings_are_other_recordings(source: Source) -> None:
    picks = [Pick(0, 1)]
    keys = {
        source.key(picks),
        replace(source, seed=1).key(picks),
        replace(source, sampling=Sampling(11)).key(picks),
        source.key([Pick(0, 2)]),
    }
    with torch.no_grad():
        source.pipeline.unet.conv_in.weight[0] += 1
    assert len(keys | {source.key(picks)}) == 5


def test_bad_requests(source: Source) -> None:
    with pytest.raises(CalibrationError, match="no calibration samples"):
        source.record([])
    with pytest.raises(CalibrationError, match="beyond the sampler"):
        source.record([Pick(0, 10)])


def test_a_diverging_model_is_reported(source: Source) -> None:
    with torch.no_grad():
        source.pipeline.unet.conv_out.bias[:] = float("inf")
    data = source.record([Pick(0, 5)])
    with pytest.raises(CalibrationError, match="not finite"):
        list(data.batches(1))


def test_an_unwritable_cache_is_one_error(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StepquantError, NotADirectoryError)):
        replace(source, cache=tmp_path / "file").record([Pick(0, 1)])


def test_synthetic_records(source: Source, tmp_path: Path) -> None:
    steps = torch.tensor([0, 5, 9])
    for index in range(2):
        Image.new("RGB", (16, 16), (255 * index, 0, 0)).save(tmp_path / f"{index}.png")
    clean = from_images(source, steps, str(tmp_path), diffused=False).take(range(3))
    assert clean.arguments["sample"][0].unique().tolist() == [-1.0]
    assert torch.equal(clean.arguments["sample"][0], clean.arguments["sample"][2])
    scheduler = scheduler_of(source.pipeline, None)
    scheduler.set_timesteps(source.sampling.steps)
    assert clean.arguments["timestep"].tolist() == scheduler.timesteps[steps].tolist()
    noisy = from_images(source, steps, str(tmp_path), diffused=True).take(range(3))
    noise = from_noise(source, steps).take(range(3)).arguments["sample"]
    level = scheduler.alphas_cumprod[scheduler.timesteps[steps]][:, None, None, None]
    expected = level.sqrt() * clean.arguments["sample"] + (1 - level).sqrt() * noise
    assert torch.allclose(noisy.arguments["sample"], expected, atol=1e-5)
    with pytest.raises(CalibrationError, match="images=FOLDER"):
        from_images(source, steps, str(tmp_path / "none"), diffused=False)


def test_synthetic_records_of_a_model_that_is_not_square(source: Source, tmp_path: Path) -> None:
    model = source.pipeline.unet
    model.register_to_config(sample_size=(8, 16))
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    steps = torch.tensor([9, 2])
    for data in (from_noise(source, steps), from_images(source, steps, str(tmp_path), diffused=True)):
        arguments = data.take(range(2)).arguments
        assert arguments["sample"].shape == (2, 3, 8, 16)
        assert Denoiser(model).predict(arguments).shape == (2, 3, 8, 16)


def test_guidance_branches_are_kept_apart(text_pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    source = Source(text_pipeline, Sampling(3, prompts=("a b", "c")), batch=2, cache=tmp_path)
    data = source.record(every(2, (0, 2)))
    batch = data.take(range(len(data)))
    assert sorted(batch.branch.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]
    text = batch.arguments["encoder_hidden_states"]
    pairs = {(int(t), int(s)): [] for t, s in zip(batch.trajectory, batch.step)}
    for row in range(len(batch)):
        pairs[int(batch.trajectory[row]), int(batch.step[row])].append(row)
    for first, second in pairs.values():
        assert torch.equal(batch.arguments["sample"][first], batch.arguments["sample"][second])
        assert not torch.equal(text[first], text[second])
    unconditional = text[batch.branch == 0]
    # A product of floats may sum the rows of a batch in different orders.
    torch.testing.assert_close(unconditional[0], unconditional[-1], atol=1e-5, rtol=1e-5)


def test_a_damaged_shard_is_recorded_again(source: Source) -> None:
    picks = every(6, (3,))
    data = source.record(picks)
    whole = [shard.read_bytes() for shard in data.shards]
    data.shards[0].write_bytes(whole[0][:100])
    leftover = data.shards[0].with_name(f".{data.shards[0].name}.999999999.part")
    leftover.write_bytes(b"half")
    again = source.record(picks)
    assert [shard.read_bytes() for shard in again.shards] == whole
    assert not leftover.exists(), "what a killed process left behind is gone"
