"""Counts what the soak did, and writes it as JSON after every round."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.processes import CRASH


@dataclass
class Tally:
    """The counts of all rounds until now."""

    seed: int
    numbers: Path
    """The file that holds them."""
    errors: Path
    """What the children wrote on standard error."""
    started: float = field(default_factory=time.monotonic)
    scenes: dict[str, Counter[str]] = field(default_factory=dict)
    failure: str | None = None

    @property
    def total(self) -> Counter[str]:
        """The counts of all scenes together."""
        return sum(self.scenes.values(), Counter())

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def add(self, scene: str, done: Counter[str]) -> None:
        """Count a round, and write all counts."""
        self.scenes.setdefault(scene, Counter()).update({"rounds": 1, **done})
        self.write()

    def crashes(self) -> Counter[str]:
        """Errors that nobody foresaw, by their words -> how many processes ended by them."""
        lines = self.errors.read_text(errors="replace").splitlines() if self.errors.exists() else []
        return Counter(line.removeprefix(CRASH) for line in lines if line.startswith(CRASH))

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "failure": self.failure,
            "total": dict(sorted(self.total.items())),
            "scenes": {name: dict(sorted(done.items())) for name, done in self.scenes.items()},
            "crashes": dict(self.crashes()),
        }

    def write(self) -> None:
        """Write the summary, whole or not at all."""
        beside = self.numbers.with_name(f"{self.numbers.name}.tmp")
        beside.write_text(json.dumps(self.summary(), indent=2) + "\n")
        os.replace(beside, self.numbers)
