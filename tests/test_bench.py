from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from uuid import UUID

import orjson
import pytest
from click.testing import CliRunner

from bench import acknowledged, report, wrk
from bench.__main__ import LARGE, POSTGRESQL, SCENARIOS, SHORT, main
from bench.acknowledged import post_sample
from bench.client import Client
from bench.errors import BenchError, LostRunError
from bench.figures import Figure, Samples, Target, Unit, at_least, at_most, show_value
from bench.limit_sqlite import rows_per_second
from bench.rows import Ids, make_run
from bench.scenario import Options, new_nonce
from bench.workplace import LIMIT_HTTP_FSYNC, ROOT, TELEMETRYD_WAL, workplace

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
QUICKLY = ("--only", "get", "--seconds", "0.2", "--rounds", "1", "--runs", "2000")


def bench_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "bench", *QUICKLY, "--folder", str(folder)]


def figure(value: float, target: Target | None = None) -> Figure:
    target = target or at_least(0.5)
    return Figure("a load", Unit.ROWS, Samples("us", (value, 1, 1e9)), Samples("limit", (100,)), target)


def test_one_scenario_prints_its_line_or_how_to_install_wrk(tmp_path: Path) -> None:
    done = subprocess.run(bench_command(tmp_path), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    if shutil.which("wrk") is None:
        assert done.returncode == 1
        assert wrk.INSTALL in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "| GET limit=100, 1 connection" in done.stdout
        assert "of 2 targets met" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_wrk_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, QUICKLY)
    assert result.exit_code == 1
    assert "apt-get install wrk" in result.output


