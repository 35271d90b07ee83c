"""Lower a float model to integers: swap its layers, fill in the artifact's tensors, choose kernels, fuse chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import Artifact, LayerSpec, ProductSpec, StepSpec, bounds_of
from stepquant.core.bounds import check_tensors, check_values
from stepquant.core.entries import AGAIN
from stepquant.core.grid import GridError
from stepquant.errors import ArtifactError, ModelError, RuntimeSupportError
from stepquant.models.attention import KeepProduct, NoFusing, rebind
from stepquant.models.blocks.structure import Structure, roles, structure
from stepquant.models.denoiser import device_of
from stepquant.models.families.registry import family_of
from stepquant.models.families.roles import PRODUCTS
from stepquant.models.split import find, split_concats
from stepquant.runtime.attend import Attention, Readers
from stepquant.runtime.convolutions import IntegerConv1d, IntegerConv2d, channels_last
from stepquant.runtime.fused import Chain, Done, NormOut, Resample, Residual, Up
from stepquant.runtime.intact import check_steps, own_bounds
from stepquant.runtime.layers import IntegerLayer, IntegerLinear
from stepquant.runtime.product import IntegerProduct
from stepquant.runtime.replay import Replay
from stepquant.runtime.steps import StepForward, StepTensors
from stepquant.runtime.stored import versions_of
from stepquant.runtime.texts import Texts
from stepquant.runtime.times import TableColumn, Tabled, TimeRows, TimeTable
from stepquant.runtime.transformer import Block, Transformer

# Layers whose output meets the stream inside the model; all others emit the dtype that they receive.
INTO_STREAM = ("stem", "modulate", "context", "k_text", "v_text", "k_added", "v_added", "q_added")

# In models built of residual units these are a sliver of the weights; elsewhere they may be a third of them.
SMALL = ("stem", "time", "modulate", "cond")

LAYERS: dict[type[nn.Module], type[IntegerLayer]] = {
    nn.Linear: IntegerLinear,
    nn.Conv1d: IntegerConv1d,
    nn.Conv2d: IntegerConv2d,
}


def skeleton(
    model: nn.Module,
    layers: Mapping[str, LayerSpec],
    products: Mapping[str, ProductSpec],
    splits: Mapping[str, tuple[int, ...]],
    steps: StepSpec | None = None,
) -> nn.Module:
    """Put runtime modules with empty buffers of the right shape into `model`, in place; the meta device will do."""
    split_concats(model, splits)
    device, groups = device_of(model), steps.groups if steps else 1
    for path, spec in layers.items():
        model.set_submodule(path, integer_layer(find(model, path), spec, path, groups))
    for path, product in products.items():
        attention = find(model, path)
        if not isinstance(attention, PRODUCTS):
            raise ArtifactError(
                f"'{path}' is no attention, and has no product", got=type(attention).__name__, fix=AGAIN
            )
        attention.product = IntegerProduct(product, device_of(attention), groups)
        rebind(attention, attention.product, path)
        attention.set_processor = KeepProduct(attention)  # type: ignore[assignment]
    for path in {path.rpartition(".")[0] for path in layers}:
        if hasattr(type(model.get_submodule(path)), "fuse_projections"):
            model.get_submodule(path).fuse_projections = NoFusing(path)  # type: ignore[assignment]
    if steps is not None:
        check_steps(model, steps)
        if steps.table:
            for path in structure(model).time_layers():
                model.set_submodule(path, Tabled())
        model.steps = StepTensors(steps, device)
    return model


def lower(model: nn.Module, artifact: Artifact, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """`model` in integers, in place."""
    skeleton(model, artifact.layers, artifact.products, artifact.splits, artifact.steps)
    own = own_tensors(model)
    bounds = bounds_of(artifact.layers, artifact.products, artifact.steps)
    check_tensors(artifact.tensors, own, "artifact", bounds)
    check_values(artifact.tensors, bounds, "artifact")
    for name, value in artifact.tensors.items():
        own[name].copy_(value)
    return prepare(model, dtype)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of all runtime modules by their names in the state dict."""
    return {
        f"{path}.{name}": value
        for path, module in runtime_modules(model).items()
        for name, value in module.named_buffers(recurse=False)
    }


