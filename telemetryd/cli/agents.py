"""The commands of the agents' side: sync, replay."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

import click

from telemetryd.cli.accounts import Accounts, Left, in_words, outcome, plain_name, sentences
from telemetryd.cli.basics import EXIT_USAGE, F
from telemetryd.cli.files import LONGEST_LINE_MIB, READ_ERRORS, Patience, Refusals, Sending
from telemetryd.cli.options import counted, fail, json_flag, print_json, progress
from telemetryd.cli.reach import RefusedError, Where, client_config, daemon_flags, refuse_missing_socket
from telemetryd.client.aside import Aside
from telemetryd.client.bounds import Upkeep
from telemetryd.client.config import Config, buffer_folder
from telemetryd.client.counters import Counters
from telemetryd.client.dead_letters import DEAD_LETTERS, bury
from telemetryd.client.delivery import BlockedError, Delivery, RetryError, WaitError
from telemetryd.client.folder import ACTIVE, READY, SYNCED, UNSENT, Entry, is_aside, summary, waiting
from telemetryd.client.old_variables import old_buffer_folders, old_raw_folders
from telemetryd.client.streams import Stream
from telemetryd.client.transport import Transport
from telemetryd.client.uploader import Uploader
from telemetryd.errors import sentence

_WATCH_S: Final = 2.0
_COST: Final = 20
"""Looking through a folder takes at most one twentieth of the time."""

_BUFFER_FILES: Final = "telemetry_*.jsonl.*"
_LEFT_OPEN: Final = "telemetry_*.jsonl.active"
_RAW_FILES: Final = "*.ndjson"
"""The names of the replaced client's files."""

_FOLDER: Final = "The spool's folder.  [TELEMETRY_BUFFER_DIR; default: ~/.local/state/telemetryd/buffer]"
folder_option = click.option("--buffer-dir", type=click.Path(path_type=Path), help=_FOLDER)
retry_option = click.option(
    "--retry-for",
    "retry_s",
    type=click.FloatRange(min=0),
    default=10.0,
    metavar="SECONDS",
    help="How long to try again while the daemon does not take anything.  [default: 10]",
)


take_over_option = click.option(
    "--take-over",
    is_flag=True,
    help="Take over what local-telemetry 3.x has left, where its variables and defaults say (docs/how-to/from-3.x.md).",
)


def from_files(function: F, *, or_takes_over: bool = False) -> F:
    """Give a command that sends the runs of files its argument and flags; if it takes over, no file need be named."""
    longest_line = click.option(
        "--longest-line",
        "longest_line_mib",
        type=click.IntRange(1, 1024),
        default=LONGEST_LINE_MIB,
        show_default=True,
        metavar="MIB",
        help="A longer line of NDJSON, or other JSON, is refused unread, so that a small file cannot fill the memory.",
    )
    rejects = click.option(
        "--rejects",
        type=click.Path(path_type=Path),
        help="Append what the daemon refuses to this file; no link.",
    )
    files = click.argument(
        "files", nargs=-1, required=not or_takes_over, type=click.Path(exists=True, dir_okay=False, allow_dash=True)
    )
    return files(rejects(longest_line(retry_option(json_flag(daemon_flags(function))))))


def folder_of(named: Path | None, *, may_come: bool = False) -> Path:
    """Return the spool's folder; end the process if there is none where the command line or the environment says."""
    try:
        folder = buffer_folder(named)
    except ValueError as error:
        click.echo(f"telemetryd: {error}", err=True)
        sys.exit(EXIT_USAGE)
    is_named = named is not None or bool(os.environ.get("TELEMETRY_BUFFER_DIR"))
    if is_named and not folder.is_dir():
        if not may_come:
            fail(f"{folder} is no folder; name the one that agents write to with --buffer-dir (TELEMETRY_BUFFER_DIR)")
        if not folder.exists():
            click.echo(f"telemetryd: there is no folder {folder} yet; waiting for it", err=True)
    return folder


