"""The command run: runs a program as a run. It starts fast, because nothing of the server is loaded."""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from telemetryd.cli.basics import DurationType, PairType, SizeType
from telemetryd.cli.recording import end, quiet_client
from telemetryd.client.client import Client
from telemetryd.client.ending_signals import wait_for_ending
from telemetryd.client.programs import (
    NOT_EXECUTABLE,
    SIGNALLED,
    Manner,
    NotStartedError,
    block_signals,
    execute,
    program_name,
    signal_name,
)

_EXIT_LOCKED: Final = 75
"""EX_TEMPFAIL (sysexits(3)): try again later."""
_DEFAULT_TAIL: Final = 16 * 1024
_MOST_EVENTS: Final = 1000
_LOCK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}", re.ASCII)
_LOCK_RETRY_S: Final = 0.1


@click.command(
    context_settings={"allow_interspersed_args": False},
    help=r"""Run a command, and record it as a run.

    The run is in the client's spool before the command starts, so it is recorded even if the daemon is down or this
    machine dies. Signals are handed on, standard input and output are the command's own, and the exit status is the
    command's: 128 + n if it died of signal n, 127 if there is no such command, 126 if it cannot be executed or its lock
    cannot be opened, 75 if another run holds the lock. The run ends as success, failure, timeout, or cancelled if it
    was ended by SIGINT, SIGTERM, SIGHUP or SIGQUIT. Processor time and peak memory go to metrics_json. The command
    finds its run in TELEMETRY_PARENT_RUN_ID and TRACEPARENT. Where the daemon is comes from TELEMETRY_API_URL, as for
    every client.

    \b
    Examples:
      telemetryd run -- ./backup.sh --full
      telemetryd run --agent backup --job-type nightly --label host=db1 --timeout 2h --lock backup -- ./backup.sh
      15 3 * * *  telemetryd run --agent backup -- /usr/local/bin/backup.sh        # in a crontab
    """,
)
@click.option("--agent", help="The agent's name.  [default: the program's name]")
@click.option("--job-type", default="command", show_default=True, help="What kind of job it is.")
@click.option("--label", "labels", multiple=True, type=PairType(), metavar="K=V", help="A label; may be given again.")
@click.option("--timeout", "timeout_s", type=DurationType(), help="End the command with SIGTERM after this time: 2h.")
@click.option(
    "--kill-after",
    "kill_after_s",
    type=DurationType(),
    default="10s",
    show_default=True,
    help="End it with SIGKILL this long after the timeout.",
)
@click.option("--lock", metavar="NAME", help="Do not start while another run of this user holds the lock NAME.")
@click.option("--lock-wait", "lock_wait_s", type=DurationType(), help="Wait for the lock for this long.")
@click.option(
    "--tail",
    type=SizeType(),
    help="Keep the last bytes of standard error in error_details (16k), and make its lines events of the run, at most "
    "1,000. 0 leaves standard error alone.  [default: 16k without events, or 0 if standard error is a terminal]",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENTS]…")
def run(
    *,
    command: tuple[str, ...],
    agent: str | None,
    job_type: str,
    labels: tuple[tuple[str, str], ...],
    timeout_s: float | None,
    kill_after_s: float,
    lock: str | None,
    lock_wait_s: float | None,
    tail: int | None,
) -> None:
    """Run a command as a run."""
    if lock_wait_s is not None and lock is None:
        raise click.UsageError("--lock-wait needs --lock.")
    if lock is not None and not _LOCK_NAME.fullmatch(lock):
        raise click.UsageError(
            f"--lock: {lock!r} must be 1 to 100 letters, digits and _ . @ -, not beginning with a sign."
        )
    mask = block_signals()
    client = quiet_client()
    fields: dict[str, Any] = {"labels": dict(labels)} if labels else {}
    started = client.run(agent or program_name(command), job_type, heartbeat=True, **fields)
    kept: tuple[int, ...] = ()
    if lock is not None:
        try:
            kept = (_take_lock(client.config.folder, lock, lock_wait_s or 0.0),)
        except NotLockedError as error:
            started.finish(error.status, error_summary=f"not started: {error}")
            _end(client, str(error), error.exit_status)
    default_tail = 0 if os.isatty(2) else _DEFAULT_TAIL
    events = _MOST_EVENTS if tail else 0
    manner = Manner(timeout_s, kill_after_s, default_tail if tail is None else tail, events, kept)
    try:
        status = execute(started, list(command), manner, mask)
    except NotStartedError as error:
        _end(client, str(error), error.exit_status)
    _end(client, None, status)


class NotLockedError(Exception):
    """The command is not started, because its lock cannot be had; the text says why.

    Attributes:
        status: the run's.
        exit_status: ours.

    """

    def __init__(self, text: str, status: str, exit_status: int) -> None:
        super().__init__(text)
        self.status = status
        self.exit_status = exit_status


def _end(client: Client, complaint: str | None, status: int) -> NoReturn:
    if complaint is not None:
        click.echo(f"telemetryd run: {complaint}", err=True)
    end(client)
    sys.exit(status)


def _take_lock(folder: Path, name: str, wait_s: float) -> int:
    """Lock a file in a folder; return its descriptor, which holds the lock until the last process with it has ended.

    Raises:
        NotLockedError: if another run holds it for so long, a signal ends us before, or the file cannot be opened.

    """
    path = folder / "locks" / f"{name}.lock"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise NotLockedError(f"{error.filename}: {error.strerror}", "failure", NOT_EXECUTABLE) from error
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rest_s = until - time.monotonic()
            if rest_s <= 0:
                raise NotLockedError(f"another run holds the lock {name}", "cancelled", _EXIT_LOCKED) from None
            if (ended_by := wait_for_ending(min(_LOCK_RETRY_S, rest_s))) is not None:
                text = f"{signal_name(ended_by)} while it waited for the lock {name}"
                raise NotLockedError(text, "cancelled", SIGNALLED + ended_by) from None
        else:
            return number
