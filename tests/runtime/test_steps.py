"""What changes from step to step, in integers: against the fake-quant network, and against calls of one sample each."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from stepquant import hub
from stepquant.artifact import Artifact, ProductSpec, StepSpec
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.core.ranges import minmax
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.errors import ArtifactError, CalibrationError, RuntimeSupportError
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.fit.time_block import ROLES, time_chains, time_table
from stepquant.models.blocks.structure import structure
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import scheduler_of
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime.coverage import TABLED, coverage
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.lower import lower
from stepquant.runtime.steps import StepTensors
from tests import crafted
from tests.conftest import make_unet
from tests.runtime.synthetic import quantized, relative

# Codes next to a border may land on the other side of it; how many do depends on the order in which a processor sums floats.
WITHIN = {"w8a8": 0.02, "w4a4": 0.15}
FLOAT_TIME = Rule(None, "tabled", ROLES, optional=True)


def plan(name: str, table: bool) -> Plan:
    return scheme(name).with_rules([FLOAT_TIME]) if table else scheme(name)


def stepped(
    source: Source,
    name: str = "w8a8",
    groups: int = 10,
    table: bool = False,
    calls: list[Tensor] | None = None,
) -> tuple[Artifact, list[Tensor], CalibSet]:
    """An artifact with ranges for every step, and what its fake-quant network returns for a batch at every t."""
    denoiser, times = Denoiser.of(source.pipeline), source.times()
    data = source.record(every(4, range(source.sampling.steps)))
    steps = StepTable.of(times, groups)
    rows = time_table(denoiser, time_chains(denoiser), steps.times.float()) if table else None
    with torch.no_grad(), insert(denoiser, plan(name, table), steps=steps) as network:
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax)
        network.switch(weights=True, inputs=True)
        fake = [denoiser.predict({"sample": noise(4), "timestep": t}) for t in calls or times]
        return freeze(network, rows), fake, data


def noise(batch: int) -> Tensor:
    """With channels densest: the float stem sums in the same order in both networks."""
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("name", ["w8a8", "w4a4"])
def test_integers_follow_the_fake_quant_network_at_every_step(source: Source, name: str, table: bool) -> None:
    artifact, fake, _ = stepped(source, name, table=table)
    model = copy.deepcopy(source.pipeline.unet)
    lowered = lower(model, artifact, torch.float32)
    for t, wanted in zip(source.times(), fake):
        got = lowered(noise(4), t, return_dict=False)[0]
        assert relative(got, wanted) < WITHIN[name]


def test_ranges_differ_from_step_to_step_and_are_the_ones_in_use(source: Source) -> None:
    """With the rows exchanged, the outputs are others: the table is really read."""
    artifact, fake, _ = stepped(source)
    lowered = lower(copy.deepcopy(source.pipeline.unet), artifact, torch.float32)
    assert any(len(v.unique()) > 5 for k, v in artifact.tensors.items() if k.endswith("input_scale"))
    steps = lowered.get_submodule("steps")
    steps.rows.copy_(steps.rows.flip(0))
    lowered.load_state_dict(lowered.state_dict())
    t = source.times()[0]
    assert relative(lowered(noise(4), t, return_dict=False)[0], fake[0]) > 1e-3


@pytest.mark.parametrize("table", [False, True])
def test_a_batch_of_mixed_t_is_what_its_samples_are_alone(source: Source, table: bool) -> None:
    times = source.times()[[7, 0, 3, 9]]
    artifact, (fake,), _ = stepped(source, table=table, calls=[times])
    lowered = lower(copy.deepcopy(source.pipeline.unet), artifact, torch.float32)
    x = noise(4)
    got = lowered(x, times, return_dict=False)[0]
    alone = [lowered(x[i : i + 1], times[i : i + 1], return_dict=False)[0] for i in range(4)]
    assert torch.equal(got, torch.cat(alone))
    assert relative(got, fake) < WITHIN["w8a8"]


def test_no_t_is_guessed(source: Source) -> None:
    artifact, _, _ = stepped(source, table=True)
    lowered = lower(copy.deepcopy(source.pipeline.unet), artifact)
    with pytest.raises(RuntimeSupportError, match="no entry for t = 3"):
        lowered(noise(1), torch.tensor(3))
    with (
        pytest.raises(CalibrationError, match="no range was made for"),
        insert(Denoiser.of(source.pipeline), scheme("w8a8"), steps=StepTable.of(source.times())) as network,
    ):
        network.denoiser.predict({"sample": noise(1), "timestep": torch.tensor(3)})


def test_every_group_of_steps_needs_records(source: Source) -> None:
    denoiser = Denoiser.of(source.pipeline)
    data = source.record(every(2, (0, 1, 2)))
    with insert(denoiser, scheme("w8a8"), steps=StepTable.of(source.times())) as network:
        set_weight_ranges(network, minmax)
        with pytest.raises(CalibrationError, match="no records"):
            set_input_ranges(network, data, minmax)


def test_the_tabled_layers_are_gone_and_the_table_is_exact(source: Source) -> None:
    artifact, _, _ = stepped(source, table=True)
    lowered = lower(copy.deepcopy(source.pipeline.unet), artifact, torch.float32)
    assert not [name for name in lowered.state_dict() if "time_emb" in name]
    block, t = source.pipeline.unet.mid_block.resnets[0], source.times()[4:5]
    unet = source.pipeline.unet
    exact = block.time_emb_proj(nn.functional.silu(unet.time_embedding(unet.time_proj(t))))
    chains = time_chains(Denoiser(unet))
    before = [block.width for block in chains.residuals if block.timed]
    place = [block.path for block in chains.residuals if block.timed].index("mid_block.resnets.0")
    stored = artifact.tensors["steps.table"][4].split(before)[place]
    torch.testing.assert_close(stored, exact[0], atol=1e-6, rtol=1e-6)


def test_layers_that_a_table_stands_for_multiply_nothing(source: Source) -> None:
    artifact, _, _ = stepped(source, table=True)
    lowered = lower(copy.deepcopy(source.pipeline.unet), artifact)
    arguments = first_arguments(source.pipeline, 1) | {"timestep": source.times()[:1]}
    lines = {line.path: line for line in coverage(lowered, arguments).lines}
    tabled = {path for path, line in lines.items() if line.reason == TABLED}
    assert tabled == set(structure(source.pipeline.unet).time_layers()) != set()
    assert {path for path, line in lines.items() if not line.macs} == tabled


@pytest.mark.parametrize("table", [False, True])
def test_saved_and_loaded_it_returns_the_same_bits(source: Source, tmp_path, table: bool) -> None:
    from diffusers import DDIMPipeline

    artifact, _, _ = stepped(source, table=table)
    shape = (10, 3)
    correction = StepCorrection(1 + 0.1 * torch.rand(shape), torch.rand(shape), torch.zeros(shape))
    artifact = artifact.with_correction(correction, StepTable.of(source.times()))
    hub.attach(source.pipeline.unet, artifact)
    t = source.times()[6]
    before = source.pipeline.unet(noise(2), t).sample
    source.pipeline.save_pretrained(tmp_path / "out")
    again = DDIMPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(again.unet(noise(2), t).sample, before)
    tensors = again.unet.get_submodule("steps").to(torch.bfloat16)
    assert isinstance(tensors, StepTensors)
    assert torch.equal(tensors.correction().scale, correction.scale)


def test_the_correction_is_applied_behind_the_model(source: Source) -> None:
    artifact, _, _ = stepped(source)
    plain = lower(copy.deepcopy(source.pipeline.unet), artifact)
    shape = (10, 3)
    scale, bias = torch.rand(shape) + 0.5, torch.randn(shape)
    corrected = artifact.with_correction(
        StepCorrection(scale, bias, torch.zeros(shape)), StepTable.of(source.times())
    )
    lowered = lower(copy.deepcopy(source.pipeline.unet), corrected)
    t = source.times()[2]
    wanted = plain(noise(3), t).sample * scale[2].reshape(1, 3, 1, 1) + bias[2].reshape(1, 3, 1, 1)
    torch.testing.assert_close(lowered(noise(3), t).sample, wanted)


def corrected_pipeline(source: Source, noise_mode: str, variance: float) -> None:
    times = StepTable.of(source.times())
    shape = (len(times.times), 3)
    correction = StepCorrection(
        torch.ones(shape), torch.zeros(shape), torch.full(shape, variance), noise_mode
    )
    artifact = Artifact({}, {}, {}).with_correction(correction, times)
    assert artifact.steps == StepSpec(len(times.times), channels=3, noise=noise_mode)
    lower(source.pipeline.unet, artifact, torch.float32)


@pytest.mark.parametrize("prediction, variance", [("epsilon", 0.1), ("v_prediction", 1.0)])
def test_a_noisy_sampler_absorbs_the_variance(source: Source, prediction: str, variance: float) -> None:
    """The variance of x' over many draws is that of the plain sampler when the error itself is added."""
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False)
    source.pipeline.scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    times = source.times()
    corrected_pipeline(source, "absorb", variance)
    carrying = scheduler_of(source.pipeline, "ddpm")
    generator = torch.Generator().manual_seed(0)
    # In the middle the error's share is below the sampler's noise, so that all of it can be absorbed.
    draws, t = 40_000, times[4]
    x, predicted = torch.zeros(draws, 3, 1, 1), torch.zeros(draws, 3, 1, 1)
    error = variance**0.5 * torch.randn(draws, 3, 1, 1, generator=generator)
    spread = []
    for sampler, given in ((scheduler, predicted), (carrying, predicted + error)):
        sampler.set_timesteps(source.sampling.steps)
        spread.append(sampler.step(given, t, x, generator=generator).prev_sample.var().item())
    assert spread[1] == pytest.approx(spread[0], rel=0.03)
    own, less = (s._get_variance(t).max().item() for s in (scheduler, carrying))
    assert less < 0.9 * own


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize(
    "prediction, variance", [("epsilon", 0.02), ("v_prediction", 0.02), ("sample", 0.02)]
)
def test_ddim_with_noise_absorbs_the_variance(
    source: Source, prediction: str, variance: float, eta: float
) -> None:
    """In closed form: the noise that is left, and the error that is answered to, are together the noise that was."""
    source.pipeline.scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    times = source.times()
    corrected_pipeline(source, "absorb", variance)
    plain, carrying = source.pipeline.scheduler, scheduler_of(source.pipeline, "ddim", source.sampling.steps)
    plain.set_timesteps(source.sampling.steps)
    t, x, still = times[3], torch.zeros(1, 3, 1, 1, dtype=torch.float64), torch.zeros(1, 3, 1, 1)
    one = torch.ones(1, 3, 1, 1)

    def step(sampler: DDIMScheduler, predicted: Tensor, noise: Tensor) -> Tensor:
        return sampler.step(predicted, t, x, eta=eta, variance_noise=noise).prev_sample

    own = step(plain, still, one)  # s, as nothing else is in the state
    rate = step(plain, one, still)  # d mean / d prediction
    left = step(carrying, still, one)
    torch.testing.assert_close(left**2 + variance * rate**2, own**2)
    assert (left < own).all()
    # The same draw of the generator, so that a seed keeps its picture.
    draws = [
        s.step(still, t, x, eta=eta, generator=torch.Generator().manual_seed(1)) for s in (plain, carrying)
    ]
    torch.testing.assert_close(draws[1].prev_sample * own, draws[0].prev_sample * left)


