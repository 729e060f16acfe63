"""SIGHUP: what a daemon reads again, all or nothing, while it serves."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from telemetryd import daemon as process
from telemetryd.configuration import LoadedSettings, load
from telemetryd.errors import ConfigurationError
from telemetryd.ops.logs import LogLevel, log
from telemetryd.ops.systemd import Notifier
from telemetryd.reloading import LogLevels, Part, Reloading
from telemetryd.settings import Settings
from tests.conftest import PATIENCE_S, Daemon, StartDaemon, make_run, wait_until
from tests.http_client import get, post
from tests.test_daemon import Load, stored
from tests.test_logs import connect, written
from tests.tools.forks import popen
from tests.tools.process import telemetryd

RULE = '[[rules]]\nname = "{}"\nkind = "stale"\nafter = "1h"\n'


class Fake:
    """A part that takes note of what it is given."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        self.bug: Exception | None = None
        self.seen: list[Settings] = []
        self.applied = 0

    def prepare(self, settings: Settings) -> Callable[[], None]:
        self.seen.append(settings)
        if self.bug is not None:
            raise self.bug
        if self.problems:
            raise ConfigurationError([*self.problems])
        return self._apply

    def _apply(self) -> None:
        self.applied += 1


def reloading(folder: Path) -> Reloading:
    """Return what reloads from a folder's `.env`, which is empty now."""

    def read() -> LoadedSettings:
        return load({}, {}, folder / ".env")

    (folder / ".env").write_text("")
    return Reloading(read(), read, Notifier({}))


async def reloaded(it: Reloading, *parts: Part) -> list[dict[str, Any]]:
    """Reload once; return the lines of the log."""
    with written() as lines:
        await it.reload(parts)
    return [json.loads(line) for line in lines]


async def test_all_parts_change_or_none_does_and_every_problem_is_in_the_one_line(tmp_path: Path) -> None:
    good, bad, worse = Fake(), Fake("a: is wrong", "b: is wrong"), Fake("c: is wrong")
    parts = [Part(name, fake, ()) for name, fake in (("good", good), ("bad", bad), ("worse", worse))]
    it = reloading(tmp_path)
    (line,) = await reloaded(it, *parts)
    assert (line["level"], line["message"]) == ("ERROR", "Not reloaded, all stays as it was")
    assert line["problems"] == ["a: is wrong", "b: is wrong", "c: is wrong"]
    assert it.problem == "Not reloaded, all stays as it was: a: is wrong; b: is wrong; c: is wrong"
    assert good.applied == 0
    bad.problems = worse.problems = ()
    (line,) = await reloaded(it, *parts)
    assert (line["level"], line["message"], line["changed"]) == ("INFO", "Reloaded", ["good", "bad", "worse"])
    assert it.problem is None
    assert good.applied == bad.applied == worse.applied == 1


async def test_what_only_a_restart_changes_stays_and_is_named(tmp_path: Path) -> None:
    fake, it = Fake(), reloading(tmp_path)
    part = Part("fake", fake, ("alerts_file", "api_auth_token"))
    (tmp_path / ".env").write_text("TELEMETRY_QUEUE_MAX=5\nTELEMETRY_ALERTS_FILE=rules\nTELEMETRY_NONE=1\n")
    for remarks in (1, 0):  # a remark is made once, the warning as long as it is true
        *remarked, line, warning = await reloaded(it, part)
        assert [each["remark"] for each in remarked] == [
            "TELEMETRY_NONE is not a setting of telemetryd and has no effect"
        ] * remarks
        assert line["message"] == "Reloaded"
        assert (warning["level"], warning["settings"]) == ("WARNING", ["TELEMETRY_QUEUE_MAX"])
        assert (fake.seen[-1].queue_max, fake.seen[-1].alerts_file) == (10_000, Path("rules"))
    (tmp_path / ".env").write_text("TELEMETRY_API_PORT=many\nTELEMETRY_QUEUE_MAX=0\n")
    (line,) = await reloaded(it, part)
    assert [problem.partition(":")[0] for problem in line["problems"]] == ["TELEMETRY_API_PORT", "TELEMETRY_QUEUE_MAX"]
    assert len(fake.seen) == 2


