"""The runs page: every run of the store, the latest first."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import streamlit as st

from gradwatch_dashboards.web.source import open_store, plain, tell_malformed, telling
from gradwatch_monitor import views

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_OPEN = "run to open"  # in the session: the uid of the row that was clicked
store = open_store()
st.title("Runs")
st.caption(f"{plain(store.name)}: pick a run to see it.")


def opens(uids: Sequence[str], key: str) -> Callable[[], None]:
    """What a click on a row of the table does that shows these runs and has that key."""

    def clicked() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows:
            st.session_state[_OPEN] = uids[rows[0]]

    return clicked


@st.fragment(run_every=5.0)
def table() -> None:
    """The runs, looked at again every five seconds."""
    if (uid := st.session_state.pop(_OPEN, None)) is not None:
        st.switch_page("run.py", query_params={"run": f"uid:{uid}"})
    with telling():
        show()


def show() -> None:
    """The table; a row that is picked leads to its run."""
    frame = views.runs_table(store)
    tell_malformed(store)
    uids = frame["uid"].tolist()
    # A click tells the row's place among the rows that were shown. Other rows are another table, so
    # that a place is never looked up in rows that were read after the click.
    key = f"runs {hashlib.sha256(json.dumps(uids).encode()).hexdigest()}"
    st.dataframe(
        frame.drop(columns=["uid", "id"]),
        hide_index=True,
        height="content" if len(frame) < 20 else 740,
        on_select=opens(uids, key),
        selection_mode="single-row",
        key=key,
        column_config={
            "steps": st.column_config.NumberColumn(format="localized"),
            "last step": st.column_config.DatetimeColumn(
                "last step (UTC)", format="YYYY-MM-DD HH:mm:ss"
            ),
            "started": st.column_config.DatetimeColumn(
                "started (UTC)", format="YYYY-MM-DD HH:mm:ss"
            ),
        },
    )


table()
