"""Writes the parts of the documentation that derive from the code and from measurements."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench import report
from telemetryd.client.config import VARIABLES, Config
from telemetryd.client.context import PARENT_VARIABLE
from telemetryd.model import events, runs
from telemetryd.model.values import COMPONENT, Role
from telemetryd.settings import Settings, variable
from tests.faults import mutants
from tests.tools import reference

ROOT = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
REFERENCE: Final = ROOT / "docs" / "reference"
PERFORMANCE: Final = ROOT / "docs" / "explanation" / "performance.md"

FIGURES: Final = {
    "one run in each request, 64 connections": "single POST, 64 connections, WAL, time-ordered ids",
    "batches of 1,000 runs": "batches of 1,000, 4 connections, WAL, time-ordered ids",
    "a page of 100 runs": "GET limit=100, 1 connection",
}
"""What the README says of speed: its own words, and the load of the benchmark."""


def fields_table() -> str:
    """Return every field of a run as a Markdown table."""
    lines = ["| Field | Type | Given on POST | By PATCH | |", "|---|---|---|---|---|"]
    schema = runs.Run.model_json_schema()
    for name in runs.COLUMNS:
        variants = schema["properties"][name].get("anyOf", [schema["properties"][name]])
        # The type of a component stands in its own schema.
        kinds = [next(iter(part.get(COMPONENT, {"": part}).values()))["type"] for part in variants]
        shown = "timestamp" if "date-time" in str(schema["properties"][name]) else " or ".join(dict.fromkeys(kinds))
        required = name in runs.NewRun.model_json_schema()["required"]
        given = "required" if required else "yes" if name in runs.columns(Role.SET) else ""
        patch = "yes" if name in runs.PATCHABLE else ""
        lines.append(f"| `{name}` | {shown} | {given} | {patch} | {runs.Run.model_fields[name].description} |")
    return "\n".join(lines)


def event_fields_table() -> str:
    """Return the fields that a new event brings along as a Markdown table."""
    lines = ["| Field | Required | |", "|---|---|---|"]
    required = events.NewEvent.model_json_schema()["required"]
    for name in events.STORED:
        given = "yes" if name in required else ""
        lines.append(f"| `{name}` | {given} | {events.Event.model_fields[name].description} |")
    return "\n".join(lines)


def client_table() -> str:
    """Return the client's variables as a Markdown table."""
    lines = ["| Variable | Default | |", "|---|---|---|"]
    defaults = {**asdict(Config()), "buffer_dir": "~/.local/state/telemetryd/buffer"}
    scale = {"max_bytes": 1 << 20, "max_age_s": 86_400, "keep_s": 3600}
    for name, (field, _, text) in VARIABLES.items():
        value = defaults[field]
        if field in scale:
            value = f"{value / scale[field]:g}"
        shown = str(value).lower() if isinstance(value, bool) else value
        lines.append(f"| `{name}` | {'' if value is None else f'`{shown}`'} | {reference.cell(text)} |")
    lines.append(f"| `{PARENT_VARIABLE}` | | The run_id of the run that started this process. |")
    return "\n".join(lines)


def env_example() -> str:
    """Return .env.example: every variable, commented out, with its default."""
    lines = ["# telemetryd reads this file as .env in its working directory; variables of the environment win.", ""]
    for name, setting in Settings.model_fields.items():
        default = "./data/telemetry.sqlite" if name == "db_path" else reference.default(name).strip("`")
        lines += [f"# {setting.description}", f"#{variable(name)}={default}", ""]
    return "\n".join(lines)


def figures_table(results: Path) -> str:
    """Return the three figures of the README as a Markdown table."""
    cells = {figure.load: report.cells(figure) for figure in reversed(report.read(results))}
    lines = [f"| on {report.circumstances(results)} | measured | compared with |", "|---|--:|--:|"]
    for words, load in FIGURES.items():
        _, reached, reference, *_ = cells[load]
        lines.append(f"| {words} | {reached} | {reference} |")
    return "\n".join(lines)


def fill(text: str, marker: str, content: str) -> str:
    """Return a text with the part between two markers replaced."""
    pattern = rf"(<!-- begin {marker} -->\n).*?(<!-- end {marker} -->)"
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"marker {marker} stands {count} times")
    return filled


def rendered() -> dict[Path, str]:
    """Return each file that holds generated parts, as it should be."""
    overview, measured = README.read_text("utf-8"), PERFORMANCE.read_text("utf-8")
    # What has not been measured stays as it is.
    for results in sorted(report.RESULTS.glob("*.json")):
        measured = fill(measured, f"{results.stem} targets", report.render(results))
        if results.stem == "latest":
            overview = fill(overview, "figures", figures_table(results))
    tables = {
        REFERENCE / "runs.md": ("fields", fields_table()),
        REFERENCE / "http.md": ("event fields", event_fields_table()),
        REFERENCE / "client.md": ("client settings", client_table()),
        ROOT / "docs" / "explanation" / "reliability.md": ("mutants", mutants.table()),
    }
    return {
        README: overview,
        PERFORMANCE: measured,
        **{page: fill(page.read_text("utf-8"), marker, table) for page, (marker, table) in tables.items()},
        **{REFERENCE / f"{name}.md": text for name, text in reference.pages().items()},
        ROOT / ".env.example": env_example(),
    }


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, "utf-8")
