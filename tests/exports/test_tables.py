"""Tables of embeddings in the files of other programs: floats, but in a graph, which looks up bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepquant.hub.exports.at_rest import at_rest
from stepquant.hub.exports.outlook import TABLE
from stepquant.hub.exports.qdq import ExportedTable
from stepquant.job.export import export
from tests.exports.conftest import Make

PATH = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table"


@pytest.mark.parametrize(("to", "name"), [("sdnq", "out"), ("comfyui", "a.safetensors"), ("gguf", "a.gguf")])
def test_files_of_weights_have_them_in_float(to: str, name: str, rounded: Make, tmp_path: Path) -> None:
    model, _, folder = rounded("class_transformer")
    done = export(folder, tmp_path / name, to=to)
    fate = next(fate for fate in done.outlook.fates if fate.path == PATH)
    assert (fate.becomes, fate.reason) == ("float16", TABLE)
    if to == "gguf":  # which an outside reader reads
        return
    written = load_file(done.file / "diffusion_pytorch_model.safetensors" if to == "sdnq" else done.file)
    want = model.get_submodule(PATH).total_weight(torch.float32)
    torch.testing.assert_close(written[f"{PATH}.weight"].float(), want, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a16"])
def test_a_graph_looks_up_the_same_rows(scheme: str, rounded: Make) -> None:
    model, _, folder = rounded("class_transformer", scheme)
    places = torch.tensor([0, 4, 20])
    found = ExportedTable(at_rest(folder).tables[PATH])(places)
    assert torch.equal(found, model.get_submodule(PATH)(places))
