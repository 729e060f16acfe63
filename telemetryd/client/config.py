"""The client's settings: arguments win over TELEMETRY_* variables, which win over defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Durability = Literal["write", "fsync"]
MIB: Final = 1 << 20


def default_buffer_dir() -> Path:
    """Return where the spool is kept if nothing says otherwise: in the user's state folder (XDG base directories)."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "telemetryd" / "buffer"


@dataclass(frozen=True, slots=True)
class Config:
    """How one client behaves.

    Raises:
        ValueError: if a value cannot be used; the message names it and says what is allowed.

    """

    url: str = "http://localhost:8765"
    """The daemon: http://host:port, https://host/path, or unix:///path/of/the/socket."""
    token: str | None = None
    """Sent as `Authorization: Bearer …`."""
    buffer_dir: Path | None = None
    """The spool's folder; several processes may share it. None means `default_buffer_dir()`."""
    durability: Durability = "write"
    """write: a call returns when the line is with the kernel; fsync: when it is on the disk."""
    send: bool = True
    """Whether this process sends. If not, it only fills the spool, and `telemetryd sync --watch` has to send."""
    linger_s: float = 0.2
    """How long the first line of a batch waits for others, in seconds."""
    timeout_s: float = 30.0
    """How long an answer may take, in seconds."""
    flush_timeout_s: float = 2.0
    """How long the end of the process may be held up to send what is left, in seconds; the rest stays in the spool."""
    file_bytes: int = 8 * MIB
    """A spool file is closed (.ready) when it is so large,"""
    file_age_s: float = 600.0
    """or so old."""
    max_bytes: int = 1024 * MIB
    """The folder's bound: beyond it the oldest sent files are deleted, then the oldest unsent ones that are closed."""
    max_age_s: float = 30 * 86_400.0
    """Unsent files are given up when they are so old."""
    keep_s: float = 86_400.0
    """Sent files (.synced) are deleted when they are so old."""

    def __post_init__(self) -> None:
        scheme = self.url.partition("://")[0].lower()
        if scheme not in ("http", "https", "unix") or len(self.url) <= len(scheme) + 3:
            raise ValueError(f"url must be http://…, https://… or unix:///path, not {self.url!r}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("token must be printable ASCII in one line")  # not shown: it is a secret
        if self.durability not in ("write", "fsync"):
            raise ValueError(f"durability must be 'write' or 'fsync', not {self.durability!r}")
        for name in ("linger_s", "flush_timeout_s", "keep_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)!r}")
        for name in ("timeout_s", "file_bytes", "file_age_s", "max_bytes", "max_age_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, it is {getattr(self, name)!r}")

    @property
    def folder(self) -> Path:
        """The spool's folder."""
        return self.buffer_dir if self.buffer_dir is not None else default_buffer_dir()

    @classmethod
    def load(cls, **given: Any) -> Config:
        """Collect the settings; arguments that are None count as not given.

        Raises:
            TypeError: if there is no such setting.
            ValueError: if a value cannot be used.

        """
        unknown = set(given) - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
        values = {**_from_environment(os.environ), **{k: v for k, v in given.items() if v is not None}}
        if "buffer_dir" in values:
            values["buffer_dir"] = Path(values["buffer_dir"]).expanduser().absolute()
        return cls(**values)


def _switch(text: str) -> bool:
    if text.strip().lower() in ("1", "true", "yes", "on"):
        return True
    if text.strip().lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be true or false")


def _scaled(factor: float) -> Callable[[str], float]:
    return lambda text: float(text) * factor


VARIABLES: Final[Mapping[str, tuple[str, Callable[[str], Any], str]]] = {
    "TELEMETRY_API_URL": ("url", str, "The daemon: http://host:port, https://…, or unix:///path."),
    "TELEMETRY_API_AUTH_TOKEN": ("token", str, "The daemon's token, if it asks for one."),
    "TELEMETRY_API_AUTH_TOKEN_FILE": ("token", lambda path: Path(path).read_text("utf-8").strip(), "Or its file."),
    "TELEMETRY_BUFFER_DIR": ("buffer_dir", Path, "The spool's folder."),
    "TELEMETRY_BUFFER_DURABILITY": ("durability", str, "write, or fsync: each call waits for the disk."),
    "TELEMETRY_BUFFER_MAX_MB": ("max_bytes", lambda text: int(float(text) * MIB), "The folder's bound, in MiB."),
    "TELEMETRY_BUFFER_MAX_DAYS": ("max_age_s", _scaled(86_400), "Unsent files are given up after so many days."),
    "TELEMETRY_BUFFER_KEEP_HOURS": ("keep_s", _scaled(3600), "Sent files are deleted after so many hours."),
    "TELEMETRY_SEND": ("send", _switch, "false: only fill the spool; `telemetryd sync --watch` sends."),
    "TELEMETRY_TIMEOUT_S": ("timeout_s", float, "How long an answer may take."),
    "TELEMETRY_FLUSH_TIMEOUT_S": ("flush_timeout_s", float, "How long sending may hold up the end of the process."),
}
"""Variable → setting, how its text is read, and what it is."""


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, (name, read, _) in VARIABLES.items():
        text = environment.get(variable)
        if text:
            try:
                values.setdefault(name, read(text))
            except (ValueError, OSError) as error:
                shown = "" if name == "token" else f" (it is {text!r:.100})"
                raise ValueError(f"{variable}: {error}{shown}") from error
    return values
