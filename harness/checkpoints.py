"""Checkpoints: everything needed to continue a run, in its folder `checkpoints/`.

  <step>/      the arrays, written by orbax
  <step>.json  their names, shapes and dtypes, the score, and a checksum of every file

`step` counts environment steps. A process can be killed at any moment: orbax makes <step>/ appear
only when it is complete, and <step>.json, without which a checkpoint does not count, is written
last. Before a checkpoint is read, its files are compared with their checksums. A damaged one is
reported, and the one before it is used. One that cannot be read at the moment (too many open files,
a network that is down) is not damaged: nothing else is used in its place, and it is never deleted.
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
import tempfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp

from harness.errors import UsageError
from harness.processes import is_first, wait_for_all
from harness.run_dir import CHECKPOINTS_FOLDER, NEW, write_whole

UNFINISHED = ".orbax-checkpoint-tmp"  # what orbax appends to the name of what it still writes


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run_dir: the run's directory.
      keep: how many of the last checkpoints to keep; the one with the best score is kept as well.
    """

    def __init__(self, run_dir, keep: int = 2):
        import orbax.checkpoint as ocp

        self.folder = Path(run_dir).absolute() / CHECKPOINTS_FOLDER
        self.keep = keep
        self.damaged: set[int] = set()  # steps that `restore` has found damaged
        self.orbax = ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order.

        Raises:
          UsageError: the folder cannot be read.
        """
        try:
            return self._steps()
        except OSError as error:
            raise UsageError(f"{str(self.folder)!r} cannot be read: {error.strerror}") from None

    def save(self, state, step: int, score: float = math.nan, **notes) -> None:
        """Write a checkpoint and delete old ones. The run's directory must exist.

        Args:
          state: a pytree of arrays, also of typed keys.
          score: the higher the better; nan if there is none.
          **notes: anything that JSON can hold. `metrics_bytes`, the size of the record, and
            `diverged`, pairs of a seed and its story, are 0 and [] by default.

        Raises:
          OSError: it could not be written; earlier checkpoints are unchanged.
        """
        leaves = named_leaves(state)
        new = self.folder / f"{NEW}-{step}"
        if is_first():
            self.folder.mkdir(exist_ok=True)
            self._check_space(leaves)
            remove(new)
        wait_for_all("before a checkpoint")
        self._write_arrays(leaves, new)
        if is_first():
            self._complete(leaves, new, step, score, notes)
        self.damaged.discard(step)
        wait_for_all("after a checkpoint")

    def _complete(self, leaves, new, step, score, notes):
        """Make what orbax has written to `new` the checkpoint of a step."""
        about = {
            "score": None if math.isnan(score) else score,
            "notes": {"metrics_bytes": 0, "diverged": []} | notes,
            "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
            "files": checksums(new),
        }
        self._delete(step)
        os.rename(new, self.folder / str(step))
        self._write_about(about, step)
        self._delete_old(step)

    def restore(self, like, best: bool = False, where=None):
        """The last undamaged checkpoint, or with `best` the one with the best score.

        Args:
          like: a pytree with the structure, shapes and dtypes of the state that was saved, as
            `jax.eval_shape` returns it.
          where: a pytree like it of shardings; by default all is loaded to the first device here.

        Returns:
          The state, its step, and its notes.

        Raises:
          UsageError: there is no checkpoint, it cannot be read, or it does not fit `like`.
        """
        steps = self.steps()[::-1]
        if not steps:
            reason = "the run did not come to its first evaluation, or they were deleted"
            raise UsageError(f"no checkpoint in {str(self.folder)!r}: {reason}")
        try:
            candidates = [*self._best(steps), *steps] if best else steps
            for step in dict.fromkeys(candidates):  # without repetitions
                try:
                    about = self._verify(step)
                except ValueError as error:
                    self.damaged.add(step)
                    damage = f"checkpoint {self.folder / str(step)} is damaged ({error})"
                    print(f"warning: {damage}; not used", file=sys.stderr)
                    continue
                state = self._read_arrays(step, about["leaves"], like, where)
                return state, step, about["notes"]
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            failure = f"a checkpoint in {str(self.folder)!r} cannot be read: {reason}"
            raise UsageError(f"{failure}; it may be sound, so no other one is used") from None
        raise UsageError(f"every checkpoint in {str(self.folder)!r} is damaged")

    def shapes(self) -> dict[str, list[int]]:
        """The shapes of the arrays in the last checkpoint, by their paths; see `named_leaves`.

        Raises:
          ValueError: its list of arrays is damaged.
        """
        leaves = self._about(self.steps()[-1])["leaves"]
        return {name: shape for name, (shape, _) in leaves.items()}

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

    def _write_arrays(self, leaves, new):
        try:
            with orbax_can_read(self.folder) as folder:
                self.orbax.save(folder / new.name, filled(leaves))
                self.orbax.wait_until_finished()
                if is_first():  # for the others it may not be complete yet
                    self._check_readable(folder / new.name, leaves)
        except OSError:
            for unfinished in self.folder.glob(f"{NEW}-*"):
                remove(unfinished)
            raise

    def _check_readable(self, where, leaves):
        """Raise ValueError if orbax does not find these arrays; their data is not read."""
        metadata = self.orbax.metadata(where).item_metadata  # None if orbax finds no checkpoint
        found = {name: describe(leaf) for name, leaf in metadata.tree.items()} if metadata else {}
        for name, leaf in filled(leaves).items():
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.eval_shape(jax.random.key_data, leaf)
            if found.get(name) != describe(leaf):
                raise ValueError(f"it was written, but its {name} cannot be read back")

    def _write_about(self, about, step):
        text = json.dumps(about)
        checked = {"checksum": zlib.crc32(text.encode()), "about": text}
        write_whole(self.folder / f"{step}.json", json.dumps(checked))

    def _delete_old(self, step):
        """Keep the last checkpoints and the best one; delete what else was written by a run."""
        with contextlib.suppress(OSError):  # what cannot be read now is looked at the next time
            complete = self._steps()
            past = [saved for saved in complete if saved <= step and saved not in self.damaged]
            kept = {*past[-self.keep :], *self._best(past)}
            # Later ones are damaged, or else this run would have begun there.
            kept |= {saved for saved in complete if saved > step and not self._is_damaged(saved)}
            for path in list(self.folder.iterdir()):
                name = path.name.removesuffix(".json")
                is_unfinished = name.lstrip(".").startswith(NEW) or UNFINISHED in name
                if is_unfinished or (name.isdecimal() and int(name) not in kept):
                    remove(path)

    def _delete(self, step):
        remove(self.folder / f"{step}.json")
        remove(self.folder / str(step))

    # --- Reading -----------------------------------------------------------------------------

    def _steps(self) -> list[int]:
        """As `steps`, but raises OSError. (`Path.glob` takes what it cannot read for empty.)"""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _about(self, step) -> dict:
        """The contents of <step>.json; raises ValueError if it is damaged."""
        file = self.folder / f"{step}.json"
        try:
            saved = json.loads(file.read_bytes())
            if zlib.crc32(saved["about"].encode()) != saved["checksum"]:
                raise ValueError
            about = json.loads(saved["about"])
        except FileNotFoundError:
            raise ValueError(f"{file.name} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file.name} has changed") from None
        if not is_complete(about):
            raise ValueError(f"{file.name} is not complete")
        return about

    def _verify(self, step) -> dict:
        """The contents of <step>.json; raises ValueError if any file is damaged."""
        about = self._about(step)
        files = about["files"]
        found = checksums(self.folder / str(step))
        for name in sorted(files.keys() | found.keys()):
            if name not in found:
                raise ValueError(f"{name} is missing")
            if name not in files:
                raise ValueError(f"{name} is not one of its files")
            if found[name] != files[name]:
                raise ValueError(f"{name} has changed")
        return about

    def _is_damaged(self, step) -> bool:
        """Whether it was found damaged, by `restore` or now by a look at <step>.json."""
        if step not in self.damaged:
            try:
                self._about(step)
            except ValueError:
                self.damaged.add(step)
        return step in self.damaged

    def _best(self, steps) -> list[int]:
        """The step with the highest score, the last one if several have it; [] without scores."""
        scores = {}
        for step in steps:
            with contextlib.suppress(ValueError):  # damaged; `restore` reports it
                scores[step] = self._about(step)["score"]
        scored = [step for step, score in scores.items() if score is not None]
        return [max(scored, key=lambda step: (scores[step], step))] if scored else []

    def _read_arrays(self, step, saved, like, shardings):
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
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = named_leaves(shardings) if shardings else {}
        shapes = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=places.get(name, first_device)
            )
            for name, leaf in wanted.items()
        }
        try:
            with orbax_can_read(self.folder) as folder:
                leaves = self.orbax.restore(folder / where.name, filled(shapes))
        except (LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            # Orbax trusts its own files, but the checksums may be those of files that never were.
            raise OSError(f"orbax does not understand it ({error!r})") from None
        for name, leaf in shapes.items():
            if not leaf.size:
                leaves[name] = jnp.zeros(leaf.shape, leaf.dtype)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


@contextlib.contextmanager
def orbax_can_read(folder: Path):
    """A path of `folder` for orbax, which inside the block is quiet and raises OSErrors.

    Orbax finds its own files by patterns, so that it reads `[1]` in a path as `1`; tensorstore
    takes a backslash for a slash, and only UTF-8. Such a folder gets a link with a plain name.
    Errors of files reach Python as ValueErrors; orbax logs their tracebacks as well.
    """
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        with contextlib.ExitStack() as stack:
            if not has_plain_path(folder):
                place = next(filter(has_plain_path, (tempfile.gettempdir(), "/tmp")))
                place = stack.enter_context(tempfile.TemporaryDirectory(dir=place))
                link = Path(place) / CHECKPOINTS_FOLDER
                link.symlink_to(folder)
                folder = link
            yield folder
    except ValueError as error:
        if number := re.search(r"os_error_code='(\d+)'", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code)) from error
        raise OSError(str(error)) from error
    finally:
        logger.disabled = before


def has_plain_path(folder) -> bool:
    return bool(re.fullmatch(r"[\w/.,+=@ -]*", str(folder), re.ASCII))


def named_leaves(tree) -> dict:
    """The leaves of a pytree, in order, by their paths, as "params/params/actor_head/kernel"."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def describe(leaf) -> list:
    """Shape and dtype of an array, as JSON holds them: [[3, 4], "float32"]."""
    return [list(leaf.shape), str(leaf.dtype)]


