"""Games of the Arcade Learning Environment as pure functions of a state, on all cores.

Before every step an emulator is set to the state to step from, unless it is in that state already;
after it the state is read back. Results therefore depend on the arguments only: states can be
stepped in any order, stored, and stepped again.

ale_py keeps Python's lock while it emulates, so that threads would take turns. Other processes,
one for each further core, emulate a share of the rows. They are started once enough has been
emulated to make up for it, and end with this process.

States are stored in checkpoints, which may come from a stranger. A state that is not of this game,
or broken, begins it anew.
"""

import atexit
import contextlib
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np

from harness.processes import num_cores

START_SECONDS = 0.3  # of emulation by this process; then the others are started
WARM_UP_FRAMES = 60  # after which all registers of the emulator have been set
FORGET_FRAMES = 8  # after which 3D Tic-Tac-Toe shows nothing of what was before
MAX_ROWS = 64  # that a process emulates between two messages

# --- A game in this process ----------------------------------------------------------------------


class Game:
    """A game, prepared as by ale_py's AtariVectorEnv, in one process.

    Attributes:
      actions: the number of actions.
      row: the dtype of a row, which `play` steps: what it is given, and what comes of it.
      emulator: the emulator.
      shrink: what makes small images of its screens.
    """

    def __init__(
        self, game: str, frameskip: int, full_action_space: bool, max_frames: int, size: int
    ):
        import ale_py

        self.emulator = Emulator(game, max_frames)
        ale = self.emulator.ale
        minimal = ale.getMinimalActionSet()
        self._actions = ale.getLegalActionSet() if full_action_space else minimal
        self._fire = ale_py.Action.FIRE
        self._can_fire = self._fire in minimal
        self.actions = len(self._actions)
        height, width = ale.getScreenDims()
        self.shrink = Shrink(height, width, size)
        self._screens = np.empty((2, height, width), np.uint8)  # of the last two frames
        self.row = np.dtype(
            [
                ("state", np.uint8, len(self.emulator.beginning)),
                ("action", np.int32, frameskip),
                ("frame", np.uint8, (size, size)),
                ("reward", np.float32),
                ("terminated", bool),
                ("truncated", bool),
            ]
        )

    def starts(self, number: int, fire: bool):
        """Frames and states to start from, see `Atari.starts`; to be called before `play`."""
        if fire and self._can_fire:
            self.emulator.ale.act(self._fire)
        frames = []
        states = []
        for _ in range(number):
            frames.append(self.shrink(self.emulator.ale.getScreenGrayscale()))
            states.append(np.frombuffer(self.emulator.read_state(), np.uint8))
            self.emulator.idle()
        for _ in range(WARM_UP_FRAMES):
            self.emulator.idle()
        return np.stack(frames), np.stack(states)

    def play(self, rows):
        """Step rows (n,) of the dtype `row` from their states by their actions, in place."""
        ale = self.emulator.ale
        states = rows["state"]
        frames = rows["frame"]
        for i, actions in enumerate(rows["action"].tolist()):
            self.emulator.restore(states[i].tobytes())
            reward, frames[i] = self._play(ale, actions)
            ends = ale.game_over(with_truncation=False), ale.game_truncated()
            states[i] = np.frombuffer(self.emulator.read_state(), np.uint8)
            rows["reward"][i] = reward
            rows["terminated"][i], rows["truncated"][i] = ends

    def _play(self, ale, actions):
        """Play actions, one for every frame; returns the reward and the frame to show."""
        *others, last_action = actions
        before, last = self._screens
        reward = sum([ale.act(self._actions[action]) for action in others])
        if others:
            ale.getScreenGrayscale(before)
        reward += ale.act(self._actions[last_action])
        ale.getScreenGrayscale(last)
        return reward, self.shrink(np.maximum(before, last) if others else last)


