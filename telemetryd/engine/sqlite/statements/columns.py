"""Shared SQL: truncation of times to minutes, hours and days, and the columns that identify a process."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from telemetryd.model.commands import Process

MINUTE: Final = len("2025-12-24T10:00")
HOUR: Final = len("2025-12-24T10")
DAY: Final = len("2025-12-24")

PROCESS: Final = tuple(field.name for field in fields(Process))
