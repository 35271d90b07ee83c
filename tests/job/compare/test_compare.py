"""Comparisons: what is finished is never made again, what is damaged is, and nothing depends on who made which part."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stepquant.errors import StepquantError, UnknownNameError
from stepquant.job.compare import (
    Cell,
    Evaluation,
    Inline,
    Processes,
    Variant,
    compare,
    drive,
    grid,
    known,
    tasks,
)
from stepquant.job.compare.store import take_lock
from stepquant.job.results import evaluate_artifact
from tests.job.conftest import cells_of

Cells = Callable[..., list[Cell]]


class Shards(Inline):
    """Every set of images in pieces, as many workers would make it."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots


def files(folder: Path, *patterns: str) -> dict[str, bytes]:
    found = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def weights(store: Path) -> dict[str, bytes]:
    """All that must not depend on where and how often it was made."""
    return files(store, "floats/*/*.safetensors", "artifacts/*/artifact/**/*")


def numbers(results: Iterable[dict[str, Any]]) -> list[Any]:
    return [[row["quality"], row["steps"], row["images"]] for row in results]


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one cell, made without an accident."""
    folder = tmp_path_factory.mktemp("stores") / "made"
    compare(cells_of(tiny), folder, executor=Inline())
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return shutil.copytree(made, tmp_path / "store")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was really made: recipes quantized and batches generated."""
    made: list[str] = []
    quantize, batch = tasks.quantize_pipeline, tasks.make_batch

    def count_quantize(pipeline: Any, recipe: Any, *rest: Any, **options: Any) -> Any:
        made.append(f"quantize {recipe.method} {recipe.scheme} {recipe.seed}")
        return quantize(pipeline, recipe, *rest, **options)

    def count_batch(pipeline: Any, recipe: Any, evaluation: Any, seed: int, number: int) -> Any:
        made.append(f"batch {number}")
        return batch(pipeline, recipe, evaluation, seed, number)

    monkeypatch.setattr(tasks, "quantize_pipeline", count_quantize)
    monkeypatch.setattr(tasks, "make_batch", count_batch)
    return made


class TestGrid:
    def test_every_method_in_every_scheme_with_every_seed(self, tiny: Path) -> None:
        found = grid(
            str(tiny), [Variant("minmax"), Variant("ptq4dm", {"samples": 8})], ["w8a8", "w4a8"], range(3)
        )
        assert len({(cell.label, cell.scheme, cell.recipe.seed) for cell in found}) == 12
        assert {cell.label for cell in found} == {"minmax", "ptq4dm (samples=8)"}

    def test_a_setting_goes_to_the_methods_that_have_it(self, tiny: Path) -> None:
        variants = [Variant("minmax"), Variant("brecq")]
        found = grid(str(tiny), variants, ["w8a8"], [0], settings={"iterations": "3"})
        assert [cell.recipe.settings for cell in found] == [{}, {"iterations": "3"}]

    def test_a_setting_of_no_method_is_an_error(self, tiny: Path) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'samples'"):
            grid(str(tiny), [Variant("minmax")], ["w8a8"], [0], settings={"sampels": 3})

    @pytest.mark.parametrize(
        ("variant", "scheme", "near"),
        [(Variant("minmx"), "w8a8", "minmax"), (Variant("minmax"), "w8a", "w8a8")],
    )
    def test_unknown_names(self, tiny: Path, variant: Variant, scheme: str, near: str) -> None:
        with pytest.raises(UnknownNameError, match=near):
            grid(str(tiny), [variant], [scheme], [0])

    def test_nothing_is_an_error(self, tiny: Path) -> None:
        with pytest.raises(StepquantError, match="nothing to compare"):
            grid(str(tiny), [], ["w8a8"], [0])
        with pytest.raises(StepquantError, match="'images' of the evaluation"):
            Evaluation.of(images=0)


