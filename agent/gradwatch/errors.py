"""Every exception that gradwatch raises, in one tree.

GradwatchError
├── ConfigurationError (ValueError)      an argument or setting that cannot be right
├── AlreadyWrappedError (RuntimeError)   the optimizer carries an agent
├── NotWrappedError (LookupError)        the optimizer carries none
├── NonFiniteGradientError (RuntimeError)  on_nonfinite="raise"
├── NotControllableError (RuntimeError)  a running job that cannot be changed from outside
├── RingError                            a flight-recorder file that cannot be used
├── GrafanaError                         a Grafana server that is out of reach, or refuses
└── StoreError                           the database
    ├── StoreNotFoundError (LookupError)   no store at that URL
    ├── StoreRevisionError               a schema this version does not know
    └── RunNotFoundError (LookupError)   no such run in the store
"""

from __future__ import annotations

__all__ = [
    "AlreadyWrappedError",
    "ConfigurationError",
    "GradwatchError",
    "GrafanaError",
    "NonFiniteGradientError",
    "NotControllableError",
    "NotWrappedError",
    "RingError",
    "RunNotFoundError",
    "StoreError",
    "StoreNotFoundError",
    "StoreRevisionError",
]


class GradwatchError(Exception):
    """The root of the tree."""


class ConfigurationError(GradwatchError, ValueError):
    """An argument or setting is wrong; the message names it, its value and what would be right."""


class AlreadyWrappedError(GradwatchError, RuntimeError):
    """`wrap` was called on an optimizer that already carries an agent."""


class NotWrappedError(GradwatchError, LookupError):
    """`Agent.of` was called on an optimizer that carries no agent."""


class NonFiniteGradientError(GradwatchError, RuntimeError):
    """A gradient held NaN or inf under `on_nonfinite="raise"`; the step was not applied.

    `step` is the optimizer step, `parameters` maps each non-finite parameter's name to
    "nan", "inf" or "nan+inf".
    """

    def __init__(self, message: str, *, step: int, parameters: dict[str, str]) -> None:
        super().__init__(message)
        self.step = step
        self.parameters = parameters


class NotControllableError(GradwatchError, RuntimeError):
    """A run is not live or does not allow it, or there is nothing to apply or to undo."""


class RingError(GradwatchError):
    """A flight-recorder file cannot be created, or is not one."""


class GrafanaError(GradwatchError):
    """A Grafana server could not be reached, or did not do what was asked of it."""


class StoreError(GradwatchError):
    """The store cannot be read or written."""


class StoreNotFoundError(StoreError, LookupError):
    """There is no store at that URL."""


class StoreRevisionError(StoreError):
    """The store's schema revision is not the one this version works with."""


class RunNotFoundError(StoreError, LookupError):
    """The store holds no run of that name, id or uid."""
