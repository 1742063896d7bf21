"""Where the pages' data comes from, and what they show while there is none."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, NoReturn

import streamlit as st

from gradwatch.config import Settings, redact
from gradwatch.errors import GradwatchError, StoreNotFoundError
from gradwatch_monitor.stalls import status
from gradwatch_monitor.store import Run, Store

__all__ = ["badge", "open_store", "plain", "tell_malformed", "telling"]

if TYPE_CHECKING:
    from collections.abc import Iterator

HOW_TO_START = """\
import gradwatch

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
gradwatch.wrap(optimizer, model=model, clip=gradwatch.ClipNorm(1.0), run="my-run")
# the loop stays as it was, without its own clip_grad_norm_
"""

_COLOURS = {
    "running": "blue",
    "finished": "green",
    "failed": "red",
    "crashed": "red",
    "silent": "orange",
    "stalled": "orange",
}


def open_store() -> Store:
    """The store of GRADWATCH_STORE; where it has no runs, the page says how to start and ends."""
    url = Settings.load().store
    try:
        store = Store(url)
        if not store.runs(limit=1):
            _empty(url)
    except StoreNotFoundError:
        _empty(url)
    except GradwatchError as error:
        st.error(plain(str(error)))
        st.stop()
    return store


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """What goes wrong in the block is told on the page, in a sentence; the rest of the page goes on."""
    try:
        yield
    except GradwatchError as error:
        st.error(plain(str(error)))
    except Exception as error:  # noqa: BLE001 - the border: Streamlit would show where in the code
        st.error(
            plain(
                f"This part of the page cannot be shown, by a fault of gradwatch itself "
                f"({type(error).__name__}: {error}). Please report it."
            )
        )


def tell_malformed(store: Store) -> None:
    """Say that some values of the store are taken as unknown, where any were met."""
    if store.malformed:
        st.warning(plain(f"{store.malformed.sentence[0].upper()}{store.malformed.sentence[1:]}."))


def _empty(url: str) -> NoReturn:
    st.title("No runs yet")
    st.write(f"{plain(redact(url))} has no run. Put one line into a training job:")
    st.code(HOW_TO_START, language="python")
    st.write("or train a small model on real data, watched from its first step:")
    st.code("gradwatch demo", language="bash")
    st.caption("This page looks again every two seconds.")
    _look_again()
    st.stop()


@st.fragment(run_every=2.0)
def _look_again() -> None:
    try:
        with Store(Settings.load().store) as store:
            there = bool(store.runs(limit=1))
    except GradwatchError:
        there = False
    if there:
        st.rerun()


def badge(store: Store, run: Run) -> None:
    """The run's status, coloured."""
    told = status(store, run)
    explained = {
        "silent": "It says that it runs, but has given no sign of life for a minute.",
        "stalled": "Its process lives, but has taken no step for far longer than usual.",
    }
    st.badge(told, color=_COLOURS.get(told, "gray"), help=explained.get(told))  # type: ignore[arg-type]


def plain(text: str) -> str:
    """Text as text: what Markdown would read as markup is escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:&])", r"\\\1", text)
