"""Statistics over seeds against scipy; means of a report."""

import numpy as np
import pytest
import scipy.stats

from envs import Episodes
from harness.metrics import (
    SAMPLED,
    SAMPLED_LENGTH,
    describe,
    interval,
    iqm,
    scalars,
    summarize,
    summarize_episodes,
)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_iqm_is_scipys_trimmed_mean(count, rng):
    values = rng.normal(size=(6, count))
    np.testing.assert_allclose(iqm(values), scipy.stats.trim_mean(values, 0.25, axis=1))


def test_the_interval_is_scipys_percentile_bootstrap(rng):
    values = rng.normal(size=20)
    how = {"method": "percentile", "n_resamples": 20_000}
    expected = scipy.stats.bootstrap((values,), lambda x, axis: iqm(x), **how).confidence_interval
    np.testing.assert_allclose(interval(values, resamples=20_000), expected, atol=0.02)


def test_scalars():
    metrics = {
        "eval/greedy_return": np.array([1.0, np.nan, 3.0]),
        "x": np.array(2.0),
        "y": np.array([np.nan]),
    }
    assert scalars(metrics) == {
        "eval/greedy_return": 2.0,
        "eval/greedy_return/seed_0": 1.0,
        "eval/greedy_return/seed_2": 3.0,
        "eval/greedy_return/iqm": 2.0,
        "eval/greedy_return/iqm_low": 1.0,
        "eval/greedy_return/iqm_high": 3.0,
        "x": 2.0,
    }


def test_summarize_divides_sums_by_what_they_count():
    sums = {
        "losses/entropy": np.array([3.0, 6.0]),
        "charts/episodic_return": np.array([50.0, 0.0]),
        "charts/episodes": np.array([5, 0]),
    }
    finite = {name: np.array([3, 3]) for name in sums}
    report = summarize(sums, finite, first=10, count=3, steps_per_update=8)
    np.testing.assert_array_equal(report["losses/entropy"], [1.0, 2.0])
    np.testing.assert_array_equal(report["charts/episodic_return"], [10.0, np.nan])
    np.testing.assert_array_equal(report["charts/episodes"], [5, 0])
    assert report.step == 13 * 8
    nothing = sums | {"charts/episodes": np.array([0, 0])}
    nothing = summarize(nothing, finite, first=10, count=3, steps_per_update=8)
    assert "charts/episodic_return" not in nothing and "losses/entropy" in nothing


def test_a_report_knows_the_update_in_which_a_loss_was_first_not_finite():
    sums = {"losses/a": np.array([1.0, np.nan]), "losses/b": np.array([1.0, 1.0])}
    sums |= {"charts/episodes": np.array([0, 0]), "charts/x": np.array([1.0, np.nan])}
    finite = {"losses/a": np.array([3, 1]), "losses/b": np.array([3, 3])}
    finite |= {"charts/episodes": np.array([3, 3]), "charts/x": np.array([3, 0])}
    first_nonfinite = summarize(sums, finite, first=10, count=3, steps_per_update=8).first_nonfinite
    assert first_nonfinite.keys() == {"losses/a", "losses/b"}
    np.testing.assert_array_equal(first_nonfinite["losses/a"], [0, 12])
    np.testing.assert_array_equal(first_nonfinite["losses/b"], [0, 0])


def test_evaluation_in_words_and_numbers():
    returns = np.array([[1.0, 3.0], [5.0, 7.0], [0.0, 0.0]])
    episodes = Episodes(returns, np.ones((3, 2)))
    means = summarize_episodes(episodes)["eval/greedy_return"]
    np.testing.assert_array_equal(means, [2.0, 6.0, 0.0])
    beginning = "greedy return over 2 episodes: "
    text = "median of 3 seeds 2.00, IQM 2.67 (95 % interval 0.00 to 6.00)"
    assert describe(episodes) == beginning + text + "; the seeds: 2.00 6.00 0.00"
    healthy = "median of 2 seeds 4.00, IQM 4.00 (95 % interval 2.00 to 6.00)"
    healthy = beginning + healthy + "; the seeds: 2.00 6.00 (1 diverged)"
    assert describe(episodes, {2: "story"}) == healthy
    single = Episodes(np.array([[4.0, 4.0]]), np.ones((1, 2)))
    assert describe(single) == beginning + "4.00 (95 % interval 4.00 to 4.00)"
    assert describe(episodes, {1: "a", 2: "b"}).endswith(" (2 diverged)")
    assert describe(single, policy="sampled").startswith("sampled return over 2 episodes: 4.00 ")
    assert summarize_episodes(single, "sampled").keys() == {SAMPLED, SAMPLED_LENGTH}


def test_what_an_environment_reports_of_its_episodes_is_evaluated_as_well():
    reports = {"first_trial_return": np.array([[1.0, 2.0], [5.0, 5.0], [0.0, 1.0]])}
    episodes = Episodes(np.ones((3, 2)), np.ones((3, 2)), reports)
    means = summarize_episodes(episodes, "sampled")["eval/sampled_first_trial_return"]
    np.testing.assert_array_equal(means, [1.5, 5.0, 0.5])
    assert describe(episodes, {1: "story"}).endswith("; first trial return 1.00 (1 diverged)")
