"""Everything that a run has found, with what it was made on, as data."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from costs.items import Axis, Deeds, Item, Point, Row

_PACKAGES = ("torch", "torchvision", "torch-ttt")


@dataclass(frozen=True)
class Results:
    """What was found, in the order it was.

    Args:
        rows: comparisons.
        points: of the curves.
        deeds: what the engines did.
        about: machine, threads, versions.
    """

    rows: tuple[Row, ...]
    points: tuple[Point, ...]
    deeds: tuple[Deeds, ...]
    about: dict[str, str]

    @classmethod
    def of(cls, items: Iterable[Item], about: dict[str, str]) -> Results:
        """Sort items by kind."""
        found = list(items)
        return cls(
            tuple(item for item in found if isinstance(item, Row)),
            tuple(item for item in found if isinstance(item, Point)),
            tuple(item for item in found if isinstance(item, Deeds)),
            about,
        )

    @property
    def summary(self) -> str:
        """How many of the required bounds hold."""
        judged = [row for row in self.rows if row.verdict]
        met = sum(row.verdict == "ok" for row in judged)
        return f"{met} of {len(judged)} required bounds hold."

    @property
    def running(self) -> float:
        """The smallest share of its time that a comparison ran; below one, others had the rest."""
        return min((row.running for row in self.rows), default=1.0)

    def sections(self) -> dict[str, list[Row]]:
        """Return the rows by section."""
        sections: dict[str, list[Row]] = {}
        for row in self.rows:
            sections.setdefault(row.section, []).append(row)
        return sections

    def curves(self) -> dict[tuple[Axis, str], dict[str, dict[int, float]]]:
        """Return milliseconds by axis and network, then by engine, then by place."""
        curves: dict[tuple[Axis, str], dict[str, dict[int, float]]] = {}
        for point in self.points:
            engines = curves.setdefault((point.axis, point.network), {})
            engines.setdefault(point.engine, {})[point.at] = point.milliseconds
        return curves

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        rows = [{**asdict(row), "verdict": row.verdict} for row in self.rows]
        content = {"about": self.about, "summary": self.summary, **asdict(self), "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")


def machine(device: torch.device, threads: int) -> dict[str, str]:
    """Return what the times depend on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads on the CPU": str(threads),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def _processor() -> str:
    """Return the processor's name, where Linux tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
