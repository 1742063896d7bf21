"""What is wrong with a run: one rule a function, `Window` → `Sign`, and the list of them all."""

from gradwatch_monitor.diagnosis import clipping, layers, numbers, rates, training
from gradwatch_monitor.diagnosis.window import Rule, Sign, Window

__all__ = ["RULES", "Rule", "Sign", "Window"]

RULES: tuple[Rule, ...] = (
    *numbers.RULES,
    *rates.RULES,
    *training.RULES,
    *clipping.RULES,
    *layers.RULES,
)
