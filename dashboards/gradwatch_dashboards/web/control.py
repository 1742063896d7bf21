"""Apply and Undo on the run page: asked for, confirmed, then written for the running job to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from gradwatch.addresses import is_loopback
from gradwatch.errors import GradwatchError
from gradwatch_dashboards.terminal import number, user
from gradwatch_dashboards.web.source import plain
from gradwatch_monitor import applying, recommend
from gradwatch_monitor.applying import Proposal
from gradwatch_monitor.store import obstacle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch_monitor.applying import Outcome
    from gradwatch_monitor.recommend import Recommendation
    from gradwatch_monitor.store import Change, Run, Store

__all__ = ["panel"]

_ASKED, _FAILED = "proposal", "proposal failed"  # in the session: (run's uid, what)


def panel(
    store: Store, run: Run, recommendation: Recommendation, outcomes: Sequence[Outcome]
) -> None:
    """The two buttons, the question before either does anything, and what became of the last."""
    closed = obstacle(run) or _not_alone()
    nothing = applying.why_not(recommendation)
    last = applying.last_in_force([outcome.applied for outcome in outcomes])
    nothing_back = None if last else "Nothing was applied that could be undone."

    def propose(make: Callable[[], Proposal]) -> None:
        st.session_state.pop(_FAILED, None)
        try:
            st.session_state[_ASKED] = (run.uid, make())
        except GradwatchError as error:
            st.session_state[_FAILED] = (run.uid, str(error))

    with st.container(horizontal=True):
        st.button(
            "Apply",
            key="apply",
            icon=":material/check:",
            disabled=bool(closed or nothing),
            help=plain(closed or nothing or "Asks first; the job takes it at its next step."),
            on_click=propose,
            args=(lambda: applying.recommended(recommend(store, run.id)),),
        )
        st.button(
            "Undo",
            key="undo",
            icon=":material/undo:",
            disabled=bool(closed or nothing_back),
            help=plain(closed or nothing_back or "What was in force before the last change."),
            on_click=propose,
            args=(lambda: applying.undoing(store, run.id),),
        )
    if closed:
        st.caption(plain(f"Apply and Undo are off: {closed}."))
    asked, failed = (_of(run, key) for key in (_ASKED, _FAILED))
    if isinstance(asked, Proposal):
        _question(store, run, asked)
    if isinstance(failed, str):
        st.error(plain(failed))
    if requests := store.changes(run.id):
        _last(requests[0], {one.applied.change: one for one in outcomes})


def _question(store: Store, run: Run, proposal: Proposal) -> None:
    """What exactly is to be done to which job; nothing is written before the answer."""

    def answer(*, yes: bool) -> None:
        st.session_state.pop(_ASKED, None)
        if not yes:
            return
        try:
            proposal.ask(store, run.id, by=user(), reason="in the dashboard")
        except GradwatchError as error:
            st.session_state[_FAILED] = (run.uid, str(error))

    with st.container(border=True):
        now = number(store.summary(run.id).last_threshold)
        st.markdown(
            f"Change the running job **{plain(run.name)}** from **{plain(now)}** to "
            f"**{plain(str(proposal))}**, from its next step on?"
        )
        with st.container(horizontal=True):
            st.button(
                "Yes, change it", key="yes", type="primary", on_click=answer, kwargs={"yes": True}
            )
            st.button("No", key="no", on_click=answer, kwargs={"yes": False})


def _last(request: Change, outcomes: dict[int, Outcome]) -> None:
    """What became of the last request."""
    wanted = applying.wanted(request)
    if request.refused is not None:
        st.error(plain(f"The job did not take {wanted}: {request.refused}."))
    elif request.applied_step is None:
        st.info(plain(f"{wanted} is asked for; the job takes it at its next step."))
    elif request.id in outcomes:
        change = outcomes[request.id].applied
        st.success(
            plain(
                f"{number(change.old)} → {number(change.new)} from step {change.step:,} on, "
                f"by {change.by}; {outcomes[request.id]}."
            )
        )


def _of(run: Run, key: str) -> object:
    """What the session holds for this run."""
    uid, value = st.session_state.get(key, (None, None))
    return value if uid == run.uid else None


def _not_alone() -> str | None:
    """Whoever sees the page can press its buttons: not where others on the network see it."""
    address = str(st.get_option("server.address"))
    if is_loopback(address):
        return None
    return f"this page is bound to {address}, where others see it too; use `gradwatch apply`"
