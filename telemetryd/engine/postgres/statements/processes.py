"""SQL for the processes that runs are registered with."""

from __future__ import annotations

from typing import Final

from telemetryd.engine.columns import PROCESS
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.model.processes import Process
from telemetryd.model.queries import ListProcesses

_KEY: Final = "pid, start_time, boot_id, pid_namespace"
_SELECT: Final = f"""
    SELECT DISTINCT ON ({_KEY}) {", ".join(PROCESS)} FROM run_processes WHERE certified_at IS NULL
    ORDER BY {_KEY}, oom_kills DESC NULLS LAST
"""


@answers(ListProcesses)
def fetch_processes(plain: Plain, query: ListProcesses) -> list[Process]:
    """Fetch each process that is registered and not certified, with the most out-of-memory kills it is known with."""
    return [Process(*row) for row in plain.execute(_SELECT)]
