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


class DatabaseRefused(Exception):
    """PostgreSQL responds, but the login is rejected, or the schema is missing; the text is a sentence for the operator."""


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
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        raise DatabaseRefused(f"PostgreSQL rejects DATABASE_URL: {error}") from error
    except asyncpg.UndefinedObjectError as error:
        if migrating and "configuration parameter" not in str(error):
            raise
        raise DatabaseRefused(f"PostgreSQL does not know a parameter of DATABASE_URL: {error}") from error
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError) as error:
        if migrating:
            raise
        raise DatabaseRefused(f"The database lacks what this version needs ({error}): gptutor migrate") from error
    except asyncpg.LockNotAvailableError as error:
        raise RowsLocked(type(error).__name__) from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseRefused(
            f"The role of DATABASE_URL lacks a privilege ({error}). The owner of the database grants it: see sql/roles.sql; "
            "migrations are applied by the owner."
        ) from error
    except asyncpg.ClientConfigurationError as error:
        raise DatabaseRefused(f"DATABASE_URL is wrong: {error}.") from error
    except UNAVAILABLE as error:
        raise DatabaseUnavailable(type(error).__name__) from error