# --- sync ----------------------------------------------------------------------------------------


@click.command(
    help=r"""Send what agents have left in their buffer folder.

    What processes that are alive send themselves is left to them; everything else, the lines of those that run with
    TELEMETRY_SEND=false included, is taken stream after stream, each under a lock, so any number of agents and of
    these commands may work on one folder. A file is `.synced` when every line of it has been acknowledged, or stands
    in dead-letter.jsonl with the daemon's reason.

    With --take-over the folder is that of local-telemetry 3.x, and what that left open (`*.jsonl.active`) is sent as
    well; stop its agents before.

    \b
    Examples:
      telemetryd sync --dry-run
      telemetryd sync --buffer-dir /var/lib/agents/buffer --json
      telemetryd sync --watch --url unix:///run/telemetryd/telemetryd.sock
    """
)
@folder_option
@click.option("--watch", is_flag=True, help="Go on until SIGTERM or SIGINT: send whatever comes.")
@click.option("--dry-run", is_flag=True, help="Only say what the folder holds.")
@take_over_option
@retry_option
@json_flag
@daemon_flags
def sync(
    *,
    buffer_dir: Path | None,
    watch: bool,
    dry_run: bool,
    take_over: bool,
    retry_s: float,
    as_json: bool,
    where: Where,
) -> None:
    left_open: list[Path] = []
    if take_over:
        folders = [buffer_dir] if buffer_dir is not None else old_buffer_folders(os.environ)
        buffer_dir = _left_by_3x(folders, _BUFFER_FILES, "name the folder with --buffer-dir")
        left_open = [path for path in sorted(buffer_dir.glob(_LEFT_OPEN)) if stat.S_ISREG(path.lstat().st_mode)]
        if not dry_run:
            _close(left_open)
            left_open = []
    config = None if dry_run else client_config(where, buffer_dir=buffer_dir)
    folder = folder_of(buffer_dir, may_come=watch)
    counters = Counters()
    accounts = Accounts(counters)
    problem = None if config is None else _sync(config, counters, accounts, None if watch else retry_s)
    left = Left()
    try:
        left.look(folder, left_open)
    except OSError as error:
        problem = problem or sentence(error)
    problem = problem or (None if watch else left.trouble)
    files = [] if watch else accounts.to_json(left.files)
    if as_json:
        print_json({**outcome(counters), "left": left.states, "files": files, "problem": problem})
    else:
        for text in sentences(files):
            click.echo(text)
        if not dry_run:
            _echo_outcome(counters)
        elif not left.states:
            click.echo(f"Nothing is left to be sent in {folder}")
        for text in left.sentences():
            click.echo(text)
    if watch and problem is None:
        return  # stopped as it was meant to be; each refusal was reported when it came
    end(problem, counters, f"; see {folder / DEAD_LETTERS}")


def _left_by_3x(folders: list[Path], pattern: str, otherwise: str) -> Path:
    """Return the first folder that has files of 3.x, or end the process with where was looked."""
    found = next((folder for folder in folders if any(folder.glob(pattern))), None)
    if found is None:
        fail(f"3.x has left no {pattern} in {', '.join(map(str, folders))}; {otherwise}")
    return found


def _close(left_open: list[Path]) -> None:
    """Give the files that 3.x has left open names of closed ones that are free; it makes others if it still runs."""
    for path in left_open:
        name = path.name.removesuffix(f".jsonl{ACTIVE}")
        stems = (path.with_name(f"{name}-{number}" if number else name) for number in count())
        free = next(
            stem for stem in stems if not any(os.path.lexists(f"{stem}.jsonl{state}") for state in (READY, SYNCED))
        )
        path.rename(f"{free}.jsonl{READY}")


