"""Beside the job: read the store, recommend a threshold.

from gradwatch_monitor import Store, recommend

store = Store("sqlite:///gradwatch.db")
print(recommend(store, store.run("bilstm").id))
"""

from gradwatch_monitor.recommend import Recommendation, recommend
from gradwatch_monitor.store import Run, Store

__all__ = ["Recommendation", "Run", "Store", "recommend"]
