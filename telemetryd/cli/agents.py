"""The commands of the agents' side: sync, replay."""

from __future__ import annotations

import gzip
import io
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

import click

from telemetryd.cli.options import EXIT_USAGE, Progress, fail, json_flag, print_json, progress, size
from telemetryd.client.config import Config
from telemetryd.client.context import timestamp
from telemetryd.client.counters import Counters
from telemetryd.client.courier import Courier
from telemetryd.client.delivery import MAX_BYTES, Delivery, Parcel, RetryError, WaitError
from telemetryd.client.folder import (
    DEAD_LETTERS,
    SYNCED,
    Bounds,
    Entry,
    Stream,
    bury,
    enforce,
    entries,
    summary,
    waiting,
)
from telemetryd.client.lines import dead_letter, encode, read_object, unfold
from telemetryd.client.transport import Transport
from telemetryd.client.worker import Backoff
from telemetryd.errors import ErrorItem, describe

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

T = TypeVar("T")

_TOLD: Final = 20
_WATCH_S: Final = 2.0
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_GZIP: Final = b"\x1f\x8b"

url_option = click.option("--url", help="The daemon's address.  [TELEMETRY_API_URL; default: http://localhost:8765]")
retry_option = click.option(
    "--retry-for",
    "retry_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds to try again while the daemon does not take anything.",
)


def _config(**given: Any) -> Config:
    logging.getLogger("telemetryd.client").addHandler(logging.NullHandler())  # here the commands say it themselves
    try:
        return Config.load(**given)
    except ValueError as error:
        click.echo(f"telemetryd: {error}", err=True)
        sys.exit(EXIT_USAGE)


class Patience:
    """Repeats what may succeed later, until nothing has got on for too long or somebody stops us.

    Args:
        seconds: how long nothing may get on; None means for ever.
        stopped: is set when the work shall end.

    """

    def __init__(self, seconds: float | None, stopped: threading.Event) -> None:
        self._seconds = seconds
        self._stopped = stopped
        self._backoff = Backoff()

    def attempt(self, step: Callable[[], T], stopped: T) -> T:
        """Return what a step returns, or the other value if we were stopped.

        Raises:
            RetryError: if it failed for too long.

        """
        since = time.monotonic()
        while not self._stopped.is_set():
            try:
                done = step()
            except WaitError:
                raise
            except RetryError as error:
                waited = time.monotonic() - since
                if self._seconds is not None and waited >= self._seconds:
                    raise
                pause = self._backoff.pause_s(error)
                self._stopped.wait(pause if self._seconds is None else min(pause, self._seconds - waited))
            else:
                self._backoff.reset()
                return done
        return stopped


# --- sync ----------------------------------------------------------------------------------------


@click.command()
@click.option("--buffer-dir", type=click.Path(path_type=Path), help="The spool's folder.  [TELEMETRY_BUFFER_DIR]")
@click.option("--watch", is_flag=True, help="Go on until SIGTERM or SIGINT: send whatever comes.")
@click.option("--dry-run", is_flag=True, help="Only say what the folder holds.")
@retry_option
@json_flag
@url_option
def sync(
    *, buffer_dir: Path | None, watch: bool, dry_run: bool, retry_s: float, as_json: bool, url: str | None
) -> None:
    r"""Send what agents have left in their buffer folder.

    Files of processes that are alive are theirs to send; the others are taken one after the other, each under a
    lock, so any number of agents and of these commands may work on one folder. A file is `.synced` when every line
    of it has been acknowledged, or stands in dead-letter.jsonl with the daemon's reason.

    \b
    Examples:
      telemetryd sync --dry-run
      telemetryd sync --buffer-dir /var/lib/agents/buffer --json
      telemetryd sync --watch --url unix:///run/telemetryd/telemetryd.sock
    """
    config = _config(buffer_dir=buffer_dir, url=url)
    counters = Counters()
    problem = None if dry_run else _sync(config, counters, None if watch else retry_s)
    left = {state: total for state, total in summary(config.folder).items() if state != "synced"}
    if as_json:
        print_json({**_outcome(counters), "left": left, "problem": problem})
    else:
        if not dry_run:
            click.echo(_sentence(counters))
        for state, total in left.items():
            whose = "of processes that are alive" if state == "active" else "to be sent"
            click.echo(f"{total['files']} files {whose}, {size(total['bytes'])} (.{state})")
    _end(problem, counters, f"; see {config.folder / DEAD_LETTERS}")


