"""Transformer blocks that run as chains: the numbers of the unfused route, on the ways that were meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.models.denoiser import Denoiser
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.blocks.basic import Bare, Placed
from stepquant.runtime.blocks.chain import Chain, chains
from stepquant.runtime.blocks.joined import Joined
from stepquant.runtime.blocks.modulated import Modulated
from stepquant.runtime.blocks.one_stream import Frames
from stepquant.runtime.coverage import coverage
from stepquant.runtime.cpu.lasting import TEXTS, Recorded, same_bits
from stepquant.runtime.lower import lower, prepare
from tests.models import every
from tests.models.tiny import CASES
from tests.runtime.synthetic import quantized, share_of_able

needs_extension = pytest.mark.skipif(not ops.compiled(), reason="integer layers need the kernels here")

KINDS = {
    "class_transformer": {"Zero": 3},
    "pixart_sigma": {"Single": 2},
    "sd3_dual": {"Joint": 3, "Turned": 5},
    "flux": {"Joint": 1, "Wide": 2, "Turned": 3},
    "qwen_image": {"Named": 2, "Turned": 2},
    "wan": {"Float32": 2, "Turned": 4},
    "z_image": {"Sandwich": 4, "Turned": 4},
    "lumina2": {"ZeroSandwich": 4, "FeedForward": 4, "Turned": 4},
    "bria": {"Joint": 1, "Wide": 2, "Turned": 3},
    "chroma": {"Pruned": 1, "WidePruned": 2, "Turned": 3},
    "flux2": {"Given": 1, "ParallelBlock": 2, "Turned": 1, "Parallel": 2},
    "hunyuan_image": {"Behind": 1, "WideBehind": 2, "Turned": 3},
    "hunyuan_video": {"Behind": 1, "WideBehind": 2, "Turned": 3},
    "hunyuan_video15": {"Behind": 2, "Turned": 2},
    "wan_from_image": {"Float32": 2, "Turned": 2},
    "wan_controlled": {"Float32": 3, "Controlled": 2, "Turned": 10},
    "skyreels": {"Float32": 2, "Turned": 4},
    "cosmos": {"Thrice": 2, "Turned": 4},
    "allegro": {"Places": 2},
    "latte": {"Single": 4},
    "ltx": {"Root": 2, "Turned": 4},
    "stable_audio": {"BareTurned": 2},
    "cogvideox": {"Front": 2, "Turned": 2},
    "cogview4": {"FrontTurns": 2, "Turned": 2},
    "cogview3": {"FrontHalves": 2, "Turned": 2},
    "auraflow": {"JointStart": 1, "Start": 2, "Turned": 3},
    "hunyuandit": {"Shifted": 4, "Turned": 8},
    "krea2": {"ScaleFirst": 2, "Alone": 2, "Turned": 4},
    "mochi": {"JointSandwich": 2, "Joined": 2},
    "sana": {"Image": 2, "Linear": 2, "Joined": 2, "ImageFeedForward": 2},
    "ConsisIDTransformer3DModel": {"Front": 2, "Turned": 2},
    "Flux3Transformer2DModel": {"FeedForward": 4, "Turned": 4},  # which nobody declared
}


def lowered(name: str, split: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, arguments, *_ = CASES[name]() if name in CASES else every.BUILDERS[name]()
    for table in (value for key, value in model.named_parameters() if key.endswith("scale_shift_table")):
        nn.init.normal_(table)
    denoiser = Denoiser(model.eval())
    artifact, _ = quantized(model, scheme("w8a8"), lambda _: denoiser.predict(arguments), split)
    return lower(deepcopy(model), artifact, torch.float32), arguments


def predicted(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return Denoiser(model).predict(arguments)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often chains went the way of their class; the processor of an attention always does."""
    found: Counter[str] = Counter()
    former: Callable[..., Any] = Chain.unfused

    def unfused(chain: Chain, *args: Any, **kwargs: Any) -> Any:
        found[type(chain).__name__] += type(chain) is not Joined
        return former(chain, *args, **kwargs)

    monkeypatch.setattr(Chain, "unfused", unfused)
    return found


@needs_extension
@pytest.mark.parametrize("name, split", [*((name, False) for name in KINDS), ("flux", True), ("flux2", True)])
def test_a_chain_gives_the_numbers_of_the_layers_alone(name: str, split: bool, taken: Counter[str]) -> None:
    model, arguments = lowered(name, split)
    found = Counter(type(chain).__name__ for chain in chains(model))
    assert {kind: found[kind] for kind in KINDS[name]} == KINDS[name]
    fused = [predicted(model, arguments) for _ in range(3)]  # as it is, recorded, replayed
    assert not taken.total()
    assert all(torch.equal(one, fused[0]) for one in fused)
    seen = coverage(model, arguments)
    assert share_of_able(seen) == 1.0
    alone = predicted(prepare(model, torch.float32, fuse=False), arguments)
    # One rounding that falls the other way changes far more than the order of sums in float32.
    assert float((fused[0] - alone).norm() / alone.norm()) < 2e-2


@needs_extension
@pytest.mark.parametrize(
    "name, kind, count", [("text_to_video", Bare, 5), ("animated", Placed, 7), ("image_to_video", Frames, 4)]
)
def test_blocks_over_the_frames_of_u_nets_give_the_numbers_of_their_layers(
    name: str, kind: type[Chain], count: int, taken: Counter[str]
) -> None:
    """One by one: from the first to the last layer of a U-Net, roundings that fall the other way grow."""
    model, arguments = lowered(name)
    found = [chain for chain in chains(model) if type(chain) is kind]
    assert len(found) == count
    predicted(model, arguments)
    assert not taken[kind.__name__]
    for chain in found:
        x = torch.randn(6, 4, chain.module.norm1.normalized_shape[0])
        given = (3, torch.randn(8, 5, chain.module.attn2.cross_attention_dim)) if kind is Frames else ()
        with torch.no_grad():
            fused, alone = chain.fused(x.clone(), *given), chain.unfused(x.clone(), *given)
        assert float((fused - alone).norm() / alone.norm()) < 1e-3


