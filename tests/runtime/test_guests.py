"""What others do to a lowered model: hooks, offloading, threads, edits, copies, and processors of attention."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from stepquant.calib.record import Source
from stepquant.errors import ModelError, RuntimeSupportError
from stepquant.models.attention import Rebound
from stepquant.quant.plan import Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.dequantize import dequantize
from stepquant.runtime.lower import lower
from tests.models.tiny import conditional
from tests.runtime.synthetic import artifact_of, calling, make, noise, quantized, relative
from tests.runtime.test_steps import stepped

compiled = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lower(make(), artifact_of(make()))


@pytest.fixture(scope="module")
def textual() -> nn.Module:
    torch.manual_seed(0)
    floating, text = conditional().eval(), noise(1, 7, 32, seed=4)
    artifact, _ = quantized(floating, scheme("w8a8"), lambda t: floating(noise(1, 4, 16, 16), t, text).sample)
    return lower(floating, artifact)


@torch.no_grad()
def call(model: nn.Module, x: Tensor, t: object = 3, **inputs: Tensor) -> Tensor:
    return model(x, t, **inputs, return_dict=False)[0]


@compiled
def test_one_tensor_without_numbers_is_refused_and_none_at_all_is_a_shape() -> None:
    x, weight = torch.randn(2, 8, 4, 4), torch.ones(8, device="meta")
    code = (0.1, 128, 0, 255)
    operation = torch.ops.stepquant.group_norm_quantize.default
    with pytest.raises(RuntimeSupportError, match="'group_norm_quantize'.*'weight' is on the meta device"):
        operation(x, weight, None, 2, 1e-5, *code)
    assert operation(x.to("meta"), weight, None, 2, 1e-5, *code).is_meta


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("kind", ["model", "textual"])
def test_an_offloaded_model_makes_the_same_images(
    kind: str, buffers: bool, request: pytest.FixtureRequest
) -> None:
    whole = request.getfixturevalue(kind)
    inputs = {"encoder_hidden_states": noise(1, 7, 32, seed=4)} if kind == "textual" else {}
    offloaded = accelerate.cpu_offload(copy.deepcopy(whole), "cpu", offload_buffers=buffers)
    assert next(offloaded.parameters()).is_meta
    for turn in range(4):
        x = noise(1, 4 if inputs else 3, 16, 16, seed=turn)
        assert torch.equal(call(offloaded, x, 5 + turn, **inputs), call(whole, x, 5 + turn, **inputs))
    accelerate.hooks.remove_hook_from_submodules(offloaded)


@pytest.mark.parametrize("kind", ["model", "textual"])
def test_a_model_whose_groups_are_on_disk_makes_the_same_images(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Between calls there is memory that nobody wrote in the places of its tensors."""
    whole = request.getfixturevalue(kind)
    inputs = {"encoder_hidden_states": noise(1, 7, 32, seed=4)} if kind == "textual" else {}
    offloaded, cpu = copy.deepcopy(whole), torch.device("cpu")
    x = noise(1, 4 if inputs else 3, 16, 16)
    call(offloaded, x, 5, **inputs)
    offloaded.enable_group_offload(
        cpu, cpu, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for t in (5, 5, 5, 6, 7, 7, 7):
        assert torch.equal(call(offloaded, x, t, **inputs), call(whole, x, t, **inputs))
    for asked in (offloaded.state_dict, lambda: dequantize(offloaded)):
        with pytest.raises(RuntimeSupportError, match="took the tensors away"):
            asked()


SWALLOWED = (
    "down_blocks.0.resnets.0.conv1",
    "up_blocks.0.resnets.0.norm2",
    "mid_block.attentions.0.to_q",
    "up_blocks.0.upsamplers.0.conv",
    "time_embedding.linear_1",
    "conv_norm_out",
    "conv_act",
    "conv_out",
)


@pytest.mark.parametrize("path", SWALLOWED)
def test_hooks_inside_a_chain_run_on_floats_and_may_change_them(path: str) -> None:
    twin, x, seen = lower(make(), artifact_of(make()), torch.float32), noise(2, 3, 16, 16), []
    want = [call(twin, x) for _ in range(3)][-1]
    layer = twin.get_submodule(path)
    handle = layer.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    got = call(twin, x)
    assert len(seen) == 1
    assert torch.uint8 not in seen[0]
    assert relative(got, want) < 0.02
    handle.remove()
    changing = layer.register_forward_hook(lambda _, args, out: torch.zeros_like(out))
    assert not torch.equal(call(twin, x), got)
    changing.remove()
    assert torch.equal(call(twin, x), want)


def test_a_forward_bound_inside_a_chain_runs(model: nn.Module) -> None:
    twin, x = copy.deepcopy(model), noise(1, 3, 16, 16)
    want = call(twin, x)
    layer = twin.mid_block.resnets[0].conv1
    former, calls = layer.forward, []
    layer.forward = lambda *args: (calls.append(args), former(*args))[1]
    call(twin, x)
    assert len(calls) == 1
    del layer.forward
    assert torch.equal(call(twin, x), want)


def in_threads(model: nn.Module, jobs: list[tuple[Tensor, object]], count: int) -> list[Tensor]:
    """The predictions of all jobs, by so many threads that begin together, in the order of the jobs."""
    outs: dict[int, Tensor] = {}
    ready = threading.Barrier(count)

    def work(first: int) -> None:
        ready.wait()
        for place in range(first, len(jobs), count):
            outs[place] = call(model, *jobs[place])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(count)]
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(former)
    return [outs[place] for place in range(len(jobs))]


