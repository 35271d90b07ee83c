"""Stable Diffusion 1.5 in the engines that people run on a processor: seconds, memory, size on disk, error.

    python -m benchmarks.engines --prepare
    python -m benchmarks.engines --cases unet --engines stepquant,openvino
    python -m benchmarks.engines --table

Weights are random, at their true widths: seconds and memory mean what they say, errors only stand beside each other. Three
cases: the U-Net (one call of one sample), the autoencoder's decoder, and a picture of 512 x 512 in four steps of LCM with the
text encoder. Every engine runs in a process of its own, and is calibrated on the calls of another picture; `--together` of
them beside the reference, torch in fp32, take turns in rounds whose order rotates. With one thread the clock is processor
time. What is measured is kept and not measured again; an engine that cannot run is a row that says why.

`--python torchao=PATH` is the interpreter of an environment that has it: packages that get in each other's way need one each,
and so does SDNQ (`--python sdnq=PATH`), whose licence forbids to import it beside other code.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.engines.catalogue import CASES, ENGINES, REFERENCE, Engine
from benchmarks.engines.given import NETWORKS, PICTURE
from benchmarks.engines.store import TITLES, Row, Store, key, table
from benchmarks.engines.turns import EngineError, Played, Process, rounds, spread

SUBJECT = "benchmarks.engines.subject"


class Bench:
    """The folder of a run: the float pipeline, what engines made of it, and the figures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder / options.size
        self.subject = self.folder / "subject"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.folder / "figures.json")

    def job(self, engine: Engine, case: str, prepare: bool, network: str) -> dict[str, Any]:
        return {
            "module": engine.module,
            "options": dict(engine.options),
            "case": case,
            "network": network,
            "prepare": prepare,
            "subject": str(self.subject),
            "folder": str(self.folder / engine.name),
            "threads": self.options.threads,
        }

    def python(self, engine: Engine) -> str:
        """The interpreter that was named for it, else this one."""
        named = dict(one.split("=", 1) for one in self.options.python)
        return next((path for word, path in named.items() if word in engine.name.lower()), sys.executable)

    def make_subject(self) -> None:
        if self.subject.is_dir():
            return
        part = fresh(self.subject.with_name("subject.part"))
        job = {
            "module": SUBJECT, "options": {"size": self.options.size}, "case": "", "network": "", "prepare": True,
            "subject": str(part), "folder": str(self.folder), "threads": self.options.threads,
        }  # fmt: skip
        with Process(job, sys.executable) as process:
            process.heard()
        part.rename(self.subject)

    def prepare(self, engine: Engine, case: str) -> None:
        """The networks of a case in the engine's own files, as far as they are not there."""
        for network in networks_of(engine, case):
            done = self.folder / engine.name / f"{network}.done"
            if done.is_file():
                continue
            shutil.rmtree(done.with_suffix(""), ignore_errors=True)
            print(f"preparing {engine.name}: {network}", file=sys.stderr, flush=True)
            with Process(self.job(engine, case, True, network), self.python(engine)) as process:
                done.write_text(json.dumps(process.heard()))

    def together(self, case: str, engines: Sequence[Engine]) -> None:
        """The reference and these engines in turns."""
        running: dict[str, Process] = {}
        told: dict[str, Row] = {}
        with ExitStack() as stack:
            for engine in engines:
                job = self.job(engine, case, False, case)
                process = stack.enter_context(Process(job, self.python(engine)))
                try:
                    told[engine.name] = process.heard()
                    running[engine.name] = process
                except EngineError as error:
                    self.failed(case, engine, error)
            played = rounds(running, self.options.rounds)
        known = {self.options.against} - {REFERENCE}
        for engine in engines:
            if engine.name in played.lost:
                self.failed(case, engine, played.lost[engine.name])
            elif engine.name in running and engine.name not in known:
                self.store.put(case, engine.name, self.row(case, engine, told[engine.name], played))

    def row(self, case: str, engine: Engine, told: Row, played: Played) -> Row:
        name, against = engine.name, self.options.against
        known = 1.0 if against == REFERENCE else self.store.rows()[key(case, against)]["ratio"][0]
        return {
            **told,
            "seconds": spread([turn[name] for turn in played.taken]),
            "ratio": spread([known * turn[against] / turn[name] for turn in played.taken]),
            "peak": max(told["peak"], played.peaks[name]),
            "peak_of_calls": played.peaks[name],
            "size": self.size(engine, case),
            "prepared": self.prepared(engine, case),
            **self.circumstances(),
        }

    def circumstances(self) -> Row:
        return {
            "rounds": self.options.rounds,
            "against": self.options.against,
            "threads": self.options.threads,
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
        }

    def size(self, engine: Engine, case: str) -> int:
        folder = self.folder / engine.name
        return sum(
            one.stat().st_size
            for name in networks_of(engine, case)
            for one in (folder / name).rglob("*")
            if one.is_file()
        )

    def prepared(self, engine: Engine, case: str) -> Row:
        """Seconds and memory that it took to make the engine's files, by network."""
        done = {name: self.folder / engine.name / f"{name}.done" for name in networks_of(engine, case)}
        return {name: json.loads(file.read_text()) for name, file in done.items()}

    def failed(self, case: str, engine: Engine, why: EngineError | str) -> None:
        print(f"{case} / {engine.name}: {why}", file=sys.stderr, flush=True)
        self.store.put(case, engine.name, {"failed": str(why)} | self.circumstances())

    def run(self, case: str, chosen: Sequence[Engine]) -> None:
        ready = []
        for engine in chosen:
            if case in engine.missing:
                self.failed(case, engine, engine.missing[case])
            elif not self.store.has(case, engine.name) or engine.name == self.options.against:
                try:
                    self.prepare(engine, case)
                    ready.append(engine)
                except EngineError as error:
                    self.failed(case, engine, error)
        if self.options.prepare:
            return
        reference = [one for one in ready if one.name == self.options.against]
        others = [one for one in ready if one.name != self.options.against]
        for start in range(0, len(others), self.options.together):
            self.together(case, reference + others[start : start + self.options.together])