def _sync(config: Config, counters: Counters, accounts: Accounts, retry_s: float | None) -> str | None:
    """Send what the folder holds, once or (without a bound for failures) until a signal; return what went wrong."""
    watch = retry_s is None
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT) if watch else ():
        signal.signal(number, lambda *_: stopped.set())
    work = _Sync(config, counters, None if watch else accounts, Patience(retry_s, stopped), stopped)
    try:
        if watch:
            work.watch()
        else:
            refuse_missing_socket(config)
            while work.pass_over():  # until nothing waits for what has been sent meanwhile
                pass
    except (RetryError, RefusedError, OSError) as error:
        return str(error)
    finally:
        work.close()
    return None if watch else work.trouble


def _echo_outcome(counters: Counters) -> None:
    click.echo(in_words(outcome(counters)))
    if counters.torn:
        click.echo(f"{counted(counters.torn, 'torn line')} left out: the call that began to write it had not returned")


def end(problem: str | None, counters: Counters, where: str = "") -> None:
    """End the process with exit status 1 if something went wrong or was refused."""
    if problem is not None:
        fail(problem)
    if counters.dead:
        fail(f"{counted(counters.dead, 'line')} refused{where}")


class _Sync:
    def __init__(
        self,
        config: Config,
        counters: Counters,
        accounts: Accounts | None,
        patience: Patience,
        stopped: threading.Event,
    ) -> None:
        self._folder = config.folder
        self._counters = counters
        self._accounts = accounts
        self._patience = patience
        self._stopped = stopped
        self._transport = Transport(config)
        self._refusals = Refusals(None)
        self._aside = Aside(config.folder)
        self._delivery = Delivery(self._transport, self._bury, counters, self._aside)
        self._upkeep = Upkeep(config, self._dropped)
        self.problem: str | None = None
        """The last trouble with one of the files."""
        self._blocked = ""

    @property
    def trouble(self) -> str | None:
        """What kept us from sending everything."""
        if self.problem is None and (self._blocked or self._counters.aside):
            return f"Some lines do not get through to the daemon; they are tried again later. {self._blocked}".rstrip()
        return self.problem

    def watch(self) -> None:
        """Send whatever comes, and keep the folder within its bounds, until we are stopped."""
        while not self._stopped.is_set():
            began, before = time.monotonic(), self._counters.sent
            looking = 0.0
            try:
                self.pass_over()
                looking = self._looking_s
                self._upkeep.attend(None)
            except OSError as error:
                self._note(error)
            if self._counters.sent == before:
                self._stopped.wait(max(_WATCH_S, _COST * looking) - (time.monotonic() - began))

    def pass_over(self) -> bool:
        """Send every stream that nobody else sends, as far as it has come; return whether another pass may get on.

        Raises:
            OSError: if the folder cannot be read.
            RetryError: if the daemon takes nothing.

        """
        began, before = time.monotonic(), self._counters.sent
        found = waiting(self._folder)
        total = sum(each["bytes"] for each in summary(self._folder, UNSENT).values())
        self._looking_s = time.monotonic() - began
        some_wait = False
        done = 0
        with progress() as drawn:
            for name, numbers in found.items():
                if self._stopped.is_set():
                    break
                if is_aside(name) and not self._aside.is_due(name):
                    continue
                try:
                    for size_of_part in self._send(name, numbers):
                        done += size_of_part
                        drawn("Sending", min(done, total), total)
                        self._stopped.wait(self._delivery.pause_s)
                except BlockedError as error:
                    self._aside.postpone(name)
                    self._blocked = str(error)
                except WaitError:
                    some_wait = True  # it comes after another stream, perhaps one of this pass
                except OSError as error:
                    self._note(error)  # the others can be sent all the same
        return some_wait and self._counters.sent > before

    def _send(self, name: str, numbers: list[int]) -> Iterator[int]:
        """Send a stream unless another process does; yield the size of each part that was sent."""
        stream = Stream.take(self._folder, name, numbers)
        if stream is None:
            return
        uploader = Uploader(stream, self._delivery, self._counters)
        try:
            end = stream.end()
            while (stream.number, stream.offset) < end and self._patience.attempt(uploader.send_next, 0):
                self._attribute(stream)
                yield uploader.sent_bytes
            self._attribute(stream)
            stream.window(1, 1)  # marks a file that has been sent whole
        except RetryError:
            uploader.give_up()
            self._attribute(stream)
            raise
        finally:
            stream.release()

    def _attribute(self, stream: Stream) -> None:
        """Attribute what has been counted to the file that the stream stands in."""
        if self._accounts is not None:
            self._accounts.note(plain_name(stream.path(stream.number, READY)))

    def _note(self, error: OSError) -> None:
        if self.problem != str(error):
            self.problem = str(error)
            click.echo(f"telemetryd: {error}", err=True)

    def close(self) -> None:
        self._transport.close()

    def _bury(self, lines: list[bytes], status: int | None, reason: object) -> None:
        try:
            bury(self._folder, lines, status, reason)
        except OSError as error:
            self._note(error)
            raise
        self._refusals.add(lines, status, reason)

    def _dropped(self, entry: Entry, lines: int, reason: str) -> None:
        self._counters.dropped += lines
        text = f"{counted(lines, 'line')} not stored and given up, {Path(entry.path).name} deleted: {reason}"
        click.echo(f"telemetryd: {text}", err=True)


