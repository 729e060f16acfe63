from __future__ import annotations

import os
import re
import sys
import threading
import uuid
from pathlib import Path

import pytest

from telemetryd.client import Client, context
from telemetryd.client.context import ProcessIdentity, Surroundings, new_run_id, timestamp
from telemetryd.model.values import canonical_timestamp
from tests.client.conftest import git


@pytest.mark.parametrize(
    ("agent", "shown"), [("hugo-translator", "hugo-translator"), ("a b/ü", "a-b-"), ("", ""), ("x" * 500, "x" * 200)]
)
def test_run_ids_have_the_form_that_agents_know(agent: str, shown: str) -> None:
    run_id = new_run_id(agent)
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z-{shown}-[0-9a-f]{{8}}", run_id), run_id
    assert len(run_id) <= 255


def test_run_ids_of_one_second_differ() -> None:
    assert len({new_run_id("a") for _ in range(300_000)}) == 300_000


@pytest.mark.parametrize("moment", [0.0, 1_767_195_045.999_999, 1_767_195_046.0, 1_700_000_000.123456])
def test_timestamps_are_what_the_daemon_stores(moment: float) -> None:
    text = timestamp(moment)
    assert canonical_timestamp(text) == text
    assert len(timestamp()) == len("2025-12-31T15:30:45.123456Z")


def test_the_process_is_named_by_what_proc_says() -> None:
    if sys.platform != "linux":
        pytest.skip("Linux only")
    own = ProcessIdentity.own()
    assert own is not None
    assert own.pid == os.getpid()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 < own.start_time / os.sysconf("SC_CLK_TCK") <= uptime + 1
    assert uuid.UUID(own.boot_id)


def test_the_surroundings_are_looked_up_again_after_a_while(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    surroundings = Surroundings({"environment": "prod", "host": "box"}, fresh_s=0)
    before = surroundings.fields()
    assert (before["environment"], before["host"]) == ("prod", "box")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "second")
    assert surroundings.fields()["git_commit_hash"] != before["git_commit_hash"]


def test_a_deleted_working_directory_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Surroundings({}).fields()["host"]


def test_the_enclosing_run_is_that_of_the_task_or_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(context.PARENT_VARIABLE, "from-outside")
    assert context.parent_run_id() == "from-outside"
    token = context.enclosing_run.set(Client(send=False, buffer_dir=tmp_path).run("a", "j", run_id="mine"))
    seen: list[str | None] = []
    thread = threading.Thread(target=lambda: seen.append(context.parent_run_id()))
    thread.start()
    thread.join()
    assert (context.parent_run_id(), seen) == ("mine", ["from-outside"])
    context.enclosing_run.reset(token)
