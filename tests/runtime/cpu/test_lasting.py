"""What recorded calls keep of texts and of t: the bytes that a call without memory gives, and never those of another one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.models.denoiser import Denoiser
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.cpu import lasting
from stepquant.runtime.cpu.lasting import NUMBERS, TEXTS, Lasting, Recorded, bytes_of, same_bits
from stepquant.runtime.cpu.recording import Recording
from stepquant.runtime.lower import lower
from tests.models.tiny import CASES
from tests.runtime.synthetic import noise, quantized

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")

CONSTANT = torch.arange(6.0).reshape(2, 3) / 7


def shifted_view(x: Tensor, text: Tensor, t: Tensor) -> Tensor:
    room = torch.zeros(2, 3)
    room[:, :1].copy_(x[:, :1])
    return room + text.exp() * t


def unsafe_view(x: Tensor, text: Tensor, t: Tensor) -> Tensor:
    line = torch.ops.aten._unsafe_view(text * 2, [6])
    line.add_(x.reshape(-1))
    return line.reshape(2, 3) + t


# A function of x, a text and t, and how many operations follow from the text and from t alone.
FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int, int]] = {
    "both": (lambda x, text, t: x * (text @ CONSTANT.T @ CONSTANT).relu() + (t * 2).cos(), 4, 2),
    "together": (lambda x, text, t: x + text * t, 0, 0),
    "constants": (lambda x, text, t: x * torch.arange(3.0).sin() + CONSTANT * 2, 2, 0),
    "a copy that is written to": (lambda x, text, t: text.exp().add_(x) + text.cos() + t, 1, 0),
    "a copy that the text is written to": (lambda x, text, t: x + torch.zeros(2, 3).add_(text) * t, 2, 0),
    "a view that is written to": (shifted_view, 1, 0),
    "a view that nobody declared": (unsafe_view, 0, 0),
    "a constant that is written to": (
        lambda x, text, t: x + text @ (CONSTANT * 2).mul_(3).T @ CONSTANT,
        0,
        0,
    ),
    "parts": (lambda x, text, t: x + torch.cat(text.exp().split([1, 2], 1)[::-1], 1) * 2 + t, 4, 0),
    "no x": (lambda x, text, t: text * 2, 0, 0),
    "the text itself": (lambda x, text, t: x * text.t().t() + t.reshape(1), 2, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts_of_a_call_give_its_bytes(name: str) -> None:
    function, of_texts, of_numbers = FUNCTIONS[name]
    given = [noise(2, 3, seed=seed) for seed in (1, 2)] + [torch.tensor([3.0])]
    recording = Recording(given)
    with torch.no_grad(), recording:
        out = function(*given)
    call, memory = Recorded(recording, 3, out, [1], [2]), Lasting()
    sizes = [0 if call.sequences[own] is None else call.sequences[own].size() for own in (TEXTS, NUMBERS)]
    assert sizes == [of_texts, of_numbers]

    def same() -> None:
        want = function(*(one.clone() for one in given))
        made = call.run(given, memory.of(call, given))
        assert torch.equal(made, want)
        made.zero_()

    for seed in range(3):
        for x in (4, 5):
            given[0] = noise(2, 3, seed=10 * seed + x)
            same()
        given[1] = noise(2, 3, seed=seed)
        same()
        given[1].add_(1)
        same()
        given[2].mul_(1.5)
        same()


def test_lists_are_predicted_and_places_that_are_constants_are_looked_up_once() -> None:
    table = noise(4, 3, seed=5)

    def function(x: Tensor, text: Tensor, t: Tensor) -> list[Tensor]:
        angles = table[torch.arange(3, 1, -1)]
        return [x * angles + text, (x + t).view(-1)]

    given = [noise(2, 3, seed=1), noise(2, 3, seed=2), torch.tensor([3.0])]
    recording = Recording(given)
    with torch.no_grad(), recording:
        out = function(*given)
    call, memory = Recorded(recording, 3, out, [1], [2]), Lasting()
    assert [torch.equal(one, table[[3, 2]]) for one in call.fixed] == [True]
    for seed in range(2):
        given[0] = noise(2, 3, seed=seed)
        assert same_bits(call.run(given, memory.of(call, given)), function(*given))
        assert not same_bits(call.run(given, memory.of(call, given)), out[:1])


def recorded(function: Callable[..., Tensor], *given: Tensor) -> Recorded:
    recording = Recording(given)
    with torch.no_grad(), recording:
        out = function(*given)
    return Recorded(recording, len(given), out, [1], [2])


def test_texts_take_turns_and_are_let_go() -> None:
    x, t, texts = noise(2, 3), torch.tensor([1.0]), [noise(2, 3, seed=seed) for seed in range(3)]
    call, memory = recorded(lambda x, text, t: x + text.exp() + t, x, texts[0], t), Lasting()
    first = [memory.of(call, [x, text, t])[0] for text in texts[:2]]
    again = [memory.of(call, [x, text, t])[0] for text in texts[:2]]
    assert all(a is b for a, b in zip(first, again))
    memory.of(call, [x, texts[2], t])
    assert memory.of(call, [x, texts[0], t])[0] is not first[0]
    del texts
    gc.collect()
    memory.of(call, [x, noise(2, 3), t])
    assert len(memory.of_texts) == 1
    with torch.inference_mode():
        uncounted = noise(2, 3)
        before = memory.of(call, [x, uncounted, t])[0]
        uncounted.add_(1)
        assert not torch.equal(memory.of(call, [x, uncounted, t])[0], before)


def test_rows_of_t_take_no_more_room_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "KEPT_BYTES", 100)
    x, text = noise(2, 3), noise(2, 3)
    call = recorded(lambda x, text, t: x + text + t.expand(3, 3).exp()[:2], x, text, torch.tensor([1.0]))
    memory = Lasting()
    for _ in range(2):
        for t in range(4):  # 36 bytes each
            given = [x, text, torch.tensor([float(t)])]
            assert torch.equal(call.run(given, memory.of(call, given)), x + text + given[2].exp())
    assert len(memory.of_numbers[call]) == 2
    memory.drop(call)
    assert not memory.of_numbers
    assert memory.room == 100


@pytest.fixture(scope="module")
def pixart() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, arguments, _ = CASES["pixart_sigma"]()
    denoiser = Denoiser(model.eval())
    artifact, _ = quantized(model, scheme("w8a8"), lambda _: denoiser.predict(arguments))
    return lower(model, artifact, torch.float32), arguments


def test_a_transformer_reads_texts_once_and_sees_that_they_change(
    pixart: tuple[nn.Module, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = deepcopy(pixart[0]), dict(pixart[1])
    made: list[int] = []
    former = Lasting.text

    def text(memory: Lasting, call: Recorded, inputs: Any) -> list[Tensor]:
        known = list(memory.of_texts)
        found = former(memory, call, inputs)
        made.append(sum(all(one is not other for other in known) for one in memory.of_texts))
        return found

    monkeypatch.setattr(Lasting, "text", text)

    def call(**changed: Any) -> None:
        arguments.update(changed)
        with torch.no_grad():
            want = type(model).forward(model, **arguments, return_dict=False)[0]
            assert torch.equal(model(**arguments, return_dict=False)[0], want)

    for _ in range(4):
        call(hidden_states=torch.randn_like(arguments["hidden_states"]))
    assert made == [1, 0, 0]  # the first call was not recorded yet
    for t in (3, 700, 3):
        call(timestep=torch.full_like(arguments["timestep"], t))
    assert made[3:] == [0, 0, 0]
    words = arguments["encoder_hidden_states"]
    call(encoder_hidden_states=words * 2)
    words.mul_(3)
    call(encoder_hidden_states=words)
    assert made[6:] == [1, 1]
    layer = model.caption_projection.linear_1
    layer.weight_scale.mul_(2)
    for _ in range(3):
        call()
    assert made[8:] == [1, 0]


@pytest.mark.parametrize("x", [torch.tensor([7]), torch.tensor(7), torch.tensor([1.5, 2.0]).bfloat16()])
def test_values_are_known_by_their_bytes_however_they_lie(x: Tensor) -> None:
    same = x.reshape(-1)[:1].expand(3)
    assert bytes_of(same) == bytes_of(same.clone()) != bytes_of(same + 1)
    assert bytes_of(same[:1].expand(1)) == bytes_of(x.reshape(-1)[:1].clone())
