"""The report of a run: a table for people, and JSON for programs."""

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
from typing import Final

import telemetryd
from bench.figures import Figure, Unit, show_value
from bench.scenario import Options

RESULTS: Final = Path(__file__).parent / "results"
_HEADINGS: Final = ("load", "reached", "reference", "ratio", "target", "met")


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table that can be read as it is."""
    lines = [_HEADINGS, *(cells(figure) for figure in figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    rows = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)


def cells(figure: Figure) -> tuple[str, ...]:
    """Return a figure's line of the table."""
    reference = figure.reference
    return (
        figure.load,
        show_value(figure.reached.median, figure.unit),
        f"{reference.name} {show_value(reference.median, figure.unit)}" if reference else "",
        "" if figure.ratio is None else show_value(figure.ratio, Unit.RATIO),
        str(figure.target or ""),
        {None: "", True: "yes", False: "NO"}[figure.is_met],
    )


def met(figures: Sequence[Figure]) -> str:
    """Return how many of the figures that have a target meet it."""
    aimed = [figure for figure in figures if figure.target]
    return f"{sum(figure.is_met is True for figure in aimed)} of {len(aimed)} targets met"


def write(folder: Path, name: str, figures: Sequence[Figure], options: Options, loads: tuple[float, float]) -> None:
    """Write the JSON and the table; `loads` are the machine's load averages before and after the run."""
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
    (folder / f"{name}.md").write_text(f"{render(folder / f'{name}.json')}\n", "utf-8")


def render(results: Path) -> str:
    """Return what `write` wrote as JSON as Markdown: how it was measured, and the table."""
    report, figures = json.loads(results.read_text("utf-8")), read(results)
    machine, loads, options = report["machine"], report["load_average"], report["options"]
    measured = (
        f"Measured at {report['measured_at']} on {machine['processors']} processors, Python {machine['python']}, "
        f"SQLite {machine['sqlite']}: medians of up to {options['rounds']}, loads of {options['seconds']:g} s; "
        f"load average {loads['before']:.1f} before and {loads['after']:.1f} after; {met(figures)}."
    )
    return f"{measured}\n\n{table(figures)}"


def circumstances(results: Path) -> str:
    """Say on how much of a machine, and when, a report in JSON was made."""
    report = json.loads(results.read_text("utf-8"))
    return f"{report['machine']['processors']} processors, {datetime.fromisoformat(report['measured_at']):%-d %B %Y}"


def read(results: Path) -> list[Figure]:
    """Return the figures that a report in JSON holds."""
    return [Figure.from_json(figure) for figure in json.loads(results.read_text("utf-8"))["figures"]]
