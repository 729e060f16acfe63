"""Every exception of the daemon, each with the sentence that a user reads and the names that logs and metrics use."""

from __future__ import annotations

from typing import ClassVar, Final

from typing_extensions import TypedDict


class ErrorItem(TypedDict):
    """One fault of a request body, in the shape the guide shows for status 422."""

    loc: list[str | int]
    msg: str
    type: str


class TelemetrydError(Exception):
    """The base of everything below."""

    message: ClassVar[str] = "The daemon has failed."
    """The sentence that a user reads if the exception has no other text."""
    error_type: ClassVar[str] = "TelemetrydError"
    """What the log calls it."""


class ConfigurationError(TelemetrydError):
    """Raised for settings that cannot be used; `problems` holds one sentence for each."""

    message = "Some settings cannot be used."
    error_type = "ConfigurationError"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class AddressError(TelemetrydError):
    """Raised for an address that cannot be listened on; its text says why and what to do."""

    message = "An address cannot be listened on."
    error_type = "AddressError"


class DatabaseError(TelemetrydError):
    """Raised for a database file that cannot be used as it is; its text says why and what to run."""

    message = "The database file cannot be used as it is."
    error_type = "DatabaseError"


class DatabaseOwnedError(DatabaseError):
    """Raised while another process holds the database's lock."""

    message = "Another process owns the database."
    error_type = "DatabaseOwnedError"


class InvalidBodyError(TelemetrydError):
    """Raised for a body that cannot be used; `errors` lists every fault.

    Args:
        errors: the faults.
        event_id: of the run that is refused, where the body cannot be decoded otherwise.

    """

    message = "The request body does not describe what it should."
    error_type = "ValidationError"

    def __init__(self, errors: list[ErrorItem], event_id: str | None = None) -> None:
        super().__init__("; ".join(describe(error) for error in errors))
        self.errors = errors
        self.event_id = event_id


class InvalidRequestError(TelemetrydError):
    """Raised for a wrong query parameter or header; its text says what is allowed."""

    message = "The request itself (a query parameter, a header) is wrong."
    error_type = "ValidationError"


class RunNotFoundError(TelemetrydError):
    """Raised where a request names a run that is not stored."""

    message = "There is no run with this event_id."
    error_type = "RunNotFoundError"

    def __init__(self, event_id: str) -> None:
        super().__init__(f"Run not found: {event_id}")


class ItemRefusedError(TelemetrydError):
    """The base of what is refused although it is right: by itself, or as an item of a batch next to others."""

    message = "This is refused."
    error_type = "ItemRefusedError"
    status: ClassVar[int] = 403
    """The answer that it gets by itself; an item of a batch carries it."""
    kind: ClassVar[str] = "refused"
    """The type of an item's fault."""
    wait_s: float | None = None
    """The seconds after which the same may be accepted, None if that never happens by itself."""


class NotAllowedError(ItemRefusedError):
    """Raised for a run that the token may not write; its text says why."""

    message = "The token may not write this run."
    error_type = "NotAllowedError"
    kind = "not_allowed"


class QuotaExceededError(ItemRefusedError):
    """Raised for what is beyond a quota; its text says whose.

    Args:
        message: whose quota it is.
        wait_s: the seconds until it is not used up any more.

    """

    message = "The quota is used up."
    error_type = "QuotaExceededError"
    status = 429
    kind = "quota_exceeded"

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class TokenQuotaError(QuotaExceededError):
    """Raised for what is beyond the quota of the request's token.

    Args:
        quota: which one is used up.
        wait_s: the seconds until it is not used up any more.

    """

    message = "The quota of this token is used up."
    error_type = "TokenQuotaError"

    def __init__(self, quota: str, wait_s: float) -> None:
        super().__init__(f"The quota of {quota} of this token is used up", wait_s)
        self.quota = quota


class TokenGoneError(TelemetrydError):
    """Raised for a request whose token was accepted when it came, and is not any more."""

    message = "The token was revoked, or has expired, while the request waited."
    error_type = "TokenGoneError"


class CursorGoneError(TelemetrydError):
    """Raised for a cursor after which not everything is known any more; its text says why."""

    message = "What comes after this cursor is not known any more. Begin again."
    error_type = "CursorGoneError"


class NotWatchedError(TelemetrydError):
    """Raised for a process that cannot be watched; its text says why."""

    message = "The process cannot be watched. Heartbeats can stand in."
    error_type = "NotWatchedError"


class BodyTooLargeError(TelemetrydError):
    """Raised for a body beyond its limit, as sent or as decoded."""

    message = "The request body is larger than the daemon takes."
    error_type = "BodyTooLargeError"


class UnsupportedBodyError(TelemetrydError):
    """Raised for a body in a form that the daemon does not read."""

    message = "The request body has a media type or a content coding that the daemon does not read."
    error_type = "UnsupportedBodyError"


