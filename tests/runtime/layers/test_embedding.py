"""Tables of embeddings in integers: every grid, saved and loaded, beside adapters, back in float."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from stepquant import hub
from stepquant.artifact import Artifact, LayerSpec
from stepquant.core.grid import Grid
from stepquant.errors import ArtifactError
from stepquant.models.denoiser import prediction_of
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime.coverage import coverage
from stepquant.runtime.layers.embedding import LOOKED_UP, IntegerEmbedding
from stepquant.runtime.lower import integer_layer
from tests.models.tiny import CASES
from tests.runtime.synthetic import artifact_of, make, noise, quantized, relative

PATH = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table"
GRIDS = [
    "int8/channel",
    "uint8/channel",
    "int4/channel/asym",
    "int3/channel",
    "int2/channel/codebook",
    "int5/group8",
    "int6/tensor",
]


def tables_on(grid: str) -> Plan:
    return Plan("tables", (Rule(Grid.parse(grid), "test", path="*embedding_table"), Rule(None, "test")))


class Small:
    """A DiT, and itself with nothing but its tables on a grid."""

    def __init__(self, plan: Plan, kind: Any = CASES["class_transformer"]) -> None:
        torch.manual_seed(0)
        self.model, self.arguments, _ = kind()
        self.model.eval()
        self.artifact, self.fake = quantized(self.model, plan, lambda _: self.call(self.model))
        self.served = copy.deepcopy(self.model)
        hub.attach(self.served, self.artifact)

    def call(self, model: Any) -> Tensor:
        with torch.no_grad():
            return prediction_of(model(**self.arguments, return_dict=False))


def by_hand(artifact: Artifact, path: str, row: int, dim: int) -> list[float]:
    """The numbers of one row from the bytes of the artifact, bit by bit."""
    grid, tensors = artifact.layers[path].weight, artifact.tensors
    stream = "".join(f"{byte:08b}"[::-1] for byte in tensors[f"{path}.weight"].tolist())
    found = []
    for place in range(row * dim, (row + 1) * dim):
        code = int(stream[place * grid.bits : (place + 1) * grid.bits][::-1], 2)
        at = place // grid.group if grid.group else 0 if grid.granularity == "tensor" else row
        integer = float(tensors[f"{path}.weight_codebook"][at, code]) if grid.codebook else code + grid.qmin
        zero = 0 if grid.symmetric else int(tensors[f"{path}.weight_zero_point"][at])
        found.append((integer - zero) * float(tensors[f"{path}.weight_scale"][at]))
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_are_those_of_the_integers_on_disk(grid: str) -> None:
    small = Small(tables_on(grid))
    table = small.served.get_submodule(PATH)
    assert isinstance(table, IntegerEmbedding)
    rows = table(torch.tensor([[3, 20], [7, 3]]))
    assert rows.shape == (2, 2, 32)
    for got, row in zip(rows.flatten(0, 1), (3, 20, 7, 3)):
        torch.testing.assert_close(got, torch.tensor(by_hand(small.artifact, PATH, row, 32)))
    assert torch.equal(table(torch.tensor(5)), table.total_weight(torch.float32)[5])
    # What was judged while quantizing is what ships.
    torch.testing.assert_close(small.call(small.served), small.fake[0])
    assert relative(small.call(small.served), small.call(small.model)) < 2.0 ** (1 - Grid.parse(grid).bits)


def test_eight_bits_are_a_quarter_and_their_error_is_in_the_last_of_them() -> None:
    small = Small(scheme("w8a8"))
    spec = small.artifact.layers[PATH]
    assert spec == LayerSpec(Grid.parse("int8/channel"))
    table, weight = small.served.get_submodule(PATH), small.model.get_submodule(PATH).weight
    stored = sum(value.nbytes for value in table.buffers())
    assert stored == weight.numel() + 4 * len(weight)
    error = (table.total_weight(torch.float32) - weight).abs().amax(1)
    assert bool((error <= weight.abs().amax(1) / 254 * 1.001).all())


@pytest.mark.parametrize("name", ["w6a6", "w4a8", "w4a4", "w4a16", "w4a8-dynamic"])
def test_named_schemes_keep_eight_bits_of_tables(name: str) -> None:
    small = Small(scheme(name))
    assert small.artifact.layers[PATH] == LayerSpec(Grid.parse("int8/channel"))
    plan = scheme(name).with_rules([Rule(None, "test", path="*embedding_table")])
    assert type(Small(plan).served.get_submodule(PATH)) is nn.Embedding


def test_classes_of_unets_are_tables_too() -> None:
    model = make(num_class_embeds=5)
    artifact = artifact_of(model)
    assert artifact.layers["class_embedding"] == LayerSpec(Grid.parse("int8/channel"))
    served = copy.deepcopy(model)
    hub.attach(served, artifact)
    assert "class_embedding" not in artifact_of(make()).layers
    given = {"sample": noise(2, 3, 16, 16), "timestep": 5}
    one, other = (served(**given, class_labels=torch.tensor([k, k])).sample for k in (1, 3))
    assert not torch.equal(one, other)


def test_a_network_without_a_float_of_its_own_has_the_dtype_that_was_asked(tmp_path: Path) -> None:
    small = Small(scheme("w8a8"))
    assert not any(True for _ in small.served.named_parameters())
    assert small.served.dtype == torch.float32
    assert [one.numel() for one in small.served.parameters()] == [0]
    small.served.save_pretrained(tmp_path)
    half = DiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == small.call(half).dtype == torch.bfloat16
    assert half.get_submodule(PATH)(torch.tensor([1])).dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "again")
    saved = [
        load_file(place / "diffusion_pytorch_model.safetensors") for place in (tmp_path, tmp_path / "again")
    ]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(small.call(again), small.call(small.served))


def test_adapters_are_the_parameters_of_such_a_network() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    served = Small(scheme("w8a8")).served
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], r=2), served)
    assert {name.rpartition("lora_")[2][0] for name, _ in served.named_parameters()} == {"A", "B"}
    assert len(list(served.parameters())) == len(list(served.named_parameters()))


@torch.no_grad()
@pytest.mark.parametrize("called", [False, True])
def test_rows_are_the_same_where_their_bytes_come_and_go(called: bool, tmp_path: Path) -> None:
    """Between calls there is memory that nobody wrote in the places of its tensors."""
    served, cpu = make(num_class_embeds=5), torch.device("cpu")
    hub.attach(served, artifact_of(served))
    given = {"sample": noise(2, 3, 16, 16), "timestep": 5, "class_labels": torch.tensor([1, 3])}
    offloaded, want = copy.deepcopy(served), served(**given).sample
    if called:
        offloaded(**given)
    offloaded.enable_group_offload(
        cpu, cpu, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    for _ in range(3):
        assert torch.equal(offloaded(**given).sample, want)


def test_dequantizing_gives_ordinary_tables_back() -> None:
    small = Small(tables_on("int4/channel/asym"))
    rows = small.served.get_submodule(PATH).total_weight(torch.float32)
    model = small.served.dequantize()
    assert type(model.get_submodule(PATH)) is nn.Embedding
    assert torch.equal(model.get_submodule(PATH).weight, rows)
    assert set(model.state_dict()) == set(small.model.state_dict())
    assert "dtype_alone" not in dict(model.named_buffers())
    torch.testing.assert_close(small.call(model), small.fake[0])


def test_coverage_says_that_rows_are_looked_up() -> None:
    small = Small(scheme("w8a8"))
    lines = {line.path: line for line in coverage(small.served, small.arguments).lines}
    assert (lines[PATH].macs, lines[PATH].planned, lines[PATH].reason) == (0, False, LOOKED_UP)


def test_a_table_has_nothing_beside_its_weight() -> None:
    grid = Grid.parse("int8/channel")
    with pytest.raises(ArtifactError, match="'some' cannot carry") as caught:
        integer_layer(nn.Embedding(3, 4), LayerSpec(grid, Grid.parse("uint8/tensor")), "some")
    assert "nothing that would multiply it" in str(caught.value)
