"""A policy read from text: what is none is told, and nothing is ever evaluated."""

import re

import pytest

from gradwatch import ClipNorm, SkipSpikes, TargetRatio
from gradwatch.errors import ConfigurationError
from gradwatch.policies import parse


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("TargetRatio(cap=3)", TargetRatio(cap=3.0)),
        (" clip=gradwatch.TargetRatio(0.05, 0.2) ", TargetRatio(0.05, 0.2)),
        ("SkipSpikes(policy=ClipNorm(1), sigma=5)", SkipSpikes(ClipNorm(1.0), sigma=5.0)),
    ],
)
def test_as_one_would_write_it(text, policy):
    """By position or by name."""
    assert parse(text) == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Clip(1.0)", "no policy is called 'Clip'; there are AdaptiveGradientClip"),
        ("TargetRatio(cup=3)", "TargetRatio has no 'cup'; it takes low, high, cap, initial"),
        ("TargetRatio(cap=-3)", "cap must be a finite number above 0"),
        ("ClipNorm(1, 2, 3)", "ClipNorm takes 2 arguments: max_norm, norm_type"),
        ("ClipNorm(1, max_norm=2)", "is no policy; write one as"),
        ("ClipNorm(**{'max_norm': 1})", "is no policy; write one as"),
        ("ClipNorm(max_norm=open('proof', 'w'))", "no policy is called 'open'"),
        ("ClipNorm(max_norm=[open('proof', 'w')])", "is no policy; write one as"),
        ("().__class__(1)", "no policy is called"),
        ("__import__('os').mkdir('proof')", "no policy is called"),
        ("(lambda: ClipNorm(1))()", "no policy is called"),
        ("ClipNorm(10 ** 10 ** 10)", "is no policy; write one as"),
        ("ClipNorm({[]: 1})", "is no policy; write one as"),
        ("ClipNorm", "is no policy; write one as"),
        ("0.8", "is no policy; write one as"),
        ("", "is no policy; write one as"),
        ("ClipNorm(" * 5000, "is no policy; write one as"),
        ("ClipNorm(1.0)\0", "is no policy; write one as"),
    ],
)  # fmt: skip
def test_what_is_none_is_told_and_not_run(text, words, tmp_path):
    """One line, with what would be right; the text touches nothing."""
    with pytest.raises(ConfigurationError, match=re.escape(words)) as told:
        parse(text)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "initial"),
    [
        ("PercentileClip(95)", 0.7),
        ("PercentileClip(95, 2, 1000, 100, 5)", 5.0),
        ("TargetRatio(initial=1)", 1.0),  # its default, but named
        ("SkipSpikes(TargetRatio(cap=3))", 0.7),
    ],
)
def test_a_first_threshold_that_is_not_named_may_be_given(text, initial):
    """By position or by name, the text's own comes first; others have none."""
    policy = parse(text, initial=0.7)
    assert getattr(policy, "policy", policy).initial == initial
    assert parse("ZClip()", initial=0.7) == parse("ZClip()")
