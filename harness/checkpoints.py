"""Checkpoints: all that a run needs to go on, in its directory `checkpoints/`.

  <step>/      the arrays, written by orbax
  <step>.json  what is in them (shapes, dtypes), the score, and a checksum of every file

`step` counts environment steps. Orbax makes the directory appear only when it is complete, and the JSON file, without
which a checkpoint does not count, comes last: a process can be killed at any moment. Before a checkpoint is read its
files are compared with their checksums; a damaged one is reported and the one before it is used.
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


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run_dir: the run's directory.
      keep: how many of the last to keep; the best one by score is kept besides.
    """

    def __init__(self, run_dir, keep: int = 2):
        import orbax.checkpoint as ocp

        self.folder = Path(run_dir).absolute() / FOLDER
        self.keep = keep
        self.orbax = ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """The steps that there are complete checkpoints of, in order."""
        return sorted(
            int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal()
        )

    def save(self, state, step: int, score: float = math.nan, **notes) -> None:
        """Write a pytree of arrays (typed keys included), its score, and notes: whatever JSON holds.

        Raises:
          OSError: it could not be written; earlier checkpoints are as they were.
        """
        self._delete(step)
        leaves = named_leaves(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        size = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()) + 2**18
        )  # at most; orbax compresses
        if (
            shutil.disk_usage(self.folder).free < size
        ):  # orbax, if it runs out of space, says so on many pages
            raise OSError(
                errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, it takes up to {size / 2**20:,.1f} MiB"
            )
        try:
            with quiet_orbax():
                self.orbax.save(self.folder / str(step), leaves)
                self.orbax.wait_until_finished()
        except ValueError as error:  # tensorstore's way of saying that a file cannot be written
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                remove(unfinished)
            number = re.search(r"os_error_code='(\d+)'", str(error))
            raise OSError(
                *((int(number[1]), os.strerror(int(number[1]))) if number else (str(error),))
            ) from error
        about = {
            "score": None if math.isnan(score) else score,
            "notes": notes,
            "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()},
            "files": checksums(self.folder / str(step)),
        }
        text = json.dumps(about)
        with open(self.folder / "new", "w") as file:
            json.dump({"checksum": zlib.crc32(text.encode()), "about": text}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.folder / "new", self.folder / f"{step}.json")

        past = [
            saved for saved in self.steps() if saved <= step
        ]  # a run that fell back has no future yet
        kept = {*past[-self.keep :], *self._best(past)}
        for path in self.folder.iterdir():  # also what a killed process left
            if not path.stem.isdecimal() or int(path.stem) not in kept:
                remove(path)

    def restore(self, like, best: bool = False):
        """The last checkpoint that is whole, or the best one.

        Args:
          like: a pytree with the structure, shapes and dtypes of what was saved (`jax.eval_shape` will do).

        Returns:
          The state, its step, and its notes.

        Raises:
          UsageError: there is none, or it does not fit `like`.
        """
        steps = self.steps()[::-1]
        if not steps:
            raise UsageError(
                f"no checkpoint in {str(self.folder)!r}: the run did not come to its first evaluation"
            )
        for step in dict.fromkeys([*(self._best(steps) if best else ()), *steps]):
            try:
                about = self._verify(step)
            except (OSError, ValueError) as error:
                print(
                    f"warning: checkpoint {self.folder / str(step)} is damaged ({error}); not used",
                    file=sys.stderr,
                )
                continue
            return self._restore(step, about["leaves"], like), step, about["notes"]
        raise UsageError(f"every checkpoint in {str(self.folder)!r} is damaged")

    def _about(self, step) -> dict:
        file = self.folder / f"{step}.json"
        try:
            saved = json.loads(file.read_bytes())
            if zlib.crc32(saved["about"].encode()) != saved["checksum"]:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file.name} has changed") from None
        return json.loads(saved["about"])

    def _verify(self, step) -> dict:
        about = self._about(step)
        found = checksums(self.folder / str(step))
        for name, checksum in about["files"].items():
            if found.get(name) != checksum:
                raise ValueError(f"{name} {'has changed' if name in found else 'is missing'}")
        return about

    def _best(self, steps) -> list[int]:
        """The one with the highest score, if any has one."""
        scores = {}
        for step in steps:
            with contextlib.suppress(OSError, ValueError):  # damaged: `restore` will say so
                scores[step] = self._about(step)["score"]
        scored = [step for step, score in scores.items() if score is not None]
        return [max(scored, key=lambda step: (scores[step], step))] if scored else []

    def _restore(self, step, saved, like):
        where, wanted = self.folder / str(step), named_leaves(like)
        for name in sorted(saved.keys() ^ wanted.keys()):
            owner = "the checkpoint" if name in saved else "the state"
            raise UsageError(
                f"{where} is of another version of this script: only {owner} has {name}"
            )
        for name, leaf in wanted.items():
            was, now = saved[name], [list(leaf.shape), str(leaf.dtype)]
            if was != now:
                raise UsageError(
                    f"{where} does not fit: its {name} is {was[1]} {was[0]}, not {now[1]} {now[0]}"
                )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was saved
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
            for name, x in wanted.items()
        }
        leaves = self.orbax.restore(where, shapes)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])

    def _delete(self, step):
        for path in (self.folder / f"{step}.json", self.folder / str(step)):
            remove(path)

    def close(self) -> None:
        self.orbax.close()


@contextlib.contextmanager
def quiet_orbax():
    """Without the pages of tracebacks that orbax logs on the way to an error that is raised anyway."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def named_leaves(tree) -> dict:
    """The leaves of a pytree, in order, by their paths: "params/params/actor_head/kernel"."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file under `folder`."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                sums[str(path.relative_to(folder))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return sums


def remove(path: Path) -> None:
    """Delete a file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
