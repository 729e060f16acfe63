"""The commands that run the daemon and show its settings."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from telemetryd import daemon
from telemetryd.cli.basics import EXIT_FAILURE, EXIT_USAGE
from telemetryd.cli.options import complain, failing, json_flag, load_settings, print_json, settings_flags
from telemetryd.configuration import load
from telemetryd.errors import AddressError, ConfigurationError, DatabaseError, sentence
from telemetryd.ops.logs import logging_to

try:
    import uvloop
except ImportError:  # an interpreter that it does not support: slower, not worse
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop


_SWITCH_INTERVAL_S = 0.0001
"""How long a thread waits before it asks a busy one for the interpreter's lock.

The writer's thread needs the lock again after each step of SQLite. With Python's 5 ms it gets on only when the event
loop has nothing left to do, so that one of the two is always idle (`python -m bench --only post-64` shows the gain).
"""


@click.command(
    help=r"""Serve the API until SIGTERM or SIGINT.

    SIGHUP reads the rules of alerts, the tokens and the log level again.

    \b
    Examples:
      telemetryd serve
      telemetryd serve --port 8766 --db-path /var/lib/telemetryd/telemetry.sqlite
      TELEMETRY_DB_JOURNAL_MODE=WAL telemetryd serve --log-level debug
    """
)
@settings_flags()
def serve(**flags: Any) -> None:
    loaded = load_settings(flags, of_daemon=True)
    settings = loaded.settings
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with logging_to(sys.stdout, settings.log_level, settings.log_format):
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                status = runner.run(daemon.serve(loaded, partial(load, flags)))
        except (AddressError, DatabaseError) as error:
            complain(sentence(error))
            status = EXIT_FAILURE
        except ConfigurationError as error:
            for problem in error.problems:
                complain(problem)
            status = EXIT_USAGE
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the loop that is gone has restored the default, which kills
    sys.exit(status)


@click.command(
    help=r"""Print every setting with its value and where it came from.

    The token is masked, paths are absolute. What a start would remark on goes to standard error. With --check only
    what is wrong is printed (exit status 2), also with the files that a start or a reload reads.

    \b
    Examples:
      telemetryd config
      telemetryd config --json | jq '.TELEMETRY_DB_PATH.value'
      telemetryd config --check && systemctl restart telemetryd
    """
)
@click.option("--check", "only_check", is_flag=True, help="Only check everything that a start or a reload reads.")
@json_flag
@settings_flags()
def config(as_json: bool, only_check: bool, **flags: Any) -> None:
    loaded = load_settings(flags, of_daemon=True)
    if only_check:
        with failing():
            daemon.check(loaded.settings)
        return
    for remark in loaded.remarks:
        complain(f"remark: {remark}")
    shown = loaded.shown()
    if as_json:
        print_json(shown)
        return
    width = max(map(len, shown))
    for name, entry in shown.items():
        value = "" if entry["value"] is None else entry["value"]
        value = str(value).lower() if isinstance(value, bool) else value
        click.echo(f"{name:<{width}} = {value}  # {entry['origin']}")