async def test_a_pipe_in_the_place_of_a_file_holds_up_no_reload(tmp_path: Path) -> None:
    fake, other, it = Fake(), Fake("a: is wrong"), reloading(tmp_path)
    os.mkfifo(pipe := tmp_path / "pipe")  # to open it would wait for ever
    (tmp_path / ".env").write_text(f"TELEMETRY_ALERTS_FILE={pipe}\n")
    (line,) = await reloaded(it, Part("fake", fake, ("alerts_file", "log_level")), Part("other", other, ()))
    assert line["message"] == "Not reloaded, all stays as it was"
    assert line["problems"] == [f"TELEMETRY_ALERTS_FILE: {pipe}: is a pipe, which a reload cannot read", "a: is wrong"]
    assert fake.seen == []


async def test_the_log_level_changes_at_once(tmp_path: Path) -> None:
    it = reloading(tmp_path)
    part = Part("log level", LogLevels(Settings()), ("log_level",))
    with written(LogLevel.INFO) as lines:
        for level in ("LOG_LEVEL=debug", "LOG_LEVEL=debug", "TELEMETRY_LOG_LEVEL=WARNING", ""):
            (tmp_path / ".env").write_text(level)
            await it.reload([part])
            log.debug("debug")
            log.info("info")
    read = [json.loads(line) for line in lines]
    assert [line["message"] for line in read] == ["Reloaded", "debug", "info"] * 2 + ["Reloaded", "info"]
    assert [line["changed"] for line in read if "changed" in line] == [["log level"], [], ["log level"]]


async def test_those_who_ask_meanwhile_are_served_afterwards_and_never_two_at_once(tmp_path: Path) -> None:
    loaded, asked, at_work = load({}, {}, None), asyncio.Event(), [0]
    loop = asyncio.get_running_loop()

    def read() -> LoadedSettings:
        at_work.append(at_work[-1] + 1)
        assert at_work[-1] == 1
        if len(at_work) == 2:
            loop.call_soon_threadsafe(it.ask)
            loop.call_soon_threadsafe(it.ask)
            loop.call_soon_threadsafe(asked.set)
            asyncio.run_coroutine_threadsafe(asked.wait(), loop).result(PATIENCE_S)
        at_work.append(0)
        if len(at_work) == 5:
            loop.call_soon_threadsafe(done.set)
        return loaded

    it, done = Reloading(loaded, read, Notifier({})), asyncio.Event()
    it.ask()  # as a start is asked
    working = asyncio.create_task(it.run([]))
    await asyncio.wait_for(done.wait(), PATIENCE_S)
    working.cancel()
    await asyncio.wait((working,))


async def test_a_bug_that_ends_reloading_is_reported_at_once(tmp_path: Path) -> None:
    it, fake = reloading(tmp_path), Fake()
    fake.bug = KeyError("x")
    with written() as lines:
        working = asyncio.create_task(it.run([Part("fake", fake, ())]))
        working.add_done_callback(process._report_death)
        it.ask()
        await asyncio.wait((working,))
        await asyncio.sleep(0)
    (line,) = map(json.loads, lines)
    assert (line["level"], line["error_type"]) == ("CRITICAL", "KeyError")


