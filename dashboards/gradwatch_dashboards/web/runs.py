"""The runs page: every run of the store, the latest first."""

import streamlit as st

from gradwatch_dashboards.web.source import open_store, plain
from gradwatch_monitor import views

store = open_store()
st.title("Runs")
st.caption(f"{plain(store.name)}: pick a run to see it.")


@st.fragment(run_every=5.0)
def table() -> None:
    """The runs, looked at again every five seconds."""
    frame = views.runs_table(store)
    picked = st.dataframe(
        frame.drop(columns="id"),
        hide_index=True,
        height="content" if len(frame) < 20 else 740,
        on_select="rerun",
        selection_mode="single-row",
        key="runs",
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
    rows = picked["selection"]["rows"]
    if rows:
        st.switch_page("run.py", query_params={"run": str(frame["id"].iloc[rows[0]])})


table()
