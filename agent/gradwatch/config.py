"""Settings: each with its unit and range, an environment variable `GRADWATCH_<NAME>`, a default.

An argument of `wrap` comes before a `Settings` object, that before the environment, that before
the default written here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from gradwatch.errors import ConfigurationError
from gradwatch.secrets import quoted, redact

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DEFAULT_STORE",
    "Settings",
    "redact",
    "resolve_store",
    "sqlite_path",
    "unknown_variables",
]

DEFAULT_STORE = "sqlite:///gradwatch.db"


class Settings(BaseSettings):
    """All settings of the agent. Frozen; a wrong name or a value out of range is an error.

    A misspelt environment variable cannot be told from another program's: `gradwatch doctor` does.
    """

    model_config = SettingsConfigDict(env_prefix="GRADWATCH_", frozen=True, extra="forbid")

    store: Annotated[
        str, Field(repr=False, description="Where records go: an SQLAlchemy URL, or a file's path.")
    ] = DEFAULT_STORE
    run: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=240,  # the store's column has 255, and may need some for a -2
            description="The run's name, 240 characters at most; default: the script's name.",
        ),
    ] = None
    run_id: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=240,
            description="The run's uid, 240 characters at most: a job started again under it "
            "resumes it.",
        ),
    ] = None
    metrics_port: Annotated[
        int | Literal["off"] | None,
        Field(
            description="TCP port of the Prometheus exporter, 1 to 65535; the next free one where "
            "it is taken; 0: any; `off`: none."
        ),
    ] = 9495
    metrics_addr: Annotated[str, Field(min_length=1, description="Address the exporter binds.")] = (
        "127.0.0.1"
    )
    metrics_runs: Annotated[
        int,
        Field(
            ge=1,
            le=100_000,
            description="Runs of a process of which all series are exported, about a hundred each: "
            "first those that go on, then the last to end. Of all others there is "
            "`gradwatch_run_active` alone.",
        ),
    ] = 20
    advertised_addr: Annotated[
        str | None,
        Field(description="Host name or address under which Prometheus reaches the exporter."),
    ] = None
    sd_dir: Annotated[
        Path | None,
        Field(
            description="Folder in which the exporter's address is left as a file for Prometheus' "
            "`file_sd_configs`; default: none. The file goes when the job ends well and stays when "
            "it dies."
        ),
    ] = None
    disabled: Annotated[
        bool, Field(description="Stop recording (no ring, worker, store or exporter); clip still.")
    ] = False
    fold: Annotated[
        bool,
        Field(
            description="Fold clipping into the fused optimizer's kernel, and call that directly; "
            "0: multiply in place, bit-identical to torch's `clip_grad_norm_`, and step by torch's."
        ),
    ] = True
    remote_control: Annotated[
        bool,
        Field(
            description="Let whoever can write the store apply another threshold while the run "
            "goes on (`gradwatch apply`); all ranks need it."
        ),
    ] = False
    ring_dir: Annotated[
        Path | None,
        Field(
            description="Folder of the flight-recorder files; default: beside an SQLite store on a "
            "local disk, else a folder of your own under the temporary one."
        ),
    ] = None
    ring_steps: Annotated[
        int,
        Field(
            ge=64,
            le=2**26,
            description=(
                "Steps a flight-recorder file holds (96 bytes each). Where it is not set, the fifth "
                "run of a process and later ones have an eighth of it, and of the event slots."
            ),
        ),
    ] = 131_072
    ring_events: Annotated[
        int,
        Field(ge=64, le=2**20, description="Event slots a file holds (512 bytes each)."),
    ] = 4096
    drain_interval: Annotated[
        float,
        Field(gt=0, le=60, description="Seconds between two looks of the worker at the rings."),
    ] = 0.25
    heartbeat_interval: Annotated[
        # A run that was silent for 60 s is taken for gone, by whoever prunes or resumes: half of that.
        float,
        Field(gt=0, le=30, description="Seconds between two heartbeats of a run."),
    ] = 5.0
    close_timeout: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="Seconds that `close()` waits at most until the store has taken what is "
            "left. The rest stays in the flight-recorder file: `gradwatch recover` stores it.",
        ),
    ] = 3.0
    fork_timeout: Annotated[
        float,
        Field(
            ge=0,
            le=60,
            description="Seconds that a fork waits at most for a call to a PostgreSQL server that "
            "is under way. For one to an SQLite file it waits 2 s at most: the child could damage "
            "a file that it inherits open.",
        ),
    ] = 0.2
    layer_norms_every: Annotated[
        int | None,
        Field(
            ge=0,
            description="Steps between two samples of the per-layer norms; 0: only on a spike or "
            "a non-finite step; default: the greater of 100 and 10 x the number of tensors, and "
            "steps 100 and 200.",
        ),
    ] = None

    @field_validator("run", "run_id")
    @classmethod
    def _storable(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            msg = "it holds a NUL, which PostgreSQL takes in no text"
            raise ValueError(msg)
        return value

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _port(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.lower() in {"off", "none", ""}):
            return "off"
        try:
            port = int(value)
        except (TypeError, ValueError):
            port = -1
        if isinstance(value, bool) or not 0 <= port <= 65535:
            msg = 'must be a port from 0 to 65535 (0: any free one), or "off"'
            raise ValueError(msg)
        return port

    @field_validator("store")
    @classmethod
    def _url(cls, value: str) -> str:
        return resolve_store(value)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Settings from the environment, with `overrides` before it.

        Raises `ConfigurationError` naming the setting, its value and what would be right.
        """
        try:
            return cls(**overrides)
        except ValidationError as error:
            raise ConfigurationError(_explain(error, overrides)) from None

    def override(self, **values: Any) -> Self:
        """These settings with some replaced; validated like all others."""
        return type(self).load(**{**self.model_dump(), **values}) if values else self


