"""Everything people look at: the command line, the demo, the Streamlit app."""