# How many passes over tokens a block saves at least, beside those that its attentions and feed-forwards save by themselves.
SAVED = {
    "cogvideox": 13,
    "cogview4": 18,
    "cogview3": 13,
    "auraflow": 16,
    "hunyuandit": 7,
    "sana": 12,
    "krea2": 8,
    "mochi": 16,
    "animated": 4,
    "image_to_video": 8,
}


class Passes(TorchDispatchMode):
    """The number of operations that return no view."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@needs_extension
@pytest.mark.parametrize("name", SAVED)
def test_norms_gates_and_residuals_are_no_passes_of_their_own(name: str) -> None:
    model, arguments = lowered(name)
    blocks = [chain for chain in chains(model) if isinstance(chain, Modulated)]

    def passes() -> int:
        predicted(model, arguments)
        with torch.no_grad(), Passes() as seen:
            model.__dict__["forward"].own_forward(**arguments)
        return seen.count

    fused = passes()
    for block in blocks:
        block.fused = block.unfused  # type: ignore[method-assign]
    assert passes() - fused >= SAVED[name] * len(blocks)


@needs_extension
@pytest.mark.parametrize(
    "name, kinds",
    [("lumina2", (torch.bool, torch.int64)), ("qwen_image", (torch.bool, torch.int64, torch.float32))],
)
def test_masks_of_a_text_are_of_any_type(name: str, kinds: tuple[torch.dtype, ...]) -> None:
    model, arguments = lowered(name)
    (key,) = (one for one in arguments if one.endswith("mask"))
    masks = [arguments | {key: arguments[key].to(kind)} for kind in kinds]
    wanted, *others = [predicted(model, given) for given in masks]
    assert all(torch.equal(one, wanted) for one in others)
    assert not torch.equal(predicted(model, arguments | {key: torch.ones_like(arguments[key])}), wanted)


@needs_extension
def test_projections_share_one_product_and_the_gate_is_in_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = lowered("class_transformer")
    products: list[tuple[int, bool]] = []
    former = ops.Product.linear

    def linear(product: Any, codes: Tensor, *args: Any) -> Tensor:
        products.append((len(product.scale), len(args) > 3 and args[3] is not None))
        return former(product, codes, *args)

    monkeypatch.setattr(ops.Product, "linear", linear)
    predicted(model, arguments)
    width = model.transformer_blocks[0].attn1.to_q.out_features
    inner = model.transformer_blocks[0].ff.net[2].in_features
    assert products[:4] == [(3 * width, False), (width, True), (inner, False), (width, True)]


class Doubling(AttnProcessor2_0):
    """A processor that computes with what it is given."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert hidden_states.is_floating_point()
        return super().__call__(attn, 2 * hidden_states, *args, **kwargs)


@needs_extension
def test_blocks_that_are_watched_or_changed_run_as_their_class(taken: Counter[str]) -> None:
    model, arguments = lowered("class_transformer")
    plain, block = predicted(model, arguments), model.transformer_blocks[1]
    seen: list[torch.dtype] = []
    hook = block.attn1.to_k.register_forward_hook(lambda _, given, __: seen.append(given[0].dtype))
    # Sums in another order: a rounding may fall the other way.
    assert (predicted(model, arguments) - plain).norm() < 0.02 * plain.norm()
    assert seen == [torch.float32]
    assert taken == {"Zero": 1, "Joined": 0}
    hook.remove()
    taken.clear()
    block.attn1.processor = Doubling()
    assert not torch.equal(predicted(model, arguments), plain)
    assert taken["Zero"]


@needs_extension
def test_calls_that_take_lists_are_recorded() -> None:
    model, arguments = lowered("z_image")
    replay: Any = model.__dict__["forward"]
    for _ in range(2):
        predicted(model, arguments)
    (recorded,) = replay.sequences.values()
    assert isinstance(recorded, Recorded)
    assert recorded.sequences[TEXTS].size() > 20  # the blocks over the text alone
    other = arguments | {"x": [one + 1 for one in arguments["x"]]}
    with torch.no_grad():
        assert same_bits(
            model(**other, return_dict=False)[0], replay.own_forward(**other, return_dict=False)[0]
        )


@needs_extension
def test_whoever_watches_a_norm_or_a_product_of_turned_heads_sees_floats() -> None:
    model, arguments = lowered("wan")
    plain, attention = predicted(model, arguments), model.blocks[0].attn1
    seen: list[torch.dtype] = []
    for watched in (attention.norm_q, attention.product):
        hook = watched.register_forward_hook(lambda _, given, __: seen.append(given[0].dtype))
        assert (predicted(model, arguments) - plain).norm() < 0.02 * plain.norm()
        hook.remove()
    assert seen == [torch.float32] * 2
    assert torch.equal(predicted(model, arguments), plain)


@needs_extension
def test_a_copy_whose_tensors_come_and_go_gives_the_same_bytes() -> None:
    model, arguments = lowered("class_transformer")
    offloaded = accelerate.cpu_offload(deepcopy(model), "cpu", offload_buffers=True)
    with torch.no_grad():
        found = offloaded(**arguments, return_dict=False)[0]
        assert torch.equal(found, model(**arguments, return_dict=False)[0])
    assert offloaded.transformer_blocks[0].attn1.to_k.weight.is_meta
