"""Every compiled operation against its specification over random shapes, zero points, limits and saturated numbers.

`python -m tests.torture.shapes --count 10000 --seed 0`; a violation names the number of its case: `--only NUMBER`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops import Code, Product
from tests.runtime import reference
from tests.runtime.ops.test_attention import check as check_attention
from tests.runtime.ops.test_ops import assert_codes, channels_last
from tests.torture.runs import Violations


class Case:
    """Random numbers of one case."""

    def __init__(self, seed: int, number: int) -> None:
        self.draw = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.draw.getrandbits(62))
        self.dtype = self.draw.choice((torch.bfloat16, torch.float32))

    def size(self, most: int) -> int:
        """Any, but often at an edge of what vectors hold."""
        near = [n for n in (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129) if n <= most]
        return self.draw.choice(near) if self.draw.random() < 0.4 else self.draw.randint(1, most)

    def code(self) -> Code:
        low, high = self.draw.choice(((0, 255), (0, 255), (1, 255), (120, 135), (0, 15)))
        zero = self.draw.choice((low, high, self.draw.randint(low, high)))
        return Code(10 ** self.draw.uniform(-3, 0), zero, low, high)

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Some of them beyond every limit."""
        x = torch.randn(shape, generator=self.generator) * 10 ** self.draw.uniform(-2, 1)
        if self.draw.random() < 0.2:
            x[torch.rand(shape, generator=self.generator) < 0.05] *= 1e6
        return x.to(dtype or self.dtype)

    def image(self, *shape: int) -> Tensor:
        """In one of the layouts that a network has."""
        kind = self.draw.randrange(4)
        if kind == 0:
            return self.numbers(*shape)
        if kind == 1:
            wide = channels_last(self.numbers(shape[0], shape[1] + 5, *shape[2:]))
            return wide[:, 2 : 2 + shape[1]]
        if kind == 2:
            return channels_last(self.numbers(*shape[:2], 2 * shape[2], shape[3]))[:, :, ::2]
        return channels_last(self.numbers(*shape))

    def mask(self, *shape: int) -> Tensor | None:
        """Of (batch, heads, queries, keys), of any of which but the last there may be one for all."""
        if self.draw.random() < 0.3:
            return None
        shape = *(self.draw.choice((1, size)) for size in shape[:3]), shape[3]
        left = torch.rand(shape, generator=self.generator) < self.draw.random()
        if self.draw.random() < 0.5:
            return left
        least = self.draw.choice((-1e4, -torch.inf, torch.finfo(torch.float32).min))
        return torch.where(left, torch.randn(shape, generator=self.generator), least)

    def codes(self, *shape: int) -> Tensor:
        if self.draw.random() < 0.15:
            return torch.full(shape, self.draw.choice((0, 255)), dtype=torch.uint8)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)

    def weight(self, *shape: int) -> Tensor:
        if self.draw.random() < 0.15:
            return torch.full(shape, self.draw.choice((-128, 127)), dtype=torch.int8)
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=self.generator)

    def maybe(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor | None:
        return self.numbers(*shape, dtype=dtype) if self.draw.random() < 0.5 else None


def quantize(case: Case) -> None:
    x, code = case.image(case.size(3), case.size(70), case.size(9), case.size(9)), case.code()
    assert torch.equal(ops.quantize(x, code), reference.quantize(x, code))


def quantize_concat(case: Case) -> None:
    batch, height, width = case.size(3), case.size(9), case.size(9)
    x, skip = (case.image(batch, case.size(70), height, width) for _ in range(2))
    code = case.code()
    assert torch.equal(ops.quantize_concat(x, skip, code), reference.quantize_concat(x, skip, code))


def group_norm_quantize(case: Case) -> None:
    groups, batch, height, width = case.size(8), case.size(3), case.size(9), case.size(9)
    channels = groups * case.size(16)
    own = case.draw.randint(1, channels)
    x = case.image(batch, own, height, width)
    rest = {"skip": case.image(batch, channels - own, height, width)} if own < channels else {}
    around = {name: case.maybe(batch, channels) for name in ("add", "scale", "shift")} | rest
    affine = case.maybe(channels, dtype=torch.float32), case.maybe(channels, dtype=torch.float32)
    code, activation = case.code(), case.draw.choice(("none", "silu"))
    exact = reference.normed(
        x, *affine, groups, 1e-5, activation, *(around.get(n) for n in ("add", "scale", "shift", "skip"))
    )
    got = ops.group_norm_quantize(x, *affine, groups, 1e-5, code, activation, **around)  # type: ignore[arg-type]
    assert_codes(got, exact, code, doubtful=1.0)


def layer_norm_quantize(case: Case) -> None:
    batch, tokens, width = case.size(3), case.size(20), case.size(140)
    x, code = case.numbers(batch, tokens, width), case.code()
    affine = case.maybe(width, dtype=torch.float32), case.maybe(width, dtype=torch.float32)
    scale, shift = case.maybe(batch, width), case.maybe(batch, width)
    y = reference.affine(reference.standardized(x, 1e-5), *affine, (1, 1, -1))
    exact = reference.modulated(y, scale, shift, (batch, 1, -1))
    got = ops.layer_norm_quantize(x, *affine, 1e-5, code, scale, shift)
    assert_codes(got, exact, code, doubtful=1.0)
    y = torch.nn.functional.rms_norm(x.double(), (width,), eps=1e-5).float()
    y = reference.affine(y, affine[0], None, (1, 1, -1))
    got = ops.rms_norm_quantize(x, affine[0], 1e-5, code, scale, shift)
    assert_codes(got, reference.modulated(y, scale, shift, (batch, 1, -1)), code, doubtful=1.0)


def activation_quantize(case: Case) -> None:
    x, code = case.numbers(case.size(3), case.size(9), 2 * case.size(80)), case.code()
    name = case.draw.choice(("silu", "gelu", "gelu_tanh", "geglu", "swiglu", "swiglu_first"))
    exact = reference.activate(x.double(), name).float()
    assert_codes(ops.activation_quantize(x, name, code), exact, code, doubtful=1.0)


def rotate(case: Case) -> None:
    group = 4 ** case.draw.randint(1, 4)
    x, code = case.numbers(case.size(9), group * case.draw.randint(1, 9)), Code(1.0, 128, 1, 255)
    arguments = x, group, code, case.maybe(x.shape[1], dtype=torch.float32)
    got, want = ops.rotate_quantize_rows(*arguments), ops.rotate_quantize_rows.plain(*arguments)
    assert all(map(torch.equal, got, want))


def upsample(case: Case) -> None:
    x = case.codes(case.size(3), case.size(70), case.size(9), case.size(9))
    x = channels_last(x) if case.draw.random() < 0.5 else x
    assert torch.equal(ops.upsample_nearest2x(x), reference.upsample_nearest2x(x))


def convolve(case: Case) -> None:
    kernel = case.draw.choice(((1, 1), (3, 3), (3, 3), (5, 2), (2, 3)))
    doubled = case.draw.random() < 0.2
    stride = (case.draw.randint(1, 2), case.draw.randint(1, 2))
    dilation = (case.draw.randint(1, 2), case.draw.randint(1, 2))
    sides = tuple(case.draw.randint(0, 3) for _ in range(4))
    least = [(dilation[i] * (kernel[i] - 1) + 1) for i in range(2)]
    height, width = least[0] + case.size(12) - 1, least[1] + case.size(12) - 1
    batch, inputs, outputs = case.size(3), case.size(70), case.size(80)
    codes, weight = case.codes(batch, inputs, height, width), case.weight(outputs, inputs, *kernel)
    codes = channels_last(codes) if case.draw.random() < 0.7 else codes
    scale = torch.rand(outputs, generator=case.generator) * 1e-3
    bias, zero = (
        case.maybe(outputs, dtype=torch.float32),
        case.draw.choice((0, 255, case.draw.randint(0, 255))),
    )
    walk = {"stride": stride, "sides": sides, "dilation": dilation, "doubled": doubled}
    plain = reference.convolve(codes, 0.02, zero, weight, scale, bias, case.dtype, None, **walk)  # type: ignore[arg-type]
    add = case.maybe(*plain.shape)
    want = reference.convolve(codes, 0.02, zero, weight, scale, bias, case.dtype, add, **walk)  # type: ignore[arg-type]
    product = Product.of(weight, scale, bias)
    assert torch.equal(product.convolve(codes, Code(0.02, zero), case.dtype, add, **walk), want)  # type: ignore[arg-type]


def linear(case: Case) -> None:
    rows, inputs, outputs = case.size(70), case.size(200), case.size(130)
    codes, weight = case.codes(rows, inputs), case.weight(outputs, inputs)
    scale = torch.rand(outputs, generator=case.generator) * 1e-3
    bias, add = case.maybe(outputs, dtype=torch.float32), case.maybe(rows, outputs)
    zero = case.draw.choice((0, 255, case.draw.randint(0, 255)))
    gate = case.maybe(case.draw.choice((1, rows)), outputs, dtype=torch.float32)
    want = reference.linear(codes, 0.5, zero, weight, scale, bias, case.dtype, add, gate)
    product = Product.of(weight[:, :, None, None], scale, bias)
    assert torch.equal(product.linear(codes, Code(0.5, zero), case.dtype, add, gate), want)


def branch(case: Case) -> None:
    """Both sides one after the other, whose sums are floats: as near as their magnitudes let float32 be."""
    rows, inputs, outputs, rank = case.size(70), case.size(200), case.size(130), case.size(80)
    x, down, up = case.numbers(rows, inputs), case.numbers(rank, inputs), case.numbers(outputs, rank)
    low = ops.multiply_side(x, ops.pack_side(down, case.dtype), rank)
    rounding = 2.0**-8 if case.dtype == torch.bfloat16 else 0
    exact, magnitude = x.double() @ down.double().T, x.double().abs() @ down.double().abs().T
    assert ((low.double() - exact).abs() <= magnitude * 2.0**-23 * inputs + exact.abs() * rounding).all()
    codes, weight = case.codes(rows, inputs), case.weight(outputs, inputs)
    product = Product.of(weight[:, :, None, None], torch.full((outputs,), 1e-3), None)
    alone = product.linear(codes, Code(0.5, 7), torch.float32)
    got = product.linear(codes, Code(0.5, 7), torch.float32, low=low, up=ops.pack_side(up, case.dtype))
    exact, magnitude = low.double() @ up.double().T, low.double().abs() @ up.double().abs().T
    allowed = (magnitude + alone.abs()) * 2.0**-23 * (rank + 2)
    assert ((got.double() - alone - exact).abs() <= allowed).all()


def attention(case: Case) -> None:
    batch, heads, width = case.size(2), case.size(3), case.size(80)
    counts = (case.size(40), *[case.size(70)] * 2)
    q, k, v = (
        case.numbers(batch, n, heads * width).view(batch, n, heads, width).transpose(1, 2) for n in counts
    )
    codes = (*[Code(10 ** case.draw.uniform(-2.5, -1), case.draw.randint(0, 255)) for _ in range(3)],
             Code(case.draw.choice((1 / 255, 0.3 / 255)), 0))  # fmt: skip
    check_attention(q, k, v, codes, most_doubtful=1.0, mask=case.mask(batch, heads, *counts[:2]))


OPERATIONS: tuple[Callable[[Case], None], ...] = (
    *(quantize, quantize_concat, group_norm_quantize, layer_norm_quantize, activation_quantize),
    *(rotate, upsample, convolve, linear, branch, attention),
)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    if not ops.compiled():
        print("shapes: the C++ kernels are not built, there is nothing to compare")
        return 1
    torch.set_num_threads(2)
    violations, wrong, start = Violations("shapes"), Counter[str](), time.time()
    for number in range(options.count) if options.only is None else (options.only,):
        operation = OPERATIONS[number % len(OPERATIONS)]
        try:
            operation(Case(options.seed, number))
        except (AssertionError, RuntimeError) as error:
            wrong[operation.__name__] += 1
            words = (str(error).strip().splitlines() or ["differs from its specification"])[0]
            violations.check(False, f"{operation.__name__}, case {number}, seed {options.seed}: {words}")
    print(
        f"shapes: {options.count} random cases of {len(OPERATIONS)} operations, seed {options.seed}, "
        f"{ops.capability()} kernels: {violations.count} violations {dict(wrong) or ''}, {time.time() - start:.0f} s"
    )
    return min(violations.count, 1)


if __name__ == "__main__":
    sys.exit(main())
