"""What a declaration says about a model is measured: change one argument, see whose input changes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import LEAVES
from tests.models.tiny import CASES

ALLOWED = ("time", "cond", "context", "k_text", "v_text", "const", "modulate")


def fingerprint(x: Tensor) -> str:
    return hashlib.md5(x.detach().float().contiguous().numpy().tobytes()).hexdigest()


class Concats(TorchFunctionMode):
    """Channel widths of every two-way concatenation."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and len(args[0]) == 2 and args[0][0].ndim >= 3:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            self.seen.add(tuple(part.shape[dim] for part in args[0]))
        return func(*args, **(kwargs or {}))


def observe(
    model: nn.Module, arguments: dict[str, Any]
) -> tuple[dict[str, list[str]], list[str], set[tuple[int, ...]]]:
    """Fingerprints of every leaf's inputs, modules in order of their first call, widths of concatenations."""
    prints: dict[str, list[str]] = defaultdict(list)
    order: list[str] = []

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            order.append(name)
            if isinstance(module, LEAVES):
                prints[name].append(fingerprint(args[0] if args else next(iter(kwargs.values()))))

        return before

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in model.named_modules()]
    with torch.no_grad(), Concats() as concats:
        model(**arguments)
    for handle in handles:
        handle.remove()
    return dict(prints), list(dict.fromkeys(order)), concats.seen


@pytest.mark.parametrize("name", CASES)
def test_declaration_holds(name: str) -> None:
    model, arguments, changed = CASES[name]()
    model.eval()
    denoiser = Denoiser(model)
    sites, family = denoiser.sites(), denoiser.family
    prints, order, concats = observe(model, arguments)
    hit: dict[str, set[str]] = {leaf: set() for leaf in prints}
    for label, values in changed.items():
        now, _, _ = observe(model, arguments | values)
        for leaf in prints:
            if now[leaf] != prints[leaf]:
                hit[leaf].add(label)

    labels = defaultdict(set)
    for label, values in changed.items():
        for argument in values:
            labels[argument].add(label)
    of = lambda names: set().union(*(labels[n] for n in names))  # noqa: E731
    t, text, cond = of((family.t,)), of(family.text), of(family.cond)
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
        role = sites[leaf]
        if role in ALLOWED:
            assert seen <= may[role], f"{leaf} ({role}) also depends on {seen - may[role]}"
            assert seen, f"{leaf} ({role}) depends on nothing"
        else:
            assert "x" in seen or role == "attn_out", f"{leaf} ({role}) depends only on {seen}"

    assert set(sites) == set(prints), "every declared leaf runs"
    places = [order.index(block) for block in denoiser.blocks()]
    assert places == sorted(places), "blocks are not in execution order"
    blocks = set(denoiser.blocks())
    outside = {leaf for leaf in sites if not any(leaf.startswith(block + ".") for block in blocks)}
    assert {sites[leaf] for leaf in outside} <= {"stem", "head", "time", "cond", "context", "modulate"}
    assert set(denoiser.concats().values()) <= concats
    assert bool(denoiser.concats()) == hasattr(model, "up_blocks"), "a U-Net has skip connections"


def test_a_wrong_role_would_be_caught() -> None:
    """The contract can fail: a convolution declared as time layer depends on x."""
    model, arguments, changed = CASES["plain"]()
    prints, _, _ = observe(model, arguments)
    now, _, _ = observe(model, arguments | changed["x"])
    assert now["time_embedding.linear_1"] == prints["time_embedding.linear_1"]
    assert now["conv_out"] != prints["conv_out"]