class UnavailableError(TelemetrydError):
    """The base of what passes: it is answered with 503, and counted under `reason` if a write was refused."""

    message = "The daemon cannot do this now; the same request may succeed later."
    error_type = "UnavailableError"
    reason: ClassVar[str] = "unavailable"
    """Under which label a refused write is counted."""
    retry_after_seconds = 1


class SlowBodyError(UnavailableError):
    """Raised for a body that keeps its place for too long."""

    message = "The request body stopped arriving, or came too slowly; send it again."
    error_type = "SlowBodyError"
    reason = "slow body"
    retry_after_seconds = 5


class TooManyBodiesError(UnavailableError):
    """Raised when a body would take more memory than all may have together."""

    message = "Too many large bodies are being received; try again shortly."
    error_type = "TooManyBodiesError"
    reason = "too many bodies"


class TooManySubscribersError(UnavailableError):
    """Raised for one stream more than may be open."""

    message = "Too many streams are open; try again later."
    error_type = "TooManyTailsError"
    reason = "too many tails"
    retry_after_seconds = 10


class TooManyWaitsError(UnavailableError):
    """Raised for one waiting request more than there may be."""

    message = "Too many requests wait for changes; try again later, or without wait."
    error_type = "TooManyWaitsError"
    reason = "too many waits"
    retry_after_seconds = 10


class NoMemoryError(UnavailableError):
    """Raised in the place of a MemoryError."""

    message = "There is not enough memory for this request now; a smaller one may succeed."
    error_type = "NoMemoryError"
    reason = "no memory"
    retry_after_seconds = 5


class QueueFullError(UnavailableError):
    """Raised when the writer's queue takes no more."""

    message = "Too many writes are waiting; try again shortly."
    error_type = "QueueFullError"
    reason = "queue full"


class StoppingError(UnavailableError):
    """Raised for what comes while the daemon is being stopped."""

    message = "The daemon is shutting down; try again shortly."
    error_type = "StoppingError"
    reason = "stopping"


class DatabaseBusyError(UnavailableError):
    """Raised when SQLite has waited in vain for a lock of another process."""

    message = "The database is locked by another process; try again shortly."
    error_type = "DatabaseBusyError"
    reason = "database busy"


class TooManyExportsError(UnavailableError):
    """Raised for one export more than may run."""

    message = "As many exports are running as may at once; try again later."
    error_type = "TooManyExportsError"
    reason = "too many exports"
    retry_after_seconds = 10


class StorageFullError(UnavailableError):
    """Raised when the disk had no room for a commit."""

    message = "The disk is full; nothing of this request was acknowledged."
    error_type = "StorageFullError"
    reason = "storage full"
    retry_after_seconds = 10


class LowDiskError(UnavailableError):
    """Raised for new writes while less than the reserve is free."""

    message = "The disk is almost full, so no new writes are taken (TELEMETRY_MIN_FREE_MB); nothing of this was stored."
    error_type = "LowDiskError"
    reason = "low disk"
    retry_after_seconds = 10


class WriteFailedError(UnavailableError):
    """Raised for every command of a group that could not be committed."""

    message = "The write was rolled back; repeat it with the same event_id."
    error_type = "WriteFailedError"
    reason = "write failed"


class DatabaseSuspectError(UnavailableError):
    """Raised while it is unknown what the disk holds."""

    message = (
        "The database failed and is being opened again; if this was stored or not, repeat it with the same event_id."
    )
    error_type = "DatabaseSuspectError"
    reason = "database suspect"
    retry_after_seconds = 5


class WriterDeadError(UnavailableError):
    """Raised once the writer's task has ended by a failure."""

    message = "The writer has stopped after a failure; the daemon is restarting."
    error_type = "WriterDeadError"
    reason = "writer dead"
    retry_after_seconds = 5


class QueryTimeoutError(UnavailableError):
    """Raised for a query that was interrupted at its deadline."""

    message = "The query took too long and was interrupted; narrow its filters."
    error_type = "QueryTimeoutError"
    reason = "query timeout"


class CommandFailedError(TelemetrydError):
    """Raised for the one command of a group that had to be undone."""

    message = "The database refused this one change; its neighbours were stored."
    error_type = "CommandFailedError"


def describe(error: ErrorItem) -> str:
    """Say one body fault in one line: `status: Status must be …`."""
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    return f"{place}: {error['msg']}" if place else error["msg"]


def sentence(error: BaseException) -> str:
    """Return the error's own text, or else the sentence of its class; of a foreign one without either, its type."""
    if text := str(error):
        return text
    if isinstance(error, TelemetrydError):
        return error.message
    return next((text for kind, text in _WORDLESS.items() if isinstance(error, kind)), type(error).__name__)


def error_type(error: BaseException) -> str:
    """Return what the log calls an error: a foreign one by its type."""
    return error.error_type if isinstance(error, TelemetrydError) else type(error).__name__


_WORDLESS: Final = {MemoryError: "Out of memory.", TimeoutError: "Timeout expired."}
"""What is said of errors that the interpreter raises without a text."""
