"""What every engine's statements share about columns: lengths of truncated times, those of a process."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from telemetryd.model.processes import Process

MINUTE: Final = len("2025-12-24T10:00")
HOUR: Final = len("2025-12-24T10")
DAY: Final = len("2025-12-24")

PROCESS: Final = tuple(field.name for field in fields(Process))
