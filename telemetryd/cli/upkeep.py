"""The commands that prune and reap runs and confirm the clock: prune, reap, confirm-clock."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click
import orjson
from click.shell_completion import CompletionItem

from telemetryd.cli.basics import DurationType, F
from telemetryd.cli.options import counted, failing, json_flag, print_json, progress
from telemetryd.cli.reach import Renamed, Where, target_flags
from telemetryd.cli.target import Body, Target, find_target
from telemetryd.durations import duration_text
from telemetryd.engine.sqlite.partials import partial_file, publish
from telemetryd.errors import DatabaseError
from telemetryd.model import requests
from telemetryd.model.values import Status, canonical_status, utc_now
from telemetryd.services.upkeep import in_slices

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def older_than(text: str, *, required: bool = True) -> Callable[[F], F]:
    """Give a command the age that it asks for."""
    return click.option("--older-than", type=DurationType(), required=required, help=f"{text}: 90d, 12h, 30m, 45s, 2w.")


class ExactNameType(click.ParamType[str]):
    """A name, which is no pattern."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        try:
            return requests.exact_name(value)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


agent = click.option(
    "--agent",
    "agent_name",
    cls=Renamed,
    old=("--agent-name",),
    type=ExactNameType(),
    metavar="NAME",
    help="Only runs of this agent; a pattern is refused.",
)
job_type = click.option(
    "--job-type",
    cls=Renamed,
    old=("--job",),
    type=ExactNameType(),
    metavar="NAME",
    help="Only runs of this job type; a pattern is refused.",
)
dry = click.option("--dry-run", is_flag=True, help="Only count.")


class StatusType(click.ParamType[str]):
    """A status, in any form that the API takes."""

    name = "status"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the stored form."""
        try:
            return canonical_status(value)
        except ValueError:
            self.fail(f"{value!r} is not one of {', '.join(Status)}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the statuses."""
        return [CompletionItem(str(status)) for status in Status if status.startswith(incomplete.lower())]


@click.command(
    help=r"""Delete old runs, and free their space.

    The totals stay right. Work goes through the running daemon in small slices with pauses, or directly if none runs.
    With --archive, exactly the archived runs are deleted, and only if they did not change meanwhile.

    The daemon deletes nothing by itself (TELEMETRY_PRUNE_AFTER) until --confirm-automatic has recorded the age in the
    database, once; a shorter age has to be confirmed again. A restored database has to be confirmed anew.

    \b
    Examples:
      telemetryd prune --older-than 90d --dry-run
      telemetryd prune --older-than 90d --archive /backups/runs-2025.ndjson.zst
      telemetryd prune --older-than 30d --agent hugo-translator --status success --json
      telemetryd prune --older-than 90d --unix /run/telemetryd/telemetryd.sock
      telemetryd prune --confirm-automatic 90d --unix /run/telemetryd/telemetryd.sock
    """
)
@older_than("Age of the runs by created_at", required=False)
@agent
@job_type
@click.option("--status", type=StatusType(), help="Only runs of this status.")
@dry
@click.option(
    "--archive",
    type=click.Path(dir_okay=False, path_type=Path),
    help="First write the runs with their events to this file (NDJSON, Zstandard); only those are deleted.",
)
@click.option(
    "--confirm-automatic",
    type=DurationType(),
    help="Delete nothing now, but allow TELEMETRY_PRUNE_AFTER of this age or longer in this database: 90d.",
)
@json_flag
@target_flags
def prune(
    *,
    older_than: float | None,
    agent_name: str | None,
    job_type: str | None,
    status: str | None,
    dry_run: bool,
    archive: Path | None,
    confirm_automatic: float | None,
    as_json: bool,
    where: Where,
) -> None:
    if confirm_automatic is not None:
        if older_than is not None or agent_name or job_type or status or dry_run or archive is not None:
            raise click.UsageError("--confirm-automatic stands alone: it deletes nothing now")
        _confirm_automatic(where, confirm_automatic, as_json=as_json)
        return
    if older_than is None:
        raise click.UsageError("Missing option '--older-than' (or '--confirm-automatic').")
    chosen = _chosen(older_than, agent_name=agent_name, job_type=job_type, status=status)
    with failing():
        if archive is not None and archive.exists():
            raise DatabaseError(f"{archive} exists already; an archive never replaces a file")
        file = None if archive is None else archive.absolute()
        answer = asyncio.run(_prune(where, chosen, dry_run=dry_run, archive=file))
    _print(answer, "pruned", "deleted", as_json=as_json)


