"""Lower a float model to integers: swap its layers, fill in the artifact's tensors, choose kernels, fuse chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.artifact import Artifact, LayerSpec, ProductSpec, StepSpec, bounds_of
from stepquant.core.bounds import check_tensors, check_values
from stepquant.core.entries import AGAIN
from stepquant.core.grid import GridError
from stepquant.core.policy import FloatSteps
from stepquant.errors import ArtifactError, RuntimeSupportError
from stepquant.models.attention import KeepProduct, NoFusing
from stepquant.models.blocks.structure import Structure, roles, structure
from stepquant.models.causal import keep_counts
from stepquant.models.denoiser import device_of
from stepquant.models.families.registry import family_of, is_declared, is_generic
from stepquant.models.families.roles import PRODUCTS
from stepquant.models.products import multiplies, rebind
from stepquant.models.split import find, split_concats
from stepquant.runtime.adapters.loading import CHANGING, take_adapters
from stepquant.runtime.adapters.present import INNER
from stepquant.runtime.blocks.install import Install, bind, bound, install, look_up, uninstall
from stepquant.runtime.blocks.install import unbind as unbind_one
from stepquant.runtime.blocks.time_rows import TabledLayer, put_tabled
from stepquant.runtime.cpu.replay import Replay
from stepquant.runtime.intact import check_steps, own_bounds
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.cast import FloatLayer
from stepquant.runtime.layers.convolution import IntegerConv1d, IntegerConv2d, IntegerConv3d
from stepquant.runtime.layers.embedding import IntegerEmbedding, has_tokens, no_tokens
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.linear import IntegerLinear, LowRankBranch
from stepquant.runtime.layers.offloaded import refuse_absent
from stepquant.runtime.layers.tabled import Tabled
from stepquant.runtime.moving import Move
from stepquant.runtime.parameters import MARK, Counted, mark_packed, tell_parameters
from stepquant.runtime.policy import PolicyForward, check_policy
from stepquant.runtime.steps import StepForward, StepTensors

# Layers whose output meets the stream inside the model; all others emit the dtype that they receive.
INTO_STREAM = ("stem", "modulate", "context", "k_text", "v_text", "k_added", "v_added", "q_added")

# In models built of residual blocks these are a sliver of the weights; elsewhere they may be a third of them.
SMALL = ("stem", "time", "modulate", "cond")

# What a lowered model does otherwise than its class, beside `forward`.
OWN_METHODS = ("_apply", "parameters", "num_parameters", "fuse_lora", "get_input_embeddings", *CHANGING)
ORDINARY = [kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]

LAYERS: dict[type[nn.Module], Callable[..., IntegerLayer | IntegerEmbedding]] = {
    nn.Linear: IntegerLinear,
    nn.Conv1d: IntegerConv1d,
    nn.Conv2d: IntegerConv2d,
    nn.Conv3d: IntegerConv3d,
    nn.Embedding: IntegerEmbedding,
}


def skeleton(
    model: nn.Module,
    layers: Mapping[str, LayerSpec],
    products: Mapping[str, ProductSpec],
    splits: Mapping[str, tuple[int, ...]],
    steps: StepSpec | None = None,
    policy: FloatSteps | None = None,
) -> nn.Module:
    """Put runtime modules with empty buffers of the right shape into `model`, in place; the meta device will do."""
    if policy is not None:
        check_policy(model, policy, corrected=steps is not None and bool(steps.channels))
        model.policy = policy  # type: ignore[assignment]
    split_concats(model, splits)
    keep_counts(model)
    device, groups = device_of(model), steps.groups if steps else 1
    for path, spec in layers.items():
        model.set_submodule(path, integer_layer(find(model, path), spec, path, groups))
    for path, product in products.items():
        attention = find(model, path)
        if not multiplies(attention):
            raise ArtifactError(
                f"'{path}' is no attention, and has no product", got=type(attention).__name__, fix=AGAIN
            )
        attention.product = IntegerProduct(product, device_of(attention), groups)
        rebind(attention, attention.product, path)
        if hasattr(type(attention), "set_processor"):
            attention.set_processor = KeepProduct(attention)  # type: ignore[assignment]
    if steps is not None:
        check_steps(model, steps)
        if steps.table and not steps.tabled:
            for path in structure(model).time_layers():
                model.set_submodule(path, Tabled())
        tensors = StepTensors(steps, device)
        put_tabled(model, steps, tensors)
        model.steps = tensors
    for path in {path.rpartition(".")[0] for path in (*layers, *(steps.tabled if steps else ()))}:
        owner: Any = model.get_submodule(path)
        if hasattr(type(owner), "fuse_projections"):
            owner.fuse_projections = NoFusing(path)
        if path:
            tell_parameters(owner)
    mark_packed(model)
    if has_tokens(model):
        model.get_input_embeddings = no_tokens  # type: ignore[assignment]
    return model


def lower(model: nn.Module, artifact: Artifact, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """`model` in integers, in place; it holds the artifact's own tensors where they are on its device."""
    skeleton(model, artifact.layers, artifact.products, artifact.splits, artifact.steps, artifact.policy)
    fill(model, artifact)
    return prepare(model, dtype)


def hold(model: nn.Module, artifact: Artifact) -> nn.Module:
    """`model` with the artifact's tensors, in place, to be saved and not to run: no layer takes memory of its own."""
    split_concats(model, artifact.splits)
    floats = model.state_dict()
    skeleton(model.to("meta"), artifact.layers, artifact.products, {}, artifact.steps, artifact.policy)
    fill(model, artifact)
    for name, value in model.state_dict().items():
        if value.is_meta:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(floats[name], requires_grad=False)
            else:
                module._buffers[leaf] = floats[name]
    return model