class TestFinished:
    def test_nothing_is_made_twice(self, cells: Cells, tmp_path: Path, counted: list[str]) -> None:
        first = compare(cells("minmax", "ptq4dm", seeds=2), tmp_path, executor=Inline())
        assert (first.made, first.found, first.failed) == (4, 0, 0)
        # Three batches for each of four cells, and for the float model's two seeds, which serve all four.
        assert sum(what.startswith("batch") for what in counted) == 3 * (4 + 2)
        before = files(tmp_path, "**/*.json", "**/*.safetensors")
        counted.clear()
        again = compare(cells("minmax", "ptq4dm", seeds=2), tmp_path, executor=Inline())
        assert (again.made, again.found) == (0, 4)
        assert not counted
        assert files(tmp_path, "**/*.json", "**/*.safetensors") == before

    def test_more_cells_share_what_is_there(self, cells: Cells, store: Path, counted: list[str]) -> None:
        compare(cells("minmax", "ptq4dm"), store, executor=Inline())
        assert sorted(counted) == ["batch 0", "batch 1", "batch 2", "quantize ptq4dm w8a8 0"]
        counted.clear()
        compare(cells(images=7), store, executor=Inline())
        assert not any(what.startswith("quantize") for what in counted)

    def test_numbers_are_those_of_evaluate(self, cells: Cells, tiny: Path, store: Path) -> None:
        (found,) = compare(cells(), store, executor=Inline()).results
        artifact = next(store.glob("artifacts/*/artifact"))
        other = evaluate_artifact(
            artifact, str(tiny), steps=3, images=5, batch=2, floor=False, probed=2, shown=2
        )
        psnr = [next(q for q in row["quality"] if q["name"] == "PSNR") for row in (found, other)]
        assert psnr[0]["value"] == psnr[1]["value"]
        assert psnr[0]["floor"] is not None
        assert found["steps"] == other["steps"]
        assert found["images"] == other["images"]

    def test_an_embedded_model_brings_its_prompts(self, tmp_path: Path) -> None:
        evaluation = Evaluation.of(images=2, steps=2, batch=2)
        few = [Variant("minmax", {"samples": 16, "trajectories": 8})]
        cells = grid("stepquant:characters-text", few, ["w8a8"], [0], evaluation, steps=2)
        assert compare(cells, tmp_path / "store", executor=Inline()).failed == 0

    def test_what_it_took_is_kept(self, cells: Cells, store: Path) -> None:
        (found,) = compare(cells(), store, executor=Inline()).results
        assert found["making"]["seconds"] > 0
        assert found["making"]["peak_bytes"] >= found["making"]["start_bytes"] > 1e7
        assert found["size"]["bytes"] < found["size"]["float_bytes"]
        assert not list(store.glob("*/*/work"))
        assert not list(store.glob("cells/*/images"))
        assert len(list(store.glob("cells/*/samples.png"))) == 1

    def test_other_code_makes_other_cells_unless_it_is_told_not_to(
        self, cells: Cells, store: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stepquant.job.compare.cell.code_digest", lambda _: "0123456789")
        assert compare(cells(), store, executor=Inline(), any_code=True).found == 1
        assert compare(cells(), store, executor=Inline()).made == 1
        assert len(counted) == 1 + 3 * 3

    def test_what_is_known_can_be_read_without_making_anything(
        self, cells: Cells, store: Path, counted: list[str]
    ) -> None:
        made = compare(cells(), store, executor=Inline())
        first, second = known(cells("minmax", "ptq4dm"), store)
        assert first == made.results[0]
        assert second is None
        assert not counted
        with pytest.raises(StepquantError, match="there is no store of runs"):
            known(cells(), store / "nowhere")


class TestDamaged:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:-40],
            lambda text: "{}",
            lambda text: text.replace('"quality": [', '"quality": [7, '),
        ],
    )
    def test_results_are_measured_again(
        self, cells: Cells, store: Path, counted: list[str], damage: Callable[[str], str]
    ) -> None:
        first = compare(cells(), store, executor=Inline())
        file = next(store.glob("cells/*/results.json"))
        file.write_text(damage(file.read_text()))
        again = compare(cells(), store, executor=Inline())
        assert numbers(again.results) == numbers(first.results)
        assert counted == ["batch 0", "batch 1", "batch 2"]

    def test_images_and_weights_are_made_again(self, cells: Cells, store: Path, counted: list[str]) -> None:
        before = weights(store)
        for pattern in ("floats/*/00001.safetensors", "artifacts/*/artifact/unet/*.safetensors"):
            file = next(store.glob(pattern))
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(data)
        next(store.glob("cells/*/results.json")).unlink()
        compare(cells(), store, executor=Inline())
        assert counted == ["quantize minmax w8a8 0", "batch 1", "batch 0", "batch 1", "batch 2"]
        assert weights(store) == before

    @pytest.mark.parametrize("text", ["{", '{"format": 99}', "[]"])
    def test_a_store_that_cannot_be_read(self, cells: Cells, tmp_path: Path, text: str) -> None:
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(StepquantError, match="store of runs cannot be read"):
            compare(cells(), tmp_path, executor=Inline())

    def test_a_folder_of_something_else(self, cells: Cells, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(StepquantError, match="is no store of runs"):
            compare(cells(), tmp_path, executor=Inline())


class TestFailed:
    def test_a_failure_is_shown_stops_nobody_and_is_tried_again(
        self, cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quantize = tasks.quantize_pipeline

        def fail(pipeline: Any, recipe: Any, *rest: Any, **options: Any) -> Any:
            if recipe.method == "minmax":
                raise ValueError("no <range> today")
            return quantize(pipeline, recipe, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(tasks, "quantize_pipeline", fail)
            found = compare(cells("minmax", "ptq4dm"), tmp_path, executor=Inline())
        assert (found.made, found.failed) == (1, 1)
        assert found.results[0]["error"] == "ValueError: no <range> today"
        assert "no &lt;range&gt; today" in found.page.read_text()
        assert r"no \<range\> today" in (tmp_path / "compare.md").read_text()
        again = compare(cells("minmax", "ptq4dm"), tmp_path, executor=Inline())
        assert (again.made, again.found, again.failed) == (1, 1, 0)
        assert "today" not in again.page.read_text()

    def test_what_never_appears_is_given_up(
        self, cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tasks.Quantize, "perform", lambda self, progress: None)
        found = compare(cells(), tmp_path, executor=Inline())
        assert "look at the disk" in found.results[0]["error"]

    def test_an_interruption_loses_one_batch_at_most(
        self, cells: Cells, store: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = tasks.make_batch

        def interrupt(*arguments: Any) -> Any:
            if len([what for what in counted if what.startswith("batch")]) == 4:
                raise KeyboardInterrupt
            return batch(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(tasks, "make_batch", interrupt)
            with pytest.raises(KeyboardInterrupt):
                compare(cells(), tmp_path / "a", executor=Inline())
        found = compare(cells(), tmp_path / "a", executor=Inline())
        assert len(counted) == 1 + 9
        whole = compare(cells(), store, executor=Inline())
        assert numbers(found.results) == numbers(whole.results)

    def test_a_killed_quantization_adds_up_its_seconds(
        self, cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stepquant.job.compare.meter.SECONDS_BETWEEN_NOTES", -1.0)
        with monkeypatch.context() as patch:
            patch.setattr("stepquant.methods.method.freeze", interrupted)
            with pytest.raises(KeyboardInterrupt):
                compare(cells(), tmp_path, executor=Inline())
        file = next(tmp_path.rglob("spent.json"))
        spent = json.loads(file.read_text())
        assert spent["seconds"] > 0
        file.write_text(json.dumps(spent | {"seconds": 1000.0}))
        assert compare(cells(), tmp_path, executor=Inline()).results[0]["making"]["seconds"] > 1000


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


class TestTogether:
    def test_shards_of_any_size_give_the_same_bytes(self, cells: Cells, tmp_path: Path) -> None:
        one = compare(cells(images=13), tmp_path / "one", executor=Inline())
        for slots in (2, 7):
            many = compare(cells(images=13), tmp_path / str(slots), executor=Shards(slots))
            assert weights(tmp_path / "one") == weights(tmp_path / str(slots))
            assert numbers(one.results) == numbers(many.results)

    def test_a_cell_that_another_comparison_makes_is_waited_for(
        self, cells: Cells, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = compare(cells(), store, executor=Inline())
        mine = tmp_path / "mine"
        compare(cells("ptq4dm"), mine, executor=Inline())
        artifact = next(store.glob("artifacts/*")).name
        held = take_lock(mine / "artifacts" / artifact)
        assert held is not None
        waits: list[float] = []

        def release(seconds: float) -> None:
            waits.append(seconds)
            held.release()

        monkeypatch.setattr(drive.time, "sleep", release)
        found = compare(cells(), mine, executor=Inline())
        assert len(waits) == 1
        assert numbers(found.results) == numbers(whole.results)

    def test_processes_give_the_same_bytes_though_one_is_killed(
        self, cells: Cells, store: Path, tmp_path: Path
    ) -> None:
        killed: list[int] = []

        class Killing:
            """Kills the worker that first says that it is generating."""

            def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
                if "generating" in label and not killed:
                    killed.append(next(iter(executor.busy)))
                    os.kill(killed[0], signal.SIGKILL)
                yield from items

            def note(self, words: str) -> None:
                return None

        executor = Processes(1, Killing(), threads=torch.get_num_threads())
        one = compare(cells(), store, executor=Inline())
        other = compare(cells(), tmp_path / "other", executor=executor)
        assert killed
        assert weights(store) == weights(tmp_path / "other")
        assert numbers(one.results) == numbers(other.results)
        assert not executor.busy
        assert not executor.idle
