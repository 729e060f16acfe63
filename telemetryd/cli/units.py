"""The command units: records the runs of systemd's units, without touching them, from the journal."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import orjson

from telemetryd.cli.basics import EXIT_FAILURE
from telemetryd.client.client import Client
from telemetryd.client.unit_journal import FIELDS, MESSAGES, UnitJournal

_IDLE_S: Final = 0.5
"""After this long without an entry, what was held back is recorded, and the place is saved."""
_SAVE_AFTER: Final = 500
"""Entries after which the place is saved although more are waiting."""
_ACKNOWLEDGED_S: Final = 30.0
_TIMERS_S: Final = 5.0
_PIECE: Final = 1 << 16
_MOST_SAID: Final = 4096
"""Bytes of what journalctl has complained of that are shown, the last ones."""
_CURSOR_GONE: Final = "cursor"


@click.command(
    help=r"""Record the runs of systemd units from the journal.

    The units are not touched. PATTERNS are names of units, with or without .service, in which * and ? stand for any
    text. Each invocation becomes a run, whose agent is the unit's name: running from its start, then success, failure,
    timeout, or cancelled if it was stopped. Processor time and memory are taken from the journal. The place in the
    journal is saved only when the daemon has acknowledged the runs before it, so nothing is missed and nothing is
    stored twice, however often either is restarted. The first time, it begins with this boot. To read the journal, run
    it as root or in the group systemd-journal, as telemetryd-units.service does.

    \b
    Examples:
      telemetryd units 'backup-*' certbot
      telemetryd units --all-timers
    """,
)
@click.argument("patterns", nargs=-1)
@click.option("--all-timers", is_flag=True, help="The units of all timers as well.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="File with the place in the journal.  [default: units.json in the client's spool]",
)
@click.option("--once", is_flag=True, help="End when the whole journal has been read.")
def units(*, patterns: tuple[str, ...], all_timers: bool, state: Path | None, once: bool) -> None:
    """Record the runs of systemd's units."""
    if not patterns and not all_timers:
        raise click.UsageError("Name at least one unit, or give --all-timers.")
    client = Client.tolerant()
    place = Place(state or client.config.folder / "units.json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    is_meant = Meant(patterns, all_timers=all_timers)
    try:
        journal = UnitJournal(client, is_meant, place.state)
    except (AttributeError, TypeError) as error:
        place.fail(error)
    try:
        _follow(client, journal, place, once=once)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        client.close()


def _follow(client: Client, journal: UnitJournal, place: Place, *, once: bool) -> None:
    unsaved = 0
    cursor: str | None = None
    for entry in _entries(place, once=once):
        if entry is not None:
            journal.read(entry)
            cursor = str(entry["__CURSOR"])
            unsaved += 1
        if cursor is not None and (entry is None or unsaved >= _SAVE_AFTER):
            journal.settle()
            if client.flush(_ACKNOWLEDGED_S):
                place.save(cursor, journal.state())
                unsaved, cursor = 0, None


def _entries(place: Place, *, once: bool) -> Iterator[dict[str, Any] | None]:
    """Yield the journal's entries from a place on, and None whenever there is none for a moment, or at the end."""
    command = ["journalctl", "--output=json", "--no-pager", "--quiet", f"--output-fields={','.join(FIELDS)}"]
    command += ["--boot", "--lines=all"] if place.cursor is None else [f"--after-cursor={place.cursor}"]
    if not once:
        command.append("--follow")
    matches = ["_PID=1", *(f"MESSAGE_ID={message}" for message in MESSAGES)]
    # In memory, not in a pipe: it may complain of each of many damaged files, and would wait for us to read it.
    with open(os.memfd_create("journalctl"), "rb") as complaints:
        try:
            reader = subprocess.Popen([*command, *matches], stdout=subprocess.PIPE, stderr=complaints)  # noqa: S603
        except OSError as error:
            _fail(f"journalctl: {error.strerror}")
        with reader, contextlib.ExitStack() as ending:
            ending.callback(reader.terminate)
            yield from _lines(reader)
            ending.pop_all()  # it ends by itself, and its status counts
        complaints.seek(max(complaints.seek(0, os.SEEK_END) - _MOST_SAID, 0))
        said = complaints.read().decode("utf-8", "replace").strip()
    if reader.returncode:
        if place.cursor is not None and _CURSOR_GONE in said:
            click.echo(f"telemetryd units: {said}; begins with this boot", err=True)
            place.cursor = None
            yield from _entries(place, once=once)
            return
        _fail(f"journalctl ended with {reader.returncode}: {said}")
    yield None
    if not once:
        _fail("journalctl has ended")


def _lines(reader: subprocess.Popen[bytes]) -> Iterator[dict[str, Any] | None]:
    assert reader.stdout is not None  # noqa: S101 - it is a pipe
    rest = b""
    while True:
        if not select.select([reader.stdout], (), (), _IDLE_S)[0]:
            yield None
            select.select([reader.stdout], (), ())
        piece = os.read(reader.stdout.fileno(), _PIECE)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            with contextlib.suppress(orjson.JSONDecodeError):
                yield orjson.loads(line)


def _fail(text: str) -> NoReturn:
    click.echo(f"telemetryd units: {text}", err=True)
    sys.exit(EXIT_FAILURE)


class Place:
    """Where in the journal everything before is recorded and acknowledged, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cursor: str | None = None
        self.state: dict[str, Any] = {}
        try:
            known = json.loads(path.read_text("utf-8"))
            self.cursor, self.state = known["cursor"], known["state"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.fail(error)

    def fail(self, error: Exception) -> NoReturn:
        """End, because the file does not hold what we have written."""
        _fail(f"{self._path} cannot be read; delete it to begin with this boot: {error}")

    def save(self, cursor: str, state: dict[str, Any]) -> None:
        """Write the place so that it is whole after a power cut."""
        self.cursor, self.state = cursor, state
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._path.with_name(f"{self._path.name}.new")
        # Not through a link that somebody has put there, as root may write into a folder of others.
        number = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(number, "w", encoding="utf-8") as file:
            json.dump({"cursor": cursor, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)


class Meant:
    """Whether a unit is one of those that are meant."""

    def __init__(self, patterns: tuple[str, ...], *, all_timers: bool) -> None:
        self._patterns = patterns
        self._all_timers = all_timers
        self._known: dict[str, bool] = {}

    def __call__(self, unit: str) -> bool:
        """Return whether a unit, given by its full name, is meant."""
        if unit not in self._known:
            names = unit, unit.removesuffix(".service")
            is_named = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self._patterns)
            self._known[unit] = is_named or (self._all_timers and _is_timed(unit))
        return self._known[unit]


def _is_timed(unit: str) -> bool:
    """Return whether a timer starts a unit."""
    command = ["systemctl", "show", "--property=TriggeredBy", "--value", "--", unit]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMERS_S, check=False)  # noqa: S603
        trouble = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.SubprocessError) as error:
        trouble = str(error)
    if trouble is not None:  # to go on would be to miss the unit's runs; the place is not saved
        _fail(f"systemctl does not say whether a timer starts {unit}: {trouble}")
    return any(name.endswith(".timer") for name in done.stdout.split())