def _sync(config: Config, counters: Counters, retry_s: float | None) -> str | None:
    """Send what the folder holds, once or (without a bound for failures) until a signal; return what went wrong."""
    watch = retry_s is None
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT) if watch else ():
        signal.signal(number, lambda *_: stopped.set())
    work = _Sync(config, counters, Patience(retry_s, stopped))
    try:
        while not stopped.is_set():
            if watch:
                work.tidy()
            if not work.pass_over() and (not watch or stopped.wait(_WATCH_S)):
                break
    except (RetryError, OSError) as error:
        return str(error)
    finally:
        work.close()
    return None


def _end(problem: str | None, counters: Counters, where: str = "") -> None:
    if problem is not None:
        fail(problem)
    if counters.dead:
        fail(f"{counters.dead} lines were refused{where}")


def _outcome(counters: Counters) -> dict[str, int]:
    return {
        "sent": counters.sent,
        "stored": counters.stored,
        "duplicates": counters.duplicates,
        "refused": counters.dead,
        "torn": counters.torn,
    }


def _sentence(counters: Counters) -> str:
    return (
        f"{counters.sent} lines sent: {counters.stored} runs stored, {counters.duplicates} known before, "
        f"{counters.dead} lines refused"
    )


class _Sync:
    def __init__(self, config: Config, counters: Counters, patience: Patience) -> None:
        self._config = config
        self._counters = counters
        self._patience = patience
        self._transport = Transport(config)
        self._refusals = _Refusals(None)
        self._delivery = Delivery(self._transport, self._bury, counters)

    def pass_over(self) -> int:
        """Send every stream that nobody else sends; return how many lines that were."""
        folder, before = self._config.folder, self._counters.sent
        with progress() as drawn:
            total = sum(entry.size for entry in entries(folder) if entry.state != SYNCED)
            done = 0
            for name in waiting(folder):
                stream = Stream.take(folder, name)
                if stream is None:
                    continue
                courier = Courier(stream, self._delivery, self._counters)
                try:
                    while self._patience.attempt(courier.carry, 0):
                        done += courier.carried_bytes
                        drawn("Sending", min(done, total), total)
                        time.sleep(self._delivery.pause_s)
                except WaitError:
                    pass  # it comes after another stream, perhaps one of this pass
                finally:
                    stream.release()
        return self._counters.sent - before

    def tidy(self) -> None:
        """Keep the folder within its bounds."""
        config = self._config
        enforce(config.folder, Bounds(config.max_bytes, config.max_age_s, config.keep_s), None, self._dropped)

    def close(self) -> None:
        self._transport.close()

    def _bury(self, lines: list[bytes], status: int | None, reason: object) -> None:
        bury(self._config.folder, lines, status, reason)
        self._refusals.add(lines, status, reason)

    def _dropped(self, entry: Entry, lines: int, reason: str) -> None:
        self._counters.dropped += lines
        click.echo(f"telemetryd: {lines} unsent lines given up, {entry.path.name} deleted: {reason}", err=True)


