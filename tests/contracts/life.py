"""The 15 checks that diffusers makes of its quantization backends, and its two of torch.compile, for one family each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant import hub
from stepquant.models.denoiser import prediction_of
from stepquant.quant.plan import Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime.layers.layer import IntegerLayer
from tests.models.tiny import CASES
from tests.runtime.synthetic import quantized, relative


class Life:
    """A family before and after quantizing, and what it is called with."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model, self.arguments, _ = CASES[name]()
        self.model.eval()
        self.served = self.quantize()
        with torch.no_grad():
            self.exact, self.wanted = self.call(self.model), self.call(self.served)

    def call(self, model: Any) -> Tensor:
        return prediction_of(model(**self.arguments, return_dict=False))

    def quantize(self, *rules: Rule) -> Any:
        plan = scheme("w8a8").with_rules(rules) if rules else scheme("w8a8")
        artifact, _ = quantized(self.model, plan, lambda _: self.call(self.model))
        served = copy.deepcopy(self.model)
        hub.attach(served, artifact)
        return served

    def reloaded(self, folder: Path, **options: Any) -> Any:
        return type(self.model).from_pretrained(folder, **options)

    def near(self, model: Any) -> None:
        with torch.no_grad():
            assert torch.equal(self.call(model), self.wanted)


def num_parameters(life: Life, _: Path) -> None:
    assert life.served.num_parameters() == life.model.num_parameters()


def memory_footprint(life: Life, _: Path) -> None:
    assert life.model.get_memory_footprint() > 1.2 * life.served.get_memory_footprint()


def inference(life: Life, _: Path) -> None:
    assert relative(life.wanted, life.exact) < 0.25


def dtype_assignment(life: Life, _: Path) -> None:
    served = life.served
    for cast in (
        lambda: served.to(torch.float16),
        lambda: served.to("cpu", torch.float16),
        served.float,
        served.half,
    ):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    served.to("cpu")
    life.near(served)


def lora_inference(life: Life, _: Path) -> None:
    """A LoRA adds what it adds to the float model, and leaves nothing behind."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    options = {"r": 4, "lora_alpha": 2, "init_lora_weights": False}
    config = peft.LoraConfig(target_modules=["to_q", "to_v", "to_out.0"], **options)
    model, served = copy.deepcopy(life.model), copy.deepcopy(life.served)
    takes_lora = hasattr(model, "add_adapter")
    for twin in (model, served):
        torch.manual_seed(1)
        # Of models that diffusers loads no LoRA into, peft itself takes care.
        twin.add_adapter(config) if takes_lora else peft.inject_adapter_in_model(config, twin)
    with torch.no_grad():
        exact, rounding = life.call(model), relative(life.wanted, life.exact)
        added = relative(exact, life.exact)
        assert added > 2 * rounding, "the adapter matters"
        # A part of it leaves the ranges that were measured without an adapter.
        assert relative(life.call(served), exact) < 1.5 * rounding + 0.1 * added
    if takes_lora:
        served.unload_lora()
        life.near(served)


def serialization(life: Life, folder: Path) -> None:
    life.served.save_pretrained(folder, variant="int8")
    life.near(life.reloaded(folder, variant="int8", low_cpu_mem_usage=True))


def sharded_serialization(life: Life, folder: Path) -> None:
    life.served.save_pretrained(folder, max_shard_size=life.served.get_memory_footprint() // 2)
    assert len(list(folder.glob("*.safetensors"))) > 1
    life.near(life.reloaded(folder))


def config_serialization(life: Life, _: Path) -> None:
    config = life.served.config["quantization_config"]
    assert config.to_dict() == config.to_diff_dict()
    assert '"quant_method": "stepquant"' in config.to_json_string()


def original_dtype(life: Life, folder: Path) -> None:
    assert life.served.config["_pre_quantization_dtype"] == life.model.dtype


def quantized_layers(life: Life, _: Path) -> None:
    """Every linear that the plan does not keep in float is an integer one."""
    config = hub.config_of(life.served)
    linears = {path for path, module in life.model.named_modules() if isinstance(module, nn.Linear)}
    left = {path for path, module in life.served.named_modules() if isinstance(module, nn.Linear)}
    assert left == linears - set(config.layers)
    assert left < linears


def keep_modules_in_fp32(life: Life, folder: Path) -> None:
    """Scales, biases and tables stay as they are on disk, whatever dtype the float parts are asked in."""
    life.served.save_pretrained(folder)
    half = life.reloaded(folder, dtype=torch.bfloat16)
    packed = set(life.served.state_dict()) - {name for name, _ in type(half).named_parameters(half)}
    for name in packed:
        assert half.get_buffer(name).dtype == life.served.get_buffer(name).dtype
    assert {own.dtype for own in half.parameters()} <= {torch.bfloat16}
    with torch.no_grad():
        assert relative(life.call(half).float(), life.exact) < 0.25


def modules_to_not_convert(life: Life, _: Path) -> None:
    path = next(path for path in hub.config_of(life.served).layers)
    other = life.quantize(Rule(None, "test", path=path))
    assert not isinstance(other.get_submodule(path), IntegerLayer)
    assert other.get_memory_footprint() > life.served.get_memory_footprint()
    with torch.no_grad():
        assert relative(life.call(other), life.exact) < 0.25


def device_map(life: Life, folder: Path) -> None:
    life.served.save_pretrained(folder)
    for where in ("auto", "cpu"):
        loaded = life.reloaded(folder, device_map=where)
        assert loaded.hf_device_map
        assert loaded.device == torch.device("cpu")
    life.near(loaded)


def dequantize(life: Life, folder: Path) -> None:
    made = copy.deepcopy(life.served).dequantize()
    assert set(made.state_dict()) == set(life.model.state_dict())
    made.half().float().save_pretrained(folder)
    again = life.reloaded(folder)
    assert not hasattr(again, "hf_quantizer")
    with torch.no_grad():
        assert relative(life.call(again), life.exact) < 0.1


class Trained(nn.Module):
    """An adapter that a script of training puts around a layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.layer(x, *args) + self.up(self.down(x))


def training(life: Life, _: Path) -> None:
    served = copy.deepcopy(life.served)
    for module in list(served.modules()):
        for name in ("to_q", "to_k", "to_v"):
            if "Attention" in type(module).__name__ and getattr(module, name, None) is not None:
                setattr(module, name, Trained(getattr(module, name)))
    adapters = [module for module in served.modules() if isinstance(module, Trained)]
    with torch.amp.autocast("cpu", torch.bfloat16):
        life.call(served).norm().backward()
    assert all(adapter.up.weight.grad is not None for adapter in adapters)
    assert all(adapter.up.weight.grad.norm() > 0 for adapter in adapters[:1])


CHECKS: tuple[Callable[[Life, Path], None], ...] = (
    num_parameters,
    memory_footprint,
    inference,
    dtype_assignment,
    lora_inference,
    config_serialization,  # first: saving leaves a plain table in the model's configuration
    serialization,
    sharded_serialization,
    original_dtype,
    quantized_layers,
    keep_modules_in_fp32,
    modules_to_not_convert,
    device_map,
    dequantize,
    training,
)  # more of LoRA: tests/runtime/test_adapters.py; torch.compile: tests/runtime/test_compile.py
