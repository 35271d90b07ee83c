"""LoRA beside integer layers: in fused blocks and recorded calls, several at once, weighed, switched off, unloaded."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant import hub
from stepquant.errors import RuntimeSupportError
from stepquant.models.denoiser import Denoiser
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.lower import lower
from tests.contracts.test_families_quantize import Calls
from tests.contracts.test_families_quantize import quantized as quantized_by_calls
from tests.models.tiny import CASES, conditional
from tests.runtime.synthetic import noise, quantized, relative

peft = pytest.importorskip("peft", reason="LoRA needs peft")
get_peft_model_state_dict = peft.get_peft_model_state_dict

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.0.proj"]
X, TEXT = noise(2, 4, 16, 16), noise(2, 7, 32, seed=4)


@torch.no_grad()
def call(model: nn.Module, t: object = 3, **more: Any) -> Tensor:
    return model(X, t, encoder_hidden_states=TEXT, return_dict=False, **more)[0]


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, nn.Module]:
    """The float model, and the same in integers."""
    torch.manual_seed(0)
    model = conditional().eval()
    artifact, _ = quantized(model, scheme("w8a8"), lambda t: model(X, t, TEXT).sample)
    return model, lower(copy.deepcopy(model), artifact)


@pytest.fixture
def pair(twins: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(twins)  # type: ignore[return-value]


def add(model: Any, name: str, seed: int, layers: list[str] = LAYERS, **options: Any) -> None:
    model.add_adapter(peft.LoraConfig(r=4, target_modules=layers, **({"lora_alpha": 4} | options)), name)
    generator = torch.Generator().manual_seed(seed)
    for path, own in model.named_parameters():
        if f".{name}." in path:
            own.data = 0.1 * torch.randn(own.shape, generator=generator)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(model: nn.Module) -> Counter[str]:
    with Counting() as counting:
        call(model)
    return counting.seen


def test_loras_add_what_they_add_to_the_float_model(pair: tuple[nn.Module, nn.Module]) -> None:
    model, lowered = pair
    before, plain, operations = call(model), [call(lowered) for _ in range(3)][-1], counted(lowered)
    rounding = relative(plain, before)
    for twin in pair:
        add(twin, "one", 1)
    # The first call runs as it is written, the second is recorded, the third replayed.
    exact = call(model)
    assert relative(exact, before) > 4 * rounding, "the adapter matters"
    for _ in range(3):
        assert relative(call(lowered), exact) < 1.5 * rounding
    if ops.compiled():
        assert any(not isinstance(kept, bool | None) for kept in lowered.forward.sequences.values())
    assert counted(lowered)["stepquant.linear.default"] >= operations["stepquant.linear.default"]
    for twin in pair:
        add(twin, "two", 2)
        twin.set_adapters(["one", "two"], [0.7, 0.4])
    both = call(model)
    assert relative(both, exact) > 2 * rounding
    for _ in range(3):
        assert relative(call(lowered), both) < 1.5 * rounding
    half = call(model, cross_attention_kwargs={"scale": 0.5})
    for _ in range(3):
        assert relative(call(lowered, cross_attention_kwargs={"scale": 0.5}), half) < 1.5 * rounding
        assert relative(call(lowered), both) < 1.5 * rounding
    for leave in (lowered.disable_adapters, lowered.unload_lora):
        leave()
        for _ in range(3):
            assert torch.equal(call(lowered), plain)
    assert counted(lowered) == operations, "without an adapter not one operation more"


def test_a_branch_that_was_trained_on_takes_effect(pair: tuple[nn.Module, nn.Module]) -> None:
    lowered = pair[1]
    add(lowered, "one", 1)
    before = [call(lowered) for _ in range(3)][-1]
    with torch.no_grad():
        for path, own in lowered.named_parameters():
            if "time_emb_proj.lora_B" in path or "attn2.to_k.lora_B" in path:
                own.mul_(2)
    after = call(lowered)
    assert not torch.equal(after, before)
    assert torch.equal(after, call(copy.deepcopy(lowered)))


def test_a_layer_that_somebody_replaced_runs(pair: tuple[nn.Module, nn.Module]) -> None:
    """As scripts of training put adapters of their own there, without a word to anybody."""
    lowered, plain = pair[1], [call(pair[1]) for _ in range(3)][-1]
    attention = lowered.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_k = nn.Sequential(attention.to_k, nn.Tanh())
    for _ in range(3):
        assert not torch.equal(call(lowered), plain)
    attention.to_k = attention.to_k[0]
    assert torch.equal(call(lowered), plain)


def test_what_a_lora_cannot_do_says_what_to_do(pair: tuple[nn.Module, nn.Module]) -> None:
    lowered = pair[1]
    add(lowered, "one", 1)
    before = call(lowered)
    with pytest.raises(RuntimeSupportError, match=r"fuse_lora\(\)(.|\n)*do: leave fuse_lora\(\) out"):
        lowered.fuse_lora(0.5)
    assert torch.equal(call(lowered), before), "nothing was scaled before it was refused"
    with pytest.raises(RuntimeSupportError, match="'two' asks for use_dora(.|\n)*float weight"):
        add(lowered, "two", 2, use_dora=True)
    with pytest.raises(RuntimeSupportError, match="init_lora_weights='pissa'"):
        add(pair[1], "three", 2, ["to_q"], init_lora_weights="pissa")


def test_gradients_reach_adapters_and_pass_straight_through_the_rounding(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    found = []
    for twin in pair:
        twin.requires_grad_(False)
        add(twin, "one", 1)
        twin(X, 3, encoder_hidden_states=TEXT).sample.square().mean().backward()
        found.append(torch.cat([own.grad.flatten() for own in twin.parameters() if own.requires_grad]))
    assert relative(found[1], found[0]) < 0.2


def test_a_pipeline_loads_weighs_and_unloads_loras_of_files(text_pipeline: Any, tmp_path: Path) -> None:
    pipe, unet = text_pipeline, text_pipeline.unet
    inputs = noise(2, 4, 8, 8), 3, noise(2, 77, 32, seed=4)
    artifact, _ = quantized(unet, scheme("w8a8"), lambda _: unet(*inputs).sample)
    trained = copy.deepcopy(unet)
    add(trained, "default", 1, ["to_q", "to_k", "to_v", "to_out.0"], lora_alpha=16)
    weights = get_peft_model_state_dict(trained)
    pipe.save_lora_weights(
        tmp_path / "lora", {name: 4 * value if "lora_B" in name else value for name, value in weights.items()}
    )
    hub.attach(unet, artifact)

    @torch.no_grad()
    def predict(model: nn.Module) -> Tensor:
        return model(*inputs).sample

    plain = predict(unet)
    for name in ("one", "two"):
        pipe.load_lora_weights(tmp_path / "lora", adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.7, 0.3])  # together what one is alone
    assert relative(predict(unet), predict(trained)) < 0.05 < relative(predict(unet), plain)
    with pytest.raises(RuntimeSupportError, match=r"save_pretrained\(\): adapters are loaded"):
        unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(RuntimeSupportError, match=r"dequantize\(\): adapters are loaded"):
        unet.dequantize()
    with pytest.raises(RuntimeSupportError, match=r"fuse_lora\(\)"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(predict(unet), plain)
    with pytest.raises(RuntimeSupportError, match=r"add_adapter\(\): this kind of adapter"):
        unet.add_adapter(peft.LoKrConfig(r=2, alpha=2, target_modules=["to_q"]), "kronecker")
    for cast in (unet.bfloat16, unet.double):
        with pytest.raises(RuntimeSupportError, match="cannot be cast to"):
            cast()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_fused_blocks_of_transformers_add_loras_too(name: str) -> None:
    """Of attentions and feed-forwards; afterwards blocks are fused again."""
    torch.manual_seed(0)
    model, arguments, _ = CASES[name]()
    denoiser = Denoiser(model.eval())
    artifact, _ = quantized_by_calls(denoiser, Calls((arguments,)))
    served = Denoiser(lower(copy.deepcopy(model), artifact, torch.float32))
    before = denoiser.predict(arguments)
    plain = [served.predict(arguments) for _ in range(3)][-1]
    rounding = relative(plain, before)
    for layers in (["to_q", "to_out.0"], ["net.0.proj", "net.2"]):
        for twin in (denoiser.model, served.model):
            add(twin, "one", 1, layers, lora_alpha=16)
        exact = denoiser.predict(arguments)
        assert relative(exact, before) > 2 * rounding, "the adapter matters"
        for _ in range(3):
            # A part of it leaves the ranges that were measured without an adapter.
            assert relative(served.predict(arguments), exact) < 1.5 * rounding + 0.1 * relative(exact, before)
        for twin in (denoiser.model, served.model):
            twin.unload_lora()  # type: ignore[operator]
        for _ in range(3):
            assert torch.equal(served.predict(arguments), plain)
