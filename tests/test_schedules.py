"""The learning rate is a pure function of the step with the values that the recipe promises."""

import pytest

from training.schedules import SCHEDULES, learning_rate_factor


def rate(step, schedule="cosine", **changes):
    settings = {"warmup_steps": 10, "max_steps": 110, "min_lr_ratio": 0.1} | changes
    return learning_rate_factor(step, lr_scheduler_type=schedule, **settings)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)]
)
def test_cosine_values_at_chosen_steps(step, expected):
    assert rate(step) == pytest.approx(expected, abs=1e-12)


def test_linear_falls_in_a_straight_line():
    assert rate(35, "linear") == pytest.approx(0.1 + 0.9 * 0.75)


def test_constant_stays_at_the_peak_after_the_warmup():
    assert {rate(step, "constant") for step in (10, 50, 110)} == {1.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_warmup_starts_at_the_peak(schedule):
    assert rate(0, schedule, warmup_steps=0) == 1.0
