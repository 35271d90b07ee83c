"""Back to float: every integer layer becomes the layer of torch whose weight its integers stand for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from stepquant.errors import RuntimeSupportError
from stepquant.models.attention import NoFusing
from stepquant.models.products import give_back
from stepquant.models.split import SplitLayer
from stepquant.runtime.adapters.present import INNER, adapters_in
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.embedding import IntegerEmbedding
from stepquant.runtime.layers.floating import float_layer
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.offloaded import check_present
from stepquant.runtime.layers.packed import PackedWeight
from stepquant.runtime.layers.tabled import Tabled
from stepquant.runtime.lower import OWN_METHODS, unbind
from stepquant.runtime.parameters import MARK, FloatBuffers

OF_QUANTIZING = ("quantization_config", "_pre_quantization_dtype")


FOLLOWED = (None, torch.float32, torch.bfloat16)


class Living:
    """What diffusers asks of a quantizer when a model is loaded in a dtype, is saved, or becomes float again."""

    asked: torch.dtype | None = None

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # what is float, as adapters: gradients pass straight through the rounding

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """What is stored is read as it is; float parts are cast behind that."""
        if torch_dtype not in FOLLOWED:
            raise RuntimeSupportError(
                f"dtype={torch_dtype}: the float parts of a quantized model cannot follow it",
                expected="torch.float32 or torch.bfloat16",
                fix="dtype=torch.bfloat16, or for the other parts alone: "
                "dtype={'default': torch.float16, 'unet': torch.bfloat16}",
            )
        self.asked = torch_dtype
        return torch.float32

    def follow(self, model: nn.Module) -> bool:
        """Cast the float parts to what was asked for; packed tensors, scales and tables stay. Whether anything was."""
        floats = [own for own in model.parameters() if own.is_floating_point()]
        if self.asked in (None, torch.float32) or not floats:
            return False
        for own in floats:  # of a network that is packed as a whole the mark of its dtype
            own.data = own.data.to(self.asked)
        return True

    def _dequantize(self, model: Any) -> Any:
        return dequantize(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        adapted = [name for name in state_dict if f".{INNER}." in name]
        if adapted:
            raise RuntimeSupportError(
                "save_pretrained(): adapters are loaded, and a quantized model is saved without them",
                where=adapted[0].partition(f".{INNER}.")[0],
                fix="pipe.save_lora_weights() if they have no file of their own, pipe.unload_lora_weights(), then save",
            )
        return state_dict, {}


def dequantize(model: Any) -> Any:
    """`model` in float32, in place, an ordinary model of diffusers; activations are no longer quantized."""
    check_dequantizable(model)
    unbind(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, IntegerLayer | IntegerEmbedding):
            model.set_submodule(path, float_layer(module))
        elif isinstance(module, IntegerProduct):
            attention: Any = model.get_submodule(path.rpartition(".")[0])
            give_back(attention)
            del attention.product
    for path, module in list(model.named_modules()):
        if isinstance(module, SplitLayer):
            model.set_submodule(path, unsplit(module))
        if isinstance(vars(module).get("fuse_projections"), NoFusing):
            del module.fuse_projections
        if isinstance(vars(module).get("parameters"), FloatBuffers):
            del module.parameters
    model._buffers.pop(MARK, None)
    if "steps" in model._modules:
        del model.steps
    for name in (*OWN_METHODS, "policy"):
        vars(model).pop(name, None)
    if hasattr(model, "_internal_dict"):
        kept = {name: value for name, value in model.config.items() if name not in OF_QUANTIZING}
        model._internal_dict = FrozenDict(kept)
    vars(model).pop("quantization_method", None)
    return model


def check_dequantizable(model: nn.Module) -> None:
    check_present(model, "dequantize()")
    for path, module in model.named_modules():
        if isinstance(module, Tabled):
            raise RuntimeSupportError(
                "dequantize(): a table holds what the time embedding becomes, and the layers that made it are gone",
                where=path,
                fix="load the float pipeline instead",
            )
        if isinstance(module, PackedWeight) and module.weight.is_meta:
            raise RuntimeSupportError(
                "dequantize(): the layers are offloaded",
                where=path,
                fix="pipe.remove_all_hooks() and pipe.to('cpu') before it",
            )
    if adapters_in(model):
        raise RuntimeSupportError(
            "dequantize(): adapters are loaded beside integer layers",
            fix="unload_lora() before it, and load them again behind it",
        )


def unsplit(split: SplitLayer) -> nn.Module:
    """The layer over the concatenation that was split into a sum."""
    first: Any = split.get_submodule("0")
    parts: list[Any] = list(split.children())
    weight = torch.cat([part.weight for part in parts], 1)
    if isinstance(first, nn.Linear):
        made: Any = nn.Linear(weight.shape[1], weight.shape[0], first.bias is not None, "meta")
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = {name: getattr(first, name) for name in names}
        bias = {"bias": first.bias is not None, "device": "meta"}
        made = type(first)(weight.shape[1], weight.shape[0], **geometry, **bias)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), first.bias
    return made.eval()  # type: ignore[no-any-return]
