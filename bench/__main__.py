"""The command line: which scenarios to run, how thoroughly, and where the report goes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from bench import cost, export, memory, migration, postgres_queries, postgres_writes, reads, report, writes
from bench.errors import BenchError
from bench.figures import Figure
from bench.scenario import Bench, Options
from bench.seeding import Seeds
from bench.workplace import ROOT, workplace
from bench.wrk import require_wrk

Scenario = Callable[[Bench], list[Figure]]

SCENARIOS: Final[dict[str, Scenario]] = {
    "post-64": writes.post_64,
    "post-1": writes.post_1,
    "batches": writes.batches,
    "written": writes.written,
    "patch": writes.patch,
    "slow-disk": writes.slow_disk,
    "client": writes.client,
    "cost": cost.cost,
    "idle-connections": memory.idle_connections,
    "get": reads.get,
    "filters": reads.filters,
    "cursor": reads.cursor,
    "totals": reads.totals,
    "stats": reads.stats,
    "export": export.export,
    "migrate": migration.migrate,
    "ingest": writes.ingest,
    "mixed": reads.mixed,
    "memory": memory.memory,
    "postgres-batches": postgres_writes.postgres_batches,
    "postgres-singles": postgres_writes.postgres_singles,
    "postgres-queries": postgres_queries.postgres_queries,
}
_READS: Final = ("get", "filters", "cursor", "totals")
# Those that add to the seeded databases come last.
_ADDING: Final = ("mixed", "memory")
_WRITES: Final = ("post-64", "post-1", "batches", "written", "patch", "slow-disk", "client", "cost", "idle-connections")
SHORT: Final = (*_WRITES, *_READS, *_ADDING)
"""The scenarios of `make bench`, which fit into ten minutes."""
LARGE: Final = (*_READS, "stats", "migrate", "export", "ingest", *_ADDING)
"""The scenarios whose outcome depends on the size of the database."""

POSTGRESQL: Final = ("postgres-batches", "postgres-singles", "postgres-queries")
"""The scenarios of PostgreSQL next to its own limits and SQLite; they start a server of their own."""


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SCENARIOS)), help="Run this scenario (repeatable).")
@click.option("--seconds", default=2.0, help="Length of each load; wrk counts in whole seconds.")
@click.option("--rounds", default=5, help="Rounds, of which the median counts; at most 3 of what takes long.")
@click.option("--postgresql", is_flag=True, help="Run the scenarios of PostgreSQL; queries have ten times the runs.")
@click.option("--large", is_flag=True, help="Run what depends on the database's size, with 10 million runs.")
@click.option("--runs", default=100_000, help="Runs in the databases; with --large a hundred times as many.")
@click.option("--keep", is_flag=True, help="Keep the seeded databases (10 GB with --large) for the next run.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "bench",
    help="Where the databases are made; decides which disk is measured.  [default: build/bench]",
)
def main(
    only: tuple[str, ...],
    seconds: float,
    rounds: int,
    postgresql: bool,
    large: bool,
    runs: int,
    keep: bool,
    folder: Path,
) -> None:
    r"""Measure telemetryd against limits, a baseline, and its targets.

    The report goes to bench/results/latest.* (large.* with --large, postgresql.* with --postgresql), unless --only is
    given.

    \b
    Examples:
      python -m bench
      python -m bench --only post-64 --seconds 1 --rounds 1
      python -m bench --large --keep --only filters
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the processes as Ctrl-C does
    options = Options(seconds, rounds, large, runs)
    chosen, name = (POSTGRESQL, "postgresql") if postgresql else (LARGE, "large") if large else (SHORT, "latest")
    names = only or chosen
    before = os.getloadavg()[0]
    try:
        require_wrk()
        figures, failures = _run(names, options, folder, keep=keep)
    except BenchError as error:
        click.echo(f"bench: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("bench: interrupted", err=True)
        sys.exit(130)
    after = os.getloadavg()[0]
    if not only and not failures:
        report.write(report.RESULTS, name, figures, options, (before, after))
    click.echo(f"\n{report.table(figures)}")
    click.echo(f"\n{report.met(figures)}; load average {before:.1f} before, {after:.1f} after")
    for failure in failures:
        click.echo(f"bench: {failure}", err=True)
    if failures:
        sys.exit(1)
    click.echo("Every acknowledged run was in the database.")


def _run(names: tuple[str, ...], options: Options, folder: Path, *, keep: bool) -> tuple[list[Figure], list[str]]:
    """Run the scenarios; return what they found, and which of them failed and why."""
    figures: list[Figure] = []
    failures: list[str] = []
    started = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - started:6.0f} s  {text}", err=True)

    with workplace(folder) as place:
        seeds = Seeds(place, folder / "seeds" if keep else place.folder / "seeds", say)
        bench = Bench(options, place, seeds, say)
        for name in names:
            say(f"== {name}: {(SCENARIOS[name].__doc__ or '').splitlines()[0]}")
            try:
                figures += SCENARIOS[name](bench)
            except BenchError as error:
                failures.append(f"{name} failed: {error}")
                say(failures[-1])
    say("done")
    return figures, failures


if __name__ == "__main__":
    main()
