"""Operations called directly with arguments that do not fit: an error each time, never a crash or foreign memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stepquant.runtime import ops
from tests.runtime.ops.examples import CODE, examples, packed
from tests.runtime.ops.test_everywhere import BARE

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")


def every() -> dict[str, tuple]:
    return {name: packed(given, ops.pack_weight) for name, given in examples().items()}


def call(name: str, given: tuple) -> Tensor | tuple[Tensor, ...]:
    return getattr(torch.ops.stepquant, name).default(*given)


BAD = [
    ("group_norm", 3, 0, "group_norm: 0 groups"),
    ("group_norm", 3, -4, "group_norm: -4 groups"),
    ("group_norm", 9, torch.ones(2, 16, 3, 6), "group_norm: x and skip"),
    ("group_norm", 6, torch.ones(48, 2), "group_norm: add"),
    ("group_norm_quantize", 6, 300, "group_norm_quantize: the zero point"),
    ("quantize", 1, float("nan"), "quantize: the scale"),
    ("quantize", 1, 1e-46, "quantize: the scale"),
    ("quantize_concat", 1, torch.ones(2, 16, 6, 4), "quantize_concat: x and skip"),
    ("quantize", 0, torch.ones(3, dtype=torch.complex64), "complex"),
    ("activation_quantize", 0, torch.tensor(1.0), "activation_quantize: a gated"),
    ("layer_norm_quantize", 1, torch.ones(31), "layer_norm_quantize: weight"),
    ("rms_norm", 4, torch.ones(2, 31), "rms_norm: gate"),
    ("rms_norm", 5, torch.ones(2, 9, 31), "rms_norm: add"),
    ("rms_norm_rotary_quantize", 0, torch.ones(2, 9, 32), "rms_norm_rotary_quantize: x"),
    ("rms_norm_rotary_quantize", 1, torch.ones(32), "rms_norm_rotary_quantize: weight"),
    ("rms_norm_rotary_quantize", 4, torch.ones(1, 8, 4), "rms_norm_rotary_quantize: angles"),
    ("rms_norm_rotary_quantize", 5, None, "rms_norm_rotary_quantize: sines"),
    ("rms_norm_rotary_quantize", 8, 256, "rms_norm_rotary_quantize: the zero point"),
    ("layer_norm_rotary_quantize", 2, torch.ones(9), "layer_norm_rotary_quantize: bias"),
    ("attention", 2, torch.ones(2, 4, 9, 8, dtype=torch.uint8), "attention: value"),
    ("pack_weight", 0, torch.ones(0, 8, 3, 3, dtype=torch.int8), "pack_weight: weight"),
    ("attention", 1, torch.ones(2, 4, 9, 7), "attention: query, key"),
    ("convolve", 8, [0, 1], "convolve: stride"),
    ("convolve", 8, [1], "convolve: stride"),
    ("convolve", 7, [-3, -3], "convolve: kernel"),
    ("convolve", 9, [-1, 0, 0, 0], "convolve: sides"),
    ("convolve", 10, [1, 2**62], "convolve: dilation"),
    ("convolve", 6, torch.ones(19), "convolve: bias"),
    ("convolve", 5, torch.ones(32), "convolve: weight_sum"),
    ("convolve", 2, 256, "convolve: zero_point"),
    ("convolve", 12, torch.float64, "convolve: dtype"),
    ("convolve", 0, torch.ones(2, 8, 0, 6, dtype=torch.uint8), "convolve: codes"),
    ("convolve", 13, torch.ones(2, 20, 6, 5), "convolve: add"),
    ("linear", 0, torch.ones(4, 9, dtype=torch.uint8), "linear: weight"),
    ("linear", 3, torch.ones(4, dtype=torch.int8), "linear: weight"),
    ("linear", 8, torch.ones(30, 19), "linear: add"),
    ("linear", 11, torch.ones(30, 5), "linear: low: rows"),
    ("linear", 12, torch.ones(1, 6, 16, 1), "linear: a side"),
    ("linear", 12, None, "linear: low and up"),
    ("multiply_side", 0, torch.ones(9, 34), "multiply_side: rows"),
    ("multiply_side", 1, torch.ones(2, 16, 16, 2), "multiply_side: a side"),
    ("multiply_side", 2, 33, "multiply_side: a side"),
    ("quantize", 5, torch.ones(5), "quantize: factors"),
    ("move_codes", 0, torch.ones(5), "move_codes: bytes"),
    ("move_codes", 1, torch.ones(255, dtype=torch.uint8), "move_codes: bytes"),
    ("rotate_quantize_rows", 6, torch.ones(16), "rotate_quantize_rows: factors"),
    ("rotate_quantize_rows", 1, 5, "rotate_quantize_rows: groups"),
    ("linear", 9, torch.ones(7, 20), "linear: gate"),
]


@pytest.mark.parametrize("name, place, value, message", BAD)
def test_an_argument_that_does_not_fit_is_named(name: str, place: int, value: object, message: str) -> None:
    given = list(every()[name])
    call(name, tuple(given))
    given[place] = value
    with pytest.raises(RuntimeError, match=message):
        call(name, tuple(given))


def test_no_samples_are_no_samples_in_both() -> None:
    from tests.runtime import reference

    x, skip, rows = torch.randn(0, 32, 4, 6), torch.randn(0, 16, 4, 6), torch.randn(0, 48)
    norming = (x, torch.ones(48), None, 4, 1e-5)
    tokens = torch.randn(0, 9, 32)
    heads = torch.randn(0, 4, 9, 8)
    flat = ops.Code(1 / 255, 0, 0, 255)
    for kind in (ops, reference):
        outs = (
            kind.group_norm(*norming, "silu", rows, rows, rows, skip),
            kind.group_norm_quantize(*norming, CODE, "silu", rows, rows, rows, skip),
            kind.layer_norm_quantize(tokens, None, None, 1e-5, CODE, tokens[:, 0], tokens[:, 0]),
            kind.quantize(x, CODE),
            kind.quantize_concat(x, skip, CODE),
            kind.activation_quantize(tokens, "geglu", CODE),
            kind.upsample_nearest2x(kind.quantize(x, CODE)),
            kind.attention(heads, heads, heads, 0.3, CODE, CODE, CODE, flat),
        )
        shapes = [tuple(out.shape) for out in outs]
        assert shapes == [
            (0, 48, 4, 6), (0, 48, 4, 6), (0, 9, 32), (0, 32, 4, 6), (0, 48, 4, 6), (0, 9, 16), (0, 32, 8, 12),
            (0, 4, 9, 8),
        ]  # fmt: skip


# Arguments of every operation, one or two of them replaced at random: each call must end in a result or an error.
FUZZ = """
import random, torch
from tests.runtime.ops.test_refuse import call, every
draw = random.Random(int(sys.argv[1]))
numbers = [0, -1, 1, 2, 3, 7, 255, 256, -128, 2**31, -2**31, 2**62, -2**63]
def other(value):
    if isinstance(value, bool): return not value
    if isinstance(value, int): return draw.choice(numbers)
    if isinstance(value, float): return draw.choice([0.0, -1.0, 1e-46, 1e38, float("nan"), float("inf"), 0.5])
    if isinstance(value, str): return draw.choice(["none", "silu", "gelu", "geglu", "swiglu", "swiglu_first", ""])
    if isinstance(value, torch.dtype): return draw.choice([torch.float32, torch.bfloat16, torch.uint8, torch.float64])
    if isinstance(value, list): return [draw.choice(numbers) for _ in range(draw.choice([len(value), 0, 1, 5]))]
    shape = [draw.choice([0, 1, 2, 3, 8, 16, 32, 48]) for _ in range(draw.choice([0, 1, 2, 3, 4, 5]))]
    shape = draw.choice([shape, list(value.shape)[::-1], list(value.shape)[1:], [0, *value.shape[1:]]]) if value is not None else shape
    kind = draw.choice([torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.float64, torch.complex64])
    made = torch.zeros(shape, dtype=draw.choice([kind, value.dtype]) if value is not None else kind)
    return draw.choice([made, made.transpose(0, -1) if made.dim() else made, made.expand(2, *shape)])
ended = {True: 0, False: 0}
for turn in range(int(sys.argv[2])):
    known = every()
    name = draw.choice(sorted(known))
    given = list(known[name])
    for _ in range(draw.choice([1, 1, 2])):
        place = draw.randrange(len(given))
        given[place] = other(given[place])
    try:
        call(name, given)
        ended[True] += 1
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        ended[False] += 1
print(ended[True], ended[False])
"""


def test_random_arguments_never_end_the_process() -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", BARE + FUZZ, "0", "3000"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"ended with {run.returncode}: {run.stderr[-2000:]}"
    fine, refused = map(int, run.stdout.split())
    assert fine > 300
    assert refused > 300
