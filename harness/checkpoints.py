"""Checkpoints: everything needed to continue a run, in its folder `checkpoints/`.

  <step>/      the arrays, written by orbax
  <step>.json  their names, shapes and dtypes, the score, and a checksum of every file

`step` counts environment steps. A process can be killed at any moment: orbax makes <step>/ appear
only when it is complete, and <step>.json, without which a checkpoint does not count, is written
last. Before a checkpoint is read, its files are compared with their checksums. A damaged one is
reported, and the one before it is used.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import jax

from harness.errors import UsageError

FOLDER = "checkpoints"
UNFINISHED = "*.orbax-checkpoint-tmp*"  # what orbax names a checkpoint that it still writes


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run_dir: the run's directory.
      keep: how many of the last checkpoints to keep; the one with the best score is kept as well.
    """

    def __init__(self, run_dir, keep: int = 2):
        import orbax.checkpoint as ocp

        self.folder = Path(run_dir).absolute() / FOLDER
        self.keep = keep
        self.orbax = ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        paths = self.folder.glob("*.json")
        return sorted(int(path.stem) for path in paths if path.stem.isdecimal())

    def save(self, state, step: int, score: float = math.nan, **notes) -> None:
        """Write a checkpoint and delete old ones.

        Args:
          state: a pytree of arrays, also of typed keys.
          score: the higher the better; nan if there is none.
          **notes: anything that JSON can hold.

        Raises:
          OSError: it could not be written; earlier checkpoints are unchanged.
        """
        leaves = named_leaves(state)
        self._delete(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(leaves)
        self._write_arrays(leaves, step)
        about = {
            "score": None if math.isnan(score) else score,
            "notes": notes,
            "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
            "files": checksums(self.folder / str(step)),
        }
        self._write_about(about, step)
        self._delete_old(step)

    def restore(self, like, best: bool = False):
        """The last undamaged checkpoint, or with `best` the one with the best score.

        Args:
          like: a pytree with the structure, shapes and dtypes of the state that was saved, as
            `jax.eval_shape` returns it.

        Returns:
          The state, its step, and its notes.

        Raises:
          UsageError: there is no checkpoint, or it does not fit `like`.
        """
        steps = self.steps()[::-1]
        if not steps:
            reason = "the run did not come to its first evaluation"
            raise UsageError(f"no checkpoint in {str(self.folder)!r}: {reason}")
        candidates = [*self._best(steps), *steps] if best else steps
        for step in dict.fromkeys(candidates):  # without repetitions
            try:
                about = self._verify(step)
            except (OSError, ValueError) as error:
                damage = f"checkpoint {self.folder / str(step)} is damaged ({error})"
                print(f"warning: {damage}; not used", file=sys.stderr)
                continue
            return self._read_arrays(step, about["leaves"], like), step, about["notes"]
        raise UsageError(f"every checkpoint in {str(self.folder)!r} is damaged")

    def close(self) -> None:
        """Release what orbax holds."""
        self.orbax.close()

    # --- Writing -----------------------------------------------------------------------------

    def _check_space(self, leaves):
        """Orbax, when it runs out of space, says so on many pages, so this asks first."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        size += 2**18  # for the files around the arrays; orbax compresses, so it may need less
        if shutil.disk_usage(self.folder).free < size:
            reason = os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, f"{reason}, it takes up to {size / 2**20:,.1f} MiB")

    def _write_arrays(self, leaves, step):
        try:
            with quiet_orbax():
                self.orbax.save(self.folder / str(step), leaves)
                self.orbax.wait_until_finished()
        except ValueError as error:  # raised by tensorstore if a file cannot be written
            for unfinished in self.folder.glob(UNFINISHED):
                remove(unfinished)
            if number := re.search(r"os_error_code='(\d+)'", str(error)):
                code = int(number[1])
                raise OSError(code, os.strerror(code)) from error
            raise OSError(str(error)) from error

    def _write_about(self, about, step):
        text = json.dumps(about)
        new = self.folder / "new"
        with open(new, "w") as file:
            json.dump({"checksum": zlib.crc32(text.encode()), "about": text}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / f"{step}.json")

    def _delete_old(self, step):
        """Keep the last checkpoints and the best one; delete everything else in the folder."""
        # A run that went back to an earlier checkpoint has not reached the later steps again.
        past = [saved for saved in self.steps() if saved <= step]
        kept = {*past[-self.keep :], *self._best(past)}
        for path in self.folder.iterdir():  # a killed process may have left other files
            if not path.stem.isdecimal() or int(path.stem) not in kept:
                remove(path)

    def _delete(self, step):
        remove(self.folder / f"{step}.json")
        remove(self.folder / str(step))

    # --- Reading -----------------------------------------------------------------------------

    def _about(self, step) -> dict:
        """The contents of <step>.json; raises ValueError if it is damaged."""
        file = self.folder / f"{step}.json"
        try:
            saved = json.loads(file.read_bytes())
            if zlib.crc32(saved["about"].encode()) != saved["checksum"]:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file.name} has changed") from None
        return json.loads(saved["about"])

    def _verify(self, step) -> dict:
        """The contents of <step>.json; raises ValueError if any file is damaged."""
        about = self._about(step)
        found = checksums(self.folder / str(step))
        for name, checksum in about["files"].items():
            if name not in found:
                raise ValueError(f"{name} is missing")
            if found[name] != checksum:
                raise ValueError(f"{name} has changed")
        return about

    def _best(self, steps) -> list[int]:
        """The step with the highest score, the last one if several have it; [] without scores."""
        scores = {}
        for step in steps:
            with contextlib.suppress(OSError, ValueError):  # damaged; `restore` reports it
                scores[step] = self._about(step)["score"]
        scored = [step for step, score in scores.items() if score is not None]
        return [max(scored, key=lambda step: (scores[step], step))] if scored else []

    def _read_arrays(self, step, saved, like):
        """The arrays of a checkpoint in the structure of `like`; `saved`: their descriptions."""
        where = self.folder / str(step)
        wanted = named_leaves(like)
        for name in sorted(saved.keys() ^ wanted.keys()):
            owner = "the checkpoint" if name in saved else "the state"
            difference = f"only {owner} has {name}"
            raise UsageError(f"{where} is of another version of this script: {difference}")
        for name, leaf in wanted.items():
            was_shape, was_dtype = saved[name]
            shape, dtype = describe(leaf)
            if (was_shape, was_dtype) != (shape, dtype):
                difference = f"its {name} is {was_dtype} {was_shape}, not {dtype} {shape}"
                raise UsageError(f"{where} does not fit: {difference}")
        # Whatever device it was saved from, it is loaded to the first one here.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
            for name, leaf in wanted.items()
        }
        leaves = self.orbax.restore(where, shapes)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


@contextlib.contextmanager
def quiet_orbax():
    """Inside the block, orbax does not log the tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def named_leaves(tree) -> dict:
    """The leaves of a pytree, in order, by their paths, as "params/params/actor_head/kernel"."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def describe(leaf) -> list:
    """Shape and dtype of an array, as JSON holds them: [[3, 4], "float32"]."""
    return [list(leaf.shape), str(leaf.dtype)]


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in `folder`, by its path from there."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            sums[str(path.relative_to(folder))] = digest.hexdigest()
    return sums


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