def fill(model: nn.Module, artifact: Artifact) -> None:
    """Put the tensors of `artifact` into its skeleton."""
    own = own_tensors(model)
    bounds = bounds_of(artifact.layers, artifact.products, artifact.steps)
    check_tensors(artifact.tensors, own, "artifact", bounds)
    check_values(artifact.tensors, bounds, "artifact")
    for name, value in artifact.tensors.items():
        path, _, leaf = name.rpartition(".")
        there = value.to(own[name].dtype) if own[name].is_meta else value.to(own[name])
        model.get_submodule(path)._buffers[leaf] = there


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of all runtime modules by their names in the state dict."""
    return {
        f"{path}.{name}": value
        for path, module in runtime_modules(model).items()
        for name, value in module.named_buffers(recurse=False)
    }


def runtime_modules(
    model: nn.Module,
) -> dict[str, IntegerLayer | IntegerEmbedding | IntegerProduct | LowRankBranch | StepTensors]:
    kinds = (IntegerLayer, IntegerEmbedding, IntegerProduct, LowRankBranch, StepTensors)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def prepare(model: nn.Module, dtype: torch.dtype = torch.bfloat16, fuse: bool = True) -> nn.Module:
    """Choose kernels and dtypes for the tensors that `model` now holds, and fuse what its structure declares."""
    model.eval().requires_grad_(False)
    unbind(model)
    role_of, chains = roles(model), structure(model)
    keep = bool(chains.residuals)
    own = dtype_of(model)
    stream = dtype if has_one_stream(model, chains) else None
    for path, module in model.named_modules():
        role = role_of.get(path.removesuffix(f".{INNER}"), "")
        emit = own if role == "head" else stream if role in INTO_STREAM else None
        if isinstance(module, TabledLayer):
            module.emit = emit
        if isinstance(module, IntegerLayer):
            module.emit, module.keeps_weight = emit, keep and role in SMALL
        elif isinstance(module, IntegerEmbedding):
            module.emit = own
        if isinstance(module, IntegerLayer | IntegerEmbedding | IntegerProduct):
            module.forget()
            module.prepared()
        elif type(module).forward in ORDINARY and (emit or dtype != torch.float32):
            bind(module, FloatLayer(module, emit))
    again: Callable[[], Any] = Install(model) if fuse else int  # where blocks are not fused, nothing is to do
    if fuse:
        times, texts = install(model, chains)
        if is_declared(model):
            replay = Replay(model, times, texts, chains.text)
            again = replay.catch_up
            bind(model, replay)
    elif chains.time is not None:
        look_up(model, chains)
    policy, tensors = model.__dict__.get("policy"), getattr(model, "steps", None)
    if policy is not None:
        bind(model, PolicyForward(model, policy, model.__dict__.get("forward")))
    if isinstance(tensors, StepTensors):
        bind(model, StepForward(model, tensors, model.__dict__.get("forward")))
    model._apply = Move(model)  # type: ignore[assignment]
    take_adapters(model, again)
    if hasattr(type(model), "num_parameters"):
        model.num_parameters = Counted(model)  # type: ignore[assignment]
    model.register_load_state_dict_post_hook(Reload(dtype, fuse))
    model.register_state_dict_pre_hook(refuse_absent)
    return model


def has_one_stream(model: nn.Module, chains: Structure) -> bool:
    """Whether bfloat16 may begin behind the first layers and behind those of a text.

    Nobody knows where the stream of an undeclared model begins. Attention in float takes operands of one dtype, and
    transformers that join tokens of t or of a text to their stream make some of them float32; plain U-Nets do not.
    """
    if is_generic(model):
        return False
    attentions = [module for module in model.modules() if isinstance(module, PRODUCTS)]
    reads_text = is_declared(model) and bool(family_of(model).text)
    plain = bool(chains.residuals) and (chains.text is not None or not reads_text)
    return plain or all(isinstance(getattr(one, "product", None), IntegerProduct) for one in attentions)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the predictions of a model: bfloat16 where its float parts are, so that what follows in a pipeline meets its own."""
    mark = model._buffers.get(MARK)
    known = model.parameters() if mark is None else [mark]
    floats = (own.dtype for own in known if own.is_floating_point())
    return torch.bfloat16 if next(floats, None) == torch.bfloat16 else torch.float32


def unbind(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for key, hook in list(model._load_state_dict_post_hooks.items()):
        if isinstance(hook, Reload):
            del model._load_state_dict_post_hooks[key]
    for key, asked in list(model._state_dict_pre_hooks.items()):
        if asked is refuse_absent:
            del model._state_dict_pre_hooks[key]
    uninstall(model)
    for module in model.modules():
        if isinstance(bound(module), FloatLayer | Replay | PolicyForward | StepForward):
            unbind_one(module)


class Reload:
    """Prepares a model again after other tensors were loaded into it."""

    def __init__(self, dtype: torch.dtype, fuse: bool) -> None:
        self.dtype, self.fuse = dtype, fuse

    def __call__(self, model: nn.Module, _keys: object) -> None:
        check_values(own_tensors(model), own_bounds(runtime_modules(model)), "the state dict that was loaded")
        prepare(model, self.dtype, self.fuse)


def integer_layer(
    layer: nn.Module, spec: LayerSpec, path: str, groups: int = 1
) -> IntegerLayer | IntegerEmbedding:
    """What takes the place of a layer or of a table of embeddings at runtime, with empty buffers on the same device."""
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