def _explain(error: ValidationError, given: dict[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        where = name if name in given else f"GRADWATCH_{name.upper()}"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"no such setting; there are {', '.join(Settings.model_fields)}"
        shown = "" if name == "store" else f" = {problem['input']!r}"
        lines.append(message if name == "store" == where else f"{where}{shown}: {message}")
    return "; ".join(lines)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: a name that was mistyped does nothing."""
    known = {f"GRADWATCH_{name.upper()}" for name in Settings.model_fields}
    return sorted(name for name in environ if name.startswith("GRADWATCH_") and name not in known)


def resolve_store(url: str) -> str:
    """The URL with a relative SQLite path made absolute, so that a later `chdir` changes nothing.

    A plain path (`runs/gradwatch.db`) is taken as an SQLite file.
    """
    if re.match(r"(?![a-zA-Z]:[\\/])(?!sqlite:)[^/:@]+:(?!//).*@", url, re.DOTALL):
        msg = "the store's URL lacks its scheme: right would be postgresql+psycopg://user@host/name"
        raise ConfigurationError(msg)
    if "://" not in url and re.search(r"(?:^|\s)(?:host|hostaddr|dbname|user|password)\s*=", url):
        msg = (
            "the store's URL is a connection string of PostgreSQL's own; right would be "
            "postgresql+psycopg://user@host/name"
        )
        raise ConfigurationError(msg)
    try:
        url.encode()  # no driver takes what is no text in UTF-8
        if "://" not in url and not url.startswith("sqlite:"):
            parsed = URL.create("sqlite", database=url)
        else:
            parsed = make_url(quoted(url))
    except (ArgumentError, ValueError):
        msg = (
            f"store {redact(url)!r} is not a database URL; right would be sqlite:///gradwatch.db or "
            "postgresql+psycopg://user@host/name, what is special in a password percent-encoded"
        )
        raise ConfigurationError(msg) from None
    if parsed.get_backend_name() not in {"sqlite", "postgresql"}:
        msg = (
            f"store {redact(url)!r}: a store is SQLite or PostgreSQL, "
            "as in sqlite:///gradwatch.db or postgresql+psycopg://user@host/name"
        )
        raise ConfigurationError(msg)
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            msg = f"store {redact(url)!r}: an SQLite store is a file, as in sqlite:///gradwatch.db"
            raise ConfigurationError(msg)
        path = Path(parsed.database).expanduser().absolute()
        parsed = parsed.set(database=os.path.normpath(path))
    return parsed.render_as_string(hide_password=False)


def sqlite_path(url: str) -> Path | None:
    """The database file of an SQLite URL; None for another database, or what is no URL."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database)
