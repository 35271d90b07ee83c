"""Each operation against the torch calls it replaces, interleaved: python benchmarks/kernels.py [threads].

With one thread the clock is processor time, which a busy machine disturbs least; with more it is wall time and the best
round counts. GB/s counts the bytes of inputs and outputs once, TOPS two operations per product. Convolutions stand against
float32, whose codes are made already.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops import Code

CODE = Code(0.02, 20, 0, 255)
SIGNED = Code(0.03, 128, 1, 255)
PROBABILITIES = Code(1 / 255, 0, 0, 255)
NORMS = [
    (8, 128, 32, 32),
    (8, 256, 32, 32),
    (8, 512, 16, 16),
    (8, 256, 8, 8),
    (1, 256, 32, 32),
    (1, 256, 8, 8),
]
NORMS += [(1, 80, 64, 64), (32, 128, 32, 32)]
ATTENTIONS = [(1, 2, 4096, 4096, 40), (1, 2, 1024, 1024, 80), (8, 1, 256, 256, 256), (8, 4, 64, 64, 64)]
ATTENTIONS += [(1, 2, 4096, 77, 40), (1, 8, 4096, 4096, 64)]
# batch, inputs, outputs, height and width, kernel
CONVOLUTIONS = [(1, 64, 64, 32, 3), (1, 128, 128, 16, 3), (1, 256, 256, 8, 3), (1, 256, 256, 4, 3)]
CONVOLUTIONS += [(8, 64, 64, 32, 3), (8, 128, 128, 16, 3), (8, 256, 256, 8, 3), (8, 64, 128, 32, 1)]
CONVOLUTIONS += [(32, 128, 128, 16, 3)]


def best_times(
    calls: list[Callable[[], object]], clock: Callable[[], float], rounds: int = 15
) -> list[float]:
    """Seconds of the best round of each call; the calls take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            start = clock()
            call()
            repeats = max(1, int(3e-4 / max(clock() - start, 1e-7)))
            start = clock()
            for _ in range(repeats):
                call()
            best[index] = min(best[index], (clock() - start) / repeats)
    return best


def eager_codes(y: Tensor) -> Tensor:
    return y.float().mul_(50.0).round_().add_(20).clamp_(0, 255).to(torch.uint8)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def norm_calls(shape: tuple[int, ...]) -> list[Callable[[], object]]:
    x, channels = image(*shape), shape[1]
    weight, bias, add = torch.randn(channels), torch.randn(channels), torch.randn(shape[0], channels)
    groups = 32 if channels % 32 == 0 else 16
    low = [t.bfloat16() for t in (weight, bias, add)]

    def eager() -> Tensor:
        return eager_codes(F.silu(F.group_norm(x + low[2][:, :, None, None], groups, low[0], low[1], 1e-5)))

    return [lambda: ops.group_norm_quantize(x, weight, bias, groups, 1e-5, CODE, "silu", add), eager]


def pointwise_calls() -> dict[str, tuple[float, list[Callable[[], object]]]]:
    """Bytes moved, and the two calls."""
    x, skip, tokens, gated = (
        image(8, 256, 32, 32),
        image(8, 128, 32, 32),
        *torch.randn(2, 8192, 512).bfloat16(),
    )
    codes = ops.quantize(image(8, 256, 16, 16), CODE)
    values, gates = gated.chunk(2, -1)
    return {
        "quantize": (x.numel() * 3, [lambda: ops.quantize(x, CODE), lambda: eager_codes(x)]),
        "quantize_concat": (
            (x.numel() + skip.numel()) * 3,
            [lambda: ops.quantize_concat(x, skip, CODE), lambda: eager_codes(torch.cat([x, skip], 1))],
        ),
        "silu": (
            tokens.numel() * 3,
            [lambda: ops.activation_quantize(tokens, "silu", CODE), lambda: eager_codes(F.silu(tokens))],
        ),
        "gelu": (
            tokens.numel() * 3,
            [lambda: ops.activation_quantize(tokens, "gelu", CODE), lambda: eager_codes(F.gelu(tokens))],
        ),
        "geglu": (
            gated.numel() * 2.5,
            [
                lambda: ops.activation_quantize(gated, "geglu", CODE),
                lambda: eager_codes(values * F.gelu(gates)),
            ],
        ),
        "layer_norm": (
            tokens.numel() * 3,
            [
                lambda: ops.layer_norm_quantize(tokens, None, None, 1e-6, CODE),
                lambda: eager_codes(F.layer_norm(tokens, (512,))),
            ],
        ),
        "upsample": (
            codes.numel() * 5,
            [
                lambda: ops.upsample_nearest2x(codes),
                lambda: F.interpolate(codes, scale_factor=2, mode="nearest"),
            ],
        ),
    }


def attention_calls(sizes: tuple[int, ...]) -> list[Callable[[], object]]:
    batch, heads, queries, keys, width = sizes
    q, k, v = (torch.randn(batch, n, heads, width).bfloat16().transpose(1, 2) for n in (queries, keys, keys))
    codes = (SIGNED, SIGNED, SIGNED, PROBABILITIES)
    return [
        lambda: ops.attention(q, k, v, width**-0.5, *codes),
        lambda: F.scaled_dot_product_attention(q, k, v),
    ]


def convolution_calls(sizes: tuple[int, ...]) -> list[Callable[[], object]]:
    batch, inputs, outputs, size, kernel = sizes
    codes = ops.quantize(image(batch, inputs, size, size), CODE)
    x, sides = codes.float(), (kernel // 2,) * 4
    weight = torch.randint(-127, 128, (outputs, inputs, kernel, kernel), dtype=torch.int8)
    product = ops.Product.of(weight, torch.full((outputs,), 1e-3), torch.zeros(outputs))
    floats = weight.float().contiguous(memory_format=torch.channels_last)
    return [
        lambda: product.convolve(codes, CODE, torch.bfloat16, None, sides=sides),
        lambda: F.conv2d(x, floats, None, 1, kernel // 2),
    ]


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(
        f"{ops.capability()}, {threads} thread(s)\n| operation | us | torch us | ratio | rate |\n|---|---|---|---|---|"
    )

    def row(name: str, calls: list[Callable[[], object]], amount: float, unit: str) -> None:
        ours, torch_time = best_times(calls, clock)
        rate = f"{amount / ours:.1f} {unit}" if unit == "GB/s" else f"{amount / ours:.2f} {unit}"
        print(
            f"| {name} | {ours * 1e6:.0f} | {torch_time * 1e6:.0f} | {torch_time / ours:.1f} | {rate} |",
            flush=True,
        )

    for shape in NORMS:
        numbers = shape[0] * shape[1] * shape[2] * shape[3]
        row(f"group_norm + silu {'x'.join(map(str, shape))}", norm_calls(shape), numbers * 3e-9, "GB/s")
    for name, (size, calls) in pointwise_calls().items():
        row(name, calls, size * 1e-9, "GB/s")
    for sizes in CONVOLUTIONS:
        batch, inputs, outputs, size, kernel = sizes
        amount = 2e-12 * batch * inputs * outputs * size**2 * kernel**2
        row(f"convolve {sizes}", convolution_calls(sizes), amount, "TOPS")
    for sizes in ATTENTIONS:
        batch, heads, queries, keys, width = sizes
        row(
            f"attention {sizes}",
            attention_calls(sizes),
            4e-12 * batch * heads * queries * keys * width,
            "TOPS",
        )


if __name__ == "__main__":
    with torch.no_grad():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