@pytest.mark.parametrize("count", [2, 4])
def test_threads_on_one_model_get_what_each_would_alone(model: nn.Module, count: int) -> None:
    jobs = [(noise(1 + i % 3, 3, 16, 16, seed=i), (5, 5, 90, 700)[i % 4]) for i in range(24)]
    alone = copy.deepcopy(model)
    want = [call(alone, *job) for job in jobs]
    for _ in range(2):
        twin = copy.deepcopy(model)
        assert all(map(torch.equal, in_threads(twin, jobs, count), want))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("table", [False, True])
def test_threads_share_a_model_with_ranges_by_step(source: Source, table: bool, count: int) -> None:
    artifact, _, _ = stepped(source, groups=2, table=table)
    made = lower(copy.deepcopy(source.pipeline.unet), artifact)
    times = list(source.times())
    jobs = [(noise(1 + i % 3, 3, 8, 8, seed=i), times[i % len(times)]) for i in range(40)]
    alone = copy.deepcopy(made)
    want = [call(alone, *job) for job in jobs]
    assert all(map(torch.equal, in_threads(made, jobs, count), want))


def test_an_input_that_is_no_number_is_said_once(model: nn.Module) -> None:
    twin, x = copy.deepcopy(model), noise(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(twin, x)
        call(twin, torch.full((1, 3, 16, 16), 3e38))  # its sum alone is infinite
    broken = x.clone()
    broken[1, 0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="input at t = 90 holds NaN") as said:
        call(twin, broken, torch.tensor([7, 90]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(twin, broken, torch.tensor([7, 90]))
    assert len([one for one in said if "input" in str(one.message)]) == 1


@pytest.mark.parametrize("path", ["mid_block.resnets.0.conv1", "mid_block.attentions.0.to_k", "conv_in"])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "bias"])
def test_edited_tensors_take_effect_at_the_next_call(model: nn.Module, path: str, name: str) -> None:
    twin, x = copy.deepcopy(model), noise(1, 3, 16, 16)
    layer = twin.get_submodule(path)
    value = getattr(layer, name, None)
    if value is None:
        assert path == "conv_in"
        return
    before = [call(twin, x) for _ in range(3)][-1]
    value.mul_(1.5).add_(0.01)
    for _ in range(3):
        assert torch.equal(call(twin, x), call(copy.deepcopy(twin), x))
    assert not torch.equal(call(twin, x), before)
    setattr(layer, name, value / 2)
    assert torch.equal(call(twin, x), call(copy.deepcopy(twin), x))


def test_edited_ranges_of_a_product_and_float_weights_take_effect(model: nn.Module) -> None:
    twin, x = copy.deepcopy(model), noise(1, 3, 16, 16)
    product, floats = twin.mid_block.attentions[0].product, twin.conv_norm_out.weight
    for tensor in (product.value_scale, floats):
        before = [call(twin, x) for _ in range(3)][-1]
        with torch.no_grad():
            tensor.mul_(0.7)
        after = call(twin, x)
        assert not torch.equal(after, before)
        assert torch.equal(after, call(copy.deepcopy(twin), x))


@torch.no_grad()
def test_a_float_weight_of_the_time_embedding_that_was_replaced_takes_effect() -> None:
    floating = make()
    time = Rule(None, "test", path="time_embedding*")
    artifact, _ = quantized(floating, scheme("w8a8").with_rules([time]), calling(floating))
    twin, x = lower(floating, artifact), noise(1, 3, 16, 16)
    assert "time_embedding.linear_1" not in artifact.layers
    before = [call(twin, x) for _ in range(3)][-1]
    layer = twin.time_embedding.linear_1
    layer.weight = nn.Parameter(layer.weight.flip(0))
    after = call(twin, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, call(copy.deepcopy(twin), x))


def test_slicing_and_other_processors_keep_the_integer_product(textual: nn.Module) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    twin, x = copy.deepcopy(textual), noise(1, 4, 16, 16)
    text = {"encoder_hidden_states": noise(1, 7, 32, seed=4)}
    want = call(twin, x, **text)
    with pytest.warns(UserWarning, match="SlicedAttnProcessor computes its product in float"):
        twin.set_attention_slice("auto")
    assert torch.equal(call(twin, x, **text), want)
    twin.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(call(twin, x, **text), want)

    class Own(AttnProcessor2_0):
        pass

    twin.set_attn_processor(Own())
    assert all(isinstance(processor, Rebound) for processor in twin.attn_processors.values())
    assert (
        relative(call(twin, x, **text), want) < 0.1
    )  # by its own class now, which rounds between its layers

    class Inline:
        def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
            return hidden_states

    with pytest.warns(UserWarning, match="Inline computes its product itself"):
        twin.set_attn_processor(Inline())
    with pytest.raises(ModelError, match="cannot be concatenated"):
        twin.fuse_qkv_projections()


def test_a_processor_that_is_assigned_directly_is_taken_as_one_that_is_set(textual: nn.Module) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

    twin, x = copy.deepcopy(textual), noise(1, 4, 16, 16)
    text = {"encoder_hidden_states": noise(1, 7, 32, seed=4)}
    want = [call(twin, x, **text) for _ in range(3)][-1]
    attention = twin.mid_block.attentions[0].transformer_blocks[0].attn1

    class Inline:
        def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
            return hidden_states

    attention.processor = SlicedAttnProcessor(1)
    with pytest.warns(UserWarning, match="SlicedAttnProcessor computes its product in float"):
        assert torch.equal(call(twin, x, **text), want)
    inline = attention.processor = Inline()
    with pytest.warns(UserWarning, match="Inline computes its product itself"):
        assert not torch.equal(call(twin, x, **text), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(twin, x, **text)
        assert attention.processor is inline
        for set_it in (twin.set_attn_processor, lambda one: setattr(attention, "processor", one)):
            set_it(AttnProcessor2_0())
            for _ in range(3):
                assert torch.equal(call(twin, x, **text), want)
    assert isinstance(attention.processor, Rebound)


def test_a_copy_has_a_product_of_its_own(textual: nn.Module) -> None:
    twin = copy.deepcopy(textual)
    attention = twin.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.processor.product is attention.product
    assert attention.product is not textual.mid_block.attentions[0].transformer_blocks[0].attn1.product


def answer(calls: list[tuple[Any, ...]], sender: Any) -> None:
    """What runs in the child; of the tensors that come through shared memory nothing is changed."""
    torch.set_num_threads(1)
    sender.send([[call(made, x, t, **more).numpy() for _ in range(3)] for made, x, t, more in calls])


def test_another_process_makes_the_same_bytes(model: nn.Module, textual: nn.Module, source: Source) -> None:
    """Pickled, and sent to a spawned process, after the first calls."""
    by_step = lower(copy.deepcopy(source.pipeline.unet), stepped(source, groups=2, table=True)[0])
    text = {"encoder_hidden_states": noise(2, 7, 32, seed=4)}
    calls = [
        (model, noise(2, 3, 16, 16), 5, {}),
        (textual, noise(2, 4, 16, 16), 5, text),
        (by_step, noise(2, 3, 8, 8), source.times()[1], {}),
    ]
    wanted = [call(made, x, t, **inputs) for made, x, t, inputs in calls]
    for (made, x, t, inputs), want in zip(pickle.loads(pickle.dumps(calls)), wanted):
        assert torch.equal(call(made, x, t, **inputs), want)
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(calls, sender))
    child.start()
    sender.close()
    try:
        outs = receiver.recv()
    finally:
        child.join()
    assert child.exitcode == 0
    for three, want in zip(outs, wanted, strict=True):
        assert all(torch.equal(torch.from_numpy(one), want) for one in three)


@torch.no_grad()
def test_a_batch_of_none_is_a_batch_of_none(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    for _ in range(3):
        assert call(twin, torch.randn(0, 3, 16, 16)).shape == (0, 3, 16, 16)
