"""The client's settings: arguments win over TELEMETRY_* variables, which win over defaults."""

from __future__ import annotations

import math
import os
import pwd
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from telemetryd.client.address import Address, fault_of_authorities, fault_of_pair
from telemetryd.client.paths import expanded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Durability = Literal["write", "fsync"]
MIB: Final = 1 << 20
DEFAULT_URL: Final = "http://localhost:8765"


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a client tries, looks and tidies up, in seconds."""

    first_pause_s: float = 0.25
    """After a failure it waits for a random time of up to so long; the bound doubles with each failure,"""
    longest_pause_s: float = 30.0
    """up to this one."""
    first_look_s: float = 2.0
    """After about so long it looks for the first time for what other processes have left,"""
    look_every_s: float = 15.0
    """and then about so often."""
    aside_s: float = 15.0
    """What is set aside is tried again after so long; the pauses grow."""
    tidy_every_s: float = 5.0
    """How often it looks whether the folder is within its bounds."""
    cost: int = 100
    """Looking through the folder takes at most one part in so many of the time."""


USUAL: Final = Pace()


def default_buffer_dir() -> Path:
    """Return where the spool is kept if nothing says otherwise: in the user's state folder (XDG base directories)."""
    state = Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or ""))
    if state.is_absolute():  # "All paths set in these environment variables must be absolute", else they are ignored
        return state / "telemetryd" / "buffer"
    for home in _homes():
        folder = home / ".local/state/telemetryd/buffer"
        if home != Path("/") and _can_be_made(folder):
            return folder
    return Path("/var/tmp") / f"telemetryd-{os.getuid()}" / "buffer"  # noqa: S108 - the folder is made for us alone


def _homes() -> Iterator[Path]:
    """Yield the user's home by HOME, then by the system's list of users.

    Containers that run as any user (docker --user, OpenShift) set HOME=/, or to another user's home.
    """
    home = Path(os.environ.get("HOME") or "")
    if home.is_absolute():
        yield home
    try:
        yield Path(pwd.getpwuid(os.getuid()).pw_dir or "/")
    except KeyError:
        return


def _can_be_made(folder: Path) -> bool:
    """Return whether this user may write to a folder, or make it."""
    place = next((each for each in (folder, *folder.parents) if os.path.exists(each)), folder)
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK) and len(place.parts) > 1