class Emulator:
    """An emulator of a game that knows which state it is in.

    A state is what the emulator serializes, and zeros behind it. Whether an emulator goes on from a
    state or is restored to it makes no difference, but for two games, whose states lack something:
    - The clock of the chip in the cartridge of Pitfall II is rounded.
    - 3D Tic-Tac-Toe thinks for longer than a frame, which is then shown as far as it was drawn,
      over an older one. Neither this nor the older frames are in the state.
    These are restored in every step, the second one after frames that are always the same.

    Attributes:
      ale: the emulator as ale_py makes it; `restore` comes before and `read_state` after its use.
      beginning: the state in which the game begins.
    """

    def __init__(self, game: str, max_frames: int):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        atexit.register(vars(self).clear)  # ale_py complains about emulators that outlive it
        self._load_state = ale_py.ALEState
        self._noop = ale_py.Action.NOOP
        self.ale.setInt("random_seed", 0)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("max_num_frames_per_episode", max_frames)
        self.ale.loadROM(ale_py.roms.get_rom_path(game))
        self.ale.reset_game()
        beginning = self.ale.cloneState().serialize()
        self.beginning = beginning.ljust(len(beginning) + 64, b"\0")  # states may grow
        self._checksum = slice(*re.search(rb"[0-9a-f]{32}", beginning).span())  # of the game
        self._shows_older_frames = game == "tic_tac_toe_3d"
        self._is_exact = not self._shows_older_frames and game != "pitfall2"
        self._state = None  # the state that need not be restored

    def idle(self):
        """Run a frame without an action."""
        self._state = None
        self.ale.act(self._noop)

    def restore(self, state: bytes):
        """Set the emulator to a state; one that is not of this game, or broken, begins it anew."""
        is_here = state == self._state
        self._state = None
        if is_here:
            return
        if self._shows_older_frames:
            self._load(self.beginning)
            for _ in range(FORGET_FRAMES):
                self.ale.act(self._noop)
        if state[self._checksum] != self.beginning[self._checksum]:
            state = self.beginning
        try:
            self._load(state)
        except Exception:  # ale_py has no type of its own for what it cannot read
            self._load(self.beginning)

    def read_state(self) -> bytes:
        """The state that the emulator is in."""
        state = self.ale.cloneState().serialize().ljust(len(self.beginning), b"\0")
        self._state = state if self._is_exact else None
        return state

    def _load(self, state):
        self.ale.restoreState(self._load_state(state))


class Shrink:
    """Shrink images; a new pixel is the mean of those it covers, also in part.

    It sums slices of the image, rows first. A product of matrices would start the threads of BLAS
    for every image, which takes many times as long as the sum. Columns are summed as the rows of
    the transposed image, as rows are next to each other in memory.
    """

    def __init__(self, height: int, width: int, size: int):
        """From (height, width) to (size, size) pixels."""
        self._rows = covered_pixels(height, size)
        self._columns = covered_pixels(width, size)

    def __call__(self, image):
        """An image (height, width) uint8 -> (size, size) uint8."""
        rows = weighted_sum(image, *self._rows)
        both = weighted_sum(np.ascontiguousarray(rows.T), *self._columns)
        return np.rint(both, out=both).astype(np.uint8).T


