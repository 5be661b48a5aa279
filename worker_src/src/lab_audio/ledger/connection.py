"""Connections to PostgreSQL, and what its errors mean."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import extensions
from sqlalchemy import Connection, Engine, create_engine, exc, make_url, text

from lab_audio.config import LedgerSettings
from lab_audio.errors import ConfigError, Fatal, Retryable

# Classes of SQLSTATE that pass: connection, read-only after a failover, rollback, resources, locks, operator.
AWAY = ("08", "25", "40", "53", "55", "57", "58")
CONNECT_SECONDS = 10
MIGRATIONS = Path(__file__).with_name("migrations")
ANSWER_SECONDS = 90  # more than statement_timeout, after which a server that lives says so itself
MISCONFIGURED = ("authentication failed", "no pg_hba.conf entry", "does not exist", "no password supplied")


def open_ledger(settings: LedgerSettings) -> Engine:
    """A pool of connections, made when they are needed; dead ones are noticed before use."""
    extensions.set_wait_callback(_wait)
    url = make_url(settings.database_url.get_secret_value()).set(drivername="postgresql+psycopg2")
    return create_engine(
        url,
        pool_pre_ping=True,
        pool_size=8,
        connect_args={
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "application_name": "lab-audio",
            "options": "-c TimeZone=UTC -c statement_timeout=60s -c lock_timeout=30s"
            " -c idle_in_transaction_session_timeout=60s"
            # PostgreSQL's own, so that a dead transfer host loses its source within half a minute
            " -c tcp_keepalives_idle=15 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
        },
    )


def _wait(connection: Any) -> None:
    """psycopg2's wait callback: without it, a server that holds the connection but says nothing is waited for for ever.

    https://www.psycopg.org/docs/extensions.html#psycopg2.extensions.set_wait_callback
    """
    seconds = CONNECT_SECONDS if connection.status == extensions.STATUS_SETUP else ANSWER_SECONDS
    while (state := connection.poll()) != extensions.POLL_OK:
        ready = select.poll()
        ready.register(connection.fileno(), select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
        if not ready.poll(seconds * 1000):
            raise psycopg2.OperationalError(f"no answer within {seconds} s")


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Turn the driver's errors into the three kinds; messages name the server, never the password."""
    where = f"PostgreSQL at {engine.url.host or 'local socket'}:{engine.url.port or 5432}/{engine.url.database}"
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError) as error:
        cause = "; ".join(map(str.strip, str(getattr(error, "orig", None) or error).strip().splitlines()))
        if any(sign in cause for sign in MISCONFIGURED):
            raise ConfigError(f"DATABASE_URL: {where} refused: {cause}") from None
        code = getattr(getattr(error, "orig", None), "pgcode", None)
        if code and code[:2] not in AWAY:
            raise
        raise Retryable(f"{where}: {cause}", "PostgreSQL") from error
    except exc.ProgrammingError as error:
        code = getattr(error.orig, "pgcode", "")
        if code in ("42P01", "42703"):
            raise Fatal(f"{where} has not the tables of this release; run `lab-audio migrate`") from None
        if code == "42501":
            raise ConfigError(f"DATABASE_URL: {where}: {str(error.orig).strip()}") from None
        raise


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction: committed if the block ends, rolled back if it raises."""
    with translated(engine), engine.begin() as connection:
        yield connection


def migrate(engine: Engine) -> tuple[str | None, str]:
    """Bring the tables to this release, also those of the older system; newer ones are left as they are. Returns the
    revision that was there, and this release's.

    Runs in one transaction under an advisory lock, so that two at once do no harm.
    """
    from alembic import command  # here: a fifth of the time that every other command takes to start
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext

    config, head = Config(), _head()
    config.set_main_option("script_location", str(MIGRATIONS))
    extensions.set_wait_callback(None)  # a migration may take its time
    try:
        with transaction(engine) as connection:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('lab_audio migrate', 0))"))
            before = MigrationContext.configure(connection).get_current_revision()
            if before is None or before < head:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
    finally:
        extensions.set_wait_callback(_wait)
    return before, head


def _head() -> str:
    """The revision of this release's tables: four digits, which grow, and by which its file is called."""
    return max(file.name[:4] for file in MIGRATIONS.glob("versions/[0-9]*.py"))


def check_answers(engine: Engine) -> None:
    """Raises ConfigError where PostgreSQL does not let us in, Retryable where it is away."""
    with transaction(engine) as connection:
        connection.execute(text("SELECT 1"))


def check_migrated(engine: Engine) -> None:
    """Raises Fatal where the tables are older than this release; newer ones have all that it uses."""
    head = _head()
    with transaction(engine) as connection:
        found = connection.execute(text("SELECT max(version_num) FROM alembic_version")).scalar_one()
    if found is None or found < head:
        raise Fatal(f"the ledger's tables are at revision {found}, this release needs {head}; run `lab-audio migrate`")
