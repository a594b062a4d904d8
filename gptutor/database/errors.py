"""What can go wrong with the database, and the translation of asyncpg's exceptions: nothing above this package sees one."""

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg


class DatabaseUnavailable(Exception):
    """PostgreSQL did not respond in time, or not at all. The statement may or may not have been executed."""


class TransactionLost(DatabaseUnavailable):
    """A deadlock or a serialisation failure: the statement was certainly not executed, and may be repeated."""


class RowsLocked(DatabaseUnavailable):
    """Another transaction holds locks on the rows for longer than lock_timeout."""


class DatabaseRefused(DatabaseUnavailable):
    """PostgreSQL responds, but the login is rejected, or the schema is missing; the text is a sentence for the operator.

    To requests it is one more way in which the database is unavailable, and it passes when the operator has mended it.
    """


class ConstraintViolated(Exception):
    """The statement would have violated a constraint; `name` is the constraint's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


# TimeoutError is the builtin one, and would otherwise look like a slow upstream.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the server closed the connection, and asyncpg has not noticed yet
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.PostgresSystemError,  # such as an input/output error of its disk
)
# After these, the connection is of no use any more: the server is silent, or it is read-only, and another one may be primary now.
USELESS_CONNECTION = (OSError, TimeoutError, asyncpg.ReadOnlySQLTransactionError)


SCHEMA_MISSING = (
    asyncpg.InvalidSchemaNameError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
)
LOGIN_REJECTED = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,  # the database accepts no connections (RowsLocked is a kind of it)
)


@contextmanager
def translate_errors(*, migrating: bool = False) -> Iterator[None]:
    """Raises asyncpg's exceptions as ours. While `migrating`, tables may be missing: asyncpg's own error says which."""
    try:
        yield
    except asyncpg.IntegrityConstraintViolationError as error:
        raise ConstraintViolated(error.constraint_name or "") from error
    except asyncpg.TransactionRollbackError as error:
        raise TransactionLost(type(error).__name__) from error
    except asyncpg.LockNotAvailableError as error:
        raise RowsLocked(type(error).__name__) from error
    except LOGIN_REJECTED as error:
        raise DatabaseRefused(f"PostgreSQL rejects DATABASE_URL: {_first_line(error)}") from error
    except asyncpg.UndefinedObjectError as error:
        if migrating and "configuration parameter" not in str(error):
            raise
        raise DatabaseRefused(f"PostgreSQL does not know a parameter of DATABASE_URL: {_first_line(error)}") from error
    except SCHEMA_MISSING as error:
        if migrating:
            raise
        raise DatabaseRefused(f"The database lacks what this version needs ({_first_line(error)}): gptutor migrate") from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseRefused(
            f"The role of DATABASE_URL lacks a privilege ({_first_line(error)}). The owner of the database grants it: "
            "see sql/roles.sql; migrations are applied by the owner."
        ) from error
    except asyncpg.ClientConfigurationError as error:
        raise DatabaseRefused(f"DATABASE_URL is wrong: {_first_line(error)}.") from error
    except UNAVAILABLE as error:
        raise DatabaseUnavailable(type(error).__name__) from error


def _first_line(error: Exception) -> str:
    """Without PostgreSQL's detail and hint, so that the sentence is one line."""
    return str(error).partition("\n")[0]
