"""The commands that carry runs from one daemon to another: export, import."""

from __future__ import annotations

import asyncio
import gzip
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Final

import aiohttp
import click

from telemetryd.cli.accounts import Accounts
from telemetryd.cli.agents import end, from_files, retry_option, send_files
from telemetryd.cli.basics import F
from telemetryd.cli.files import Refusals
from telemetryd.cli.options import Progress, counted, failing, json_flag, print_json, progress, size
from telemetryd.cli.reach import (
    RefusedError,
    Renamed,
    Where,
    client_config,
    daemon_flags,
    is_hopeless,
    pause_s,
    reason,
    refusal,
    refuse_missing_socket,
    session,
)
from telemetryd.client.config import Config
from telemetryd.client.counters import Counters
from telemetryd.engine.sqlite.partials import partial_file, publish
from telemetryd.errors import DatabaseError, InvalidRequestError, UnavailableError
from telemetryd.model.filters import PARAMETERS, label_parameter
from telemetryd.model.queries import EVENTS, SNAPSHOT, Format

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_PATH: Final = "/api/v1/runs/export"
_QUIET_S: Final = 120.0
"""How long the daemon may be silent: it copies what is asked for before it answers."""
_PACKED: Final[dict[str, Callable[[IO[bytes]], Any]]] = {
    ".zst": lambda file: zstd.open(file, "wb", level=6),
    ".gz": lambda file: gzip.GzipFile("", "wb", 6, file),
}
_FILTERS: Final = tuple(parameter.name for parameter in PARAMETERS if parameter.prefix is None)
_SPELLINGS: Final = {"agent_name": ("--agent", "--agent-name")}
"""Flags that are not spelled as their filter, as all commands spell them, with their old spellings."""


def _filters(function: F) -> F:
    """Give a command one flag for each filter of the export; the daemon says what is wrong with a value."""
    metric = "Only runs with such a value in metrics_json, as tokens>1000; several times: all of them."
    function = click.option("--metric", "metrics", multiple=True, metavar="NAME>VALUE", help=metric)(function)
    label = "Only runs with such a label, as team=search or team=search,ads; several times: all of them."
    function = click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help=label)(function)
    for name in reversed(_FILTERS):
        text = f"As the parameter {name} of GET /api/v1/runs."
        spelling, *old = _SPELLINGS.get(name, (f"--{name.replace('_', '-')}",))
        function = click.option(spelling, name, cls=Renamed, old=tuple(old), metavar="VALUE", help=text)(function)
    return function


@click.command(
    help=r"""Write runs to a file, or to standard output (-).

    All that match, in the order of their arrival, from one snapshot (docs/reference/http.md says what that means in
    which journal mode). A name that ends in .zst or .gz packs it. The file gets its name when it is whole; no file is
    ever replaced.

    \b
    Examples:
      telemetryd export runs.ndjson.zst --events
      telemetryd export runs.parquet --created-after 2025-12-01T00:00:00Z
      telemetryd export - --format csv --agent hugo-translator --status failure > failures.csv
    """
)
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@click.option(
    "--format",
    "form",
    type=click.Choice([str(form) for form in Format]),
    help="The form of the file.  [default: as its name ends, else ndjson]",
)
@click.option("--events", "with_events", is_flag=True, help="Each run with its events; only with ndjson.")
@_filters
@retry_option
@json_flag
@daemon_flags
def export(
    *,
    file: str,
    form: str | None,
    with_events: bool,
    metrics: tuple[str, ...],
    labels: tuple[str, ...],
    retry_s: float,
    as_json: bool,
    where: Where,
    **filters: str | None,
) -> None:
    if as_json and file == "-":
        raise click.UsageError("--json needs a file: standard output holds the runs.")
    config = client_config(where)
    asked = {name: value for name, value in filters.items() if value is not None}
    asked |= {f"metrics.{comparison}": "" for comparison in metrics}
    given = [label.partition("=") for label in labels]
    if len({name for name, _, _ in given}) < len(given):
        raise click.UsageError("--label: each label may be given once; several values stand with commas between them.")
    asked |= {label_parameter(name): value for name, _, value in given}
    asked["format"] = form or _form_of(file)
    if with_events:
        asked["include"] = EVENTS
    with failing():
        done = asyncio.run(_export(config, file, asked, retry_s))
    if as_json:
        print_json(done)
    elif file != "-":
        kind = "one snapshot" if done["snapshot"] == "exact" else "not one snapshot: copied in slices"
        click.echo(f"{counted(done['rows'], 'run')} written to {file} ({size(done['bytes'])}; {kind})")


def _form_of(file: str) -> str:
    ends = Path(file.removesuffix(".zst").removesuffix(".gz")).suffix.removeprefix(".")
    return ends if ends in list(Format) else str(Format.NDJSON)