def survives(daemon: Daemon, number: int) -> bool:
    """Return whether a signal is ignored or handled by now, as the kernel says."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    masks = re.findall(r"^Sig(?:Ign|Cgt):\s+(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_a_daemon_under_load_reloads_and_loses_nothing(start_daemon: StartDaemon, tmp_path: Path) -> None:
    rules, dotenv = tmp_path / "alerts.toml", tmp_path / ".env"
    rules.write_text(RULE.format("first"))
    daemon = start_daemon("--alerts-file", "alerts.toml", TELEMETRY_DB_JOURNAL_MODE="WAL")

    def count(message: str) -> int:
        return sum(line["message"] == message for line in list(daemon.lines))

    def names() -> list[str]:
        return [rule["name"] for rule in get(daemon.url, "/api/v1/alerts")[1]["rules"]]

    for begins in (lambda: survives(daemon, signal.SIGHUP), daemon.database.exists):  # while it starts
        wait_until(begins)
        daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_line("Reloaded")
    assert names() == ["first"]
    senders = Load(daemon.url, threads=3)
    senders.wait_for(20)
    for name in ("second", "third"):  # a signal that still waits would read what is written next
        rules.write_text(RULE.format(name))
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(partial(lambda name: names() == [name], name))
    rules.write_text(RULE.format("fourth") + "x = 1\n[[rules]]\n")
    daemon.process.send_signal(signal.SIGHUP)
    refused = daemon.wait_for_line("Not reloaded, all stays as it was")
    assert refused["level"] == "ERROR"
    assert len(refused["problems"]) == 3
    assert count("Not reloaded, all stays as it was") == 1
    assert names() == ["third"]
    check = ("config", "--check", "--alerts-file", rules)
    assert telemetryd(*check, cwd=tmp_path, status=2).stderr.count("\n") == 3
    rules.write_text(RULE.format("fifth"))
    done = telemetryd(*check, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    dotenv.write_text("LOG_LEVEL=warning\nTELEMETRY_QUEUE_MAX=5\n")
    daemon.process.send_signal(signal.SIGHUP)
    waiting = daemon.wait_for_line("Settings have changed that need a restart")
    assert waiting["settings"] == ["TELEMETRY_QUEUE_MAX"]
    assert names() == ["fifth"]
    senders.wait_for(len(senders.acknowledged) + 20)
    assert senders.unanswered == []
    assert post(daemon.url, make_run())[0] == 201
    for number in (signal.SIGTERM, *[signal.SIGHUP] * 5):  # while it stops
        daemon.process.send_signal(number)
    senders.join()
    assert daemon.wait() == (0, "")
    assert daemon.lines[-1]["level"] == "WARNING"
    assert set(senders.acknowledged) <= stored(daemon.database)


def test_what_a_daemon_reloads_changes_together(start_daemon: StartDaemon, tmp_path: Path) -> None:
    rules, token = tmp_path / "alerts.toml", tmp_path / "token"

    def names(secret: str) -> list[str] | int:
        """The rules that a token may see, or the status with which it is refused."""
        request = urllib.request.Request(f"{url}/api/v1/alerts", headers={"X-API-Key": secret})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return [rule["name"] for rule in json.loads(answer.read())["rules"]]
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    rules.write_text(RULE.format("first"))
    token.write_text("secret-1")
    daemon = start_daemon(
        "--alerts-file", "alerts.toml", TELEMETRY_API_AUTH_ENABLED="true", TELEMETRY_API_AUTH_TOKEN_FILE="token"
    )
    url = daemon.url
    rules.write_text(RULE.format("second"))
    tokens = tmp_path / "telemetry.sqlite.tokens"
    tokens.write_text("{")
    token.write_text("secret-2")
    daemon.process.send_signal(signal.SIGHUP)
    (problem,) = daemon.wait_for_line("Not reloaded, all stays as it was")["problems"]
    assert str(tokens) in problem
    assert (names("secret-1"), names("secret-2")) == (["first"], 401)
    tokens.unlink()
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.wait_for_line("Reloaded")["changed"] == ["alert rules", "tokens"]
    assert (names("secret-1"), names("secret-2")) == (401, ["second"])
    assert daemon.stop() == 0
    assert not [line for line in daemon.raw if "secret-" in line]


def test_a_terminal_that_is_closed_ends_the_daemon_in_order(tmp_path: Path, free_port: int) -> None:
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", "serve", "--host", "127.0.0.1", "--port", str(free_port)]
    with (tmp_path / "log").open("w") as file:
        process = popen(command, environment, cwd=tmp_path, stdout=file, stderr=theirs)
    os.close(theirs)
    try:
        connect(free_port).close()
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "Reloaded" in (tmp_path / "log").read_text())
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert '"message": "Stopped"' in (tmp_path / "log").read_text()
