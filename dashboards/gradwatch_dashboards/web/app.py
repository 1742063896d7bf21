"""The Streamlit app: its pages. Started by `gradwatch ui`.

The pages lie beside it: a folder called pages would be taken for Streamlit's own kind of app.
"""

import streamlit as st

st.set_page_config(page_title="gradwatch", page_icon=":material/monitor_heart:", layout="wide")
pages = [
    st.Page("runs.py", title="Runs", icon=":material/list:", url_path="runs", default=True),
    st.Page("run.py", title="Run", icon=":material/show_chart:", url_path="run"),
]
st.html("<style>.stMainBlockContainer {padding-top: 4rem; padding-bottom: 3rem}</style>")
st.navigation(pages, position="top").run()