def runtime_modules(model: nn.Module) -> dict[str, IntegerLayer | IntegerProduct | StepTensors]:
    kinds = (IntegerLayer, IntegerProduct, StepTensors)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def prepare(model: nn.Module, dtype: torch.dtype = torch.bfloat16, fuse: bool = True) -> nn.Module:
    """Choose kernels and dtypes for the tensors that `model` now holds, and fuse what its structure declares."""
    model.eval().requires_grad_(False)
    unbind(model)
    role_of, chains = roles(model), structure(model)
    hold = bool(chains.residuals)
    for path, module in model.named_modules():
        role = role_of.get(path, "")
        emit = torch.float32 if role == "head" else dtype if role in INTO_STREAM else None
        if isinstance(module, IntegerLayer):
            module.emit, module.holds = emit, hold and role in SMALL
        if isinstance(module, IntegerLayer | IntegerProduct):
            module.forget()
            module.prepared()
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and (
            emit or dtype != torch.float32
        ):
            bind(module, FloatLayer(module, emit))
    if fuse:
        times, texts = install(model, chains)
        if is_denoiser(model):
            bind(model, Replay(model, times, texts, chains.text))
    elif chains.time is not None:
        look_up(model, chains)
    tensors = getattr(model, "steps", None)
    if isinstance(tensors, StepTensors):
        bind(model, StepForward(model, tensors, model.__dict__.get("forward")))
    model.register_load_state_dict_post_hook(Reload(dtype, fuse))
    return model


def unbind(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for key, hook in list(model._load_state_dict_post_hooks.items()):
        if isinstance(hook, Reload):
            del model._load_state_dict_post_hooks[key]
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Chain | FloatLayer | Replay | StepForward | TableColumn) or isinstance(
            getattr(forward, "__self__", None), TimeRows
        ):
            del module.forward


