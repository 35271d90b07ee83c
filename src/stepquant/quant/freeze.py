"""From quantizers to an artifact: weights rounded and packed, ranges as tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stepquant.artifact import Artifact, LayerSpec, ProductSpec, StepSpec, table_tensors
from stepquant.core.affine import to_groups
from stepquant.core.codebook import codes_of
from stepquant.core.freed import empty, trim
from stepquant.core.mapped import beside
from stepquant.core.pack import pack, pack_codes, pack_nearest
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer

LOOSE = (
    1 << 25
)  # bytes that the allocator may keep before it is asked to give them back, which takes milliseconds


def freeze(
    network: Inserted,
    time_table: Tensor | None = None,
    tabled: Mapping[str, tuple[int, ...]] | None = None,
) -> Artifact:
    """Round and pack what the quantizers describe; the network is left as it is, unless its weights are expendable.

    `time_table` has a row for each t of the network's clock, in place of the layers that depend on t alone; `tabled`
    says which, and the shape of each one's part, where that is no time embedding of the declared kind.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, LayerSpec] = {}
    products: dict[str, ProductSpec] = {}
    parameters = network.denoiser.model.named_parameters(remove_duplicate=False)
    owners, freed = Counter(id(value) for _, value in parameters), 0
    trim()
    for quantizer in network.quantizers():
        if not quantizer.dynamic:
            quantizer.range()  # one that is not set fails before any weight is gone
    for path, layer in network.weighted().items():
        assert layer.weight_quantizer is not None
        inputs = layer.input_quantizer.grid if layer.input_quantizer else None
        rank = 0 if layer.branch is None else len(layer.branch.down)
        layers[path] = LayerSpec(
            layer.weight_quantizer.grid,
            inputs,
            rotation=layer.rotation,
            rank=rank,
            balanced=layer.factors is not None,
            first=layer.first is not None,
            input_bits=layer.input_quantizer is not None and bool(layer.input_quantizer.bits),
        )
        tensors |= {f"{path}.{name}": value for name, value in packed_tensors(layer).items()}
        if network.denoiser.expendable and owners[id(layer.weight)] == 1:
            freed += layer.weight.nbytes
            empty(layer.weight)  # type: ignore[arg-type]
            if freed > LOOSE:
                trim()
                freed = 0
    for path, product in network.products.items():
        grids = {port: quantizer.grid for port, quantizer in product.ports().items()}
        products[path] = ProductSpec(**grids, shifted=product.correction is not None, first=product.first)
        if product.correction is not None:
            tensors[f"{path}.product.probabilities_shift"] = product.correction.cpu().float().reshape(1)
        for port, quantizer in product.ports().items():
            tensors |= range_tensors(f"{path}.product.{port}", quantizer)
    steps = None
    table = None if network.clock is None else network.clock.table
    if table is not None:
        tensors |= table_tensors(table)
        steps = StepSpec(len(table.times), table.groups)
        if time_table is not None:
            tensors["steps.table"] = time_table.detach().cpu().float().contiguous()
            steps = replace(steps, table=time_table.shape[1], tabled=dict(tabled or {}))
    return Artifact(layers, products, tensors, dict(network.splits), steps, policy=network.plan.float_steps)


def packed_tensors(layer: QuantLayer) -> dict[str, Tensor]:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    scale, zero_point = quantizer.range()
    out = {"weight_scale": scale.float()}
    if not quantizer.grid.symmetric:
        out["weight_zero_point"] = zero_point.to(torch.int16)
    if quantizer.grid.codebook:
        out["weight_codebook"] = quantizer.codebook.to(torch.int8)
    if layer.bias is not None:
        out["bias"] = layer.bias.detach().float()
    if layer.input_quantizer is not None:
        out |= range_tensors("input", layer.input_quantizer)
        if layer.input_quantizer.grid.codebook:
            out["input_codebook"] = layer.input_quantizer.codebook.to(torch.uint8)
        if layer.input_quantizer.bits:
            out["input_bits"] = torch.tensor(layer.input_quantizer.bits, dtype=torch.int32)
    if layer.factors is not None:
        out["input_factors"] = layer.factors.float()
    if layer.first is not None:
        out["first_output"] = layer.first.float()
    if layer.branch is not None:
        out |= {"low_rank.down": layer.branch.down, "low_rank.up": layer.branch.up}
    packed = beside(layer.weight, packed_weight(layer, quantizer))
    return {name: own(value) for name, value in out.items()} | {"weight": packed}


def packed_weight(layer: QuantLayer, quantizer: Quantizer) -> Tensor:
    """The dense stream of bytes on the CPU."""
    grid = quantizer.grid
    if grid.codebook:
        codes = codes_of(to_groups(layer.weight_integers(), grid), quantizer.codebook)
        return pack_codes(codes.reshape(-1).to(torch.uint8), grid.bits).cpu()
    if layer.rounding is not None:
        return pack(layer.weight_integers().cpu(), grid)
    return pack_nearest(to_groups(layer.weight.detach(), grid), *quantizer.range(), grid).cpu()


def own(value: Tensor) -> Tensor:
    """The same numbers on the CPU, in memory of their own and no more than they need."""
    value = value.detach().cpu()
    return value.clone(memory_format=torch.contiguous_format)


def range_tensors(prefix: str, quantizer: Quantizer) -> dict[str, Tensor]:
    if quantizer.dynamic:
        return {}
    scale, zero_point = quantizer.range()
    return {
        f"{prefix}_scale": scale.detach().cpu().float().reshape(-1).clone(),
        f"{prefix}_zero_point": zero_point.detach().cpu().to(torch.int32).reshape(-1).clone(),
    }
