"""An append-only file of finished measurements: a study that was killed resumes after the last complete line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepquant.errors import EvaluationError


class Lines:
    """One JSON object a line under its key; a line that was cut short by a crash is dropped and measured again."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, Any]:
        """What is finished, by key."""
        try:
            content = self.file.read_bytes() if self.file.exists() else b""
        except OSError as error:
            raise EvaluationError(f"cannot read the journal: {error}", where=str(self.file)) from error
        found: dict[str, Any] = {}
        for line in content.split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def append(self, key: str, value: Mapping[str, Any]) -> None:
        """Add a line; it is in the file when this returns, should the process be killed then."""
        line = json.dumps({"key": key, "value": value}).encode() + b"\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab+") as stream:
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    torn = stream.read(1) != b"\n"
                    line = b"\n" * torn + line
                stream.write(line)
        except OSError as error:
            raise EvaluationError(
                f"cannot write the journal: {error.strerror}",
                where=str(self.file),
                fix="free disk space, then run again: finished lines are kept",
            ) from error