@dataclass(frozen=True, slots=True)
class Config:
    """How one client behaves.

    Raises:
        ValueError: if a value cannot be used; the message names it and says what is allowed.

    """

    url: str = DEFAULT_URL
    """The daemon: http://host:port, https://host/path, or unix:///path/of/the/socket."""
    token: str | None = None
    """Sent as `Authorization: Bearer …`."""
    ca_file: Path | None = None
    """The certificates of the authorities (PEM) by which https is checked, instead of the system's."""
    client_cert: Path | None = None
    """The certificate (PEM) that is shown to a daemon that asks for one (TELEMETRY_TLS_CLIENT_CA)."""
    client_key: Path | None = None
    """Its private key (PEM), if it is not in the same file."""
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
    pace: Pace = USUAL
    """How often it tries, looks and tidies up; no variable changes that."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if (fault := _fault(field.name, value)) is not None:
                raise ValueError(f"{field.name} {fault}{_shown(field.name, value)}")
        if (fault := fault_of_pair(self.client_cert, self.client_key)) is not None:
            raise ValueError(f"client_cert {fault}")

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
        chosen = {name: value for name, value in given.items() if value is not None}
        known, faults = _from_environment(os.environ)
        if "client_cert" in chosen:  # the key of the environment is that of another certificate
            known.pop("client_key", None)
        if wrong := [fault for name, fault in faults.items() if name not in chosen]:
            raise ValueError("; ".join(wrong))
        values = {**known, **chosen}
        if "buffer_dir" in values:
            values["buffer_dir"] = _folder(values["buffer_dir"])
        return cls(**values)

    @classmethod
    def tolerant(cls) -> tuple[Config, list[str]]:
        """Collect the variables that can be used; also return what is wrong with the others.

        Nothing is sent if the address, the token or a certificate is wrong: the default may be another daemon.
        """
        values, faults = _from_environment(os.environ)
        if faults.keys() & {"url", "token", "ca_file", "client_cert"}:
            values["send"] = False
        return cls(**values), list(faults.values())


def _fault(name: str, value: Any) -> str | None:
    """Return what a setting must be if this value cannot be used."""
    if name in ("url", "ca_file"):
        return _fault_of_url(value) if name == "url" else fault_of_authorities(value)
    if name == "token" and value is not None and not value.isprintable():
        return "must be printable text of one line"
    if name == "durability" and value not in ("write", "fsync"):
        return "must be write or fsync"
    if name in ("linger_s", "flush_timeout_s", "keep_s") and not value >= 0:
        return "must not be negative"
    if name in ("timeout_s", "file_bytes", "file_age_s", "max_bytes", "max_age_s") and not value > 0:
        return "must be positive"
    return None


def _fault_of_url(url: str) -> str | None:
    try:
        Address.parse(url)
    except ValueError as error:
        return str(error)
    return None


def _shown(name: str, value: object) -> str:
    """Return a wrong value as an error shows it, unless it may hold a secret; what is wrong with a file names it."""
    is_left_out = name in ("token", "ca_file") or "@" in str(value)
    return "" if is_left_out else f" (it is {value!r:.100})"


def _folder(path: str | os.PathLike[str]) -> Path:
    return expanded(path).absolute()


def buffer_folder(named: Path | None = None) -> Path:
    """Return the spool's folder: the one that is named, else that of the environment, else the default one.

    Raises:
        ValueError: if it cannot be used; the message names the variable that gives it.

    """
    given = os.environ.get(_FOLDER_VARIABLE)
    if named is not None or not given:
        return default_buffer_dir() if named is None else _folder(named)
    try:
        return _folder(given)
    except ValueError as error:
        raise ValueError(f"{_FOLDER_VARIABLE}: {error}{_shown('buffer_dir', given)}") from error


def _switch(text: str) -> bool:
    if text.strip().lower() in ("1", "true", "yes", "on"):
        return True
    if text.strip().lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be true or false")


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("must be a number")
    return number


def _scaled(factor: float) -> Callable[[str], float]:
    return lambda text: _number(text) * factor


def read_token(path: str | os.PathLike[str]) -> str:
    """Return the token that a file holds.

    Raises:
        ValueError: if it holds none; the message names the file and says what is wrong.

    """
    try:
        text = expanded(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"cannot be read: {path}: {why}") from error
    if text.startswith("\ufeff"):
        raise ValueError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    if len(lines := text.splitlines()) > 1:
        raise ValueError(f"{path} must hold one line, not {len(lines)}")
    wrong = next((character for character in text if not character.isprintable()), None)
    if wrong is not None:
        raise ValueError(f"{path} holds a character that no token has, U+{ord(wrong):04X}")
    return text


def url_of_port(text: str) -> str | None:
    """Return the address of a daemon on this machine by its port; None if the text names none.

    A certificate of the daemon in the same environment (TELEMETRY_TLS_CERT) says that it speaks TLS.

    Kubernetes sets TELEMETRY_API_PORT=tcp://10.0.0.7:8765 in every container next to a service called telemetry-api.
    """
    port = int(text) if text.isascii() and text.isdigit() else 0
    scheme = "https" if os.environ.get("TELEMETRY_TLS_CERT") else "http"
    return f"{scheme}://localhost:{port}" if 0 < port < 1 << 16 else None


_FOLDER_VARIABLE: Final = "TELEMETRY_BUFFER_DIR"

VARIABLES: Final[Mapping[str, tuple[str, Callable[[str], Any], str]]] = {
    "TELEMETRY_API_URL": ("url", str, "The daemon: http://host:port, https://…, or unix:///path."),
    "METRICS_API_URL": ("url", str, "As in 3.x, if `TELEMETRY_API_URL` is not set."),
    "TELEMETRY_API_PORT": (
        "url",
        url_of_port,
        "The daemon's port on this machine, if no address is set; not with `telemetryd.compat`.",
    ),
    "TELEMETRY_API_AUTH_TOKEN": ("token", str.strip, "The daemon's token, if it asks for one."),
    "TELEMETRY_API_AUTH_TOKEN_FILE": ("token", read_token, "Or its file."),
    "TELEMETRY_API_CA_FILE": ("ca_file", _folder, "Certificates (PEM) by which https is checked."),
    "TELEMETRY_API_CLIENT_CERT": ("client_cert", _folder, "Certificate (PEM) for a daemon that asks for one."),
    "TELEMETRY_API_CLIENT_KEY": ("client_key", _folder, "Its private key (PEM), if it is not in the same file."),
    _FOLDER_VARIABLE: ("buffer_dir", _folder, "The spool's folder."),
    "TELEMETRY_BUFFER_DURABILITY": ("durability", str, "write, or fsync: each call waits for the disk."),
    "TELEMETRY_BUFFER_MAX_MB": ("max_bytes", lambda text: int(_number(text) * MIB), "The folder's bound, in MiB."),
    "TELEMETRY_BUFFER_MAX_DAYS": ("max_age_s", _scaled(86_400), "Unsent files are given up after so many days."),
    "TELEMETRY_BUFFER_KEEP_HOURS": ("keep_s", _scaled(3600), "Sent files are deleted after so many hours."),
    "TELEMETRY_SEND": ("send", _switch, "false: only fill the spool; `telemetryd sync --watch` sends."),
    "TELEMETRY_TIMEOUT_S": ("timeout_s", _number, "How long an answer may take."),
    "TELEMETRY_FLUSH_TIMEOUT_S": ("flush_timeout_s", _number, "How long sending may hold up the end of the process."),
}
"""Variable → setting, how its text is read (None: it says nothing), and what it is."""

_STRONGER: Final = {
    "METRICS_API_URL": ("TELEMETRY_API_URL",),
    "TELEMETRY_API_PORT": ("TELEMETRY_API_URL", "METRICS_API_URL"),
}
"""Variables that count only where none of these is set."""


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that the variables give, and what is wrong with the others."""
    values: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for variable, (name, read, _) in VARIABLES.items():
        text = environment.get(variable)
        if text and not any(environment.get(stronger) for stronger in _STRONGER.get(variable, ())):
            try:
                if (value := read(text)) is None:
                    continue
                fault = _fault(name, value)
            except ValueError as error:
                fault = str(error)
            if fault is None:
                values.setdefault(name, value)
            else:
                faults.setdefault(name, f"{variable}: {fault}{_shown(name, text)}")
    cert, key = values.get("client_cert"), values.get("client_key")
    if (fault := fault_of_pair(cert, key)) is not None:
        values = {name: value for name, value in values.items() if name not in ("client_cert", "client_key")}
        faults.setdefault("client_cert", f"TELEMETRY_API_CLIENT_CERT: {fault}")
    return values, faults