def _chosen(older_than: float, **equal: str | None) -> Body:
    """Return which runs are meant, as a request's body says it."""
    given = {name: value for name, value in equal.items() if value is not None}
    return {"created_before": requests.moment_ago(utc_now(), older_than), **given}


def _confirm_automatic(where: Where, age_s: float, *, as_json: bool) -> None:
    with failing():
        answer = asyncio.run(_confirm(where, {"prune_after": duration_text(age_s)}))
    if as_json:
        print_json(answer)
        return
    click.echo(
        f"With TELEMETRY_PRUNE_AFTER of {answer['prune_after']} or longer the daemon may delete runs of this database "
        f"by itself; at present that is {answer['matching']}, created before {answer['created_before']}"
    )


async def _confirm(where: Where, body: Body) -> Body:
    async with find_target(where, changes=True) as target:
        return await target.confirm(body)


@click.command(
    help=r"""Confirm that the daemon's clock is right.

    When the clock has jumped by more than a day, the daemon deletes and cancels nothing by itself, because a wrong
    clock would make everything old at once; /health and the log say so. A machine that was off for longer than a day
    looks the same. This command lets it go on, if the clock agrees with the date that you give.

    \b
    Examples:
      telemetryd confirm-clock 2026-11-30
      telemetryd confirm-clock 2026-11-30 --unix /run/telemetryd/telemetryd.sock
    """
)
@click.argument("date", metavar="YYYY-MM-DD")
@json_flag
@target_flags
def confirm_clock(*, date: str, as_json: bool, where: Where) -> None:
    with failing():
        answer = asyncio.run(_confirm(where, {"date": date}))
    if as_json:
        print_json(answer)
    else:
        click.echo(f"Confirmed: the clock says {answer['clock']}")


async def _prune(where: Where, chosen: Body, *, dry_run: bool, archive: Path | None) -> Body:
    async with find_target(where, changes=True) as target:
        count: Body = await target.prune({**chosen, "dry_run": True})
        if dry_run:
            return count
        with progress() as drawn:
            total, done = int(count["matching"]), 0

            async def one_slice(body: Body) -> Body:
                nonlocal done
                answer = await target.prune(body)
                done += int(answer["pruned"])
                drawn("Deleting", min(done, total), total)
                return answer

            if archive is None:
                await in_slices(lambda: one_slice(chosen), "pruned")
                return {**count, "dry_run": False, "pruned": done}
            pages = _chosen_pages(target, chosen, count["ahead"])
            archived, file = await _write_archive(target, pages, archive, lambda rows: drawn("Archiving", rows, total))
            slices = _archived_versions(file)
            versions: list[Body] = []
            is_cut_short = False

            async def next_slice() -> Body:
                nonlocal versions, is_cut_short
                if not is_cut_short:
                    versions = next(slices, [])
                # After the last one nothing is chosen any more, so what remains is to return the space.
                answer = await one_slice({**chosen, "versions": versions, "limit": len(versions) or requests.SLICE})
                # Runs with very many events take several turns; `more` then means these runs.
                is_cut_short = answer["more"] and answer["pruned"] < len(versions)
                return {**answer, "more": bool(versions) or answer["more"]}

            await in_slices(next_slice, "pruned")
            return {**count, "dry_run": False, "pruned": done, "archived": archived, "archive": str(archive)}


