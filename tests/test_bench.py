from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import acknowledged, chart, report, wrk
from bench.__main__ import LARGE, SCENARIOS, main
from bench.errors import LostRunError
from bench.figures import Figure, Samples, Unit, at_least, at_most, show_ratio, show_value
from bench.limit_sqlite import rows_per_second
from bench.scenario import Options
from bench.workplace import ROOT

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
QUICKLY = ("--only", "get", "--seconds", "0.2", "--rounds", "1", "--runs", "2000")


def bench_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "bench", *QUICKLY, "--folder", str(folder)]


def figure(value: float, *, target: float = 0.5) -> Figure:
    return Figure("a load", Unit.ROWS, Samples("us", (value, 1, 1e9)), Samples("limit", (100,)), at_least(target))


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


def test_the_limit_of_sqlite_stores_its_rows_and_a_lost_one_is_noticed(tmp_path: Path) -> None:
    database = tmp_path / "limit.sqlite"
    assert rows_per_second(database, 50) > 0
    assert acknowledged.last_id(database) == 50
    acknowledged.check_created(database, "limit", 0, 50)
    with pytest.raises(LostRunError, match="51 writes were acknowledged"):
        acknowledged.check_created(database, "limit", 0, 51)
    with pytest.raises(LostRunError, match="no-such-id was acknowledged"):
        acknowledged.check_ids(database, ["no-such-id"])


def test_a_database_that_is_not_there_yet_has_no_rows(tmp_path: Path) -> None:
    assert acknowledged.last_id(tmp_path / "none.sqlite") == 0


def test_medians_are_compared_with_floors_and_ceilings() -> None:
    assert figure(60).ratio == 0.6
    assert figure(60).is_met
    assert not figure(40).is_met
    assert at_most(1.5).is_met(1.5)
    assert not at_most(1.5).is_met(1.51)


def test_values_and_ratios_for_people() -> None:
    assert show_value(0.00123, Unit.SECONDS) == "1.23 ms"
    assert show_value(13_850.4, Unit.REQUESTS) == "13,850 requests/s"
    assert show_value(9.44, Unit.REQUESTS) == "9.4 requests/s"
    assert show_ratio(0.524, at_least(0.5)) == "52 %"
    assert show_ratio(1.234, at_most(1.5)) == "1.23 ×"


def test_the_report_is_a_table_json_and_a_chart(tmp_path: Path) -> None:
    figures = [figure(60), figure(40), figure(1e6, target=20)]
    assert report.table(figures).splitlines()[3].endswith("| 40 %       | ≥ 50 %   | NO  |")
    report.write(tmp_path, "latest", figures, Options(), (0.5, 1.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "latest.md", "latest.svg"]
    assert ET.fromstring(chart.draw(figures)).tag.endswith("svg")


def test_the_large_scenarios_are_scenarios() -> None:
    assert set(LARGE) <= set(SCENARIOS)
