"""Tables of embeddings that hold packed integers: rows are looked up, and what was found becomes floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.affine import dequantize
from stepquant.core.grid import GridError
from stepquant.errors import RuntimeSupportError
from stepquant.runtime.layers.packed import PackedWeight
from stepquant.runtime.layers.stored import Prepared, Versions

LOOKED_UP = "rows of a table are looked up: nothing is multiplied"


@dataclass(frozen=True, eq=False)
class PreparedTable(Prepared):
    """Row by row: a byte for each number, and what groups of them share."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class IntegerEmbedding(PackedWeight[PreparedTable]):
    """Stands where a table of embeddings was; `emit` is the dtype of what it returns."""

    weight_zero_point: Tensor  # where the grid has one

    def __init__(self, table: nn.Embedding, spec: LayerSpec, groups: int = 1) -> None:
        super().__init__()
        if spec != LayerSpec(spec.weight):
            raise GridError("a table of embeddings has a weight, and nothing that would multiply it")
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.emit = torch.float32
        self.make_weight(table.weight, spec)

    def prepare(self, versions: Versions) -> PreparedTable:
        grid, rows = self.spec.weight, self.num_embeddings
        as_stored = grid.bits == 8  # what a byte holds is its code already
        codes = self.weight if as_stored else (self.rows()[0] - grid.qmin).to(torch.uint8)
        least = torch.full((1,), -grid.qmin, dtype=torch.int16, device=codes.device)
        zero_point = least if grid.symmetric else self.weight_zero_point + least
        scale, zero_point = (
            (one.expand(rows) if len(one) == 1 else one).reshape(rows, -1)
            for one in (self.weight_scale, zero_point)
        )
        return PreparedTable(versions, codes.reshape(rows, -1), scale, zero_point)

    def forward(self, input: Tensor) -> Tensor:
        """`input` is what torch calls the places of rows."""
        ready = self.prepared()
        return looked_up(ready.codes, ready.scale, ready.zero_point, input).to(self.emit)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weight {self.spec.weight}"


def has_tokens(model: nn.Module) -> bool:
    """Whether the table that a model of transformers would hand out is one of integers."""
    own = getattr(type(model), "get_input_embeddings", None)
    return own is not None and isinstance(own(model), IntegerEmbedding)


def no_tokens() -> NoReturn:
    """Takes the place of `get_input_embeddings` of such a model."""
    raise RuntimeSupportError(
        "the table of tokens is packed: it takes no further ones, and its rows are not for editing",
        got="get_input_embeddings(), which textual inversion writes into",
        fix="quantize with a plan rule that keeps it in float: "
        '{"path": "*.token_embedding", "grid": "float", "optional": true}',
    )


def looked_up(codes: Tensor, scale: Tensor, zero_point: Tensor, places: Tensor) -> Tensor:
    """The rows at these places in float32."""
    rows = places.flatten()
    found, scale, zero_point = (one.index_select(0, rows) for one in (codes, scale, zero_point))
    numbers = found.unflatten(-1, (scale.shape[-1], -1)).float()
    values = dequantize(numbers, scale[..., None], zero_point[..., None])
    return values.reshape(*places.shape, codes.shape[-1])