def test_noise_smaller_than_the_error_vanishes(source: Source) -> None:
    corrected_pipeline(source, "absorb", 1e6)
    carrying = scheduler_of(source.pipeline, "ddim", source.sampling.steps)
    x = noise(1)
    out = carrying.step(torch.zeros_like(x), carrying.timesteps[3], x, eta=1.0, variance_noise=x)
    assert torch.equal(
        out.prev_sample,
        carrying.step(
            torch.zeros_like(x), carrying.timesteps[3], x, eta=1.0, variance_noise=0 * x
        ).prev_sample,
    )


def test_ddim_with_noise_draws_pictures_of_its_own(source: Source) -> None:
    """`ddim-eta1` is DDIM asked for eta=1, and absorbs what an artifact says."""
    noisy = replace(source.sampling, sampler="ddim-eta1")
    quiet, first, again = (run(source.pipeline, [1], s) for s in (source.sampling, noisy, noisy))
    assert torch.equal(first, again)
    assert not torch.allclose(quiet, first, atol=1e-2)
    corrected_pipeline(source, "absorb", 0.05)
    assert not torch.equal(run(source.pipeline, [1], noisy), first)


def test_a_deterministic_sampler_cannot_absorb(source: Source) -> None:
    corrected_pipeline(source, "absorb", 0.01)
    with pytest.raises(RuntimeSupportError, match="no noise that could absorb"):
        run(source.pipeline, [0], source.sampling)


