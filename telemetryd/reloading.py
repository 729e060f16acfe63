"""Reads on SIGHUP what can change while the daemon runs, and puts all of it into effect, or nothing if any is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

from telemetryd.configuration import LoadedSettings
from telemetryd.errors import ConfigurationError
from telemetryd.ops import logs
from telemetryd.ops.logs import log
from telemetryd.ops.systemd import Notifier
from telemetryd.settings import Settings, variable

T = TypeVar("T")


class Reloadable(Protocol):
    """What can get a new state while the daemon runs."""

    def prepare(self, settings: Settings) -> Callable[[], None] | None:
        """Read and check the new state; return what puts it into effect, which cannot fail, or None if it is the same.

        It runs in a thread, the result in the event loop.

        Raises:
            ConfigurationError: with every problem, each naming its variable or file.

        """


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is reloaded, and the settings whose new values it follows."""

    name: str
    reloadable: Reloadable
    follows: tuple[str, ...]


class LogLevels:
    """How severe a line has to be for the log."""

    def __init__(self, settings: Settings) -> None:
        self._level = settings.log_level

    def prepare(self, settings: Settings) -> Callable[[], None] | None:
        """Return what sets the level, or None if it is the same."""
        return None if settings.log_level == self._level else partial(self._set, settings.log_level)

    def _set(self, level: logs.LogLevel) -> None:
        self._level = level
        logs.set_level(level)


def collected(readings: Iterable[Callable[[], T]]) -> list[T]:
    """Return what each of some functions returns.

    Raises:
        ConfigurationError: with the problems of all of them.

    """
    results: list[T] = []
    problems: list[str] = []
    for read in readings:
        try:
            results.append(read())
        except ConfigurationError as error:
            problems += error.problems
    if problems:
        raise ConfigurationError(problems)
    return results


def _prepare(part: Part, settings: Settings) -> Callable[[], None] | None:
    """Have a part read its new state, unless that would wait for the other end of a pipe, and every reload with it.

    Raises:
        ConfigurationError: with every problem.

    """
    files = {name: getattr(settings, name) for name in part.follows}
    pipes = [(name, file) for name, file in files.items() if isinstance(file, Path) and file.is_fifo()]
    if pipes:
        problems = [f"{variable(name)}: {file}: is a pipe, which a reload cannot read" for name, file in pipes]
        raise ConfigurationError(problems)
    return part.reloadable.prepare(settings)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A new state that is read and checked."""

    settings: Settings
    remarks: tuple[str, ...]
    changes: dict[str, Callable[[], None]]
    """What puts it into effect, by the names of the parts that change."""
    waiting: list[str]
    """The settings that have another value, which only a restart puts into effect."""


_REFUSED: Final = "Not reloaded, all stays as it was"


class Reloading:
    """Reloads when it is asked to, one time after the other.

    Args:
        loaded: the settings in effect.
        load: collects them anew.
        notifier: learns of each reload.

    """

    def __init__(self, loaded: LoadedSettings, load: Callable[[], LoadedSettings], notifier: Notifier) -> None:
        self._settings, self._remarks, self._load, self._notifier = loaded.settings, loaded.remarks, load, notifier
        self._asked = asyncio.Event()
        self.problem: str | None = None
        """Why the last reload was refused, or None if it was not."""

    def ask(self) -> None:
        """Ask for a reload that reads what is there now or later: several that wait become one."""
        self._asked.set()

    async def run(self, parts: Sequence[Part]) -> None:
        """Reload whenever that is asked for, or was before; for ever."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._notifier.send_reloading()
            await self.reload(parts)
            self._notifier.send(READY=1, STATUS=self.problem or "Reloaded")

    async def reload(self, parts: Sequence[Part]) -> None:
        """Read everything in a thread; if all of it is right, put it into effect, else log what is wrong."""
        try:
            prepared = await asyncio.to_thread(self._prepare, parts)
        except ConfigurationError as error:
            self._refuse(error.problems)
        except OSError as error:
            self._refuse([f"{error.filename}: {error.strerror}"])
        else:
            self._put_into_effect(prepared)

    def _prepare(self, parts: Sequence[Part]) -> _Prepared:
        loaded = self._load()
        followed = {name for part in parts for name in part.follows}
        kept = {name: value for name, value in self._settings if name not in followed}
        waiting = [variable(name) for name, value in kept.items() if getattr(loaded.settings, name) != value]
        settings = loaded.settings.model_copy(update=kept)
        effects = collected([partial(_prepare, part, settings) for part in parts])
        changes = {part.name: effect for part, effect in zip(parts, effects, strict=True) if effect is not None}
        return _Prepared(settings, loaded.remarks, changes, waiting)

    def _put_into_effect(self, prepared: _Prepared) -> None:
        for put in prepared.changes.values():
            put()
        for remark in prepared.remarks:
            if remark not in self._remarks:
                log.warning("Configuration remark", extra={"remark": remark})
        self._settings, self._remarks, self.problem = prepared.settings, prepared.remarks, None
        log.info("Reloaded", extra={"changed": list(prepared.changes)})
        if prepared.waiting:
            log.warning("Settings have changed that need a restart", extra={"settings": prepared.waiting})

    def _refuse(self, problems: list[str]) -> None:
        self.problem = f"{_REFUSED}: {'; '.join(problems)}"
        log.error(_REFUSED, extra={"error_type": ConfigurationError.error_type, "problems": problems})
