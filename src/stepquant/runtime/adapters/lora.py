"""peft's LoRA layers around integer layers: a low-rank float branch on the float input, and nothing quantized again.

peft chooses a layer's adapter by the layer's class and has no registry for those of others, so its choice is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.model import LoraModel
from torch import nn

from stepquant.errors import RuntimeSupportError
from stepquant.models.split import SplitLayer
from stepquant.runtime.layers.floating import float_kind, float_twin
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.tabled import Tabled

# How a LoRA may begin; the other ways decompose the weight of the layer, which is packed.
PLAIN_BEGINNINGS = (True, False, "gaussian")
INTO_FLOAT = "apply it to the float pipeline, pipe.fuse_lora() there, and quantize that"


class Branch:
    """An adapter beside an integer layer. peft sees a float layer of the same sizes wherever it asks for one."""

    base_layer: Any
    update_layer: Any

    def __init__(self, layer: IntegerLayer, adapter_name: str, **options: Any) -> None:
        super().__init__(float_twin(layer), adapter_name, **options)  # type: ignore[call-arg]
        self.base_layer = layer
        self.train(layer.training)  # type: ignore[attr-defined]

    def merge(self, *_: Any, **__: Any) -> None:
        raise cannot_fuse(type(self.base_layer).__name__)


def cannot_fuse(where: str) -> RuntimeSupportError:
    return RuntimeSupportError(
        "fuse_lora(): a LoRA cannot be fused into packed integers, whose rounding would swallow it",
        where=where,
        fix="leave fuse_lora() out: the LoRA runs beside the integers and loses nothing; or model.dequantize() first; or "
        + INTO_FLOAT,
    )


def adapted(kind: Any) -> Any:
    """The class of peft for layers of this kind, beside an integer layer."""

    class Adapted(Branch, kind):  # type: ignore[misc]
        def update_layer(self, adapter_name: str, *args: Any, config: Any, **options: Any) -> None:
            check_plain(config, adapter_name)
            layer = self.base_layer
            self.base_layer = float_twin(layer) if isinstance(layer, IntegerLayer) else layer
            try:
                super().update_layer(adapter_name, *args, config=config, **options)
            finally:
                self.base_layer = layer
            self.train(layer.training)

    Adapted.__name__ = Adapted.__qualname__ = f"Adapted{kind.__name__}"
    return Adapted


AdaptedLinear = adapted(peft_layers.Linear)
AdaptedConv1d = adapted(peft_layers.Conv1d)
AdaptedConv2d = adapted(peft_layers.Conv2d)
AdaptedConv3d = adapted(peft_layers.Conv3d)

ADAPTED: dict[type[nn.Module], Any] = {
    nn.Linear: AdaptedLinear,
    nn.Conv1d: AdaptedConv1d,
    nn.Conv2d: AdaptedConv2d,
    nn.Conv3d: AdaptedConv3d,
}


def check_plain(config: Any, name: str) -> None:
    """Refuse what needs the float weight of the layer."""
    asked = [one.name for one in fields(config) if one.metadata.get("is_lora_variant")]
    asked = [field for field in asked if getattr(config, field)]
    begins = config.init_lora_weights
    if begins not in PLAIN_BEGINNINGS:
        asked.append(f"init_lora_weights={begins!r}")
    if asked:
        raise RuntimeSupportError(
            f"adapter '{name}' asks for {', '.join(asked)}, which needs the layer's float weight",
            expected="a plain LoRA beside a quantized layer",
            fix=INTO_FLOAT,
        )


class Choice:
    """Takes the place of peft's choice of an adapter for a layer."""

    def __init__(self, own: Callable[..., nn.Module]) -> None:
        self.own = own

    def __call__(self, lora_config: Any, adapter_name: str, target: Any, **options: Any) -> nn.Module:
        kind = float_kind(target)
        if kind is not None:
            return ADAPTED[kind](target, adapter_name, config=lora_config, **options)  # type: ignore[no-any-return]
        if isinstance(target, SplitLayer | Tabled):
            how = "split in two" if isinstance(target, SplitLayer) else "replaced by a table of its outputs"
            raise RuntimeSupportError(
                f"adapter '{adapter_name}' is for a layer that quantizing has {how}",
                where=str(options.get("target_name") or type(target).__name__),
                fix=f"{INTO_FLOAT}; or train it for other layers",
            )
        return self.own(lora_config, adapter_name, target, **options)


def register() -> None:
    """Let peft put branches beside integer layers."""
    if not isinstance(LoraModel._create_new_module, Choice):
        LoraModel._create_new_module = staticmethod(Choice(LoraModel._create_new_module))