def networks_of(engine: Engine, case: str) -> Sequence[str]:
    return NETWORKS if case == PICTURE and not engine.draws else (case,)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def chosen_of(words: str, against: str) -> list[Engine]:
    """What is compared against, and the engines of these names, or whose names hold one of these words."""
    asked = [word.strip().lower() for word in words.split(",") if word.strip()]
    names = {one.name.lower() for one in ENGINES}

    def meant(word: str, name: str) -> bool:
        return word == name if word in names else word in name

    return [
        one
        for one in ENGINES
        if one.name == against or not asked or any(meant(word, one.name.lower()) for word in asked)
    ]


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", default=",".join(CASES))
    add("--engines", default="", help="words in their names; all by default")
    add("--size", choices=("full", "half", "smoke"), default="full")
    add("--rounds", type=int, default=3)
    add("--together", type=int, default=3, help="engines that are in memory beside the reference")
    add("--threads", type=int, default=1)
    add(
        "--against",
        default=REFERENCE,
        choices=[one.name for one in ENGINES],
        help="takes part in all turns; another than fp32, which must have been measured, where memory is short",
    )
    add("--folder", type=Path, default=Path("runs/engines"))
    add("--python", action="append", default=[], metavar="ENGINE=PATH", help="an interpreter that has it")
    add("--prepare", action="store_true", help="what engines make of the networks, and no times")
    add("--table", action="store_true", help="print what was measured")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> None:
    bench = Bench(options)
    cases = options.cases.split(",")
    if not options.table:
        bench.make_subject()
        for case in cases:
            bench.run(case, chosen_of(options.engines, options.against))
    rows, engines = bench.store.rows(), [(one.name, one.eight_bits) for one in ENGINES]
    for case in cases:
        print(f"\n{TITLES[case]}\n\n{table(rows, case, engines)}")


if __name__ == "__main__":
    main(read_options())
