"""Stores what the operator confirmed, and when the clock was right."""

from __future__ import annotations

from dataclasses import astuple
from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.model.commands import ConfirmPrune, TrustClock

_CONFIRM: Final = """
    INSERT INTO confirmed_prune (after_s, confirmed_at) VALUES (%s, %s)
    ON CONFLICT (one) DO UPDATE SET after_s = excluded.after_s, confirmed_at = excluded.confirmed_at
"""
_KNOW: Final = "INSERT INTO trusted_clock (moment, boot_id, up_s) VALUES (%s, %s, %s) ON CONFLICT (one) DO "
_IF_UNKNOWN: Final = f"{_KNOW} NOTHING"
_TRUST: Final = f"""
    {_KNOW} UPDATE SET moment = excluded.moment, boot_id = excluded.boot_id, up_s = excluded.up_s
"""


def apply(plain: Plain, command: ConfirmPrune | TrustClock, now: str) -> None:
    """Carry a command out."""
    match command:
        case ConfirmPrune(after_s, clock):
            plain.execute(_CONFIRM, (after_s, now))
            plain.execute(_IF_UNKNOWN, astuple(clock))
        case TrustClock(clock):
            plain.execute(_TRUST, astuple(clock))
