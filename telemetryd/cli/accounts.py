"""What became of the lines that a command has read: in total, and file by file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from telemetryd.cli.options import counted, size
from telemetryd.client.counters import Counters
from telemetryd.client.folder import READY, UNSENT, Entry, entries, no_files
from telemetryd.client.streams import unsent_lines
from telemetryd.ops.logs import printable

_WHOSE: Final = {"active": "of processes that are alive", "ready": "to be sent"}
_SHOWN: Final = 20
"""So many files get a sentence each; --json has all of them."""


def outcome(counters: Counters) -> dict[str, int]:
    """Return what became of all lines: those sent are the sum of what follows, up to those refused."""
    return {
        "sent": counters.sent,
        "stored": counters.stored,
        "duplicates": counters.duplicates,
        "changes": counters.changes,
        "events": counters.events,
        "refused": counters.dead,
        "aside": counters.aside,
        "torn": counters.torn,
    }


def in_words(done: dict[str, int]) -> str:
    """Return an outcome as a sentence."""
    return (
        f"{counted(done['sent'], 'line')} sent: {counted(done['stored'], 'run')} stored, "
        f"{done['duplicates']} known before, {counted(done['changes'], 'change')}, {counted(done['events'], 'event')}, "
        f"{counted(done['refused'], 'line')} refused"
    )


class Accounts:
    """Attributes what is counted to the files that the lines come from.

    Args:
        counters: where is counted what becomes of lines.

    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._before = Counter(outcome(counters))
        self._files: dict[str, Counter[str]] = {}

    def note(self, name: str) -> None:
        """Attribute to a file what has been counted since the last call."""
        now = Counter(outcome(self._counters))
        new, self._before = now - self._before, now
        if new:
            self._files.setdefault(name, Counter()).update(new)

    def to_json(self, left: Iterable[tuple[str, int]] = ()) -> list[dict[str, Any]]:
        """Return what became of the lines of each file, and how many are left in it, given for those that have some."""
        nothing = outcome(Counters())
        still = Counter[str]()
        for name, lines in left:  # a file may stand there twice, .active and .ready
            still[name] += lines
        return [
            {"file": name, **nothing, **self._files.get(name, {}), "left": still[name]}
            for name in sorted({*self._files, *still})
        ]


def sentences(files: list[dict[str, Any]]) -> list[str]:
    """Return a sentence about each file, if there are several; of very many the first ones."""
    if len(files) == 1:  # of which the total says the same
        return []
    said = [f"{printable(each['file'])}: {_in_words_of_file(each)}" for each in files[:_SHOWN]]
    more = len(files) - _SHOWN
    return said if more <= 0 else [*said, f"and {counted(more, 'file')} more; --json has all of them"]


def _in_words_of_file(each: dict[str, Any]) -> str:
    left = [f"{counted(each['left'], 'line')} left"] if each["left"] else []
    return "; ".join([*([in_words(each)] if each["sent"] or not left else []), *left])


class Left:
    """What a spool's folder still holds."""

    def __init__(self) -> None:
        self.files: list[tuple[str, int]] = []
        """The name of each file, and how many lines of it are to be sent."""
        self.states: dict[str, dict[str, int]] = {}
        """The sums by state: files, bytes and lines."""
        self.trouble: str | None = None
        """What is called like a file to be sent and cannot be one."""

    def look(self, folder: Path, left_open: Iterable[Path] = ()) -> None:
        """Look through the folder.

        Args:
            folder: where to look.
            left_open: files that are to be sent, too, though their names do not say so.

        Raises:
            OSError: if it cannot be read.

        """
        opened = [Entry(str(path), path.stem, 0, READY, path.stat().st_size, 0.0) for path in left_open]
        if strange := no_files(folder):
            self.trouble = f"Not read, for it is no regular file: {printable(', '.join(strange))}"
        for entry in [*entries(folder, UNSENT), *opened]:
            lines = unsent_lines(folder, entry)
            self.files.append((plain_name(entry.path), lines))
            total = self.states.setdefault(entry.state[1:], {"files": 0, "bytes": 0, "lines": 0})
            for name, more in (("files", 1), ("bytes", entry.size), ("lines", lines)):
                total[name] += more

    def sentences(self) -> list[str]:
        """Return a sentence about each state."""
        return [
            f"{counted(total['files'], 'file')} {_WHOSE[state]}, "
            f"{counted(total['lines'], 'line')}, {size(total['bytes'])} (.{state})"
            for state, total in self.states.items()
        ]


def plain_name(path: str | Path) -> str:
    """Return what a file of the spool is called in whichever state."""
    return Path(path).name.rpartition(".")[0]
