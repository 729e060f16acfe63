"""Describes runs of systemd units, from the words that systemd uses for them (systemd.exec(5))."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from telemetryd.client.ending_signals import ENDING
from telemetryd.client.programs import signal_name
from telemetryd.timestamps import canonical, format_timestamp

EVENT_ID: Final = "systemd:{invocation_id}"
"""The event_id of a unit's run: the same from each of our commands, so that it is stored once."""
JOB_TYPE: Final = "unit"
_NUMBER: Final = re.compile(r"\d{1,3}", re.ASCII)
"""An exit status, or a signal's number."""
_STATUSES: Final = {"success": "success", "timeout": "timeout", "watchdog": "timeout", "exec-condition": "cancelled"}
"""By the unit's result; any other one is a failure."""
_STOPPED: Final = frozenset(number.name for number in ENDING)
"""Signals of a program that was stopped: its run was cancelled, whether systemd calls that a success or not."""


def outcome(result: str, exit_code: str = "", exit_status: str = "") -> dict[str, Any]:
    """Return the fields of a run that ended like this.

    Args:
        result: the unit's result, $SERVICE_RESULT, such as success, exit-code, signal, oom-kill.
        exit_code: how its main process ended, $EXIT_CODE: exited, killed or dumped; empty if it never ran.
        exit_status: its exit status, or the name of the signal without SIG, $EXIT_STATUS.

    """
    is_signal = exit_code in ("killed", "dumped")
    name = _signal(exit_status) if is_signal else ""
    status = "cancelled" if name in _STOPPED and result in ("success", "signal") else _STATUSES.get(result, "failure")
    fields: dict[str, Any] = {"status": status}
    if name:
        fields["metrics_json"] = {"signal": name}
    elif _NUMBER.fullmatch(exit_status):
        fields["metrics_json"] = {"exit_status": int(exit_status)}
    if status != "success":
        how = f"killed by {name}" if name else f"exit status {exit_status}" if exit_status else ""
        fields["error_summary"] = f"{result}: {how}" if how else result
    return fields


def _signal(text: str) -> str:
    """Return a signal's name, which the environment gives without SIG, and the journal as a number."""
    return signal_name(int(text)) if _NUMBER.fullmatch(text) else f"SIG{text}" if text else ""


def agent_of(unit: str) -> str:
    """Return the name of the agent that a unit is: backup for backup.service."""
    return unit.removesuffix(".service")


def run_of(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the run of the unit that has just stopped, from the variables that systemd gives to ExecStopPost=.

    Raises:
        ValueError: if they are not there; the text says which are missing.

    """
    result, invocation_id = variables.get("SERVICE_RESULT"), variables.get("INVOCATION_ID")
    if not result or not invocation_id:
        raise ValueError("is for ExecStopPost= of a unit: SERVICE_RESULT or INVOCATION_ID is not set")
    unit = own_unit() or "unknown"
    fields = outcome(result, variables.get("EXIT_CODE", ""), variables.get("EXIT_STATUS", ""))
    names = {
        "event_id": EVENT_ID.format(invocation_id=invocation_id),
        "agent_name": agent_of(unit),
        "job_type": JOB_TYPE,
    }
    shown, ended = _shown(unit), datetime.now(UTC)
    times: dict[str, Any] = {"end_time": format_timestamp(ended)}
    if (begun := _moment(shown.get(_BEGIN, ""))) is not None:
        elapsed = ended - datetime.fromisoformat(begun)
        times |= {"start_time": begun, "duration_ms": max(round(elapsed.total_seconds() * 1000), 0)}
    used = {name: int(shown[key]) * factor for key, (name, factor) in _USED.items() if shown.get(key, "").isdigit()}
    return {**names, **times, **fields, "metrics_json": {**fields.get("metrics_json", {}), **used}}


_BEGIN: Final = "InactiveExitTimestamp"
_USED: Final = {"CPUUsageNSec": ("cpu_s", 1e-9), "MemoryPeak": ("max_memory_bytes", 1)}
"""What systemd counts of a unit, and what it is called in metrics_json."""
_UNSET: Final = str((1 << 64) - 1)
"""What systemd shows for a figure that it does not have."""
_ANSWER_S: Final = 5.0
"""How long systemd may take to describe a unit."""


def own_unit() -> str | None:
    """Return the name of the unit that this process belongs to, from its control group, which systemd names so."""
    try:
        text = Path("/proc/self/cgroup").read_text("utf-8")
    except OSError:
        return None
    names = re.findall(r"/([^/\n]+\.service)(?:/|$)", text, re.MULTILINE)
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), names[-1]) if names else None


def _shown(unit: str) -> dict[str, str]:
    """Return what systemd says of a unit; nothing if it does not answer."""
    wanted = ",".join((_BEGIN, *_USED))
    command = ["systemctl", "show", "--timestamp=us+utc", f"--property={wanted}", "--", unit]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)  # noqa: S603 - no shell
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition("=")[::2] for line in done.stdout.splitlines())
    return {name: value for name, value in pairs if value != _UNSET}


def _moment(text: str) -> str | None:
    """Return a moment as systemd shows it (Mon 2026-11-30 21:24:48.123456 UTC) in the stored form."""
    match = re.fullmatch(r"\w+ (\S+) (\S+) UTC", text)
    return canonical(f"{match[1]}T{match[2]}Z") if match else None
