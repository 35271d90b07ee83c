"""The figures of `stepquant benchmark DIR --json FILE` as a table for docs/performance.md.

python -m benchmarks.table FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stepquant.schema import Speed, Timing


def table(speed: Speed) -> str:
    """A row for each batch size: milliseconds of the reference, and how many times faster all others are."""
    timed = [row for row in speed.rows if row.milliseconds is not None]
    names = list(dict.fromkeys(row.name for row in timed if row.name != speed.reference))
    header = ["batch", f"{speed.reference} ms", *names]
    lines = [header, ["---"] * len(header)]
    for batch in dict.fromkeys(row.batch for row in timed):
        rows = {row.name: row for row in timed if row.batch == batch}
        first = rows.get(speed.reference)
        own = "" if first is None else f"{first.milliseconds:.3g}"
        lines.append([str(batch), own, *(times(rows.get(name)) for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(row: Timing | None) -> str:
    """The median ratio and its quartiles; nothing where it was not measured."""
    if row is None or row.ratio is None:
        return ""
    return f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"


def main(file: str) -> None:
    print(table(Speed.model_validate(json.loads(Path(file).read_text(encoding="utf-8"))["speed"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
