"""Give the blocks that a structure declares the forwards that run them as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from stepquant.models.blocks.structure import Structure
from stepquant.runtime.blocks.attention import Attention, Readers
from stepquant.runtime.blocks.chain import Chain
from stepquant.runtime.blocks.feed import FeedForward
from stepquant.runtime.blocks.joined import Joined
from stepquant.runtime.blocks.modulated import KINDS
from stepquant.runtime.blocks.resampling import Resample
from stepquant.runtime.blocks.residual import Residual
from stepquant.runtime.blocks.tail import Done, NormOut
from stepquant.runtime.blocks.texts import Texts
from stepquant.runtime.blocks.time_rows import TableColumn, Tabled, TimeRows, TimeTable
from stepquant.runtime.blocks.transformer import Block, Transformer
from stepquant.runtime.blocks.up import Up
from stepquant.runtime.steps import StepTensors


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
    )
    for kind, blocks in simple:
        found |= {declared.path: kind(model.get_submodule(declared.path), declared) for declared in blocks}
    modules: list[Any] = [model.get_submodule(block.path) for block in chains.text_blocks]
    readers = [Readers(block.attn2.to_k, block.attn2.to_v) for block in modules]
    texts = Texts(readers, known=chains.text is not None)
    for index, (block, declared) in enumerate(zip(modules, chains.text_blocks)):
        found[declared.path] = Block(block, declared, texts, index)
    found |= transformer_chains(model, chains)
    if chains.tail is not None:
        norm, activation, head = chains.tail
        last = NormOut(*map(model.get_submodule, (norm, activation, head)))
        found[norm], found[activation] = last, Done(model.get_submodule(activation), last)
    for path, chain in found.items():
        bind(model.get_submodule(path), chain)
    return times, texts


def transformer_chains(model: nn.Module, chains: Structure) -> dict[str, Chain]:
    """Attentions and feed-forwards by themselves, and blocks that hand them codes."""
    joined = {one.path: Joined(model.get_submodule(one.path), one) for one in chains.joined}
    feeds = {one.path: FeedForward(model.get_submodule(one.path), one) for one in chains.feeds}
    for attention in joined.values():
        for layer, forward in attention.placed():
            bind(layer, forward)
    found: dict[str, Chain] = {**joined, **feeds}
    for block in chains.modulated:
        paths = [f"{block.path}.{name}" for name in block.attentions]
        attentions = [joined[path] for path in paths if path in joined]
        inner = [
            feeds[path] for name in ("ff", "ff_context", "ffn") if (path := f"{block.path}.{name}") in feeds
        ]
        ready = len(attentions) == len(paths) and all(one.ready() for one in attentions)
        if ready and len(inner) == block.feeds:
            kind = KINDS[block.kind]
            found[block.path] = kind(model.get_submodule(block.path), block, attentions, inner)
    return found


def bind(module: Any, forward: Callable[..., Any]) -> None:
    """Let `module` run `forward`, on this instance alone."""
    module.forward = forward


def install_times(model: nn.Module, chains: Structure) -> TimeRows | None:
    if chains.time is None:
        return None
    projection, embedding = (model.get_submodule(path) for path in chains.time)
    blocks: list[Any] = [
        model.get_submodule(f"{block.path}.time_emb_proj") for block in chains.residuals if block.timed
    ]
    tensors = getattr(model, "steps", None)
    if isinstance(tensors, StepTensors) and tensors.spec.table:
        widths = [block.width for block in chains.residuals if block.timed]
        times: TimeRows = TimeTable(projection, embedding, blocks, tensors, widths)
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
