"""Where an Optuna storage is, from what the user typed to an open one, and what is said when it does not answer."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import URL, create_engine, inspect, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from imma_cli.errors import ImmaError

FORMS = (
    "Known are sqlite:///FILE, journal:FILE, postgresql://USER:PASSWORD@HOST/DATABASE, and what else SQLAlchemy reads."
)
BUSY = 60.0
"""Seconds that SQLite waits for another process to finish writing."""
UNREACHABLE = 10
"""Seconds after which a server that does not answer is given up."""
TRIES = 10
"""Two processes that create the tables at the same moment get in each other's way, but not so often."""


class Location:
    """A storage as the user typed it. Nothing it raises shows a password."""

    def __init__(self, typed: str | None) -> None:
        self._typed = typed
        self._url: URL | None = None
        if typed is None or typed.startswith("journal:"):
            return
        try:
            url = make_url(typed)
        except (ArgumentError, ValueError):
            self._refuse([], FORMS)
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        self._url = url

    def __str__(self) -> str:
        return self._masked(self._typed or "in memory")

    def open(self) -> BaseStorage:
        """Open the storage, and create the tables or the file where there are none.

        Raises:
            ImmaError: it cannot be reached, read or written, its driver is missing, or it holds something else.
        """
        if self._typed is None:
            return InMemoryStorage()
        if self._url is None:
            return self._journal(self._typed.removeprefix("journal:"))
        if self._url.get_backend_name() == "sqlite":
            if self._url.database in (None, "", ":memory:"):  # it would be another one for every thread
                return InMemoryStorage()
            self._check_file(Path(str(self._url.database)))
        return self._database(self._url)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turn what a storage raises that has gone away since it was opened into an `ImmaError`."""
        try:
            yield
        except (StorageInternalError, SQLAlchemyError, OSError, json.JSONDecodeError) as error:
            hint = "What is finished is kept: the same command goes on from there."
            raise ImmaError(f"The storage {self} does not answer.", [self._reason(error)], hint) from None

    def _journal(self, name: str) -> BaseStorage:
        if not name:
            self._refuse(["no file is named"], "Write journal:FILE.")
        path = Path(name).absolute()
        self._check_file(path)
        try:
            with path.open("rb") as file:
                first = file.readline(1 << 16)
            if first and "op_code" not in json.loads(first):
                raise ValueError("not an operation")
        except FileNotFoundError:
            pass
        except OSError as error:
            self._refuse([self._reason(error)])
        except (ValueError, TypeError, RecursionError):
            self._refuse([f"{path} is no journal of Optuna's"], "Name a file that does not exist yet.")
        try:
            return JournalStorage(JournalFileBackend(str(path), _MendingLock(path)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            self._refuse([self._reason(error)], "Where the file is damaged, name another.")

    def _check_file(self, path: Path) -> None:
        reasons = []
        try:
            if path.exists() and not path.is_file():
                reasons.append(f"{path} is no file")
            elif path.exists() and not os.access(path, os.R_OK | os.W_OK):
                reasons.append(f"{path} may not be read and written")
            if not path.parent.is_dir():
                reasons.append(f"there is no folder {path.parent}")
            elif not os.access(path.parent, os.W_OK | os.X_OK):  # a lock stands beside the file
                reasons.append(f"nothing may be written in {path.parent.absolute()}")
        except OSError as error:  # of a folder that may not be entered, or a name that is too long
            reasons.append(self._reason(error))
        if reasons:
            self._refuse(reasons)

    def _database(self, url: URL) -> BaseStorage:
        options: dict[str, Any] = {"pool_pre_ping": True}  # connections do not live as long as an attack trains
        if url.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": BUSY}
        elif url.drivername == "postgresql+psycopg" and "connect_timeout" not in url.query:
            options["connect_args"] = {"connect_timeout": UNREACHABLE}
        try:
            self._check_tables(url, options)
            return self._with_tables(url, options)
        except NoSuchModuleError:
            self._refuse([f"{url.drivername} is unknown"], FORMS)
        except ImportError as error:
            postgres = url.drivername == "postgresql+psycopg"
            hint = (
                'pip install "imma-cli[postgres]"' if postgres else f"Install the package {error.name or 'it names'}."
            )
            self._refuse([f"its driver is missing: {error}"], hint)
        except (SQLAlchemyError, StorageInternalError, OSError, RuntimeError, ValueError, TypeError) as error:
            damaged = "Where the file is damaged, move it away; the trials that it held are made again."
            self._refuse([self._reason(error)], damaged if url.get_backend_name() == "sqlite" else None)

    def _check_tables(self, url: URL, options: dict[str, Any]) -> None:
        from optuna.storages._rdb.models import BaseModel

        engine = create_engine(url, **options)
        try:
            with engine.connect() as connection:
                tables = set(inspect(connection).get_table_names())
        finally:
            engine.dispose()
        others = tables - set(BaseModel.metadata.tables) - {"alembic_version"}
        if "version_info" not in tables and others:
            found = f"it holds something else: the tables {', '.join(sorted(others)[:5])}"
            self._refuse([found], "Name a new file, or an empty database.")

    def _with_tables(self, url: URL, options: dict[str, Any]) -> BaseStorage:
        # Optuna takes its URL for a template, and SQLAlchemy before 2.1 leaves braces as they are
        template = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        for attempt in range(1, TRIES + 1):
            try:
                return get_storage(RDBStorage(template, engine_kwargs={**options}))
            except (SQLAlchemyError, StorageInternalError, AssertionError) as error:
                if attempt == TRIES:
                    self._refuse([self._reason(error)])
                time.sleep(random.uniform(0.05, 0.25))
        raise AssertionError("not reached")

    def _refuse(self, reasons: list[str], hint: str | None = None) -> NoReturn:
        raise ImmaError(f"The storage {self} cannot be opened.", map(self._masked, reasons), hint) from None

    def _reason(self, error: BaseException) -> str:
        inner: BaseException = error
        while isinstance(inner, StorageInternalError) and inner.__cause__ is not None:
            inner = inner.__cause__
        found = getattr(inner, "orig", None) or inner  # without the SQL that SQLAlchemy adds
        return self._masked(" ".join(str(found).split()) or type(found).__name__)

    def _masked(self, text: str) -> str:
        if self._url is not None:
            secrets = [self._url.password, *(v for k, v in self._url.query.items() if "pass" in k.lower())]
            for secret in filter(None, secrets):
                text = text.replace(str(secret), "***")
        return re.sub(r"(?<=://)([^:/@\s]*):[^/\s]*@", r"\1:***@", text)


class _MendingLock(JournalFileOpenLock):
    """A lock that, once acquired, removes a last line that a killed process left without its end.

    What is appended behind such a line would make the journal unreadable for everyone.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def acquire(self) -> bool:
        acquired = super().acquire()
        try:
            with self._path.open("rb+") as file:
                data_end = file.seek(0, os.SEEK_END)
                if data_end and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except OSError:
            self.release()
            raise
        return acquired

    def release(self) -> None:
        with suppress(RuntimeError):  # who slept for so long that another took the lock has nothing to give back
            super().release()
