"""Rows of fused layers of networks of their true width, without their numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor

from stepquant.errors import ArtifactError
from stepquant.hub.foreign import names
from stepquant.hub.foreign.comfy import ComfyLayer
from stepquant.hub.foreign.container import Container, Entry
from stepquant.hub.foreign.markers import INT8, NATIVE, Marker
from stepquant.hub.foreign.names import translate
from stepquant.hub.foreign.network import ForeignFile

WIDTH = 3072
EMBEDDERS = {"time_in": 256, "vector_in": 768, "guidance_in": 256}


class Nothing:
    """Answers with zeros of the shapes that the header tells."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries

    def get_tensor(self, name: str) -> Tensor:
        return torch.zeros(()).expand(self.entries[name].shape)


def flux_layers() -> dict[str, tuple[int, int]]:
    found = {"img_in": (WIDTH, 64), "txt_in": (WIDTH, 4096)}
    for name, inputs in EMBEDDERS.items():
        found |= {f"{name}.in_layer": (WIDTH, inputs), f"{name}.out_layer": (WIDTH, WIDTH)}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        found |= {f"{block}_mod.lin": (6 * WIDTH, WIDTH), f"{block}_attn.qkv": (3 * WIDTH, WIDTH)}
        found |= {f"{block}_attn.proj": (WIDTH, WIDTH), f"{block}_mlp.0": (4 * WIDTH, WIDTH)}
        found[f"{block}_mlp.2"] = (WIDTH, 4 * WIDTH)
    found["single_blocks.0.modulation.lin"] = (3 * WIDTH, WIDTH)
    found["single_blocks.0.linear1"] = (7 * WIDTH, WIDTH)
    found["single_blocks.0.linear2"] = (WIDTH, 5 * WIDTH)
    return found | {"final_layer.linear": (64, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}


def flux() -> tuple[ForeignFile, FluxTransformer2DModel]:
    shapes = flux_layers()
    norms = [f"double_blocks.0.{stream}_attn.norm" for stream in ("img", "txt")] + ["single_blocks.0.norm"]
    floats = {f"{path}.bias": Entry("F32", shape[:1]) for path, shape in shapes.items()}
    floats |= {
        f"{path}.{part}_norm.scale": Entry("F32", (128,)) for path in norms for part in ("query", "key")
    }
    marker = Marker(INT8, NATIVE, 256)
    layers = {
        path: ComfyLayer(path, shape, marker, True) for path, shape in shapes.items() if path != "img_in"
    }
    floats["img_in.weight"] = Entry("F32", shapes["img_in"])
    file = Container(Path("some.safetensors"), "", floats, 0, {}, Nothing(floats))
    with init_empty_weights():
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return ForeignFile(file, layers, tuple(floats)), model


def test_rows_of_fused_layers_go_where_they_belong() -> None:
    found, model = flux()
    made = translate(found, model)
    linear1 = found.layers["single_blocks.0.linear1"]
    for part, begin, end in (
        ("attn.to_q", 0, 1),
        ("attn.to_k", 1, 2),
        ("attn.to_v", 2, 3),
        ("proj_mlp", 3, 7),
    ):
        place = made.layers[f"single_transformer_blocks.0.{part}"]
        assert place.sources == (linear1,)
        assert torch.equal(place.rows, torch.arange(begin * WIDTH, end * WIDTH))
    swapped = made.layers["norm_out.linear"]
    assert torch.equal(swapped.rows, torch.arange(2 * WIDTH).roll(WIDTH))
    added = made.layers["transformer_blocks.0.attn.add_k_proj"]
    assert added.sources == (found.layers["double_blocks.0.txt_attn.qkv"],)
    assert torch.equal(added.rows, torch.arange(WIDTH, 2 * WIDTH))
    assert "x_embedder.weight" in made.floats
    assert len(made.layers) + 1 == sum(isinstance(m, torch.nn.Linear) for m in model.modules())


@pytest.mark.parametrize(
    "changed",
    [
        lambda weight: weight.flip(1),
        lambda weight: weight.T.reshape(weight.shape),
        lambda weight: weight * 2,
        lambda weight: weight + torch.arange(2),
        lambda weight: weight[:, :1],
        lambda weight: weight[..., None],
    ],
)
def test_what_a_converter_does_with_columns_is_refused(
    changed: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, model = flux()
    convert = names.converter_of(type(model))
    assert convert is not None

    def other(**given: object) -> dict[str, Tensor]:
        made = convert(**given)
        made["proj_out.weight"] = changed(made["proj_out.weight"])  # type: ignore[operator]
        return made

    monkeypatch.setattr(names, "converter_of", lambda _: other)
    with pytest.raises(ArtifactError, match=r"'proj_out.weight'"):
        translate(found, model)


def test_fused_from_layers_of_two_rotations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found, model = flux()
    convert = names.converter_of(type(model))
    assert convert is not None
    path, key = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"

    def other(**given: object) -> dict[str, Tensor]:
        made = convert(**given)
        half, more = made[f"{path}.weight"][: WIDTH // 2], made["x_embedder.weight"]
        made[f"{path}.weight"] = torch.cat([half, made["proj_out.weight"].repeat(WIDTH, 1)[: WIDTH // 2]])
        assert more is not None
        return made

    assert key in dict(model.named_modules())
    odd = ComfyLayer("final_layer.linear", (64, WIDTH), Marker(INT8, NATIVE, 64), True)
    found = ForeignFile(found.file, dict(found.layers) | {odd.path: odd}, found.floats)
    monkeypatch.setattr(names, "converter_of", lambda _: other)
    with pytest.raises(ArtifactError, match="rotated differently"):
        translate(found, model)
