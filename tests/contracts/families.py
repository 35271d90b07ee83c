"""What a declaration says about a model, measured: change one argument, see whose input changes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import LEAVES
from tests.models.tiny import Case

OUTSIDE = ("stem", "head", "time", "cond", "context", "modulate")  # roles of what belongs to no block
Widths = tuple[int, ...]


def fingerprint(x: Tensor) -> str:
    return hashlib.md5(x.detach().float().contiguous().numpy().tobytes()).hexdigest()


class Concats(TorchFunctionMode):
    """Widths of every concatenation of two tensors, and the tensors themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Widths, int, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat) and len(args[0]) == 2 and out.ndim >= 3:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0) % out.ndim
            self.seen.append((tuple(part.shape[dim] for part in args[0]), dim, out))
        return out


@dataclass
class Run:
    """One call of a model: fingerprints of what its leaves read, and modules in the order of their first call."""

    prints: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    order: dict[str, int] = field(default_factory=dict)
    prediction: Tensor = field(default_factory=lambda: torch.empty(0))
    concats: set[Widths] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)  # leaves that read a concatenation of channels as it is


def observe(denoiser: Denoiser, arguments: Mapping[str, Any]) -> Run:
    run, concats, model = Run(), Concats(), denoiser.model

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            run.order.setdefault(name, len(run.order))
            if isinstance(module, LEAVES):
                x = args[0] if args else next(iter(kwargs.values()))
                run.prints[name].append(fingerprint(x))
                channels = x.ndim - 1 if isinstance(module, nn.Linear) else 1
                if any(x is out and dim == channels for _, dim, out in concats.seen):
                    run.joined.add(name)

        return before

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in model.named_modules()]
    with torch.no_grad(), concats:
        run.prediction = denoiser.predict(arguments)
    for handle in handles:
        handle.remove()
    run.concats = {widths for widths, _, _ in concats.seen}
    return run


def broken(denoiser: Denoiser, case: Case) -> list[str]:
    """The promises of a declaration that measurement does not bear out."""
    _, arguments, changed = case
    first = observe(denoiser, arguments)
    hit: dict[str, set[str]] = {leaf: set() for leaf in first.prints}
    for label, values in changed.items():
        now = observe(denoiser, {**arguments, **values})
        for leaf in hit:
            hit[leaf] |= {label} if now.prints[leaf] != first.prints[leaf] else set()
    promises = (dependence(denoiser, hit, changed), order(denoiser, first), widths(denoiser, first))
    return [line for promise in promises for line in promise] + rows(denoiser, arguments, first.prediction)


def dependence(denoiser: Denoiser, hit: dict[str, set[str]], changed: Mapping[str, Any]) -> Iterator[str]:
    """What depends on t alone, on the prompt alone, on neither: as the roles say."""
    family, sites = denoiser.family, denoiser.sites()
    yield from (f"{leaf} never runs" for leaf in sites if leaf not in hit)
    labels = {
        name: {label for label, new in changed.items() if name in new} for name in arguments_of(changed)
    }
    t, text, cond = (
        set().union(*(labels.get(name, set()) for name in names))
        for names in ((family.t,), family.text, family.cond)
    )
    may = {
        "time": t,
        "cond": cond | text,
        "context": text,
        "k_text": text,
        "v_text": text,
        "const": set(),
        "modulate": t | cond | text,
    }
    for leaf, seen in hit.items():
        role = sites.get(leaf, "read")
        prompt = any(leaf.startswith(f"{path}.") for path in family.prompt_blocks)
        if role in may and not seen <= may[role]:
            yield f"{leaf} ({role}) also depends on {sorted(seen - may[role])}"
        elif role in may and role != "const" and not seen:
            yield f"{leaf} ({role}) depends on nothing"
        elif prompt and role not in may and ("x" in seen or not seen & text):
            yield f"{leaf} of the prompt's blocks depends on {sorted(seen)}"
        # Attention to one token of text returns that token's value, whatever asks.
        elif role not in may and not prompt and role != "attn_out" and (seen <= t or seen <= text):
            yield f"{leaf} ({role}) depends only on {sorted(seen)}"


def arguments_of(changed: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {name for values in changed.values() for name in values}


def order(denoiser: Denoiser, run: Run) -> Iterator[str]:
    blocks = denoiser.blocks()
    yield from (f"block {block} never runs" for block in blocks if block not in run.order)
    places = [run.order.get(block, -1) for block in blocks]
    if places != sorted(places):
        yield "blocks are not in execution order"
    for leaf, role in denoiser.sites().items():
        if role not in OUTSIDE and not any(leaf.startswith(f"{block}.") for block in blocks):
            yield f"{leaf} ({role}) belongs to no block"


def widths(denoiser: Denoiser, run: Run) -> Iterator[str]:
    declared, sites = denoiser.concats(), denoiser.sites()
    for leaf, pair in declared.items():
        if pair not in run.concats:
            yield f"{leaf} reads no concatenation of {pair}"
    for leaf in run.joined - set(declared):
        if sites.get(leaf) not in OUTSIDE:
            yield f"{leaf} reads a concatenation that nobody declares"
    if hasattr(denoiser.model, "up_blocks") and not declared:
        yield "a U-Net has skip connections"


def rows(denoiser: Denoiser, arguments: Mapping[str, Any], both: Tensor) -> list[str]:
    """The first sample alone gets what it gets in a batch, if all arguments without a batch axis are declared."""
    shared = denoiser.family.shared
    alone = {name: value if name in shared else one_of(value) for name, value in arguments.items()}
    try:
        with torch.no_grad():
            one = denoiser.predict(alone)
    except (RuntimeError, ValueError, IndexError) as error:
        return [f"one sample alone cannot be predicted: {error}"]
    return [] if torch.allclose(both[:1], one, atol=1e-4) else ["one sample alone gets another prediction"]


def one_of(value: Any) -> Any:
    """The half of a batch of two; what has a row for every frame has half of those."""
    if isinstance(value, Mapping):
        return {name: one_of(part) for name, part in value.items()}
    if isinstance(value, Tensor) and not value.ndim:
        return value
    return value[: len(value) // 2] if isinstance(value, Tensor | list) else value
