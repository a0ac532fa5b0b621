"""Every destination is read back with the reader its users have."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from loggers import Logger, describe, make_logger, summarize, summarize_episodes


@dataclass
class Config:
    total_steps: int = 1000
    num_seeds: int = 3
    env: str = "gymnax::CartPole-v1"


METRICS = {"charts/episodic_return": np.array([20.0, np.nan, 40.0]), "charts/SPS": 1234.5}


def log_twice(names, run_dir):
    with make_logger(names, run_dir, Config()) as logger:
        logger.log(METRICS, step=500)
        logger.log({"eval/episodic_return": np.array([1.0, 2.0, 3.0])}, step=1000)


def test_file_is_strict_json_lines(tmp_path):
    log_twice(("file",), tmp_path)
    refuse = pytest.fail
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [500, 1000]
    assert lines[0]["charts/episodic_return"] == [20.0, None, 40.0] and lines[0]["charts/SPS"] == 1234.5
    assert 0 <= lines[0]["time"] <= lines[1]["time"]


def test_file_is_complete_before_it_is_closed(tmp_path):
    logger = make_logger(("file",), tmp_path, Config())
    logger.log(METRICS, step=500)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 500


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_twice(("tensorboard",), tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    value = lambda tag: [(event.step, event.value) for event in events.Scalars(tag)]  # noqa: E731
    assert value("charts/episodic_return") == [(500, 30.0)]
    assert value("charts/episodic_return/seed_2") == [(500, 40.0)]
    assert value("eval/episodic_return") == [(1000, 2.0)]
    assert "charts/episodic_return/seed_1" not in events.Tags()["scalars"]  # nan is absent
    assert b"CartPole-v1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_console_prints_a_line_per_report(tmp_path, capsys):
    log_twice(("console",), tmp_path)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert "return" in heading and "SPS" in heading
    assert "500  50%" in first and "30.00 ± 10.00" in first and "1,234" in first and "nan" not in first
    assert "1,000 100%" in second and "2.00 ± 0.82" in second
    assert len({len(line) for line in (heading, first, second)}) == 1


def test_console_columns_never_touch(tmp_path, capsys):
    huge = {"charts/episodic_return": [-12345.67, 0.0], "losses/value_loss": [1.234e9, 1.2], "charts/SPS": 98765432.1}
    with make_logger(("console",), tmp_path, Config()) as logger:
        logger.log(huge, step=500)
    line = capsys.readouterr().out.splitlines()[1]
    assert " 98,765,432 " in line and " -6172.84 ± 6172.84 " in line and " 6.2e+08 ± 6.2e+08 " in line


def test_a_failing_backend_is_dropped_and_the_rest_go_on(tmp_path, capsys):
    class Broken:
        def log(self, metrics, step):
            raise OSError("quota exceeded")

        def close(self):
            raise OSError("quota exceeded")

    logger = make_logger(("file",), tmp_path, Config())
    logger.backends.insert(0, Broken())
    logger.log(METRICS, step=1)
    logger.log(METRICS, step=2)
    logger.close()
    assert capsys.readouterr().err.count("Broken stopped: OSError('quota exceeded')") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_interrupt_closes_the_files_and_says_where_they_are(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), make_logger(("file",), tmp_path, Config()) as logger:
        raise KeyboardInterrupt
    assert f"interrupted; what was logged is in {tmp_path}" in capsys.readouterr().err
    assert logger.backends == []


def test_no_backend_is_a_logger_too():
    with Logger() as logger:
        logger.log(METRICS, step=1)


def test_summarize_divides_sums_by_what_they_count():
    sums = {
        "losses/entropy": np.array([3.0, 6.0]),
        "charts/episodic_return": np.array([50.0, 0.0]),
        "charts/episodes": np.array([5, 0]),
    }
    report = summarize(sums, num_updates=3)
    np.testing.assert_array_equal(report["losses/entropy"], [1.0, 2.0])
    np.testing.assert_array_equal(report["charts/episodic_return"], [10.0, np.nan])
    np.testing.assert_array_equal(report["charts/episodes"], [5, 0])
    nothing = summarize(sums | {"charts/episodes": np.array([0, 0])}, num_updates=3)
    assert "charts/episodic_return" not in nothing and "losses/entropy" in nothing


def test_evaluation_in_words_and_numbers():
    episodes = SimpleNamespace(returns=np.array([[1.0, 3.0], [5.0, 7.0], [0.0, 0.0]]), lengths=np.ones((3, 2)))
    np.testing.assert_array_equal(summarize_episodes(episodes)["eval/episodic_return"], [2.0, 6.0, 0.0])
    assert describe(episodes) == "greedy return over 2 episodes: 2.00 (median of 3 seeds: 2.00 6.00 0.00)"
