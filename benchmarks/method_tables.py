"""The tables of methods.md, made of the results of its cells."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PROBED_STEPS = 6  # columns of the table of errors by step
# Head, name of the number, digits behind the point, and whether it is against something else than the float model.
QUALITY = (
    ("recognised % ↑", "recognised", 1, True),
    ("truth dB ↑", "truth", 2, True),
    ("broken % ↓", "broken", 1, True),
    ("FD to data ↓", "FD", 0, True),
    ("FD to float ↓", "FD", 1, False),
    ("PSNR dB ↑", "PSNR", 2, False),
)


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of quality and cost; the float model first. What this model has not, such as classes, is no column."""
    made = [row for row in results if "error" not in row]
    columns = [c for c in QUALITY if any(quality(row, c[1], data=c[3]) is not None for row in made)]
    heads = [column[0] for column in columns]
    head = ["scheme", "method", "seeds", *heads, "noise error ↓", "MB", "s", "peak MB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *float_rows(made, columns)]
    for (label, scheme), rows in groups(results).items():
        done, errors = [r for r in rows if "error" not in r], [r["error"] for r in rows if "error" in r]
        numbers = [
            *(
                shown([quality(row, name, data=data) for row in done], places)
                for _, name, places, data in columns
            ),
            shown([mean_error(row) for row in done], 4),
            shown([row["size"]["bytes"] / 1e6 for row in done], 1, spread=False),
            shown([row["making"]["seconds"] for row in done], 0),
            shown([row["making"]["peak_bytes"] / 1e6 for row in done], 0, spread=False),
        ]
        failed = f" (failed: {errors[0].splitlines()[0]})" if errors else ""
        lines.append(f"| {' | '.join([scheme, label + failed, str(len(done)), *numbers])} |")
    return lines


def float_rows(made: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, int, bool]]) -> list[str]:
    """The float model in the quantized one's place: on the same seeds, and on others."""
    by_seed = {row["sampling"]["seed"]: row for row in made}
    rows, perfect = list(by_seed.values()), {"FD": "0", "PSNR": "∞"}

    def of(field: str) -> list[str]:
        return [
            shown([quality(row, name, data=data, field=field) for row in rows], places)
            for _, name, places, data in columns
        ]

    same = [mine if data else perfect[name] for mine, (_, name, _, data) in zip(of("reference"), columns)]
    size = shown([row["size"]["float_bytes"] / 1e6 for row in rows], 1, spread=False)
    count = str(len(rows))
    return [
        f"| {' | '.join(['fp32', '**float**, same seeds', count, *same, '0', size, '', ''])} |",
        f"| {' | '.join(['fp32', '**float**, other seeds: the noise floor', count, *of('floor'), '', '', '', ''])} |",
    ]


def step_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Relative error of the noise prediction on the float trajectory, at a few denoising steps."""
    done = {key: [r for r in rows if "error" not in r] for key, rows in groups(results).items()}
    done = {key: rows for key, rows in done.items() if rows}
    if not done:
        return []
    count = len(next(iter(done.values()))[0]["steps"])
    steps = sorted({round(i * (count - 1) / (PROBED_STEPS - 1)) for i in range(PROBED_STEPS)})
    lines = [
        "Error of the noise prediction by denoising step (0 is the noisiest), both networks on the float trajectory:",
        "",
        f"| scheme | method | {' | '.join(f'step {step}' for step in steps)} |",
        "|" + "---|" * (len(steps) + 2),
    ]
    for (label, scheme), rows in done.items():
        errors = [statistics.fmean(row["steps"][step]["relative"] for row in rows) for step in steps]
        lines.append(f"| {scheme} | {label} | {' | '.join(f'{error:.4f}' for error in errors)} |")
    return lines


def groups(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results:
        out.setdefault((row["label"], row["quantized"]["scheme"]), []).append(row)
    return out


def quality(row: Mapping[str, Any], name: str, *, data: bool = False, field: str = "value") -> float | None:
    """A number of the results: of the images themselves and against data, or against the float model on the same seeds."""
    for number in row["quality"]:
        named = number["name"].startswith("FD") if name == "FD" else number["name"] == name
        if named and number["against"].startswith("float") != data:
            return number[field] if number["value"] is not None else None
    return None


def mean_error(row: Mapping[str, Any]) -> float | None:
    return statistics.fmean(step["relative"] for step in row["steps"]) if row["steps"] else None


def shown(values: Sequence[float | None], places: int, *, spread: bool = True) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):,.{places}f}"
    return f"{mean} ± {statistics.stdev(known):.{places}f}" if spread and len(known) > 1 else mean
