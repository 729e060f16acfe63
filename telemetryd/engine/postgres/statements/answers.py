"""Registry of PostgreSQL's query handlers."""

from __future__ import annotations

from typing import Final

from telemetryd.engine.postgres import statements
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.registry import Registry

REGISTRY: Final = Registry[Plain](statements)
answers: Final = REGISTRY.answers
