"""The report of a run: a table for people, JSON for programs, and a chart."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import telemetryd
from bench.chart import draw
from bench.figures import Figure, show_ratio, show_value
from bench.scenario import Options

_HEADINGS = ("load", "telemetryd", "compared with", "ratio", "target", "met")


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table that can be read as it is."""
    lines = [_HEADINGS, *(_cells(figure) for figure in figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    rows = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)


def _cells(figure: Figure) -> tuple[str, ...]:
    return (
        figure.load,
        show_value(figure.reached.median, figure.unit),
        f"{figure.reference.name} {show_value(figure.reference.median, figure.unit)}",
        show_ratio(figure.ratio, figure.target),
        str(figure.target),
        "yes" if figure.is_met else "NO",
    )


def write(folder: Path, name: str, figures: Sequence[Figure], options: Options, loads: tuple[float, float]) -> None:
    """Write the JSON, the table and the chart; `loads` are the machine's load averages before and after the run."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "telemetryd": telemetryd.__version__,
        "machine": {
            "processors": os.cpu_count(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "system": sys.platform,
        },
        "load_average": {"before": loads[0], "after": loads[1]},
        "options": asdict(options),
        "figures": [figure.to_json() for figure in figures],
    }
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / f"{name}.svg").write_text(draw(figures), "utf-8")
    measured = (
        f"Measured at {report['measured_at']} on {os.cpu_count()} processors, Python {platform.python_version()}, "
    )
    measured += f"SQLite {sqlite3.sqlite_version}; load average {loads[0]:.1f} before and {loads[1]:.1f} after."
    (folder / f"{name}.md").write_text(f"{measured}\n\n{table(figures)}\n", "utf-8")