async def _export(config: Config, file: str, asked: dict[str, str], retry_s: float) -> dict[str, Any]:
    began = time.monotonic()
    with progress() as drawn, _opened(file, asked["format"]) as out:
        async with _answer(config, asked, retry_s) as response:
            rows = int(response.headers["X-Total-Count"])
            received = await _receive(response, out, rows, drawn, is_lines=asked["format"] == Format.NDJSON)
    return {
        "file": file,
        "format": asked["format"],
        "rows": rows,
        "bytes": received,
        "snapshot": response.headers[SNAPSHOT],
        "seconds": round(time.monotonic() - began, 3),
    }


async def _receive(
    response: aiohttp.ClientResponse, out: IO[bytes], rows: int, drawn: Progress, *, is_lines: bool
) -> int:
    """Write what comes, and return how many bytes that were.

    Raises:
        UnavailableError: if it was cut off.

    """
    received = lines = 0
    try:
        async for chunk in response.content.iter_any():
            out.write(chunk)
            received += len(chunk)
            if rows and is_lines:
                lines += chunk.count(b"\n")
                drawn("Exporting", min(lines, rows), rows)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UnavailableError(f"The export was cut off after {size(received)}; nothing of it was kept") from error
    if is_lines and lines != rows:
        raise UnavailableError(f"The export has {lines} runs instead of {rows}; nothing of it was kept")
    return received


@contextmanager
def _opened(file: str, form: str) -> Iterator[IO[bytes]]:
    """Give what to write to; a file gets its name at the end of the block, if that is reached.

    Raises:
        DatabaseError: if it cannot be made, or exists already.
        InvalidRequestError: if this form cannot be packed.

    """
    if file == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    destination = Path(file).absolute()
    pack = _PACKED.get(destination.suffix, nullcontext)
    if pack is not nullcontext and form == Format.PARQUET:
        raise InvalidRequestError(f"{file}: Parquet is packed by itself; leave {destination.suffix} out")
    if os.path.lexists(destination):
        raise DatabaseError(f"{destination} exists already; an export never replaces a file")
    with partial_file(destination) as partial:
        with partial.open("wb") as plain, pack(plain) as out:
            yield out
        publish(partial, destination)


@asynccontextmanager
async def _answer(config: Config, asked: dict[str, str], retry_s: float) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask until the daemon begins to answer.

    Raises:
        RefusedError: if it refuses.
        UnavailableError: if it cannot be reached, or cannot do it now, for so long.

    """
    patience = aiohttp.ClientTimeout(total=None, sock_connect=config.timeout_s, sock_read=_QUIET_S)
    until = time.monotonic() + retry_s
    refuse_missing_socket(config)
    async with session(config, patience) as request:
        while True:
            pause = 1.0
            try:
                response = await request("GET", _PATH, params=asked).__aenter__()
            except (aiohttp.ClientError, OSError) as error:
                problem = f"{config.url}: {reason(error, config.url)}"
                if is_hopeless(error):
                    raise UnavailableError(problem) from error
            else:
                async with response:
                    if response.status == 200 and SNAPSHOT not in response.headers:
                        raise RefusedError("What answered is no telemetryd: it sent no export", 200)
                    if response.status == 200:
                        yield response
                        return
                    problem = refusal(response, await response.read())
                    if response.status not in (429, 503):
                        raise RefusedError(problem, response.status)
                    pause = pause_s(response.headers)
            if time.monotonic() + pause > until:
                raise UnavailableError(problem)
            await asyncio.sleep(pause)


# --- import --------------------------------------------------------------------------------------


@click.command(
    "import",
    help=r"""Send the runs of exported files to the daemon.

    NDJSON (with events, if it has them), JSON (an array, {"runs": [...]}, or objects over many lines, up to
    --longest-line in all) and CSV, plain, gzip or Zstandard, and Parquet; the first bytes of a file show its format.
    - is standard input. Runs whose event_id is known stay as they are, so a file may be imported again.
    Each rejected run is reported with its line; the others are stored.

    \b
    Examples:
      telemetryd import runs.ndjson.zst
      telemetryd import runs.csv more.parquet --rejects bad.jsonl --json
      telemetryd export - --url http://old:8765 --events | telemetryd import - --url http://new:8765
    """,
)
@from_files
def import_(
    *,
    files: tuple[str, ...],
    rejects: Path | None,
    longest_line_mib: int,
    retry_s: float,
    as_json: bool,
    where: Where,
) -> None:
    counters = Counters()
    refusals = Refusals(rejects)
    config = client_config(where)
    accounts = Accounts(counters)
    problem = send_files(
        config, files, counters, refusals, accounts, retry_s=retry_s, longest_line_mib=longest_line_mib
    )
    if as_json:
        print_json(
            {
                "files": list(files),
                "inserted": counters.stored,
                "duplicates": counters.duplicates,
                "events": counters.events,
                "errors": counters.dead,
                "error_details": refusals.kept,
                "problem": problem,
            }
        )
    else:
        click.echo(
            f"{counted(counters.stored, 'run')} inserted, {counted(counters.duplicates, 'duplicate')}, "
            f"{counted(counters.events, 'event')}, {counted(counters.dead, 'error')}"
        )
    end(problem, counters)
