"""requirements.lock: what setup.cfg asks for (PostgreSQL too), complete, with hashes, and from no particular place."""

from __future__ import annotations

import re
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tools import audit

ROOT = Path(__file__).parents[1]
TEXT = audit.LOCK.read_text("utf-8")
ENTRIES = re.findall(r"^([a-z0-9-]+)==(\S+)(?: ; ([^\\\n]+))? \\\n((?:    --hash=\S+(?: \\)?\n)+)", TEXT, re.MULTILINE)
VERSIONS = {name: version for name, version, _, _ in ENTRIES}


def required() -> list[Requirement]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = setup["options"]["install_requires"] + setup["options.extras_require"]["postgresql"]
    return [Requirement(line) for line in asked.split("\n") if line]


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_what_setup_cfg_asks_for_is_in_the_lock(requirement: Requirement) -> None:
    version = VERSIONS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement} has {version}; run: make lock"


def test_every_line_is_an_exact_version_with_hashes() -> None:
    assert len(re.findall("^[a-z]", TEXT, re.MULTILINE)) == len(ENTRIES) >= len(required())
    for name, _, _, hashes in ENTRIES:
        assert re.fullmatch(r"(    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", hashes), name


def test_it_names_no_place_to_install_from() -> None:
    assert "://" not in TEXT
    assert "index" not in TEXT
    assert "find-links" not in TEXT


def test_it_is_complete_and_holds_nothing_else() -> None:
    """What the packages themselves ask for, as they are installed here."""
    needed: set[str] = set()
    waiting = [requirement for requirement in required() if applies(requirement, set())]
    while waiting:
        requirement = waiting.pop()
        if (name := canonicalize_name(requirement.name)) not in needed:
            needed.add(name)
            asked = (Requirement(text) for text in metadata.requires(name) or ())
            waiting += [each for each in asked if applies(each, requirement.extras)]
    unconditional = {name for name, _, marker, _ in ENTRIES if not marker}
    assert needed <= VERSIONS.keys(), "run: make lock"
    assert unconditional <= needed | {"typing-extensions"}, "run: make lock"


def applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def test_the_image_and_ci_install_from_it() -> None:
    assert "--require-hashes --requirement requirements.lock" in (ROOT / "Dockerfile").read_text()
    assert any("LOCK=requirements.lock" in path.read_text() for path in (ROOT / ".ci").iterdir())


# --- The audit -----------------------------------------------------------------------------------


def test_an_advisory_fails_the_audit_and_names_what_fixes_it() -> None:
    packages: list[dict[str, Any]] = [
        {"name": "a", "version": "1.0", "vulns": []},
        {"name": "b", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]},
        {"name": "c", "version": "3.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]},
    ]
    assert audit.report(packages) == (
        1,
        [
            "audit: b 2.0: PYSEC-1, fixed in 2.1",
            "audit: c 3.0: PYSEC-2, fixed in no version yet",
            "audit: 3 packages audited, 2 advisories",
        ],
    )


def test_what_could_not_be_asked_is_said_and_fails_nothing() -> None:
    packages: list[dict[str, Any]] = [
        {"name": "a", "version": "1.0", "vulns": []},
        {"name": "b", "skip_reason": "not found"},
    ]
    assert audit.report(packages) == (0, ["audit: not audited: b", "audit: 1 packages audited, 0 advisories"])
    status, [line] = audit.report(None)
    assert (status, line.startswith("audit: NOT DONE: ")) == (0, True)


def test_a_withdrawn_release_fails_the_audit_and_a_newer_one_is_named() -> None:
    locked = {name: audit.Release("1.0", is_withdrawn=name == "b") for name in "abc"}
    newest = locked | {"c": audit.Release("1.1", is_withdrawn=False)}
    assert audit.report_index(locked, newest) == (
        1,
        [
            "audit: b 1.0 was withdrawn by its authors; run: make lock",
            "audit: c 1.0 is locked, 1.1 is the newest",
            "audit: 3 releases looked up, 1 withdrawn, 1 not the newest",
        ],
    )
    assert audit.report_index({"c": locked["c"]}, newest)[0] == 0


def test_an_index_that_does_not_answer_is_said_and_fails_nothing() -> None:
    assert audit.ask_index("--no-index", "telemetryd-has-no-such-dependency") is None
    status, [line] = audit.report_index(None, None)
    assert (status, line.startswith("audit: NOT DONE: ")) == (0, True)