def forget_kept(model: nn.Module) -> None:
    """Let the next call compute what it kept of t and of texts anew."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        times = getattr(forward, "__self__", None)
        if isinstance(times, TimeRows):
            times.rows.clear()
        elif isinstance(forward, Block):
            forward.texts.kept.clear()


class Reload:
    """Prepares a model again after other tensors were loaded into it."""

    def __init__(self, dtype: torch.dtype, fuse: bool) -> None:
        self.dtype, self.fuse = dtype, fuse

    def __call__(self, model: nn.Module, _keys: object) -> None:
        check_values(own_tensors(model), own_bounds(runtime_modules(model)), "the state dict that was loaded")
        prepare(model, self.dtype, self.fuse)


class FloatLayer:
    """Stands in for the forward of a layer kept in float: casts its weight once to the dtype that reaches it."""

    def __init__(self, module: Any, emit: torch.dtype | None) -> None:
        self.module, self.emit = module, emit
        self.cast: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        self.read: Tensor | None = None  # the weight that was cast
        self.versions: list[int] = []

    def __call__(self, x: Tensor, *_: object, **__: object) -> Tensor:
        layer = self.module
        if not torch.compiler.is_compiling():
            self.renew()
        if x.dtype not in self.cast:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            self.cast[x.dtype] = (layer.weight.to(x.dtype), bias)
        weights = self.cast[x.dtype]
        linear = isinstance(layer, nn.Linear)
        y = F.linear(x, *weights) if linear else layer._conv_forward(channels_last(x), *weights)
        return y if self.emit is None else y.to(self.emit)

    def renew(self) -> None:
        """Drop what was cast from other numbers than those of now."""
        versions = versions_of(self.module.parameters())
        if self.module.weight is not self.read or versions != self.versions:
            self.cast.clear()
            self.read, self.versions = self.module.weight, versions


def is_denoiser(model: nn.Module) -> bool:
    """Whether a family declares how this model is called."""
    try:
        family_of(model)
    except ModelError:
        return False
    return True


def install(model: nn.Module, chains: Structure) -> tuple[TimeRows | None, Texts]:
    """Rebind the forwards of the blocks that the structure declares; returns what holds the rows of t and of texts."""
    times = install_times(model, chains)
    found: dict[str, Chain] = {}
    timed = [unit.path for unit in chains.residuals if unit.timed]
    for residual in chains.residuals:
        index = timed.index(residual.path) if residual.timed else -1
        found[residual.path] = Residual(model.get_submodule(residual.path), residual, times, index)
    simple: tuple[tuple[Any, Sequence[Any]], ...] = (
        (Attention, chains.attentions),
        (Transformer, chains.transformers),
        (Resample, chains.resamplers),
        (Up, chains.up_blocks),
    )
    for kind, units in simple:
        found |= {unit.path: kind(model.get_submodule(unit.path), unit) for unit in units}
    blocks: list[Any] = [model.get_submodule(unit.path) for unit in chains.text_blocks]
    texts = Texts([Readers(block.attn2.to_k, block.attn2.to_v) for block in blocks])
    for index, (block, unit) in enumerate(zip(blocks, chains.text_blocks)):
        found[unit.path] = Block(block, unit, texts, index)
    if chains.tail is not None:
        norm, activation, head = chains.tail
        last = NormOut(*map(model.get_submodule, (norm, activation, head)))
        found[norm], found[activation] = last, Done(model.get_submodule(activation), last)
    for path, chain in found.items():
        bind(model.get_submodule(path), chain)
    return times, texts


def bind(module: Any, forward: Callable[..., Any]) -> None:
    """Let `module` run `forward`, on this instance alone."""
    module.forward = forward


def install_times(model: nn.Module, chains: Structure) -> TimeRows | None:
    if chains.time is None:
        return None
    projection, embedding = (model.get_submodule(path) for path in chains.time)
    blocks: list[Any] = [
        model.get_submodule(f"{unit.path}.time_emb_proj") for unit in chains.residuals if unit.timed
    ]
    tensors = getattr(model, "steps", None)
    if isinstance(tensors, StepTensors) and tensors.spec.table:
        widths = [unit.width for unit in chains.residuals if unit.timed]
        columns = tensors.table.split(widths, 1)  # type: ignore[operator]
        times: TimeRows = TimeTable(projection, embedding, blocks, tensors.times(), columns)
    else:
        times = TimeRows(projection, embedding, blocks)
    for index, layer in enumerate(blocks):
        if isinstance(layer, Tabled):
            bind(layer, TableColumn(times, index))
    bind(projection, times.project)
    bind(embedding, times.embed)
    return times


def look_up(model: nn.Module, chains: Structure) -> None:
    """Without fused blocks: layers that a table stands in for return its rows."""
    if any(isinstance(module, Tabled) for module in model.modules()):
        install_times(model, chains)


def integer_layer(layer: nn.Module, spec: LayerSpec, path: str, groups: int = 1) -> IntegerLayer:
    """The runtime layer that takes the place of `layer`, with empty buffers on the same device."""
    for kind, runtime_kind in LAYERS.items():
        if isinstance(layer, kind):
            try:
                return runtime_kind(layer, spec, groups)
            except GridError as error:
                raise ArtifactError(
                    f"layer '{path}' cannot carry {spec.weight}", got=error.what, fix=AGAIN
                ) from error
    raise RuntimeSupportError(
        f"layer '{path}' has no integer form",
        got=type(layer).__name__,
        expected=", ".join(kind.__name__ for kind in LAYERS),
        fix="keep it in float with a plan rule",
    )
