"""The Streamlit app: its pages. Started by `gradwatch ui`.

The pages lie beside it: a folder called pages would be taken for Streamlit's own kind of app.
"""

import streamlit as st

# Its own: a browser would fetch one of Streamlit's from the network.
_ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none"
stroke="#1f6fb4" stroke-width="2.4" stroke-linecap="round" stroke-linejoin="round">
<path d="M2 14h4l3-9 5 15 3-8h5"/></svg>"""

st.set_page_config(page_title="gradwatch", page_icon=_ICON, layout="wide")
pages = [
    st.Page("runs.py", title="Runs", icon=":material/list:", url_path="runs", default=True),
    st.Page("run.py", title="Run", icon=":material/show_chart:", url_path="run"),
]
st.html("<style>.stMainBlockContainer {padding-top: 4rem; padding-bottom: 3rem}</style>")
st.navigation(pages, position="top").run()
