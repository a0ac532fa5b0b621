"""What is saved comes back exactly; what was damaged is noticed; what does not fit is refused."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment import UsageError
from harness import checkpoints as module
from harness.checkpoints import Checkpoints

TREE = {
    "params": {
        "kernel": jnp.arange(12.0).reshape(3, 4),
        "bias": jnp.array([jnp.nan, jnp.inf, -0.0]),
    },
    "counts": (jnp.int32(7), jnp.array([True, False]), jnp.arange(5, dtype=jnp.uint8)),
    "key": jax.random.split(jax.random.key(3), 2),
    "nothing": (),
    "empty": jnp.zeros((0, 3)),
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
    assert (step, notes) == (100, {"metrics_bytes": 42, "diverged": []})
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
    (checkpoints.folder / "new-7").mkdir()
    (checkpoints.folder / "8").mkdir()  # as before, but later: without its .json it does not count
    (checkpoints.folder / "notes.txt").write_text("the user's own")
    assert checkpoints.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})[0]["x"] == 2.0
    checkpoints.save({"x": jnp.array(3.0)}, 6)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "5",
        "5.json",
        "6",
        "6.json",
        "notes.txt",
    ]


def test_a_kill_while_a_checkpoint_is_written_loses_no_other_one(tmp_path, monkeypatch):
    """Also if it is of a step that has one: of a run that fell back, for example."""
    like = {"x": jax.ShapeDtypeStruct((), jnp.int32)}
    early = [(module.os, "rename"), (Checkpoints, "_check_readable")]  # the former by orbax
    early += [(module, "checksums"), (Checkpoints, "_delete")]
    late = [(Checkpoints, "_write_about"), (module.os, "replace")]
    for owner, name in early + late:
        (tmp_path / name).mkdir()
        for step in (2, 3):
            checkpoints = Checkpoints(tmp_path / name)
            for saved in (1, 2):
                checkpoints.save({"x": jnp.array(saved)}, saved)
            with monkeypatch.context() as patches, pytest.raises(SystemExit):
                patches.setattr(owner, name, lambda *_: sys.exit("killed"))
                checkpoints.save({"x": jnp.array(9)}, step)
            state, restored, _ = Checkpoints(tmp_path / name).restore(like)
            # The old one is there until the new one is complete.
            expected = 1 if step == 2 and (owner, name) in late else 2
            assert state["x"] == restored == expected
        checkpoints.save({"x": jnp.array(4)}, 4)
        assert sorted(os.listdir(checkpoints.folder)) == ["2", "2.json", "4", "4.json"]


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


def change_about(file, change):
    """Edit <step>.json so that its checksum is right."""
    saved = json.loads(file.read_bytes())
    text = json.dumps(change(json.loads(saved["about"])))
    file.write_text(json.dumps({"checksum": zlib.crc32(text.encode()), "about": text}))


@pytest.mark.parametrize(
    "change",
    [
        *(
            lambda about, name=name: {k: v for k, v in about.items() if k != name}
            for name in ("score", "notes", "leaves", "files")
        ),
        lambda about: about | {"files": {}},
        lambda about: about | {"files": dict(list(about["files"].items())[1:])},
        lambda about: about | {"notes": {"diverged": []}},
        lambda about: about | {"notes": {"metrics_bytes": -1, "diverged": []}},
        lambda about: about | {"notes": {"metrics_bytes": 1, "diverged": [["0", "x"]]}},
        lambda about: about | {"notes": {"metrics_bytes": 1, "diverged": [[0, "all of them"]]}},
        lambda about: about | {"score": "high"},
        lambda about: about | {"leaves": {"x": "float32"}},
        lambda about: [about],
    ],
)
def test_what_is_said_about_a_checkpoint_must_be_complete(change, tmp_path, capsys):
    """Above all its list of files: one that is not in it would not be compared."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"x": jnp.array(step)}, step, score=step)
    change_about(checkpoints.folder / "2.json", change)
    for best in (False, True):
        like = {"x": jax.ShapeDtypeStruct((), jnp.int32)}
        assert Checkpoints(tmp_path).restore(like, best)[1] == 1
    assert "2 is damaged (" in capsys.readouterr().err


