"""Recorded calls: the same bytes as the model's own forward, and never where they would not be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.quant.schemes import scheme
from stepquant.runtime import lower, ops
from stepquant.runtime.cpu import replay
from stepquant.runtime.cpu.recording import Recording, UnrecordableError
from stepquant.runtime.cpu.replay import Replay
from tests.models.tiny import conditional
from tests.runtime.synthetic import artifact_of, inputs_of, make, noise, quantized

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lower.lower(make(), artifact_of(make()))


def fresh(model: nn.Module) -> tuple[nn.Module, Replay]:
    """A copy without memory of former calls."""
    twin = copy.deepcopy(model)
    return twin, twin.__dict__["forward"]


def plain(model: nn.Module, x: Tensor, t: object, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return type(model).forward(model, x, t, **inputs, return_dict=False)[0]


def call(model: nn.Module, x: Tensor, t: object, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x, t, **inputs, return_dict=False)[0]


def sequences(own: Replay) -> int:
    return sum(1 for made in own.sequences.values() if made is not None and made is not False)


def test_the_third_call_is_a_sequence_with_the_bytes_of_the_first(model: nn.Module) -> None:
    twin, own = fresh(model)
    for turn in range(4):
        for batch in (1, 3):
            x = noise(batch, 3, 16, 16, seed=10 * turn + batch)
            assert torch.equal(call(twin, x, 17 * turn), plain(model, x, 17 * turn))
    assert sequences(own) == 2


@pytest.mark.parametrize(
    "t", [7, 7.5, torch.tensor(7), torch.tensor([7, 7]), torch.tensor([3, 900]), torch.tensor(7.5)]
)
def test_every_form_of_t(model: nn.Module, t: object) -> None:
    twin, _ = fresh(model)
    for seed in range(4):
        x = noise(2, 3, 16, 16, seed=seed)
        assert torch.equal(call(twin, x, t), plain(model, x, t))


def test_t_and_labels_are_read_anew_at_every_call() -> None:
    labelled = make(num_class_embeds=5)
    twin = lower.lower(labelled, artifact_of(make(num_class_embeds=5)))
    own = twin.__dict__["forward"]
    x = noise(2, 3, 16, 16)
    for t, labels in ((5, [0, 1]), (9, [2, 2]), (700, [4, 0]), (torch.tensor([8, 2]), [1, 3])):
        inputs = {"class_labels": torch.tensor(labels)}
        for _ in range(3):
            assert torch.equal(call(twin, x, t, **inputs), plain(twin, x, t, **inputs))
    assert sequences(own) == 2


def test_one_tensor_in_two_places_is_not_taken_for_two() -> None:
    torch.manual_seed(0)
    float_model, text = conditional().eval(), noise(1, 7, 32, seed=4)
    x = noise(1, 4, 16, 16)
    artifact, _ = quantized(float_model, scheme("w8a8"), lambda t: float_model(x, t, text).sample)
    twin = lower.lower(float_model, artifact)
    own = twin.__dict__["forward"]
    shapes = ((16, 16, 16), (16, 16, 16), (16, 8, 8), (32, 8, 8))
    middle = noise(1, 32, 8, 8, seed=3)
    first, second, third, fourth = (noise(1, *shape, seed=7 + i) for i, shape in enumerate(shapes))
    for residuals in ((first, first, third, fourth), (first, second, third, fourth)):
        inputs = {
            "encoder_hidden_states": text,
            "down_block_additional_residuals": residuals,
            "mid_block_additional_residual": middle,
        }
        for _ in range(4):
            assert torch.equal(call(twin, x, 5, **inputs), plain(twin, x, 5, **inputs))
    assert sequences(own) == 2


def test_autocast_leaves_nothing_behind(model: nn.Module) -> None:
    twin, own = fresh(model)
    x = noise(1, 3, 16, 16)
    want = call(fresh(model)[0], x, 3)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            call(twin, x, 3)
    assert sequences(own) == 0
    for _ in range(4):
        assert torch.equal(call(twin, x, 3), want)


def test_tensors_loaded_into_a_part_are_seen(model: nn.Module) -> None:
    twin, _ = fresh(model)
    x = noise(1, 3, 16, 16)
    for _ in range(4):
        before = call(twin, x, 3)
    part = twin.time_embedding.linear_1
    part.load_state_dict({name: value.flip(0) for name, value in part.state_dict().items()})
    after = call(twin, x, 3)
    assert not torch.equal(before, after)
    assert torch.equal(after, call(fresh(twin)[0], x, 3))


def test_outputs_come_in_the_form_that_was_asked_for(model: nn.Module) -> None:
    twin, _ = fresh(model)
    x = noise(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            out = twin(sample=x, timestep=3)
            assert torch.equal(out.sample, plain(model, x, 3))
            assert type(out).__name__ == "UNet2DOutput"


def test_the_result_is_nobody_elses_memory(model: nn.Module) -> None:
    twin, _ = fresh(model)
    x = noise(1, 3, 16, 16)
    want = plain(model, x, 3)
    for _ in range(4):
        call(twin, x, 3).zero_()
    assert torch.equal(call(twin, x, 3), want)


def test_who_watches_sees_every_operation(model: nn.Module) -> None:
    twin, own = fresh(model)
    x, seen = noise(1, 3, 16, 16), []
    for _ in range(3):
        call(twin, x, 3)
    handle = twin.mid_block.register_forward_hook(lambda *_: seen.append("hook"))
    call(twin, x, 3)
    handle.remove()
    assert seen == ["hook"]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        call(twin, x, 3)
    assert len(seen) > 50
    seen.clear()
    root = twin.register_forward_hook(lambda *_: seen.append("root"))
    call(twin, x, 3)
    root.remove()
    assert seen == ["root"]
    assert sequences(own) == 1


def test_what_changes_under_a_sequence_ends_it(model: nn.Module) -> None:
    twin, _ = fresh(model)
    x = noise(1, 3, 16, 16)
    for _ in range(3):
        before = call(twin, x, 3)
    layer = twin.up_blocks[0].resnets[0].conv2
    layer.weight_scale.mul_(1.5)
    layer.forget()
    after = [call(twin, x, 3) for _ in range(3)]
    assert not torch.equal(before, after[0])
    assert all(torch.equal(out, after[0]) for out in after)
    block = twin.mid_block.resnets[0]
    block.forward = lambda hidden, temb=None: hidden
    other = call(twin, x, 3)
    assert not torch.equal(other, after[0])
    assert torch.equal(other, plain(twin, x, 3))


def test_loading_other_tensors_begins_anew(model: nn.Module) -> None:
    twin, _ = fresh(model)
    x = noise(1, 3, 16, 16)
    for _ in range(3):
        before = call(twin, x, 3)
    state = {name: value.clone() for name, value in twin.state_dict().items()}
    state["conv_out.bias"] += 1
    twin.load_state_dict(state)
    for _ in range(3):
        after = call(twin, x, 3)
    torch.testing.assert_close(after, before + 1)


def test_gradients_and_meta_devices_go_their_own_way(model: nn.Module) -> None:
    twin, own = fresh(model)
    for _ in range(3):
        twin(noise(1, 3, 16, 16), 3)
    assert sequences(own) == 0


def test_kinds_of_calls_are_forgotten_in_order(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "KEPT_KINDS", 2)
    twin, own = fresh(model)
    for batch in (1, 2, 3):
        for _ in range(3):
            call(twin, noise(batch, 3, 16, 16), 3)
    assert len(own.sequences) == 2


def record(function, *inputs: Tensor) -> tuple[Tensor, object]:
    recording = Recording(inputs)
    with torch.no_grad(), recording:
        out = function(*inputs)
    return out, recording.sequence(len(inputs), [out])


CONSTANT = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.cat([x, y * 2], 1).split([1, 4, 1], 1)[1] + 1,
        lambda x, y: (x + y).clone().mul_(3).add_(x, alpha=2)[:, 1:].to(torch.bfloat16).float() / 3,
        lambda x, y: (
            torch.nn.functional.pad(x, (1, 0), value=0.5).relu_()[:, :3] - CONSTANT + y.view(-1).view(2, 3)
        ),
        lambda x, y: torch.nn.functional.linear(x, CONSTANT) @ y + torch.zeros(2, 3).fill_(2.0),
        lambda x, y: x.expand(4, 2, 3).transpose(0, 1).reshape(2, -1).sum(-1, keepdim=True) + y.amax(),
        lambda x, y: torch.where(x > 0, y, CONSTANT) + torch.arange(3, dtype=torch.float32),
    ],
)
def test_sequences_of_torch_operations(function) -> None:
    x, y = noise(2, 3, seed=1), noise(2, 3, seed=2)
    out, sequence = record(function, x, y)
    assert torch.equal(sequence.run([x, y])[0], out)
    x, y = noise(2, 3, seed=3), noise(2, 3, seed=4)
    former = x.clone(), y.clone()
    assert torch.equal(sequence.run([x, y])[0], function(x, y))
    assert torch.equal(x, former[0])
    assert torch.equal(y, former[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x + torch.randn(2, 3),
        lambda x: CONSTANT.clone().copy_(x) if x.sum() > 0 else x,
        lambda x: CONSTANT,
        lambda x: x + torch.ones(2, 3).index_put_((torch.tensor([0]),), x[0, 0]),
        lambda x: x + CONSTANT.mul_(1.0),
        lambda x: torch.cat([x, CONSTANT]),
        lambda x: x[:, torch.tensor([2, 0])],
    ],
)
def test_what_depends_on_values_or_chance_is_refused(function) -> None:
    with pytest.raises(UnrecordableError):
        record(function, noise(2, 3))


def test_products_of_onednn_with_their_empty_list_of_numbers() -> None:
    weight = torch.arange(512).remainder(101).sub(50).to(torch.int8).reshape(16, 32)
    packed, scales = torch.ops.onednn.qlinear_prepack(weight, [2, 32]), torch.full((16,), 0.1)

    def product(codes: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise.default(
            codes, 0.5, 3, packed, scales, torch.zeros(16, dtype=torch.int32), None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip

    out, sequence = record(product, torch.arange(64, dtype=torch.uint8).reshape(2, 32))
    other = torch.arange(64, 128, dtype=torch.uint8).reshape(2, 32)
    assert torch.equal(sequence.run([other])[0], product(other))
    assert not torch.equal(product(other), out)


def test_what_no_output_needs_is_left_out() -> None:
    _, sequence = record(lambda x: (x.exp(), x + 1)[1], noise(2, 3))
    assert sequence.size() == 1


def test_a_wrong_number_of_inputs_is_an_error() -> None:
    _, sequence = record(lambda x: x + 1, noise(2, 3))
    with pytest.raises(RuntimeError, match="expected 1 inputs"):
        sequence.run([])


def test_labels_reach_a_model_by_position_or_name() -> None:
    labelled = make(num_class_embeds=5)
    twin = lower.lower(labelled, artifact_of(make(num_class_embeds=5)))
    inputs = inputs_of(twin)
    with torch.no_grad():
        want = plain(twin, inputs["sample"], 4, class_labels=inputs["class_labels"])
        for _ in range(3):
            assert torch.equal(twin(inputs["sample"], 4, inputs["class_labels"], False)[0], want)