@needs_wrk
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_neither_processes_nor_files(tmp_path: Path, number: int, status: int) -> None:
    command = [*bench_command(tmp_path), "--seconds", "30"]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not processes_in(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # its parent knows of it, too
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == status
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []


def processes_in(folder: Path) -> list[int]:
    """The processes whose working directory is inside a folder, that is, servers of a benchmark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            directory = os.readlink(process / "cwd")
        except OSError:
            continue
        if directory.startswith(f"{folder}/"):
            found.append(int(process.name))
    return found


@pytest.mark.parametrize("ids", Ids)
def test_the_limit_of_sqlite_stores_its_rows_and_a_lost_one_is_noticed(tmp_path: Path, ids: Ids) -> None:
    database = tmp_path / "limit.sqlite"
    assert rows_per_second(database, 50, ids) > 0
    assert acknowledged.last_id(database) == 50
    acknowledged.check_created(database, "limit", 0, 50)
    with pytest.raises(LostRunError, match="51 writes were acknowledged"):
        acknowledged.check_created(database, "limit", 0, 51)
    with pytest.raises(LostRunError, match="no-such-id was acknowledged"):
        acknowledged.check_ids(database, ["no-such-id"])


@needs_wrk
@pytest.mark.parametrize("ids", Ids)
def test_both_languages_make_the_same_run_with_ids_of_two_kinds(ids: Ids) -> None:
    nonce = new_nonce()
    ours = [make_run(nonce, number, ids) for number in range(1, 9000)]
    theirs = first_batch(nonce, ids, 5000)
    assert {**theirs[0], "event_id": "", "run_id": ""} == {**ours[0], "event_id": "", "run_id": ""}
    for runs in (ours, theirs):
        found = [UUID(run["event_id"]) for run in runs]
        assert len(set(found)) == len(runs)
        assert {made.version for made in found} == {7 if ids is Ids.ORDERED else 4}
        assert (found == sorted(found)) == (ids is Ids.ORDERED)
        assert all(run["run_id"] == f"run-{run['event_id']}" and run["run_id"].endswith(nonce) for run in runs)
    if ids is Ids.ORDERED:
        assert abs(int(theirs[0]["event_id"].replace("-", "")[:12], 16) / 1000 - time.time()) < 60


def first_batch(nonce: str, ids: Ids, size: int) -> list[dict[str, str]]:
    """What wrk sends first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        load = wrk.start(f"http://127.0.0.1:{server.getsockname()[1]}", "batch", 1, 60, nonce, ids, str(size))
        try:
            server.settimeout(30)
            server.accept()[0].close()  # it looks whether anybody is there
            with server.accept()[0] as connection:
                connection.settimeout(30)
                received = b""
                while not received.endswith(b"}]"):
                    received += connection.recv(1 << 20)
                return list(orjson.loads(received.partition(b"\r\n\r\n")[2]))
        finally:
            load.kill()


def test_what_a_daemon_writes_is_counted_to_its_end_and_broken_answers_are_noticed(tmp_path: Path) -> None:
    with workplace(tmp_path) as place, place.serving(TELEMETRYD_WAL, place.folder / "telemetry.sqlite") as server:
        post_sample(server.url, new_nonce(), 10, Ids.RANDOM)
        with closing(Client(server.port)) as client:
            client.post("/api/v1/runs", orjson.dumps(make_run(new_nonce(), 1, Ids.ORDERED)))
            with pytest.raises(BenchError, match="answered 422"):
                client.post("/api/v1/runs", b"{}")
            assert client.download("/api/v1/runs/export?format=ndjson") > 11 * 500
        with closing(Client(server.port)) as client, pytest.raises(BenchError, match="refused"):
            client.download("/api/v1/runs/export?format=morse")
        assert server.highest_mib() >= server.resident_mib() > 10
        assert server.bytes_written_until_stopped() >= server.database.stat().st_size
        assert acknowledged.last_id(server.database) == 11


def test_the_limit_that_syncs_writes_its_page(tmp_path: Path) -> None:
    with workplace(tmp_path) as place, place.serving(LIMIT_HTTP_FSYNC, place.folder / "page") as server:
        with closing(Client(server.port)) as client:
            client.post("/api/v1/runs", orjson.dumps(make_run(new_nonce(), 1, Ids.ORDERED)))
        assert server.database.stat().st_size == 4096


def test_a_database_that_is_not_there_yet_has_no_rows(tmp_path: Path) -> None:
    assert acknowledged.last_id(tmp_path / "none.sqlite") == 0


def test_medians_are_compared_with_floors_and_ceilings() -> None:
    assert figure(60).ratio == 0.6
    assert figure(60).is_met
    assert not figure(40).is_met
    assert at_most(1.5).is_met(1.5)
    assert not at_most(1.5).is_met(1.51)


def test_a_target_can_be_absolute_and_a_figure_can_do_without() -> None:
    assert figure(60, at_least(59, Unit.ROWS)).is_met
    assert not figure(60, at_most(59, Unit.ROWS)).is_met
    alone = Figure("a load", Unit.MIB, Samples("us", (3,)))
    assert alone.ratio is None
    assert alone.is_met is None
    with pytest.raises(ValueError, match="without a reference"):
        _ = Figure("a load", Unit.MIB, Samples("us", (3,)), target=at_most(2)).is_met


def test_values_for_people() -> None:
    assert show_value(0.000115, Unit.SECONDS) == "115 µs"
    assert show_value(0.00123, Unit.SECONDS) == "1.23 ms"
    assert show_value(0.3, Unit.SECONDS) == "300 ms"
    assert show_value(15, Unit.SECONDS) == "15.0 s"
    assert show_value(3500, Unit.BYTES) == "3.5 KB"
    assert show_value(13_850.4, Unit.REQUESTS) == "13,850 requests/s"
    assert show_value(9.44, Unit.REQUESTS) == "9.4 requests/s"
    assert show_value(0.524, Unit.RATIO) == "0.52 ×"
    assert show_value(12.34, Unit.RATIO) == "12.3 ×"


def test_the_report_is_a_table_and_json_of_which_the_table_can_be_made_again(tmp_path: Path) -> None:
    figures = [
        figure(60),
        figure(40),
        figure(60, at_most(50, Unit.ROWS)),
        Figure("alone", Unit.MIB, Samples("us", (3,))),
    ]
    lines = report.table(figures).splitlines()
    assert lines[3].endswith("| 0.40 × | ≥ 0.50 ×      | NO  |")
    assert lines[4].endswith("| 0.60 × | ≤ 50.0 rows/s | NO  |")
    report.write(tmp_path, "latest", figures, Options(), (0.5, 1.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "latest.md"]
    text = (tmp_path / "latest.md").read_text("utf-8")
    assert text.endswith(f"\n\n{report.table(figures)}\n")
    assert "medians of up to 5, loads of 2 s; load average 0.5 before and 1.5 after; 1 of 3 targets met" in text


def test_what_is_run_are_scenarios() -> None:
    assert {*SHORT, *LARGE, *POSTGRESQL} == set(SCENARIOS)