# --- Paths, links and passing errors --------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "cwd [1] {a,b}*?%#~$HOME'\"ü文\n.",
        os.fsdecode(b"not unicode \xff"),  # and any that is, where the locale is ASCII
        "back\\slash",
        "gs:",
    ],
)
def test_a_path_may_have_any_characters(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(name)
    monkeypatch.chdir(tmp_path)
    Checkpoints(name).save(TREE, 1)
    for way in (name, tmp_path / name, "link"):
        loaded, *_ = Checkpoints(way).restore(SHAPES)
        np.testing.assert_array_equal(loaded["params"]["kernel"], TREE["params"]["kernel"])
    assert sorted(os.listdir(".")) == sorted([name, "link"])


def test_a_checkpoint_that_orbax_cannot_read_is_an_error_when_it_is_saved(tmp_path, monkeypatch):
    (tmp_path / "cwd [1]").mkdir()
    checkpoints = Checkpoints(tmp_path / "cwd [1]")
    checkpoints.save(TREE, 1)
    monkeypatch.setattr(module, "has_plain_path", lambda folder: True)
    with pytest.raises(OSError, match="it was written, but its .* cannot be read back"):
        checkpoints.save(TREE, 2)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "1.json"]


def test_nothing_outside_is_touched_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "precious").write_text("1")
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.folder.mkdir()
    for name in ("1", "2", "new-2", "new-1"):
        (checkpoints.folder / name).symlink_to(outside / "folder")
    (checkpoints.folder / "1.json").symlink_to(outside / "folder" / "precious")
    checkpoints.save({"x": jnp.array(1)}, 2)
    assert sorted(os.listdir(checkpoints.folder)) == ["2", "2.json"]
    assert (outside / "folder" / "precious").read_text() == "1"


@contextlib.contextmanager
def no_file_can_be_opened():
    """The limit of open files is reached: EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_cannot_be_read_for_a_moment_is_neither_damaged_nor_deleted(
    tmp_path, monkeypatch, capsys
):
    like = {"x": jax.ShapeDtypeStruct((), jnp.int32)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, score in ((100, 5.0), (200, 1.0), (300, 2.0)):
        checkpoints.save({"x": jnp.array(step)}, step, score)
    with no_file_can_be_opened(), pytest.raises(UsageError, match="Too many open files"):
        checkpoints.restore(like)  # an empty folder would be a run that begins again

    def fail_for(failing, function):
        def read(folder):
            if folder.name == failing:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return function(folder)

        return read

    with monkeypatch.context() as patches:
        patches.setattr(module, "checksums", fail_for("300", module.checksums))
        message = "cannot be read: Too many open files; it may be sound, so no other one is used"
        with pytest.raises(UsageError, match=message):
            checkpoints.restore(like)
    checkpoints.save({"x": jnp.array(250)}, 250, 1.0)
    assert checkpoints.steps() == [100, 250, 300]
    with monkeypatch.context() as patches:  # which one is the best is not known
        about = module.Checkpoints._about
        patches.setattr(
            module.Checkpoints,
            "_about",
            lambda self, step: fail_for("100", lambda _: about(self, step))(
                self.folder / str(step)
            ),
        )
        checkpoints.save({"x": jnp.array(350)}, 350, 1.0)
    assert checkpoints.steps() == [100, 250, 300, 350]
    checkpoints.save({"x": jnp.array(400)}, 400, 1.0)
    assert checkpoints.steps() == [100, 400]
    assert "damaged" not in capsys.readouterr().err


def test_a_run_directory_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        Checkpoints(tmp_path / "run").save(TREE, 1)
    assert not list(tmp_path.iterdir())


def test_there_may_be_none(tmp_path):
    reason = "the run did not come to its first evaluation, or they were deleted"
    with pytest.raises(UsageError, match=f"no checkpoint in .*: {reason}"):
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
