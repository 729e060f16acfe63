from __future__ import annotations

import json
import os
import subprocess
import sys

_PROGRAM = """
import resource, sys, json
before = set(sys.modules)
spent = resource.getrusage(resource.RUSAGE_SELF)
{}
now = resource.getrusage(resource.RUSAGE_SELF)
cpu = (now.ru_utime - spent.ru_utime) + (now.ru_stime - spent.ru_stime)
print(json.dumps({{"modules": sorted(set(sys.modules)), "ms": cpu * 1000}}))
"""


def imported(statement: str) -> tuple[set[str], float]:
    """Run a statement in a fresh process; return the modules it has then, and the milliseconds of CPU it took."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(statement)], env=environment, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    return set(told["modules"]), told["ms"]


HEAVY = {"aiohttp", "aiosqlite", "pydantic", "click", "uvloop", "prometheus_client", "dotenv", "asyncio", "http.client"}


def test_importing_the_client_is_quick_and_loads_nothing_of_the_server() -> None:
    results = [imported("import telemetryd.client") for _ in range(5)]
    modules = results[0][0]
    assert not modules & HEAVY
    own = {name for name in modules if name.startswith("telemetryd") and not name.startswith("telemetryd.client")}
    shared = {"telemetryd", "telemetryd.git_urls", "telemetryd.timestamps", "telemetryd.traces", "telemetryd.uuids"}
    assert own <= shared | {name for name in own if "finder" in name}
    assert min(ms for _, ms in results) < 100


def test_a_run_that_is_never_sent_loads_no_http_client() -> None:
    modules, _ = imported(
        "import tempfile; from telemetryd.client import Client\n"
        "c = Client(buffer_dir=tempfile.mkdtemp(), send=False); c.record({'agent_name': 'a', 'job_type': 'b'})\n"
        "c.run('a', 'b').start().finish(); c.close()"
    )
    assert not modules & HEAVY


def test_the_replaced_librarys_surface_is_as_light() -> None:
    modules, _ = imported("from telemetryd.compat import TelemetryClient, TelemetryConfig")
    assert not modules & HEAVY


def test_sending_needs_nothing_of_the_server_either() -> None:
    modules, _ = imported("import telemetryd.client.delivery, telemetryd.client.transport, telemetryd.client.uploader")
    assert not modules & (HEAVY - {"http.client"})
