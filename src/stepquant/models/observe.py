"""What a call shows of a model that nobody declared: which layer sees what, in which order.

Roles follow from changing one argument at a time: what depends on t alone is modulation, what depends on the prompt
alone is context, the first and the last layers that see the noisy input touch pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stepquant.core.digest import tensors_digest
from stepquant.errors import ProductError
from stepquant.models.call import Asked
from stepquant.models.denoiser import Denoiser, Seen
from stepquant.models.families.family import Family
from stepquant.models.families.roles import LEAVES
from stepquant.models.hooks import first_arguments
from stepquant.models.products import give_back, rebind

IDLE = "was not called"
Prints = dict[str, list[str]]  # leaf -> digest of every input that it saw, in the order of first calls


def shown(pipeline: Any, asked: Sequence[Asked] = ()) -> Denoiser:
    """The denoiser of a pipeline, with what its first call shows where nobody declared it."""
    denoiser = Denoiser.of(pipeline)
    return observed(denoiser, first_arguments(pipeline, 1, asked)) if denoiser.family.generic else denoiser


def observed(denoiser: Denoiser, arguments: Mapping[str, Any]) -> Denoiser:
    """An undeclared denoiser with what these arguments of one call show; a declared one as it is."""
    if not denoiser.family.generic:
        return denoiser
    order, prints = watch(denoiser, arguments)
    reached: dict[str, set[str]] = {leaf: set() for leaf in prints}
    for kind, names in kinds(denoiser.family, arguments).items():
        other = later if kind == "t" else changed
        _, now = watch(denoiser, {**arguments, **{name: other(arguments[name]) for name in names}})
        for leaf in prints:
            if now.get(leaf) != prints[leaf]:
                reached[leaf].add(kind)
    blocks = ordered_blocks(denoiser, order)
    idle = {leaf: IDLE for leaf in denoiser.sites() if leaf not in reached}
    return denoiser.having(
        Seen(roles_of(reached, blocks), blocks, idle | fixed_products(denoiser, [arguments]))
    )


def kinds(family: Family, arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """What may be changed, by what it says: x, t, text, and what else."""
    groups = {"x": (family.x,), "t": (family.t,), "text": family.text, "cond": family.cond}
    present = {kind: [name for name in names if name in arguments] for kind, names in groups.items()}
    return {kind: names for kind, names in present.items() if names}


def later(value: Any) -> Any:
    """Another time."""
    return tree_map(
        lambda t: t + torch.where(t > 0, -t / 4, 1).to(t.dtype) if isinstance(t, Tensor) else t, value
    )


def changed(value: Any) -> Any:
    """The same with other numbers in every tensor; whole numbers, which may be places in a table, change theirs."""

    def other(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype == torch.bool or not x.numel():
            return x
        if not x.is_floating_point():
            moved = x.flatten().flip(0).reshape(x.shape)
            return torch.where(x > 0, x - 1, x + 1) if x.ndim < 2 and torch.equal(moved, x) else moved
        noise = torch.Generator().manual_seed(0)
        scale = x.float().std(correction=0).clamp(min=x.float().abs().mean() / 2 + 1e-3)
        return x + scale.to(x) * torch.randn(x.shape, generator=noise).to(x)

    return tree_map(other, value)


def watch(denoiser: Denoiser, arguments: Mapping[str, Any]) -> tuple[list[str], Prints]:
    """All modules in the order of their first call, and what every leaf saw."""
    order: dict[str, int] = {}
    prints: Prints = {}

    def hook(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        order[path] = order.get(path, 0) + 1
        if isinstance(module, LEAVES):
            seen = args[0] if args else next(iter(kwargs.values()))
            prints.setdefault(path, []).append(tensors_digest({"x": seen.detach()}))

    with torch.no_grad(), hooked(denoiser.model, hook):
        denoiser.predict(arguments)
    return list(order), prints


@contextmanager
def hooked(model: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(partial(hook, path), with_kwargs=True)
        for path, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ordered_blocks(denoiser: Denoiser, order: list[str]) -> tuple[str, ...]:
    """The blocks that ran, in the order in which they did."""
    place = {path: index for index, path in enumerate(order)}
    return tuple(sorted((path for path in denoiser.blocks() if path in place), key=place.__getitem__))


def roles_of(reached: Mapping[str, set[str]], blocks: tuple[str, ...]) -> dict[str, str]:
    """Role of every leaf whose role follows from what reached it; of the others their building block says it."""
    inside = {leaf for leaf in reached if leaf.startswith(tuple(f"{block}." for block in blocks))}
    leaves = list(reached)
    begin = next((index for index, leaf in enumerate(leaves) if leaf in inside), len(leaves))
    found = {leaf: role for leaf in leaves if (role := role_for(reached[leaf], leaf in inside))}
    main = [leaf for leaf in leaves if "x" in reached[leaf]]
    if inside:
        found |= {
            leaf: "stem" if leaves.index(leaf) < begin else "head" for leaf in main if leaf not in inside
        }
    return found | ({main[0]: "stem", main[-1]: "head"} if main else {})


def role_for(reached_by: set[str], inside: bool) -> str | None:
    if "x" in reached_by:
        return None
    if not reached_by:
        return "const"
    if reached_by == {"text"}:
        return "k_text" if inside else "context"
    if "t" in reached_by:
        return "modulate" if inside else "time"
    return "cond"


def fixed_products(denoiser: Denoiser, calls: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Attentions whose product cannot be exchanged, is called in a way that integers do not know, or is not called."""
    known = denoiser.stays_float()
    tried = {p: denoiser.model.get_submodule(p) for p in denoiser.products() if p not in known}
    fixed: dict[str, str] = {}
    while tried:
        called, error = with_products(denoiser, calls, tried)
        if error is None:
            return fixed | {path: IDLE for path in tried if path not in called}
        failed = tried[str(error.where)]
        same = [path for path, module in tried.items() if alike(module, failed)]
        fixed |= dict.fromkeys(same, error.what)
        tried = {path: module for path, module in tried.items() if path not in same}
    return fixed


def with_products(
    denoiser: Denoiser, calls: Sequence[Mapping[str, Any]], attentions: Mapping[str, Any]
) -> tuple[set[str], ProductError | None]:
    """Which of these attentions call a product of ours, and the first that does not work with one."""
    bound: list[Any] = []
    called: set[str] = set()

    def product(path: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: Any) -> Tensor:
        called.add(path)
        if not query.ndim == key.ndim == value.ndim == 4 or query.shape[:2] != key.shape[:2]:
            raise ProductError("its heads are laid out in a way that integers do not know", where=path)
        if mask is not None and not isinstance(mask, Tensor):
            raise ProductError(f"its mask is a {type(mask).__name__}, which is no tensor", where=path)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    try:
        for path, attention in attentions.items():
            rebind(attention, partial(product, path), path)
            bound.append(attention)
        with torch.no_grad():
            for arguments in calls:
                denoiser.predict(arguments)
        return called, None
    except ProductError as error:
        return called, error
    finally:
        for attention in bound:
            give_back(attention)


def alike(one: Any, other: Any) -> bool:
    kinds = ((type(each), type(getattr(each, "processor", None))) for each in (one, other))
    return len(set(kinds)) == 1