def covered_pixels(pixels: int, fewer: int):
    """The pixels that each of `fewer` pixels covers, when these take the place of `pixels`.

    Returns:
      Indices of pixels (parts, fewer) int, and how much each adds (parts, fewer, 1) float32.
    """
    edges = np.linspace(0, pixels, fewer + 1)
    left = edges[:-1, None]
    right = edges[1:, None]
    covered = left.astype(int) + np.arange(-(-pixels // fewer) + 1)
    share = np.minimum(right, covered + 1) - np.maximum(left, covered)
    share = (np.maximum(share, 0) * fewer / pixels).astype(np.float32).T
    covered = np.minimum(covered, pixels - 1).T
    counts = share.any(axis=1)
    return covered[counts], share[counts, :, None]


def weighted_sum(image, pixels, shares):
    """The sum of rows of an image (all pixels, n) times their shares: (fewer, n) float32."""
    total, *others = image.take(pixels, axis=0) * shares
    for part in others:
        total += part
    return total


# --- All rows, in several processes --------------------------------------------------------------


class Atari:
    """A game of the Arcade Learning Environment, prepared as by ale_py's AtariVectorEnv.

    A step runs `frameskip` frames and shows the greater of the last two (Machado et al. 2018, arXiv
    1709.06009), in grey, as `size` x `size` pixels, each the mean of the area it covers. The caller
    gives an action for every frame, and so decides about sticky actions: nothing here is random.

    Attributes:
      actions: the number of actions.
      state_size: bytes of the emulator's state.
    """

    def __init__(
        self,
        game: str,
        frameskip: int,
        full_action_space: bool,
        max_frames: int,
        size: int = 84,
    ):
        self._arguments = (game, frameskip, full_action_space, max_frames, size)
        self._game = Game(*self._arguments)
        self.actions = self._game.actions
        self.state_size = self._game.row["state"].shape[0]
        self._num_workers = num_cores() - 1 if os.name == "posix" else 0
        self._workers = None  # until they are started
        self._seconds = 0.0  # of emulation that others could have shared
        self._lock = threading.Lock()  # programs that run at the same time share the emulators

    def starts(self, number: int, fire: bool):
        """States that an episode may begin in: after 0, 1, ... number - 1 idle frames.

        To be called before anything else.

        Args:
          fire: press the fire button first, if the game has one.

        Returns:
          Frames (number, size, size) uint8, and states (number, state_size) uint8.
        """
        with self._lock:
            return self._game.starts(number, fire)

    def step(self, state, action):
        """Step every environment.

        Args:
          state: (..., state_size) uint8.
          action: (..., frameskip) int32, one for every frame.

        Returns:
          Frames (..., size, size) uint8, states (..., state_size) uint8, rewards (...) float32,
          terminated (...) bool, truncated (...) bool.
        """
        state = np.asarray(state)
        rows = np.empty(state.shape[:-1], self._game.row)
        rows["state"] = state
        rows["action"] = action
        flat = rows.reshape(-1)
        with self._lock:
            self._play(flat)
        names = ("frame", "state", "reward", "terminated", "truncated")
        return tuple(rows[name].copy() for name in names)

    def picture(self, state):
        """The screen in colour, (height, width, 3) uint8, one frame after `state`.

        A state does not contain its screen, so the emulator has to run for a frame.
        """
        with self._lock:
            emulator = self._game.emulator
            emulator.restore(np.asarray(state).tobytes())
            emulator.idle()
            return emulator.ale.getScreenRGB()

    def _play(self, rows):
        """Step rows in place, in all processes there are."""
        if len(rows) > 1 and self._workers is None and self._seconds > START_SECONDS:
            self._start_workers()
        workers = [worker for worker in self._workers or () if worker.is_ready()]
        share = min(-(-len(rows) // (len(workers) + 1)), MAX_ROWS)
        began = time.perf_counter()
        for first in range(0, len(rows), share * (len(workers) + 1)):
            parts = [
                rows[start : start + share]
                for start in range(first, len(rows), share)[: len(workers) + 1]
            ]
            own, *others = parts
            busy = list(zip(workers, others, strict=False))
            for worker, part in busy:
                worker.begin(part)
            self._game.play(own)
            for worker, part in busy:
                if not worker.end(part):
                    self._game.play(part)
        if len(rows) > 1:
            self._seconds += time.perf_counter() - began

    def _start_workers(self):
        self._workers = []
        with contextlib.suppress(OSError):
            for _ in range(self._num_workers):
                self._workers.append(Worker(self._game.row, self._arguments))


class Worker:
    """Another process that steps rows of a game.

    Rows are in memory that the processes share; a byte through a pipe says that it is the other's
    turn. The process ends when its pipe is closed, at the latest with this process.
    """

    def __init__(self, row, arguments):
        """Raises OSError if there can be no such process."""
        with tempfile.TemporaryFile() as file:
            file.write(bytes(MAX_ROWS * row.itemsize))  # an error now, if the disk is full
            file.flush()
            self._rows = np.frombuffer(mmap.mmap(file.fileno(), 0), row)
            # Ctrl-C is for whoever started it, which decides when to end.
            code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys; "
            code += "from env_adapters.host_atari import serve; serve(*sys.argv[1:])"
            paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    code,
                    str(file.fileno()),
                    json.dumps(arguments),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=[file.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
        self._stop = weakref.finalize(self, stop, self._process)
        self._is_ready = False

    def is_ready(self) -> bool:
        """Whether it is there to step rows: not while it starts, not after an error."""
        if not self._is_ready and self._stop.alive:
            os.set_blocking(self._process.stdout.fileno(), False)
            says = self._process.stdout.read(1)
            if says == b"":
                self._stop()
            elif says:
                os.set_blocking(self._process.stdout.fileno(), True)
                self._is_ready = True
        return self._is_ready

    def begin(self, rows):
        """Let it step rows, at most MAX_ROWS."""
        self._rows[: len(rows)] = rows
        with contextlib.suppress(OSError, ValueError):  # `end` finds that out
            self._process.stdin.write(bytes([len(rows)]))

    def end(self, rows) -> bool:
        """Wait, and copy what came of it into `rows`; False if the process is no more."""
        # It may have ended in an earlier turn of the same step.
        self._is_ready = self._stop.alive and bool(self._process.stdout.read(1))
        if self._is_ready:
            rows[:] = self._rows[: len(rows)]
        else:
            self._stop()
        return self._is_ready


def stop(process):
    """End a process at once."""
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def serve(file: str, arguments: str):
    """Be the other process: step as many rows as the byte says that arrives, until none does."""
    game = Game(*json.loads(arguments))
    game.starts(1, fire=True)
    rows = np.frombuffer(mmap.mmap(int(file), 0), game.row)
    sys.stdout.buffer.write(b"\0")
    sys.stdout.buffer.flush()
    while count := sys.stdin.buffer.read(1):
        game.play(rows[: count[0]])
        sys.stdout.buffer.write(count)
        sys.stdout.buffer.flush()
