"""Give the blocks that a structure declares the forwards that run them as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from stepquant.models.blocks.joined import LinearAttention
from stepquant.models.blocks.rotary import RotaryAttention
from stepquant.models.blocks.structure import Structure, structure
from stepquant.runtime.adapters.present import adapters_in
from stepquant.runtime.blocks.attention import Attention, Readers
from stepquant.runtime.blocks.basic import BASIC
from stepquant.runtime.blocks.chain import Chain
from stepquant.runtime.blocks.feed import FeedForward, ImageFeedForward
from stepquant.runtime.blocks.front import FRONT
from stepquant.runtime.blocks.joined import End, Joined, Linear, Part
from stepquant.runtime.blocks.joint import JOINT
from stepquant.runtime.blocks.one_stream import ONE_STREAM
from stepquant.runtime.blocks.parallel import PARALLEL, Parallel
from stepquant.runtime.blocks.resampling import Resample
from stepquant.runtime.blocks.residual import Residual
from stepquant.runtime.blocks.root_norm import RootNormed
from stepquant.runtime.blocks.rotary import Turned
from stepquant.runtime.blocks.sandwich import SANDWICHES
from stepquant.runtime.blocks.tail import Done, NormOut
from stepquant.runtime.blocks.text_feed import TextFeedForward
from stepquant.runtime.blocks.texts import Texts
from stepquant.runtime.blocks.time_rows import TableColumn, TimeRows, TimeTable
from stepquant.runtime.blocks.transformer import Block, Transformer
from stepquant.runtime.blocks.up import Up
from stepquant.runtime.layers.offloaded import OFFLOADED
from stepquant.runtime.layers.tabled import Tabled
from stepquant.runtime.steps import StepTensors

ATTENTIONS: dict[type, Any] = {RotaryAttention: Turned, LinearAttention: Linear}
KINDS = BASIC | ONE_STREAM | JOINT | FRONT | PARALLEL | SANDWICHES


def forget_kept(model: nn.Module) -> None:
    """Let the next call compute what it kept of t and of texts anew."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        times = getattr(forward, "__self__", None)
        if isinstance(times, TimeRows):
            times.rows.clear()
        elif isinstance(forward, Block):
            forward.texts.kept.clear()


def install(model: nn.Module, chains: Structure) -> tuple[TimeRows | None, Texts]:
    """Rebind the forwards of the blocks that the structure declares; returns what holds the rows of t and of texts."""
    times = install_times(model, chains)
    found: dict[str, Chain] = {}
    timed = [block.path for block in chains.residuals if block.timed]
    for residual in chains.residuals:
        index = timed.index(residual.path) if residual.timed else -1
        found[residual.path] = Residual(model.get_submodule(residual.path), residual, times, index)
    simple: tuple[tuple[Any, Sequence[Any]], ...] = (
        (Attention, chains.attentions),
        (Transformer, chains.transformers),
        (Resample, chains.resamplers),
        (Up, chains.up_blocks),
        (TextFeedForward, chains.text_feeds),
        (RootNormed, chains.root_norms),
    )
    for kind, blocks in simple:
        found |= {declared.path: kind(model.get_submodule(declared.path), declared) for declared in blocks}
    modules: list[Any] = [model.get_submodule(block.path) for block in chains.text_blocks]
    readers = [Readers(block.attn2.to_k, block.attn2.to_v) for block in modules]
    texts = Texts(model, readers, known=chains.text is not None)
    for index, (block, declared) in enumerate(zip(modules, chains.text_blocks)):
        found[declared.path] = Block(block, declared, texts, index)
    found |= transformer_chains(model, chains)
    for norm, activation, head in chains.tails:
        first, second, third = map(model.get_submodule, (norm, activation, head))
        last = NormOut(first, second, third, model)
        found[norm], found[activation] = last, Done(model.get_submodule(activation), last)
    for path, chain in found.items():
        bind(model.get_submodule(path), chain)
    return times, texts


def transformer_chains(model: nn.Module, chains: Structure) -> dict[str, Chain]:
    """Attentions and feed-forwards by themselves, and blocks that hand them codes; with an adapter inside they run unfused."""

    def plain(path: str) -> bool:
        return not adapters_in(model.get_submodule(path))

    joined: dict[str, Joined] = {}
    for one in chains.joined:
        if plain(one.path):
            module: Any = model.get_submodule(one.path)
            joined[one.path] = ATTENTIONS.get(type(one), Joined)(module, one)
    kinds: tuple[tuple[Any, Sequence[Any]], ...] = (
        (FeedForward, chains.feeds),
        (ImageFeedForward, chains.image_feeds),
    )
    feeds: dict[str, Any] = {
        one.path: kind(model.get_submodule(one.path), one)
        for kind, ones in kinds
        for one in ones
        if plain(one.path)
    }
    for attention in joined.values():
        for layer, forward in attention.placed():
            bind(layer, forward)
    parallel = {
        one.path: Parallel(model.get_submodule(one.path)) for one in chains.parallel if plain(one.path)
    }
    ends: dict[str, Any] = {**joined, **parallel}
    found: dict[str, Chain] = {**ends, **feeds}
    for block in chains.modulated:
        paths = [f"{block.path}.{name}" for name in block.attentions]
        attentions = [ends[path] for path in paths if path in ends]
        inner = [feeds[path] for name in block.feeds if (path := f"{block.path}.{name}") in feeds]
        ready = len(attentions) == len(paths) and all(one.ready() for one in attentions)
        if ready and len(inner) == len(block.feeds) and plain(block.path):
            kind = KINDS[block.kind]
            found[block.path] = kind(model.get_submodule(block.path), block, attentions, inner)
    return found


class Install:
    """Fuses the blocks of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> tuple[TimeRows | None, Texts]:
        uninstall(self.model)
        return install(self.model, structure(self.model))


def bind(module: Any, forward: Callable[..., Any]) -> None:
    """Let `module` run `forward`, on this instance alone, inside what offloading has put around it."""
    setattr(module, "_old_forward" if OFFLOADED in module.__dict__ else "forward", forward)


def bound(module: Any) -> Any:
    """The forward that `module` was given; None if it has that of its class."""
    return module.__dict__.get("_old_forward" if OFFLOADED in module.__dict__ else "forward")


def uninstall(model: nn.Module) -> None:
    """Give the blocks the forwards of their classes back."""
    for module in model.modules():
        forward = bound(module)
        if isinstance(forward, Chain | End | Part | TableColumn) or isinstance(
            getattr(forward, "__self__", None), TimeRows
        ):
            unbind(module)


def unbind(module: Any) -> None:
    if OFFLOADED in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)
    else:
        del module.forward


def install_times(model: nn.Module, chains: Structure) -> TimeRows | None:
    tensors = getattr(model, "steps", None)
    tables = tensors.spec if isinstance(tensors, StepTensors) else None
    if chains.time is None or (tables is not None and tables.tabled):
        return None
    projection, embedding = (model.get_submodule(path) for path in chains.time)
    blocks: list[Any] = [
        model.get_submodule(f"{block.path}.time_emb_proj") for block in chains.residuals if block.timed
    ]
    if isinstance(tensors, StepTensors) and tensors.spec.table:
        widths = [block.width for block in chains.residuals if block.timed]
        times: TimeRows = TimeTable(model, projection, embedding, blocks, tensors, widths)
    else:
        times = TimeRows(model, projection, embedding, blocks)
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