async def _chosen_pages(target: Target, chosen: Body, ahead: list[str]) -> AsyncIterator[list[Body]]:
    """Yield page after page of the chosen runs, and then those that the list does not find by their age."""
    async for page in target.pages(chosen):
        yield page
    for event_id in ahead:
        run = await target.run(event_id)
        if run is not None:
            yield [run]


async def _write_archive(
    target: Target, pages: AsyncIterator[list[Body]], archive: Path, watch: Any
) -> tuple[int, IO[bytes]]:
    """Write runs to a file that gets its name when it is whole; return how many, and the open file.

    Raises:
        DatabaseError: if it cannot be made.

    """
    rows = 0
    with partial_file(archive) as partial:
        with partial.open("wb") as file, zstd.open(file, "wb", level=6) as packed:
            async for page in pages:
                for run in page:
                    if run.pop("more_events"):
                        await _add_other_events(target, run)
                packed.write(b"".join(orjson.dumps(run, option=orjson.OPT_APPEND_NEWLINE) for run in page))
                rows += len(page)
                watch(rows)
        publish(partial, archive)
        return rows, partial.open_for_later()


async def _add_other_events(target: Target, run: Body) -> None:
    """Complete the events of a run that has more than a page of runs shows of each."""
    while part := await target.events(run["event_id"], len(run["events"])):
        run["events"] += part


def _archived_versions(archive: IO[bytes]) -> Iterator[list[Body]]:
    """Read an open archive back, which also shows that it can be read; yield what it holds in slices."""
    versions: list[Body] = []
    with archive, zstd.open(archive, "rb") as packed:
        for line in packed:
            run = orjson.loads(line)
            versions.append({"id": run["id"], "updated_at": run["updated_at"]})
            if len(versions) == requests.SLICE:
                yield versions
                versions = []
    if versions:
        yield versions


@click.command(
    help=r"""Cancel running runs that have not changed for a while.

    These are the guide's stale runs. They become `cancelled` with an end_time of now, error_summary `Stale run
    cleaned up on startup (created at …)` and output_summary `Process did not complete - cleanup on restart`. A run
    that was changed lately by PATCH (a heartbeat) is left alone.

    \b
    Examples:
      telemetryd reap --older-than 1h --dry-run
      telemetryd reap --older-than 1h --agent hugo-translator --job-type translate_directory
      telemetryd reap --older-than 1h --json --unix /run/telemetryd/telemetryd.sock
    """
)
@older_than("How long ago the runs were created and last changed")
@agent
@job_type
@dry
@json_flag
@target_flags
def reap(
    *,
    older_than: float,
    agent_name: str | None,
    job_type: str | None,
    dry_run: bool,
    as_json: bool,
    where: Where,
) -> None:
    chosen = _chosen(older_than, agent_name=agent_name, job_type=job_type)
    with failing():
        answer = asyncio.run(_reap(where, chosen, dry_run=dry_run))
    _print(answer, "reaped", "cancelled", as_json=as_json)


async def _reap(where: Where, chosen: Body, *, dry_run: bool) -> Body:
    async with find_target(where, changes=True) as target:
        count: Body = await target.reap({**chosen, "dry_run": True})
        if dry_run:
            return count
        total, done = int(count["matching"]), 0
        with progress() as drawn:

            async def one_slice() -> Body:
                nonlocal done
                answer = await target.reap(chosen)
                done += int(answer["reaped"])
                drawn("Cancelling", min(done, total), total)
                return answer

            await in_slices(one_slice, "reaped")
        return {**count, "dry_run": False, "reaped": done}


def _print(answer: Body, done: str, verb: str, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    before = f"created before {answer['created_before']}"
    if answer["dry_run"]:
        click.echo(f"[DRY RUN] {counted(answer['matching'], 'run')} {before} would be {verb}")
        return
    click.echo(f"{counted(answer[done], 'run')} {before} {verb}")
    if "archive" in answer:
        click.echo(f"{counted(answer['archived'], 'run')} archived in {answer['archive']}")