# --- replay --------------------------------------------------------------------------------------


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--rejects", type=click.Path(path_type=Path), help="Append what the daemon refuses to this file.")
@retry_option
@json_flag
@url_option
def replay(*, files: tuple[str, ...], rejects: Path | None, retry_s: float, as_json: bool, url: str | None) -> None:
    r"""Send the runs of NDJSON files: one JSON object a line, as POST /api/v1/runs takes it.

    Plain, gzip or Zstandard; - is standard input. Spool files, dead-letter files and the archives of
    `telemetryd prune`, with the events of their runs, will do as well. Runs that are known by their event_id are
    left as they are, so a file may be replayed again.

    \b
    Examples:
      telemetryd replay runs.ndjson
      telemetryd replay --rejects bad.jsonl /backups/runs-2025.ndjson.zst --json
      telemetryd replay ~/.local/state/telemetryd/buffer/dead-letter.jsonl
      zcat old.ndjson.gz | telemetryd replay -
    """
    config = _config(url=url)
    counters = Counters()
    transport = Transport(config)
    refusals = _Refusals(rejects)
    delivery = Delivery(transport, refusals.add, counters)
    patience = Patience(retry_s, threading.Event())
    problem = None
    try:
        with progress() as drawn:
            for name in files:
                _replay_file(name, delivery, patience, drawn)
    except (RetryError, OSError, EOFError, zstd.ZstdError) as error:
        problem = str(error)
    finally:
        transport.close()
    if as_json:
        print_json({**_outcome(counters), "problem": problem})
    else:
        click.echo(_sentence(counters))
    _end(problem, counters)


def _replay_file(name: str, delivery: Delivery, patience: Patience, drawn: Progress) -> None:
    with click.open_file(name, "rb") as raw:
        total = Path(name).stat().st_size if name != "-" else 0
        file = io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
        lines: list[bytes] = []
        length = 0
        for line in _plain(file):
            unfolded = [text for text in unfold(_unwrap(line.strip())) if text]
            lines += unfolded
            length += sum(map(len, unfolded))
            if len(lines) >= delivery.rows or length >= MAX_BYTES:
                _send(lines, delivery, patience)
                lines, length = [], 0
                if total:
                    drawn(Path(name).name, raw.tell(), total)
        _send(lines, delivery, patience)
        if total:
            drawn(Path(name).name, total, total)


def _send(lines: list[bytes], delivery: Delivery, patience: Patience) -> None:
    if lines:
        parcel = Parcel.of(lines)
        patience.attempt(lambda: delivery.send(parcel), None)
        time.sleep(delivery.pause_s)


def _plain(file: Any) -> IO[bytes]:
    """Return a file's text, unpacked if its first bytes say so."""
    start = file.peek(4)[:4]
    if start.startswith(_GZIP):
        return cast("IO[bytes]", gzip.open(file))
    if start == _ZSTD:
        return cast("IO[bytes]", zstd.open(file))
    return cast("IO[bytes]", file)


def _unwrap(line: bytes) -> bytes:
    """Return the line that a dead letter holds; any other line as it is."""
    if line.startswith(b'{"time":'):
        letter = read_object(line) or {}
        if {"reason", "status", "line"} <= letter.keys():
            inner = letter["line"]
            return encode(inner).rstrip() if isinstance(inner, dict) else str(inner).encode()
    return line


class _Refusals:
    """Tells of refused lines on standard error, the first ones in words, and keeps them if a file is given."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._told = 0

    def add(self, lines: list[bytes], status: int | None, reason: object) -> None:
        """Take in refused lines."""
        if self._told < _TOLD:
            self._told += 1
            text = "; ".join(_reasons(reason))
            click.echo(
                f"telemetryd: refused ({status}): {text:.300}: {lines[0].decode('utf-8', 'replace'):.200}", err=True
            )
        if self._file is not None:
            with self._file.open("ab") as out:
                out.write(b"".join(dead_letter(line, status, reason, timestamp()) for line in lines))


def _reasons(reason: object) -> list[str]:
    faults = reason if isinstance(reason, list) else [reason]
    return [
        describe(cast("ErrorItem", fault)) if isinstance(fault, dict) and {"loc", "msg"} <= fault.keys() else str(fault)
        for fault in faults
    ]
