"""Every exception of the daemon; the first line of a docstring is the sentence it stands for."""

from __future__ import annotations

from typing_extensions import TypedDict


class ErrorItem(TypedDict):
    """One fault of a request body, in the shape the guide shows for status 422."""

    loc: list[str | int]
    msg: str
    type: str


class TelemetrydError(Exception):
    """The base of everything below."""


class ConfigurationError(TelemetrydError):
    """Some settings cannot be used; `problems` holds one sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class AddressError(TelemetrydError):
    """An address cannot be listened on; the message says why and what to do."""


class DatabaseError(TelemetrydError):
    """The database file cannot be used as it is; the message says why and what to run."""


class DatabaseOwnedError(DatabaseError):
    """Another process owns the database."""


class InvalidBodyError(TelemetrydError):
    """The request body does not describe what it should; `errors` lists every fault."""

    def __init__(self, errors: list[ErrorItem]) -> None:
        super().__init__("; ".join(describe(error) for error in errors))
        self.errors = errors


class InvalidRequestError(TelemetrydError):
    """The request itself (a query parameter, a header) is wrong; one sentence says what is allowed."""


class RunNotFoundError(TelemetrydError):
    """There is no run with this event_id."""

    def __init__(self, event_id: str) -> None:
        super().__init__(f"Run not found: {event_id}")


class CursorGoneError(TelemetrydError):
    """What comes after this place is not known any more; the message says why. Begin again."""


class NotWatchedError(TelemetrydError):
    """The process cannot be watched; the message says why. Heartbeats can stand in."""


class BodyTooLargeError(TelemetrydError):
    """The request body is larger than the daemon takes."""


class UnsupportedBodyError(TelemetrydError):
    """The request body has a media type or a content coding that the daemon does not read."""


class UnavailableError(TelemetrydError):
    """The daemon cannot do this now; the same request may succeed later."""

    retry_after_seconds = 1


class SlowBodyError(UnavailableError):
    """The request body stopped arriving, or came too slowly; send it again."""

    retry_after_seconds = 5


class TooManyBodiesError(UnavailableError):
    """Too many large bodies are being received; try again shortly."""


class TooManyTailsError(UnavailableError):
    """Too many streams are open; try again later."""

    retry_after_seconds = 10


class TooManyWaitsError(UnavailableError):
    """Too many requests wait for changes; try again later, or without wait."""

    retry_after_seconds = 10


class NoMemoryError(UnavailableError):
    """There is not enough memory for this request now; a smaller one may succeed."""

    retry_after_seconds = 5


class QueueFullError(UnavailableError):
    """Too many writes are waiting; try again shortly."""


class StoppingError(UnavailableError):
    """The daemon is shutting down; try again shortly."""


class DatabaseBusyError(UnavailableError):
    """The database is locked by another process; try again shortly."""


class TooManyExportsError(UnavailableError):
    """As many exports are running as may at once; try again later."""

    retry_after_seconds = 10


class StorageFullError(UnavailableError):
    """The disk is full; nothing of this request was acknowledged."""

    retry_after_seconds = 10


class LowDiskError(UnavailableError):
    """The disk is almost full, so no new writes are taken (TELEMETRY_MIN_FREE_MB); nothing of this was stored."""

    retry_after_seconds = 10


class WriteFailedError(UnavailableError):
    """The write was rolled back; repeat it with the same event_id."""


class DatabaseSuspectError(UnavailableError):
    """The database failed and is being opened again; if this was stored or not, repeat it with the same event_id."""

    retry_after_seconds = 5


class WriterDeadError(UnavailableError):
    """The writer has stopped after a failure; the daemon is restarting."""

    retry_after_seconds = 5


class QueryTimeoutError(UnavailableError):
    """The query took too long and was interrupted; narrow its filters."""


class CommandFailedError(TelemetrydError):
    """The database refused this one change; its neighbours were stored."""


def describe(error: ErrorItem) -> str:
    """Say one body fault in one line: `status: Status must be …`."""
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    return f"{place}: {error['msg']}" if place else error["msg"]


def sentence(error: BaseException) -> str:
    """Return the error's own message, or the first line of its class's docstring."""
    return str(error) or (type(error).__doc__ or type(error).__name__).splitlines()[0]
