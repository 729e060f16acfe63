"""Registry of SQLite's query handlers."""

from __future__ import annotations

import sqlite3
from typing import Final

from telemetryd.engine.registry import Registry
from telemetryd.engine.sqlite import statements

REGISTRY: Final = Registry[sqlite3.Connection](statements)
answers: Final = REGISTRY.answers
