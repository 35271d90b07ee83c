"""Methods on networks of every kind: blocks see what the model shows them, and each method makes something that runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path

import pytest
import torch

from stepquant import methods
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.ranges import minmax
from stepquant.errors import MethodError
from stepquant.fit.blocks import hold_out
from stepquant.fit.learner import Learner, Sample, Schedule
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.reconstruct import reconstruct
from stepquant.fit.streams import Piece, Streams, replaced, replay
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.schemes import scheme
from tests.contracts.pairs import error_of
from tests.models.steered import STEPS, source_of
from tests.models.tiny import images, joint, sounds, videos
from tests.torture.methods import files

# A stem that reads all samples as one list, frames and tokens folded into the batch, text beside the image.
ALIKE = (
    "pixart_sigma",
    "sana_guided",
    "two_texts",
    "waveform",
    "plan_of_actions",
)  # another is of their kind, or U-Nets
REPLAYED = ("pixart", "z_image", "sd3_dual", "flux", "cogvideox", "latte")


@contextmanager
def streams_of(source: Source, trajectories: int = 1) -> Iterator[Streams]:
    """Of both samples of every call at the first three steps, two records at a time."""
    data = source.record(every(trajectories, range(STEPS - 1)))
    with (
        insert(Denoiser.of(source.pipeline), scheme("w4a8")) as network,
        Streams(network, data, source.cache, batch=2) as streams,
    ):
        set_weight_ranges(network, minmax)
        network.switch(weights=False, inputs=False)
        yield streams


@pytest.mark.parametrize("name", REPLAYED)
def test_blocks_that_replay_what_they_returned_make_the_prediction(name: str, tmp_path: Path) -> None:
    """They were run on what was recorded for them alone, in batches of other records than those of the model's calls."""
    with streams_of(source_of(name, tmp_path)) as streams:
        network, place = streams.network, [slice(0)]
        with torch.no_grad():
            exact = [network.denoiser.predict(arguments) for arguments in streams.arguments]
        for piece in streams.pieces:
            streams.advance(piece, streams.inputs(piece, quantized=False), quantized=False)
        with ExitStack() as patches, torch.no_grad():
            for path, table in streams.done[False].items():
                patches.enter_context(replaced(streams.module(path), replay(table, place)))
            for rows, arguments, want in zip(streams.slices(), streams.arguments, exact):
                place[0] = rows
                torch.testing.assert_close(network.denoiser.predict(arguments), want, rtol=1e-4, atol=1e-4)
        check_units([piece.path for piece in streams.pieces], streams)


def check_units(units: list[str], streams: Streams) -> None:
    """Each quantized layer and product lies in one unit, and blocks stand in the order in which they run."""
    for path in (*streams.network.layers, *streams.network.products):
        assert sum(path == unit or path.startswith(f"{unit}.") for unit in units) == 1, path
    blocks = streams.network.denoiser.blocks()
    assert [unit for unit in units if unit in blocks] == blocks


def sample_of(streams: Streams, piece: Piece) -> Sample:
    """What a piece sees while it alone rounds its weights."""
    floats = streams.inputs(piece, quantized=False)
    targets = streams.advance(piece, floats, quantized=False)
    return Sample(floats, floats, targets, *hold_out(streams.records, 0.25))


def test_a_joint_block_is_fitted_to_both_of_its_streams(tmp_path: Path) -> None:
    with streams_of(source_of("qwen_image", tmp_path), trajectories=4) as streams:
        piece = next(one for one in streams.pieces if one.path == "transformer_blocks.0")
        given = piece.arguments.join([torch.ones(1)] * sum(map(bool, piece.arguments.rows)))
        rows = {
            key for key, value in given.items() if isinstance(value, torch.Tensor) and value.shape == (1,)
        }
        assert rows >= {"hidden_states", "encoder_hidden_states", "temb"}
        sample = sample_of(streams, piece)
        streams.network.switch(weights=True, inputs=False)
        learner = Learner(streams.network, piece, Schedule(0, rounding_rate=0), torch.Generator())
        nearest = learner.held_loss(sample)
        image, text = sample.targets.columns
        for column in (image, text):
            kept = column.clone()
            column += 1
            assert learner.held_loss(sample) > nearest + 1
            column.copy_(kept)
        schedule = Schedule(60, batch=8, rounding_rate=0.1, penalty=1.0)
        report = reconstruct(streams.network, piece, sample, schedule, seed=0)
        assert report.nearest == pytest.approx(nearest)
        assert report.hard < 0.9 * nearest
        assert learner.held_loss(sample) == pytest.approx(report.hard)


# Methods and networks take turns, each at least once; `tests.torture.methods` goes through all pairs of them.
NETWORKS = [case.__name__ for kind in (images, joint, videos, sounds) for case in kind.CASES]
WIDE = ("hunyuan_image", "hunyuan_video15")  # they read a text in 2048 channels, whatever is configured
TURNS = [one for one in NETWORKS if one not in (*ALIKE, *WIDE)]
PAIRS = list(zip(cycle(methods.names()), TURNS))
PAIRS += [("minmax", one) for one in WIDE]
PAIRS += [
    ("d2dpm", "text_to_image"),
    ("d2dpm", "z_image"),  # a prediction for each sample, in a list
    ("tdq", "z_image"),  # and samples at different steps in one batch
    ("tfmq", "wan"),  # which asks a block for its dtype though a table has the place of all of its layers
    ("tfmq", "skyreels"),  # which asks another way
]
REFUSED = {"tac": "needs an unconditional pipeline"}


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_every_method_makes_what_runs(method: str, network: str, tmp_path: Path) -> None:
    if method in REFUSED:
        with pytest.raises(MethodError, match=REFUSED[method]):
            error_of(method, network, "w4a8", tmp_path)
        return
    assert error_of(method, network, "w4a8", tmp_path) < 0.3


def test_all_methods_and_transformers_have_their_turn() -> None:
    assert {method for method, _ in PAIRS} == set(methods.names())
    assert {network for _, network in PAIRS} >= set(NETWORKS) - set(ALIKE)


def test_the_page_of_methods_by_networks_has_a_row_for_each_method_and_a_column_for_each_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
    heads, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    shown = [f"+{name}" if methods.corrects(name) else name for name in methods.names()]
    assert [row.split("`")[1] for row in rows] == shown
    assert set(re.findall("`(.*?)`", heads)) == set(files().values())