def filled(leaves: dict) -> dict:
    """The leaves without those of size 0, which orbax refuses."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


def is_complete(about) -> bool:
    """Whether this is what `save` writes into <step>.json, all of it with the right types."""
    try:
        score, notes, leaves, files = (about[k] for k in ("score", "notes", "leaves", "files"))
        size, diverged = notes["metrics_bytes"], notes["diverged"]
        # The leading axis of every leaf is that of the seeds; not all of them have diverged.
        num_seeds = min(shape[0] for shape, _ in leaves.values()) if diverged else 1
        parts = (
            score is None or math.isfinite(score),
            type(size) is int and size >= 0,
            all(type(seed) is int and type(story) is str for seed, story in diverged),
            {seed for seed, _ in diverged} < set(range(num_seeds)),
            all(type(number) is int and number > 0 for number in notes.get("parts", ())),
            all(type(shape) is list and type(dtype) is str for shape, dtype in leaves.values()),
            files and all(type(checksum) is str for checksum in files.values()),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return False
    return all(parts)


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in `folder`, by its path from there; not of links and hidden files.

    Raises:
      OSError: something there cannot be read; if there is no such folder, it is empty.
    """

    def stop(error):
        if not isinstance(error, FileNotFoundError):
            raise error

    sums = {}
    for place, _, names in os.walk(folder, onerror=stop):
        for path in (Path(place) / name for name in names if name[0] != "."):
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
                sums[str(path.relative_to(folder))] = digest.hexdigest()
    return sums


def remove(path: Path) -> None:
    """Delete a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