def test_noise_is_taken_off_from_the_sampler_s_generator(source: Source) -> None:
    corrected_pipeline(source, "sample", 0.04)
    scheduler, plain = scheduler_of(source.pipeline, None), DDIMScheduler()
    x, predicted = noise(2), torch.zeros(2, 3, 8, 8)
    for sampler in (scheduler, plain):
        sampler.set_timesteps(source.sampling.steps)
    t = scheduler.timesteps[4]
    seeded = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    got = scheduler.step(predicted, t, x, generator=seeded).prev_sample
    torch.testing.assert_close(got, plain.step(predicted - 0.2 * drawn, t, x).prev_sample)
    first, second = (run(source.pipeline, [1, 2], source.sampling) for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def tabled() -> tuple[nn.Module, Tensor]:
    """A model with everything that may have a row for each step, all rows different, and the t of one row."""
    model, scheduler, generator = make_unet(), DDIMScheduler(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(10)
    artifact, _ = quantized(model, scheme("w8a8"), lambda t: model(noise(2), t).sample)
    artifact = crafted.stepped(artifact, Denoiser.of(DDIMPipeline(model, scheduler)), scheduler.timesteps)
    for value in artifact.tensors.values():
        if value.dim() and len(value) == 10 and value.is_floating_point():
            value.mul_(1 + torch.rand(value.shape, generator=generator))
    return lower(model, artifact, torch.float32), scheduler.timesteps[2]


@torch.no_grad()
@pytest.mark.parametrize("name", ["table", "rows", "bits", "correction_scale", "correction_bias"])
@pytest.mark.parametrize("replaced", [False, True])
def test_edited_tables_take_effect_at_the_next_call(
    tabled: tuple[nn.Module, Tensor], name: str, replaced: bool
) -> None:
    (lowered, t), x = copy.deepcopy(tabled), noise(1)
    steps = lowered.get_submodule("steps")
    before = [lowered(x, t, return_dict=False)[0] for _ in range(3)][-1]
    value = steps.get_buffer(name)
    other = value.flip(0) if name in ("rows", "bits") else value * 1.5 + 0.1
    setattr(steps, name, other) if replaced else value.copy_(other)
    after = [lowered(x, t, return_dict=False)[0] for _ in range(3)]
    assert not torch.equal(after[0], before)
    fresh = copy.deepcopy(lowered)
    lowered.load_state_dict(lowered.state_dict())
    for model in (fresh, lowered):
        assert torch.equal(model(x, t, return_dict=False)[0], after[0])
    assert torch.equal(after[2], after[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "name, value", [("rows", 10), ("correction_bias", torch.nan), ("bits", 0x7FF8000000000000)]
)
def test_a_table_edited_to_what_cannot_be_is_refused_by_name(
    tabled: tuple[nn.Module, Tensor], name: str, value: float
) -> None:
    lowered, t = copy.deepcopy(tabled)
    tensor = lowered.get_submodule("steps").get_buffer(name)
    former = tensor[3].clone()
    tensor[3] = value
    with pytest.raises(ArtifactError, match=rf"'steps\.{name}' holds values that cannot be"):
        lowered(noise(1), t)
    tensor[3] = former
    lowered(noise(1), t)


@torch.no_grad()
def test_operands_may_differ_in_whether_they_have_a_range_for_every_step() -> None:
    grids = [Grid.parse(text) for text in ("uint8/step", "uint8/step", "uint8/tensor", "uint8/tensor/sym")]
    product = IntegerProduct(ProductSpec(*grids), torch.device("cpu"), groups=2)
    product.query_scale.copy_(torch.tensor([0.02, 0.5]))
    for port in ("key", "value"):
        product.get_buffer(f"{port}_scale").fill_(0.02)
    product.probabilities_scale.fill_(1 / 255)
    q, k, v = (torch.rand(1, 2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    outs = []
    for row in (0, 1):
        product.select(row)
        assert product.codes[0].scale == product.query_scale[row]
        outs.append(product(q, k, v))
    assert not torch.equal(*outs)
