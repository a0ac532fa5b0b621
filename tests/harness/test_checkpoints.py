"""What is saved comes back exactly; what was damaged is noticed; what does not fit is refused."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment import UsageError
from harness.checkpoints import Checkpoints

TREE = {
    "params": {
        "kernel": jnp.arange(12.0).reshape(3, 4),
        "bias": jnp.array([jnp.nan, jnp.inf, -0.0]),
    },
    "counts": (jnp.int32(7), jnp.array([True, False]), jnp.arange(5, dtype=jnp.uint8)),
    "key": jax.random.split(jax.random.key(3), 2),
    "nothing": (),
}
SHAPES = jax.eval_shape(lambda: TREE)


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit flipped" and data:
        path.write_bytes(
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
        )
    elif how == "deleted":
        path.unlink()
    return data


def data(leaf):
    return (
        jax.random.key_data(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )


def test_everything_comes_back_exactly(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TREE, 100, score=1.5, metrics_bytes=42)
    loaded, step, notes = Checkpoints(tmp_path).restore(SHAPES)
    assert (step, notes) == (100, {"metrics_bytes": 42})
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    for actual, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(TREE), strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert np.asarray(data(actual)).tobytes() == np.asarray(data(expected)).tobytes()
    jax.random.normal(loaded["key"][0])  # a typed key again


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([1.0, 5.0, float("nan"), 3.0, 4.0]):
        checkpoints.save({"x": jnp.full(3, step)}, step, score)
    assert checkpoints.steps() == [1, 3, 4]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "1",
        "1.json",
        "3",
        "3.json",
        "4",
        "4.json",
    ]
    like = {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}
    assert checkpoints.restore(like)[1] == 4 and checkpoints.restore(like, best=True)[1] == 1


def test_a_step_can_be_saved_again_and_leftovers_disappear(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in (1.0, 2.0):
        checkpoints.save({"x": jnp.array(value)}, 5)
    (checkpoints.folder / "9.orbax-checkpoint-tmp").mkdir()  # of a process that was killed
    (checkpoints.folder / "8").mkdir()  # as before, but later: without its .json it does not count
    assert checkpoints.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})[0]["x"] == 2.0
    checkpoints.save({"x": jnp.array(3.0)}, 6)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "5",
        "5.json",
        "6",
        "6.json",
    ]


@pytest.mark.parametrize("how", ["cut", "bit flipped", "deleted"])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_used(how, tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(TREE, step)
    files = [path for path in (checkpoints.folder / "2").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in [*files, checkpoints.folder / "2.json"]:
        original = damage(path, how)
        if path.exists() and path.read_bytes() == original:  # empty
            continue
        assert checkpoints.restore(SHAPES)[1] == 1, path
        errors = capfd.readouterr().err
        if (
            path.name != "2.json" or how != "deleted"
        ):  # without it, it looks like one that was never finished
            assert "2 is damaged" in errors and errors.count("\n") == 1, errors
        path.write_bytes(original)
    assert checkpoints.restore(SHAPES)[1] == 2 and not capfd.readouterr().err


def test_a_run_that_fell_back_replaces_what_was_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save({"x": jnp.array(step)}, step)
    damage(checkpoints.folder / "3.json", "cut")
    checkpoints.save({"x": jnp.array(2)}, 2)
    assert checkpoints.steps() == [2]


def test_when_all_are_damaged(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TREE, 1)
    damage(checkpoints.folder / "1.json", "cut")
    with pytest.raises(UsageError, match="every checkpoint in .* is damaged"):
        checkpoints.restore(SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree | {"extra": tree["key"]},
            "another version of this script: only the state has extra",
        ),
        (
            lambda tree: {"params": tree["params"]},
            "another version of this script: only the checkpoint has counts/0",
        ),
        (
            lambda tree: (
                tree
                | {"params": tree["params"] | {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
            ),
            r"its params/kernel is float32 \[3, 4\], not float32 \[4, 4\]",
        ),
        (
            lambda tree: (
                tree | {"params": tree["params"] | {"bias": jax.ShapeDtypeStruct((3,), jnp.int32)}}
            ),
            r"its params/bias is float32 \[3\], not int32 \[3\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message, tmp_path):
    Checkpoints(tmp_path).save(TREE, 1)
    with pytest.raises(UsageError, match=message):
        Checkpoints(tmp_path).restore(change(SHAPES))


def test_there_may_be_none(tmp_path):
    with pytest.raises(
        UsageError, match="no checkpoint in .*: the run did not come to its first evaluation"
    ):
        Checkpoints(tmp_path).restore(SHAPES)
    assert not list(tmp_path.iterdir())  # looking leaves no trace


def test_a_checkpoint_loads_on_another_device(tmp_path):
    """Saved where there are two CPU devices, from the second one; loaded where there is one."""
    code = (
        "import jax; from harness.checkpoints import Checkpoints\n"
        "state = jax.device_put({'x': jax.numpy.arange(5.0)}, jax.devices()[1])\n"
        f"Checkpoints({str(tmp_path)!r}).save(state, 1)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    loaded, *_ = Checkpoints(tmp_path).restore({"x": jax.ShapeDtypeStruct((5,), jnp.float32)})
    np.testing.assert_array_equal(loaded["x"], np.arange(5.0))


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        checkpoints = Checkpoints(tmp_path)
        state = {"x": jax.random.normal(jax.random.key(0), (50_000,))}
        checkpoints.save(state, 1)
        (tmp_path / "filler").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 2**17))
        with pytest.raises(OSError, match="No space left on device, it takes up to 0.4 MiB"):
            checkpoints.save(state, 2)
        loaded, step, _ = checkpoints.restore(jax.eval_shape(lambda: state))
        assert step == 1
        np.testing.assert_array_equal(loaded["x"], state["x"])
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
