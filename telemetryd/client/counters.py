"""Counters of what happened to the client's lines: sent, stored, rejected, dropped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What became of the lines, since the client was made."""

    recorded: int = 0
    """Lines that are in the spool."""
    held: int = 0
    """Lines that the disk did not take at once."""
    sent: int = 0
    """Lines that were acknowledged."""
    stored: int = 0
    """Runs that the daemon stored."""
    duplicates: int = 0
    """Runs that the daemon had already."""
    changes: int = 0
    """Lines that say more of a run which another line began, such as how it ended."""
    events: int = 0
    """Events that the daemon took."""
    dead: int = 0
    """Lines in the dead-letter file."""
    aside: int = 0
    """Lines that something before the daemon did not let through: set aside, and tried again now and then."""
    dropped: int = 0
    """Unsent lines that were given up because of the folder's bounds."""
    torn: int = 0
    """Half lines at the end of files, whose call had not returned."""
    rejected: int = 0
    """Values that no field can take, kept in context_json under telemetryd.rejected; see the log."""
    failures: int = 0
    """Calls that went wrong inside the client; see the log."""
    retries: int = 0
    """Requests that have to be repeated."""
    problem: str | None = None
    """Why sending does not get on at present."""
