"""What is counted is shown; what is published was measured on a commit, in the long form unless it says otherwise."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.faults.ledger import Entry, Ledger
from tests.tools import reliability

_ROW = Entry(
    test="tests/faults/test_x.py::test_x",
    scale=1,
    commit="0123456789ab",
    seconds=1,
    fault="SIGKILL",
    mode="WAL",
    rounds=1000,
    acknowledged=12_345,
    lost=0,
    duplicated=0,
    unrecovered=0,
    server_errors=0,
)


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> tuple[int, bool]:
    """Publish some rows; return the exit status, and whether the page was written."""
    page, ledger = folder / "page.md", folder / "ledger.jsonl"
    page.write_text("<!-- begin table -->\n<!-- end table -->\n")
    ledger.write_text("".join(f"{json.dumps(asdict(entry))}\n" for entry in entries))
    monkeypatch.setattr(reliability, "PAGE", page)
    return reliability.main(ledger), "12,345" in page.read_text()


def test_a_row_of_files_that_no_commit_holds_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dirty = replace(_ROW, fault="power cut", commit="0123456789ab-dirty")
    assert publish(tmp_path, monkeypatch, _ROW, dirty) == (1, False)
    assert "refused: measured on 0123456789ab-dirty: power cut" in capsys.readouterr().err


def test_a_short_form_and_mixed_commits_are_published_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(_ROW, fault="power cut", scale=0.15, commit="ba9876543210")
    assert publish(tmp_path, monkeypatch, _ROW, short) == (0, True)
    assert capsys.readouterr().err.splitlines() == [
        "measured with --rounds-scale 0.15, not in its long form: power cut (tests/faults/test_x.py::test_x)",
        "the rows were measured on 2 commits: 0123456789ab, ba9876543210",
    ]
    assert publish(tmp_path, monkeypatch, _ROW) == (0, True)
    assert capsys.readouterr().err == ""


def test_every_row_is_shown_even_one_that_fails() -> None:
    shown: list[str] = []
    ledger = Ledger(None, _ROW.test, 1, shown)
    ledger.record(fault="SIGKILL", mode="WAL", rounds=1000, acknowledged=12_345)
    with pytest.raises(AssertionError):
        ledger.record(fault="power cut", rounds=1, acknowledged=1, lost=1)
    assert shown == [
        "SIGKILL (WAL): rounds 1,000, acknowledged 12,345, lost 0, duplicated 0, unrecovered 0, 5xx 0",
        "power cut (both): rounds 1, acknowledged 1, lost 1, duplicated 0, unrecovered 0, 5xx 0",
    ]
