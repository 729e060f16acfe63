"""Why a benchmark ends without figures; the message tells what to do."""

from __future__ import annotations


class BenchError(Exception):
    """The benchmark cannot be run, or its figures would be false."""


class LostRunError(BenchError):
    """A run was acknowledged and is not in the database."""
