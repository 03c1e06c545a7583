"""The learning rate is a pure function of the step with the values that the recipe promises."""

import pytest

from gpt2modern.training.schedules import DECAYS, Schedule, steps_from


def rate(step, schedule="cosine", **changes):
    settings = {"warmup_steps": 10, "max_steps": 110, "min_lr_ratio": 0.1} | changes
    return Schedule(schedule, **settings).factor(step)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)]
)
def test_cosine_values_at_chosen_steps(step, expected):
    assert rate(step) == pytest.approx(expected, abs=1e-12)


def test_linear_falls_in_a_straight_line():
    assert rate(35, "linear") == pytest.approx(0.1 + 0.9 * 0.75)


def test_constant_stays_at_the_peak_after_the_warmup():
    assert {rate(step, "constant") for step in (10, 50, 110)} == {1.0}


@pytest.mark.parametrize(
    ("decay_type", "expected"),
    [
        # at 85 a quarter of the decay's 20 steps has passed, at 90 a half, at 100 all
        ("linear", {4: 0.5, 10: 1.0, 80: 1.0, 85: 0.775, 90: 0.55, 100: 0.1}),
        ("1-sqrt", {4: 0.5, 10: 1.0, 80: 1.0, 85: 0.55, 90: 0.3636038969321073, 100: 0.1}),
        ("cosine", {4: 0.5, 10: 1.0, 80: 1.0, 85: 0.8681980515339464, 90: 0.55, 100: 0.1}),
    ],
)
def test_warmup_stable_decay_values_at_chosen_steps(decay_type, expected):
    found = {
        step: rate(step, "warmup_stable_decay", max_steps=100, decay_steps=20, decay_type=decay_type)
        for step in expected
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_speedruns_learning_rate_is_that_of_its_log():
    """3,000 steps, the last 900 of them a line to zero: (3000 - step) / 900."""
    settings = {"warmup_steps": 0, "max_steps": 3000, "decay_steps": 900, "decay_type": "linear", "min_lr_ratio": 0.0}
    assert [rate(step, "warmup_stable_decay", **settings) for step in (0, 2100, 2101, 2999)] == [
        1.0, 1.0, pytest.approx(899 / 900), pytest.approx(1 / 900),
    ]  # fmt: skip


def test_the_stable_part_does_not_depend_on_the_length_of_the_run():
    rates = [
        [rate(step, "warmup_stable_decay", max_steps=most, decay_steps=20) for step in range(80)] for most in (100, 900)
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_no_warmup_starts_at_the_peak(schedule):
    assert rate(0, schedule, warmup_steps=0) == 1.0


@pytest.mark.parametrize("decay", [decay for name, decay in DECAYS.items() if name != "constant"])
def test_every_decay_goes_from_one_to_zero(decay):
    assert (decay(0.0), decay(1.0)) == (1.0, 0.0)


def test_steps_may_be_given_as_a_share_of_the_run():
    assert [steps_from("warmup", *given, 1000) for given in ((None, None), (7, None), (None, 0.03))] == [None, 7, 30]
    with pytest.raises(ValueError, match=r"--warmup_steps 7 and --warmup_ratio 0.1"):
        steps_from("warmup", 7, 0.1, 1000)


def test_parts_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="30 warm-up steps and 80 decay steps are in total more than --max_steps 100"):
        Schedule("warmup_stable_decay", max_steps=100, warmup_steps=30, decay_steps=80)


def test_the_weights_of_later_tokens_fall_one_after_the_other():
    """Thirds of 30 steps: 0.25 falls to 0, then 0.5, then there are none."""
    schedule = Schedule("constant", max_steps=30, multi_token_prediction=[0.5, 0.25])
    expected = {0: [0.5, 0.25], 5: [0.5, 0.125], 10: [0.5, 0.0], 15: [0.25, 0.0], 20: [0.0, 0.0], 29: [0.0, 0.0]}
    assert {step: schedule.later_weights(step) for step in expected} == expected
    assert Schedule("constant", max_steps=30).later_weights(3) == []


def test_another_length_changes_the_weights_of_later_tokens():
    settings = {"lr_scheduler_type": "constant", "multi_token_prediction": [0.5]}
    assert not Schedule(max_steps=30, **settings).gave_the_same(Schedule(max_steps=40, **settings), 25)
    assert Schedule(max_steps=30, **settings).gave_the_same(Schedule(max_steps=30, **settings), 25)


def test_the_last_weights_are_averaged_equally():
    """After the n-th of them the mean moves by 1/n: the last 30 % of ten steps, and at least one."""
    schedule = Schedule("constant", max_steps=10, average_last=0.3)
    assert [schedule.average_weight(step) for step in range(10)] == [0] * 7 + [1, 1 / 2, 1 / 3]
    assert [Schedule("constant", 10, average_last=0.01).average_weight(step) for step in (8, 9)] == [0, 1]
    assert {Schedule("constant", 10).average_weight(step) for step in range(12)} == {0}


def test_a_ramp_lowers_the_rates_by_the_root_of_the_batch():
    """Thirds of eight steps begin at 0, 3 and 6. The record's factors for 1:2:3 are 1, 1.52 and 1.73 of the first."""
    schedule = Schedule("constant", max_steps=8, warmup_steps=2, batch_size_ramp=[1, 2, 4])
    assert [schedule.batch_share(step) for step in range(9)] == [0.25] * 3 + [0.5] * 3 + [1] * 3
    assert [schedule.factor(step) for step in (0, 1, 2, 3, 5, 6, 7)] == pytest.approx(
        [0.25, 0.5, 0.5, 0.5**0.5, 0.5**0.5, 1, 1]
    )
    factors = [Schedule("constant", 3, batch_size_ramp=[1, 2, 3]).factor(step) for step in range(3)]
    assert [factor / factors[0] for factor in factors] == pytest.approx([1, 1.41, 1.73], abs=0.01)


def test_windows_have_a_ramp_of_their_own():
    schedule = Schedule("constant", max_steps=4, sliding_window_ramp=[1, 2])
    assert [schedule.share([1, 2], step) for step in range(5)] == [0.5, 0.5, 1, 1, 1]
    assert {schedule.batch_share(step) for step in range(4)} == {schedule.factor(3)} == {schedule.share(None, 0)} == {1}


@pytest.mark.parametrize("ramp", ["batch_size_ramp", "sliding_window_ramp"])
def test_another_length_moves_the_parts_of_a_ramp(ramp):
    settings = {"lr_scheduler_type": "constant", ramp: [1, 2]}
    assert not Schedule(max_steps=8, **settings).gave_the_same(Schedule(max_steps=12, **settings), 7)
