"""What makes two runs the same experiment."""

import dataclasses

import pytest

from harness.identity import (
    PLUMBING,
    differing_fields,
    experiment,
    seeds_of,
    versions_differ_in,
)
from harness.options import Experiment

CONFIG = {"env": "a", "env_kwargs": {"x": 1, "y": 2}, "mask": ["0"], "total_steps": 10, "lr": 0.1}


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"seed": 5, "num_seeds": 3, "run_dir": "b", "log": ["file"], "eval_every": 1}, True),
        ({"env_kwargs": {"y": 2, "x": 1}}, True),
        ({"mask": ("0",)}, True),  # of a run that is on; files have lists
        ({"env_kwargs": {"x": 1}}, False),
        ({"total_steps": 20}, False),
        ({"lr": 0.2}, False),
        ({"mask": []}, False),
        ({"new_option": 0}, False),  # of another version: rather apart than mixed
    ],
)
def test_runs_of_the_same_experiment(change, is_same):
    assert (experiment("ppo", CONFIG) == experiment("ppo", CONFIG | change)) is is_same
    fields = [] if is_same else [*change]
    assert differing_fields([CONFIG, CONFIG | change]) == fields


def test_the_script_is_part_of_an_experiment():
    assert experiment("ppo", CONFIG) != experiment("rppo", CONFIG)


def test_every_common_option_is_plumbing_or_part_of_the_experiment():
    names = {field.name for field in dataclasses.fields(Experiment)}
    assert names - PLUMBING <= {"total_steps", "init_from", "best"}


def test_seeds_of_a_run():
    assert list(seeds_of({"seed": 4, "num_seeds": 3})) == [4, 5, 6]


def test_versions_that_differ_are_named():
    one = {"replay.py": "1", "fast.py": "1"}
    assert versions_differ_in([one, one]) == []
    assert versions_differ_in([one, one | {"fast.py": "2"}, {"replay.py": "1"}]) == ["fast.py"]
