"""The commands about lines that the daemon has refused: dead-letters list, show, retry."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import click

from telemetryd.cli.agents import end, folder_of, folder_option, retry_option
from telemetryd.cli.basics import Suggesting
from telemetryd.cli.files import Patience, Refusals, reasons
from telemetryd.cli.options import counted, fail, failing, json_flag, print_json
from telemetryd.cli.reach import Where, client_config, daemon_flags, refuse_missing_socket
from telemetryd.client.batch import Batch
from telemetryd.client.context import timestamp
from telemetryd.client.counters import Counters
from telemetryd.client.dead_letters import (
    Letter,
    close_letters,
    letter_files,
    read_letters,
    replace_letters,
    wait_until_left,
)
from telemetryd.client.delivery import MAX_BYTES, Delivery, RetryError
from telemetryd.client.lines import Json, dead_letter, event_id_of, is_operation, read_object
from telemetryd.client.transport import Transport
from telemetryd.errors import sentence
from telemetryd.ops.logs import printable

_SHOWN: Final = 100


@click.group(
    "dead-letters",
    cls=Suggesting,
    help="Show what the daemon has refused, and send it again.",
)
def dead_letters() -> None:
    """Hold the commands about dead letters."""


def _chosen(folder: Path, ids: tuple[str, ...]) -> Iterator[tuple[Path, Letter]]:
    """Yield the letters that are called so, or all, with their files; end the process if one is not there."""
    missing = {*ids}
    try:
        for path in letter_files(folder):
            for letter in read_letters(path):
                if not ids or letter.id in ids:
                    missing.discard(letter.id)
                    yield path, letter
    except OSError as error:
        fail(sentence(error))
    if missing:
        fail(f"There is no dead letter {', '.join(sorted(missing))} in {folder}; see telemetryd dead-letters list")


def _described(path: Path, letter: Letter) -> Json:
    about = read_object(letter.line) or {}
    return {
        "id": letter.id,
        "time": letter.time,
        "status": letter.status,
        "reason": "; ".join(reasons(letter.reason)),
        "kind": str(about.get("op", "run")) if is_operation(letter.line) else "run",
        "event_id": event_id_of(letter.line) or None,
        "agent_name": about.get("agent_name"),
        "file": str(path),
    }


@dead_letters.command(
    "list",
    help=r"""List the lines that the daemon has refused, the oldest first.

    Each has an id, by which the other commands know it, also after it was sent and refused again.

    \b
    Examples:
      telemetryd dead-letters list
      telemetryd dead-letters list --buffer-dir /var/lib/agents/buffer --json | jq -r '.[].reason' | sort | uniq -c
    """,
)
@folder_option
@json_flag
def list_(*, buffer_dir: Path | None, as_json: bool) -> None:
    folder = folder_of(buffer_dir)
    found = (_described(path, letter) for path, letter in _chosen(folder, ()))
    if as_json:
        print_json(list(found))
        return
    is_any = False
    for each in found:
        is_any = True
        whose = each["event_id"] or "-"
        answer = "-" if each["status"] is None else str(each["status"])
        when = (each["time"] or "-")[:19]
        click.echo(
            printable(f"{each['id']}  {when:<19}  {answer:>3}  {each['kind']:<6}  {whose}  {each['reason']:.{_SHOWN}}")
        )
    if not is_any:
        click.echo(f"There is no dead letter in {folder}")


@dead_letters.command(
    help=r"""Show dead letters in full: when and why each was refused, and what it holds.

    \b
    Examples:
      telemetryd dead-letters show 3f9c01aa
      telemetryd dead-letters show 3f9c01aa --json | jq -c '.[].line' > one.jsonl   # to be changed, then replayed
    """
)
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@folder_option
@json_flag
def show(*, ids: tuple[str, ...], buffer_dir: Path | None, as_json: bool) -> None:
    folder = folder_of(buffer_dir)
    found = [
        {
            **_described(path, letter),
            "reason": letter.reason,
            "line": read_object(letter.line) or letter.line.decode("utf-8", "replace"),
        }
        for path, letter in _chosen(folder, ids)
    ]
    if as_json:
        print_json(found)
        return
    for each in found:
        line = each.pop("line")
        for name, value in each.items():
            for text in reasons(value) if name == "reason" else [value]:
                click.echo(printable(f"{name}: {text}"))
        print_json(line)


@dead_letters.command(
    help=r"""Send dead letters again: those that are named, or all.

    What the daemon takes now, or knows already, leaves its file; what it refuses again stays, with the new reason. What
    has to be changed before is better shown (`show --json`), changed and replayed.

    \b
    Examples:
      telemetryd dead-letters retry 3f9c01aa
      telemetryd dead-letters retry --all --url unix:///run/telemetryd/telemetryd.sock
    """
)
@click.argument("ids", metavar="[ID...]", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Send all of them.")
@folder_option
@retry_option
@json_flag
@daemon_flags
def retry(
    *, ids: tuple[str, ...], is_all: bool, buffer_dir: Path | None, retry_s: float, as_json: bool, where: Where
) -> None:
    if bool(ids) == is_all:
        raise click.UsageError("Name the dead letters, or give --all")
    config = client_config(where, buffer_dir=buffer_dir)
    folder = folder_of(buffer_dir)
    counters = Counters()
    problem = None
    with failing(), closing(Transport(config)) as transport:
        refuse_missing_socket(config)
        again = _Again(transport, counters, Patience(retry_s, threading.Event()))
        try:
            close_letters(folder)
            wanted: dict[Path, set[str]] = {}
            for path, letter in _chosen(folder, ids):
                wanted.setdefault(path, set()).add(letter.id)
            for path, chosen in wanted.items():
                again.send(path, chosen)
        except RetryError as error:
            problem = str(error)
        except OSError as error:
            problem = sentence(error)
    if as_json:
        print_json(
            {
                "sent": counters.sent,
                "stored": counters.stored,
                "duplicates": counters.duplicates,
                "refused": counters.dead,
                "problem": problem,
            }
        )
    else:
        click.echo(f"{counted(counters.sent, 'dead letter')} sent again: {counters.dead} refused again")
    end(problem, counters)


class _Again:
    """Sends the letters of one file after the other."""

    def __init__(self, transport: Transport, counters: Counters, patience: Patience) -> None:
        self._refusals = Refusals(None)
        self._delivery = Delivery(transport, self._refuse, counters)
        self._patience = patience
        self._refused: dict[bytes, bytes] = {}
        """Line → its new letter."""

    def send(self, path: Path, ids: set[str]) -> None:
        """Send letters of a file, and write it anew without those that are settled.

        Raises:
            RetryError: if the daemon takes nothing; what it has taken before is gone from the file.
            OSError: if the file cannot be read or written.

        """
        wait_until_left(path)
        settled: set[bytes] = set()
        self._refused.clear()
        try:
            for lines in _parts(letter.line for letter in read_letters(path) if letter.id in ids):
                batch = Batch.of(lines)
                try:
                    self._patience.attempt(partial(self._delivery.send, batch), None)
                except RetryError:
                    self._delivery.give_up(batch)
                    raise
                settled.update(lines)
        finally:
            replace_letters(
                path,
                (
                    self._refused.get(letter.line, letter.raw)
                    for letter in list(read_letters(path))
                    if letter.id not in ids or letter.line not in settled or letter.line in self._refused
                ),
            )

    def _refuse(self, lines: list[bytes], status: int | None, reason: object) -> None:
        moment = timestamp()
        for line in lines:
            self._refused[line] = dead_letter(line, status, reason, moment)
        self._refusals.add(lines, status, reason)


def _parts(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Yield lines in parts that a request may hold."""
    part: list[bytes] = []
    size = 0
    for line in lines:
        part.append(line)
        size += len(line)
        if len(part) >= _SHOWN or size >= MAX_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
