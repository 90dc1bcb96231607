"""What is refused and what failed, told alike on pages and in the API: a status, what happened, what to do next."""

from __future__ import annotations

import msgspec
import psycopg
from psycopg.errors import (
    DataError,
    InsufficientPrivilege,
    LockNotAvailable,
    QueryCanceled,
    ReadOnlySqlTransaction,
    SerializationFailure,
)

from durable_cluster.errors import (
    CodecError,
    ConfigurationError,
    DatabaseError,
    DurableError,
    InputError,
    InvalidState,
    UnknownWorkflow,
)

PROBLEM = "application/problem+json"
TITLES = {
    400: "that cannot be asked for",
    401: "a token is needed",
    403: "not allowed",
    404: "not found",
    405: "not that way",
    408: "too slow",
    409: "not in this state",
    413: "too large",
    415: "not in this format",
    422: "that does not fit",
    429: "too many failures",
    500: "the console failed",
    503: "the database does not answer",
}


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request gets nothing. ``status``: of HTTP; ``headers``: that its answer has besides."""

    status: int
    detail: str
    headers: dict[str, str] = {}

    @property
    def title(self) -> str:
        """The same for each refusal of a status."""
        return TITLES.get(self.status, "refused")


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What the API says of a request that it refuses (RFC 9457)."""

    status: int
    title: str
    detail: str


class Refused(Exception):
    """Raised by whoever refuses a request; the application answers it."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.refusal = Refusal(status=status, detail=detail, headers=named)


BY_ERROR: tuple[tuple[type[DurableError], int], ...] = (
    (UnknownWorkflow, 404),
    (InvalidState, 409),
    (InputError, 422),
    (ConfigurationError, 400),
    (CodecError, 422),
    (DatabaseError, 503),
)


BY_DATABASE_ERROR: tuple[tuple[type[psycopg.Error] | tuple[type[psycopg.Error], ...], int, str], ...] = (
    (
        InsufficientPrivilege,
        403,
        "the console's database role may not do or see this; connect it as one that may (docs/console.md says which)",
    ),
    (QueryCanceled, 503, "that took the database too long and was ended; ask for less, or again later"),
    (LockNotAvailable, 503, "somebody else is at it; try again in a moment"),
    (SerializationFailure, 503, "somebody else changed it at this moment; try again"),
    (ReadOnlySqlTransaction, 503, "the database only reads at the moment; name its primary server"),
    (DataError, 422, "there is a character or a number in that which the database cannot hold"),
    (
        (psycopg.OperationalError, psycopg.InterfaceError),
        503,
        "the database is away, or all of the console's connections are in use",
    ),
)


def refusal_of(error: Exception) -> Refusal:
    """What an error of ours or of the database comes to. What else went wrong is told to the log and not to people."""
    if isinstance(error, Refused):
        return error.refusal
    if isinstance(error, DurableError):
        status = next((status for kind, status in BY_ERROR if isinstance(error, kind)), 500)
        return Refusal(status=status, detail=str(error))
    if isinstance(error, psycopg.Error):
        return _of_the_database(error)
    return Refusal(status=500, detail="an error that nobody foresaw; the console's log has it")


def _of_the_database(error: psycopg.Error) -> Refusal:
    found = ((status, detail) for kinds, status, detail in BY_DATABASE_ERROR if isinstance(error, kinds))
    status, detail = next(found, (500, "the database refused; the console's log says what"))
    return Refusal(status=status, detail=detail)
