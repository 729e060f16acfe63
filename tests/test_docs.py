from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from bench import report
from bench.figures import Figure, Samples, Unit, at_least
from bench.scenario import Options
from telemetryd.configuration import load
from tests.faults.ledger import Ledger, read
from tests.tools import docs, reference, reliability, schema

ROOT = docs.ROOT


def test_generated_parts_are_up_to_date() -> None:
    stale = [
        path.name for path, text in docs.rendered().items() if not path.exists() or path.read_text("utf-8") != text
    ]
    assert stale == [], "run: make docs"


def test_measured_figures_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Samples("limit", (2e6,))
    figures = [Figure(load, Unit.ROWS, Samples("us", (1e6,)), limit, at_least(1)) for load in docs.FIGURES.values()]
    for name in ("latest", "large"):
        report.write(tmp_path, name, figures, Options(), (0, 0))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rendered = docs.rendered()
    line = "| batches of 1,000 runs | 1,000,000 rows/s | limit 2,000,000 rows/s |"
    assert line in rendered[ROOT / "README.md"]
    assert rendered[docs.PERFORMANCE].count(report.table(figures)) == 2


def test_the_schema_file_is_up_to_date() -> None:
    assert schema.SCHEMA.read_text("utf-8") == schema.render(), "run: make schema"


def test_env_example_with_every_line_put_in_force_is_the_default_configuration(tmp_path: Path) -> None:
    text = re.sub(r"^#(?=TELEMETRY_)", "", (ROOT / ".env.example").read_text("utf-8"), flags=re.MULTILINE)
    (tmp_path / ".env").write_text(text)
    loaded = load({}, {}, tmp_path / ".env")
    defaults = load({}, {}, None).settings
    differing = {
        name
        for name in type(defaults).model_fields
        if getattr(loaded.settings, name) != getattr(defaults, name) and name != "db_path"
    }
    assert differing == set()
    assert not loaded.remarks


def test_the_readme_can_be_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1000


PAGES = sorted(page for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "migrations" / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_in_it(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target, heading in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (heading and file.suffix == ".md" and heading not in headings(file)):
            broken.append(f"{target}#{heading}")
    assert broken == []


def headings(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {reference.anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "telemetryd").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_first_line_of_every_module_says_what_it_does(path: Path) -> None:
    sentence = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
    assert re.fullmatch(r"[A-Zt].{15,130}\.", sentence), sentence


def test_every_command_of_the_reliability_page_names_a_test() -> None:
    rows = re.findall(r"^\|.*\| `pytest '(.*)::(\w+).*?' .*` \|$", reliability.PAGE.read_text("utf-8"), re.MULTILINE)
    for path, name in rows:
        assert f"def {name}(" in (ROOT / path).read_text("utf-8"), f"{path}::{name}"


def test_what_a_fault_test_counts_becomes_a_row_and_anything_lost_fails_it(tmp_path: Path) -> None:
    written = tmp_path / "ledger.jsonl"
    ledger = Ledger(written, "tests/faults/test_kill.py::test_x[WAL]", 0.5)
    ledger.record(fault="SIGKILL", mode="WAL", rounds=1000, acknowledged=12_345)
    with pytest.raises(AssertionError, match="power cut"):
        ledger.record(fault="power cut", rounds=5, acknowledged=10, lost=1)
    rows = reliability.table(read(written)).splitlines()[-2:]
    command = "`pytest 'tests/faults/test_kill.py::test_x[WAL]' --rounds-scale 0.5`"
    assert rows == [
        f"| SIGKILL | WAL | 1,000 | 12,345 | 0 | 0 | 0 | 0 | {command} |",
        f"| power cut | both | 5 | 10 | 1 | 0 | 0 | 0 | {command} |",
    ]
