"""Fused attention: the input of query, key and value is quantized once, and the three projections are one GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.models.blocks.attention import AttentionBlock
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain, codes_for, kernel_of, pixels, run
from stepquant.runtime.kernel import Kernel
from stepquant.runtime.ops.code import Code


class Readers:
    """Linears that read the same tensor, run as one GEMM with their outputs side by side if they read the same codes."""

    def __init__(self, *layers: Any) -> None:
        self.layers = layers
        self.joins = True
        self.joint: tuple[tuple[Kernel, ...], Kernel] | None = None

    def kernels(self) -> tuple[Any, ...]:
        return tuple(kernel_of(layer) for layer in self.layers)

    def code(self) -> Code | None:
        """The code that all of them read; None if they read floats."""
        first, *others = self.kernels()
        agree = first is not None and all(
            other is not None and other.reads == first.reads for other in others
        )
        return first.code if agree else None

    def __call__(self, rows: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """What each makes of rows of `code`, or of floats where there is none."""
        if self.apart(rows):
            return [run(layer, rows, dtype) for layer in self.layers]
        widths = [layer.out_features for layer in self.layers]
        return self.side_by_side(rows, dtype).split(widths, 1)

    def side_by_side(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in one tensor."""
        if self.apart(rows):
            outs = self(rows, dtype)
            return outs[0] if len(outs) == 1 else torch.cat(tuple(outs), 1)
        return self.joint_kernel(self.kernels())(rows, dtype)

    def apart(self, rows: Tensor) -> bool:
        """Whether each of them multiplies by itself."""
        return len(self.layers) == 1 or not self.joins or rows.dtype != torch.uint8

    def joint_kernel(self, kernels: tuple[Kernel, ...]) -> Kernel:
        """Made again when a layer has made its own kernel again."""
        reads = kernels[0].reads
        if self.joint is None or any(a.packed is not b.packed for a, b in zip(self.joint[0], kernels)):
            self.joint = (kernels, type(kernels[0]).joined(kernels))
        if self.joint[1].reads != reads:
            self.joint = (kernels, self.joint[1].with_code(*reads))
        return self.joint[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"joint": None}


class Mix:
    """The product of one attention over rows of (batch * tokens, width), and the layer behind it."""

    def __init__(self, module: Any, heads: int) -> None:
        self.module, self.heads = module, heads
        self.product = getattr(module, "product", None) or F.scaled_dot_product_attention
        self.out = module.to_out[0]
        self.processor = module.processor

    def changed(self) -> bool:
        """Whether somebody gave the attention another processor."""
        return self.module.processor is not self.processor

    def __call__(self, operands: Sequence[Tensor], batch: int, residual: Tensor | None) -> Tensor:
        """Of query, key and value, added to `residual`."""
        count, width = operands[0].shape
        heads = (self.heads, width // self.heads)
        q, k, v = (
            rows.view(batch, len(rows) // batch if batch else 1, *heads).transpose(1, 2) for rows in operands
        )
        mixed = self.product(q, k, v)
        rows = mixed.transpose(1, 2).reshape(count, width)
        return run(self.out, codes_for(self.out, rows), rows.dtype, residual)


class Attention(Chain):
    """Self-attention over the pixels of an image."""

    def __init__(self, module: Any, declared: AttentionBlock) -> None:
        super().__init__(module, module.group_norm, module.to_q, module.to_k, module.to_v, module.to_out)
        self.declared, self.norm = declared, module.group_norm
        self.readers = Readers(module.to_q, module.to_k, module.to_v)
        self.mix = Mix(module, declared.heads)
        self.joints, self.mixes = (self.readers,), (self.mix,)

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x, changed = hidden_states, self.mix.changed()
        if changed or encoder_hidden_states is not None or attention_mask is not None or x.dim() != 4:
            return self.unfused(x, encoder_hidden_states, attention_mask, **kwargs)
        batch, channels, height, width = x.shape
        residual = x.permute(0, 2, 3, 1).reshape(-1, channels) if self.declared.residual else None
        out = self.mix(self.readers(pixels(self.normed(x)), x.dtype), batch, residual)
        out = out.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
        return out if self.declared.divisor == 1.0 else out / self.declared.divisor

    def state(self) -> list[Any]:
        return [self.mix.module.processor, self.readers.joins]

    def normed(self, x: Tensor) -> Tensor:
        """What the projections read, as codes if they agree on them."""
        norm, code = self.norm, self.readers.code()
        if norm is None:
            return x if code is None else ops.quantize(x, code)
        norming = (x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        return ops.group_norm(*norming) if code is None else ops.group_norm_quantize(*norming, code)
