"""Named plans: what each scheme protects, and why."""

from __future__ import annotations

from dataclasses import replace

from stepquant.core.grid import Grid
from stepquant.errors import UnknownNameError
from stepquant.quant.plan import Plan, Rule

TIMES = ("time", "cond", "const", "modulate")
TEXTS = ("context", "k_text", "v_text")
ENDS = ("stem", "head")
NARROW = ("shortcut", "proj_in", "proj_out", "skip")
# What the first and the last block of a network lose most by: convolutions, and feed-forwards.
INNER = ("conv", "ff_in", "ff_out", "qkv_ff_in")
# Layers that read the prompt, and feed-forward ones, decide the content (arXiv:2405.17873).
CONTENT = ("k_text", "v_text", "q_added", "k_added", "v_added", "ff_in", "ff_out")

W8 = Grid.parse("int8/channel")
A8 = Grid.parse("uint8/tensor")
OPERAND = Grid.parse("int8/tensor")
PROBABILITIES = Grid.parse("uint8/tensor/sym")

SCHEMES = {
    "w8a8": "8-bit weights and activations, integer products",
    "w6a6": "6-bit weights and activations",
    "w4a8": "4-bit weights, 8-bit activations",
    "w4a4": "4-bit weights and activations",
    "w8a8-dynamic": "8-bit weights; activations in 8 bits by the token as they come: no calibration",
    "w4a8-dynamic": "4-bit weights; activations in 8 bits by the token as they come: no calibration",
    "w8a16": "8-bit weights only: smaller, not faster",
    "w4a16": "4-bit weights only: smaller, not faster",
}


def scheme(name: str) -> Plan:
    """The plan of a named scheme."""
    if name not in SCHEMES:
        raise UnknownNameError("scheme", name, SCHEMES)
    widths, _, dynamic = name[1:].partition("-")
    weight_bits, activation_bits = (int(part) for part in widths.split("a"))
    weight = Grid(weight_bits, granularity="channel")
    if dynamic:
        inputs = Grid(activation_bits, granularity="token")
        return Plan(name, protections(weight_bits, activation_bits) + by_token(weight, inputs))
    if activation_bits == 16:
        return Plan(name, weight_only_rules(weight))
    return Plan(name, protections(weight_bits, activation_bits) + bulk(weight, activation_bits))


def protections(weight_bits: int, activation_bits: int) -> tuple[Rule, ...]:
    rules = [
        Rule(
            W8,
            "depends on t alone: a sliver of the work, and every block reads it",
            TIMES,
            ("weight",),
            optional=True,
        ),
        Rule(
            None,
            "depends on t alone: float costs nothing and errors would reach every block",
            TIMES,
            ("input",),
            optional=True,
        ),
        Rule(W8, "depends on the prompt alone: computed once", TEXTS, ("weight",), optional=True),
        Rule(
            None,
            "raw text features have outliers; computed once per prompt",
            TEXTS,
            ("input",),
            optional=True,
        ),
        Rule(
            None,
            "the image itself: in the last steps its noise is finer than 8-bit steps, and the layer is a sliver of the work",
            ("stem",),
            ("input",),
            optional=True,
        ),
    ]
    if weight_bits < 8:
        rules += [
            Rule(W8, "first and last layer touch pixels directly", ENDS, ("weight",), optional=True),
            Rule(W8, "reads the raw residual stream, and is small", NARROW, ("weight",), optional=True),
        ]
    if activation_bits < 8:
        rules += [
            Rule(A8, "first and last layer touch pixels directly", ENDS, ("input",), optional=True),
            Rule(
                A8,
                "reads the raw residual stream, whose range is the widest",
                (*NARROW, "down", "up"),
                ("input",),
                optional=True,
            ),
        ]
    return (*rules, *ends(weight_bits, activation_bits))


def ends(weight_bits: int, activation_bits: int) -> tuple[Rule, ...]:
    """What few bits hurt most, measured on the three embedded models (docs/metrics.md)."""
    shares = {
        "weight": "59 to 84 % of what 4 bits lose in the rest of the embedded models, with 0.7 to 12 % of the weights",
        "input": "60 to 75 % of what 4 bits lose in the rest of the embedded models, with 13 to 22 % of the products",
    }
    chosen = {"weight": (weight_bits, W8), "input": (activation_bits, A8)}
    return tuple(
        Rule(grid, f"first and last block: {shares[port]}", INNER, (port,), optional=True, ends=True)
        for port, (bits, grid) in chosen.items()
        if bits < 8
    )


def bulk(weight: Grid, activation_bits: int) -> tuple[Rule, ...]:
    operand_bits = max(activation_bits, 6)
    return (
        Rule(
            PROBABILITIES, "probabilities are never negative", ("product",), ("probabilities",), optional=True
        ),
        Rule(
            Grid(operand_bits),
            "operands of the attention products",
            ("product",),
            ("query", "key", "value"),
            optional=True,
        ),
        Rule(weight, "weights of the scheme", ports=("weight",)),
        Rule(
            Grid(activation_bits, signed=False, symmetric=False),
            "activations of the scheme",
            ports=("input",),
        ),
    )


def by_token(weight: Grid, inputs: Grid) -> tuple[Rule, ...]:
    probabilities = replace(inputs, signed=False)
    return (
        Rule(
            probabilities,
            "probabilities, with the scale of each query as it comes",
            ("product",),
            ("probabilities",),
            optional=True,
        ),
        Rule(
            inputs,
            "operands of attention, with the scale of each query, and of the keys and values of a head, as they come",
            ("product",),
            optional=True,
        ),
        Rule(weight, "weights of the scheme", ports=("weight",)),
        Rule(inputs, "activations of the scheme, with the scale of each token as it comes", ports=("input",)),
    )


def weight_only_rules(weight: Grid) -> tuple[Rule, ...]:
    small = (*ENDS, *TIMES, *TEXTS, *NARROW)
    protect = (
        (Rule(W8, "first, last and small layers", small, ("weight",), optional=True),)
        if weight.bits < 8
        else ()
    )
    return (
        *protect,
        Rule(weight, "weights of the scheme", ports=("weight",)),
        Rule(None, "a weight-only scheme keeps activations float"),
    )
