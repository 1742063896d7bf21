"""What the run page and the report have in common: their words and figures."""

__all__ = ["BAND", "VERDICTS", "WINDOW"]

BAND = (0.10, 0.30)  # of the clip ratio
WINDOW = 100  # steps
VERDICTS = {
    "keep": "keep the threshold",
    "change": "change the threshold",
    "not_needed": "clipping is not needed",
    "use_policy": "use a policy instead of a constant",
    "fix_training": "fix the training first",
    "not_enough_data": "not enough data yet",
}
