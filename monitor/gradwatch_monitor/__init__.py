"""Beside the job: read the store, recommend a threshold, say what is wrong.

from gradwatch_monitor import Store, diagnose, recommend

store = Store("sqlite:///gradwatch.db")
print(recommend(store, store.run("bilstm").id))
"""

from gradwatch_monitor.diagnose import diagnose
from gradwatch_monitor.recommend import Recommendation, recommend
from gradwatch_monitor.store import Finding, Run, Store

__all__ = ["Finding", "Recommendation", "Run", "Store", "diagnose", "recommend"]