def send_files(
    config: Config,
    files: tuple[str, ...],
    counters: Counters,
    refusals: Refusals,
    accounts: Accounts,
    *,
    retry_s: float,
    longest_line_mib: int,
) -> str | None:
    """Send the runs of files, and return what went wrong."""
    transport = Transport(config)
    patience = Patience(retry_s, threading.Event())
    sending = Sending(transport, counters, refusals, patience, longest_line_mib << 20)
    name = ""
    try:
        refuse_missing_socket(config)
        with progress() as drawn:
            for name in files:
                sending.send(name, drawn)
                accounts.note(name)
    except (RetryError, RefusedError) as error:
        return str(error)
    except READ_ERRORS as error:
        return sentence(error) if name in sentence(error) else f"{name}: {sentence(error)}"
    finally:
        accounts.note(name)
        transport.close()
    return None


# --- replay --------------------------------------------------------------------------------------


@click.command(
    help=r"""Send the runs of NDJSON files.

    One JSON object a line, as POST /api/v1/runs takes it. Plain, gzip or Zstandard; - is standard input. Spool files,
    dead-letter files and the archives of `telemetryd prune`, with the events of their runs, will do as well. Runs that
    are known by their event_id are left as they are, so a file may be replayed again. Files of local-telemetry 3.x
    (`raw/*.ndjson`, `*.jsonl.ready`) will do as well: a second line of a run says how it ended. With --take-over they
    are looked for where 3.x had them.

    \b
    Examples:
      telemetryd replay runs.ndjson
      telemetryd replay --rejects bad.jsonl /backups/runs-2025.ndjson.zst --json
      telemetryd replay ~/.local/state/telemetryd/buffer/dead-letter.jsonl
      zcat old.ndjson.gz | telemetryd replay -
    """
)
@take_over_option
@partial(from_files, or_takes_over=True)
def replay(
    *,
    files: tuple[str, ...],
    take_over: bool,
    rejects: Path | None,
    longest_line_mib: int,
    retry_s: float,
    as_json: bool,
    where: Where,
) -> None:
    config = client_config(where)
    counters = Counters()
    if take_over and not files:
        folder = _left_by_3x(old_raw_folders(os.environ), _RAW_FILES, "name its files")
        files = tuple(map(str, sorted(folder.glob(_RAW_FILES))))
    elif not files:
        raise click.UsageError("Missing argument 'FILES...'.")
    accounts = Accounts(counters)
    refusals = Refusals(rejects)
    problem = send_files(
        config, files, counters, refusals, accounts, retry_s=retry_s, longest_line_mib=longest_line_mib
    )
    if as_json:
        print_json({**outcome(counters), "files": accounts.to_json(), "problem": problem})
    else:
        for text in sentences(accounts.to_json()):
            click.echo(text)
        _echo_outcome(counters)
    end(problem, counters)
