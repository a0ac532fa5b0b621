"""Environments of one's own: trained, resumed, tried; each fault has a sentence that names it."""

import json
import re
import signal
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import ROOT, as_command, check_conformance, random_rollout, records, sentence_of, tiny

from algorithms import ppo, rppo
from env_adapters.cli import Command, main
from env_adapters.host_own import KEPT, Host
from env_adapters.own import find
from env_adapters.registry import _make
from envs import Box, make
from experiment import Run
from harness.options import launch
from harness.run_dir import unused_name

README = ROOT / "env_adapters" / "README.md"

TASK = """
import jax
import jax.numpy as jnp
import numpy as np
from envs import Box, Discrete, Task

OPENED = "at import"

def walk(size: int = 3, slope=0.5, scale: float = 1, max_steps: int = 9) -> Task:
    def observe(place, wind):
        return jnp.array([place / size, wind], jnp.float32)

    def reset(key):
        state = {"place": jnp.int32(0), "wind": jax.random.uniform(key), "time": jnp.int32(0)}
        return observe(state["place"], state["wind"]), state

    def step(key, state, action):
        place = jnp.clip(state["place"] + action - 1, -size, size)
        wind = jax.random.uniform(key)
        time = state["time"] + 1
        terminated = jnp.abs(place) == size
        truncated = (time >= max_steps) & ~terminated
        obs = observe(place, wind)
        reward = place * slope * scale
        state = {"place": place, "wind": wind, "time": time}
        return obs, state, reward, terminated, truncated

    return Task(reset, step, Box(-1.0, 1.0, (2,)), Discrete(3), max_steps)
"""

GYMNASIUM = """
import gymnasium
import numpy as np
from gymnasium import spaces

class Guess(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, size: int = 3, length: int = 6, render_mode=None):
        self.observation_space = spaces.Box(-2.0, 2.0, (size,), np.float32)
        self.action_space = spaces.Discrete(size, start=1)
        self.render_mode = render_mode
        self.size, self.length = size, length

    def observe(self):
        self.goal = int(self.np_random.integers(self.size))
        obs = self.np_random.uniform(-1, 1, self.size).astype(np.float32)
        obs[self.goal] += 1
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        reward = float(action - 1 == self.goal)
        terminated = bool(self.np_random.random() < 0.1)
        obs = self.observe()
        return obs, reward, terminated, self.time >= self.length, {}

    def render(self):
        return np.full((8, 8, 3), self.time, np.uint8)
"""

DRAWN = """
import gymnasium
import numpy as np
from gymnasium import spaces

class Counted(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = spaces.Box(0.0, 99.0, (1,)), spaces.Discrete(2)
    made = steps = 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        Counted.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        Counted.steps += 1
        return np.full(1, self.time, np.float32), 0.0, False, self.time == 50, {}

    def render(self):
        return np.full((4, 4, 3), self.time, np.uint8)
"""

GYMNAX = """
import jax
import jax.numpy as jnp
from dataclasses import dataclass
from envs import Box, Discrete

class Drift:
    length = 7
    max_steps = 7

    def observation_space(self):
        return Box(0.0, 1.0, (2,))

    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        obs = jax.random.uniform(key, (2,))
        return obs, (obs, jnp.int32(0))

    def step(self, key, state, action):
        obs = jax.random.uniform(key, (2,)) * action
        return obs, (obs, state[1] + 1), state[0].sum(), obs[0] > 0.8, {}

drift = Drift()
"""

FILES = {"walk": TASK, "Guess": GYMNASIUM, "drift": GYMNAX}


# --- Broken ---------------------------------------------------------------------------------------

BROKEN_TASKS = [
    (
        "return jnp.array([place / size, wind], jnp.float32)",
        "return jnp.array([place / size, wind, 0.0])",
        "reset of my_env.py::walk returns an observation of shape (3,), observation_space has the "
        "shape (2,)",
    ),
    (
        "obs = observe(place, wind)",
        "obs = observe(place, wind)[:1]",
        "step of my_env.py::walk returns an observation of shape (1,), observation_space has",
    ),
    (
        "Box(-1.0, 1.0, (2,))",
        "Box(-1.0, 0.2, (2,))",
        "returns an observation outside of its space: entry 1 is 0.",
    ),
    (
        "Box(-1.0, 1.0, (2,))",
        "Box(0, 255, (2,), np.uint8)",
        "returns an observation of dtype float32, observation_space has the dtype uint8",
    ),
    ("Box(-1.0, 1.0, (2,))", "Box(-1.0, 1.0, (2,), np.int32)", "has the dtype int32, not float32"),
    (
        "Box(-1.0, 1.0, (2,))",
        "Discrete(4)",
        "reset of my_env.py::walk returns an observation of shape (2,), observation_space has the "
        "shape ()",
    ),
    ("Box(-1.0, 1.0, (2,))", "None", "observation_space of my_env.py::walk is missing: it must"),
    ("Discrete(3)", "3", "action_space of my_env.py::walk is a builtins.int, and must be a Box, D"),
    (
        "truncated = (time >= max_steps) & ~terminated",
        "truncated = terminated | (time >= max_steps)",
        "step of my_env.py::walk says both terminated and truncated, in step",
    ),
    (
        "(time >= max_steps) & ~terminated",
        "False",
        "an episode of my_env.py::walk has not ended after its max_steps = 9 steps",
    ),
    (
        '"wind": jax.random.uniform(key), "time"',
        '"wind": jax.random.uniform(jax.random.key(3)), "time"',
        "reset of my_env.py::walk draws random numbers, but gives the same result for every key",
    ),
    (
        '"wind": jax.random.uniform(key), "time"',
        '"wind": jnp.float32(np.random.random()), "time"',
        "reset of my_env.py::walk is not pure: the same key gave another observation the second",
    ),
    (
        "reward = place * slope * scale",
        "reward = place + np.random.random()",
        "step of my_env.py::walk is not pure: the same key, state and action gave another reward",
    ),
    (
        'state = {"place": place, "wind": wind, "time": time}\n',
        'state = {"place": place, "wind": wind}\n',
        "the state of my_env.py::walk has a part time after reset that is gone after step",
    ),
    (
        'state = {"place": place, "wind": wind, "time": time}\n',
        'state = {"place": place[None], "wind": wind, "time": time}\n',
        "the state of my_env.py::walk changes: place has the shape () after reset and (1,) after",
    ),
    (
        'state = {"place": place, "wind": wind, "time": time}\n',
        'state = {"place": place * 0.5, "wind": wind, "time": time}\n',
        "changes: place is int32 after reset and float32 after step, and would be rounded",
    ),
    ("slope * scale", "jnp.ones(2)", "returns a reward that is float32 of shape (2,), not one n"),
    (
        "place * slope * scale",
        "jnp.log(-1.0)",
        "step of my_env.py::walk returns a reward that is n",
    ),
    (
        "return obs, state, reward, terminated",
        "return obs, state, reward, jnp.float32(terminated)",
        "step of my_env.py::walk returns a terminated that is float32, not one True or False",
    ),
    (
        "reward, terminated, truncated\n",
        "reward, terminated\n",
        "returns 4 values, not the 5 of (o",
    ),
    (
        "wind = jax.random.uniform(key)\n",
        "wind = jax.random.uniform(key)\n        raise KeyError('wind')\n",
        "step of my_env.py::walk raises KeyError in my_env.py, line 20: 'wind'",
    ),
    (  # compiled once, its numbers are the same until the process ends
        "    def step(key, state, action):",
        "    @jax.jit\n    def step(key, state, action):\n        slope = np.random.random()",
        "step of my_env.py::walk is not pure: the same key, state and action gave another reward",
    ),
    (
        "wind = jax.random.uniform(key)\n",
        "wind = 1.0 if place > 0 else 0.0\n",
        "raises TracerBoolConversionError in my_env.py, line 19: Attempted boolean conversion of",
    ),
    (
        "Discrete(3), max_steps)",
        "Discrete(3), 9.5)",
        "max_steps of my_env.py::walk must be a whole",
    ),
    (
        "Discrete(3), max_steps)",
        "Discrete(3), max_steps, action_mask=lambda state: jnp.ones(2, bool))",
        "action_mask of my_env.py::walk must be bool of shape (3,), not bool of shape (2,)",
    ),
    (
        "Discrete(3), max_steps)",
        "Discrete(3), max_steps, action_mask=lambda state: jnp.arange(3) < 2 - state['time'])",
        "action_mask of my_env.py::walk allows nothing at step 2 of an episode",
    ),
    (
        "return Task(",
        "return (",
        "my_env.py::walk returns an object of type tuple; it must be a fun",
    ),
]
BROKEN_CLASSES = [
    (
        "spaces.Discrete(size, start=1)",
        "spaces.Text(size)",
        "action_space of my_env.py::Guess is a Text, not Discrete, MultiDiscrete, MultiBinary or a",
    ),
    (
        "spaces.Box(-2.0, 2.0, (size,), np.float32)",
        "spaces.Discrete(2)",
        "reset of my_env.py::Guess returns an observation of shape (3,), observation_space has the",
    ),
    (
        "spaces.Box(-2.0, 2.0, (size,), np.float32)",
        "spaces.Sequence(spaces.Discrete(2))",
        "observation_space of my_env.py::Guess is a Sequence, not a Box, Discrete, MultiDiscrete,",
    ),
    ("self.length = size,", "self.length = sizes,", "raises NameError in my_env.py, line 13: name"),
    (
        "self.observation_space =",
        "self.space =",
        "my_env.py::Guess has no observation_space: set self.observation_space to a space of",
    ),
    (
        "spaces.Discrete(size, start=1)",
        "spaces.Tuple((spaces.Discrete(2),))",
        "action_space of my_env.py::Guess is a Tuple, not Discrete, MultiDiscrete, MultiBinary or",
    ),
    ("(size,), np.float32)", "(2,), np.float32)", "of shape (3,), observation_space has the shape"),
    (
        "return self.observe(), {}",
        "return self.observe()",
        "must return (observation, info), as in",
    ),
    (
        "terminated, self.time >= self.length, {}",
        "terminated, {}",
        "returns 4 values, not the 5 of",
    ),
    ("reward = float(action - 1 == self.goal)", "reward = 'high'", "a reward that is 'high', not"),
    (
        "return obs, reward, terminated",
        "return obs, reward, 1.0",
        "a terminated that is 1.0, not T",
    ),
    (
        "self.np_random.uniform(-1, 1, self.size)",
        "np.random.uniform(-1, 1, self.size)",
        "reset of my_env.py::Guess is not pure: the same seed gave another observation the second",
    ),
    (
        "reward = float(action - 1 == self.goal)",
        "self.all = getattr(self, 'all', 0) + 1; reward = self.all",
        "is not pure: the same seed and actions gave another reward the second time; draw from",
    ),
    (
        "self.time += 1",
        "self.time += 1 if self.time < 3 else None",
        "my_env.py::Guess raises TypeError in my_env.py, line 27: unsupported operand type(s) for",
    ),
    ("spaces.Box(-2.0, 2.0", "spaces.Box(-2.0, 1.0", "outside of its space: entry "),
]

BROKEN_OBJECTS = [
    (
        "    def action_space",
        "    def actions",
        "my_env.py::drift has no action_space: gymnax' inter",
    ),
    (
        "return Box(0.0, 1.0, (2,))",
        "return 2",
        "observation_space of my_env.py::drift is a int, no",
    ),
    ("return Box(0.0, 1.0, (2,))", "return Box(0.0, 1.0, (3,))", "observation_space has the shape"),
    (
        "state[0].sum(), obs[0] > 0.8, {}",
        "state[0].sum()",
        "returns 3 values, not the 5 of (obs, st",
    ),
    (
        "state[0].sum(), obs[0] > 0.8",
        "state[0].sum(), obs > 0.8",
        "a terminated that is bool of sha",
    ),
    (
        "def reset(self",
        "def begin(self",
        "my_env.py::drift is of type Drift; it must be a function",
    ),
]


@pytest.mark.parametrize(
    ("text", "name", "right", "wrong", "message"),
    [
        *((TASK, "walk", *case) for case in BROKEN_TASKS),
        *((GYMNASIUM, "Guess", *case) for case in BROKEN_CLASSES),
        *((GYMNAX, "drift", *case) for case in BROKEN_OBJECTS),
    ],
)
def test_each_fault_is_named(text, name, right, wrong, message, write, capsys):
    assert right in text
    write(text.replace(right, wrong))
    assert message in sentence_of(capsys, f"my_env.py::{name}")


BAD = [
    ("my_env.py", "environment 'my_env.py' names only a file: write my_env.py::name"),
    ("my_env.py::wolk", "my_env.py has no 'wolk' (did you mean 'walk'?); it has: walk"),
    (
        "my_evn.py::walk",
        "'my_evn.py' cannot be read: No such file or directory (did you mean 'my_e",
    ),
    ("./my_env::walk", "'./my_env' is no Python file (did you mean './my_env.py'?): an environme"),
    ("no.such::walk", "there is no module 'no.such': 'no' is neither installed nor in '"),
    (
        "harness.such::walk",
        "there is no module 'harness.such': 'harness.such' is neither installed",
    ),
    ("my_env.py::OPENED", "my_env.py::OPENED is of type str; it must be a function that returns a"),
    (
        "my_env.py::walk --env-kwargs sizes 3",
        "my_env.py::walk has no option 'sizes' (did you mean 's",
    ),
    (
        "my_env.py::walk --env-kwargs size 0.5",
        "option size of my_env.py::walk must be int, got 0.5",
    ),
    (
        "my_env.py::walk --env-kwargs delay x",
        "option delay of my_env.py::walk must be int, got 'x'",
    ),
    (
        "my_env.py::needs",
        "needs its argument depth: give it with --env-kwargs depth VALUE, or give",
    ),
    ("my_env.py::needs --env-kwargs depth x", "option depth of my_env.py::needs must be int, got"),
    ("guess.py::Guess --env-kwargs render_mode human", "guess.py::Guess has no option 'render_mo"),
    ("my_env.py::needs --env-kwargs depth 7", "raises ValueError in my_env.py, line 31: not 7"),
    (
        "my_env.py::noisy",
        "argument noise of my_env.py::noisy needs another name: every environment",
    ),
    (
        "gymnx::CartPole-v1",
        "unknown environment namespace 'gymnx' in 'gymnx::CartPole-v1' (did you",
    ),
]
MORE = """
def needs(depth: int):
    raise ValueError(f"not {depth}")

def noisy(noise=3):
    return walk()
"""


@pytest.mark.parametrize(("args", "message"), BAD)
def test_what_cannot_be_found_or_made_is_named(args, message, write, capsys):
    write(TASK + MORE)
    write(GYMNASIUM, "guess.py")
    assert message in sentence_of(capsys, *args.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import math\nx = 1 / 0\n", "ZeroDivisionError in my_env.py, line 2: division by zero"),
        ("def f(:\n", " cannot be imported: SyntaxError in my_env.py, line 1: invalid synt"),
        (
            "import nothing_here\n",
            "ModuleNotFoundError in my_env.py, line 1: No module named 'noth",
        ),
        ("\nraise SystemExit(3)\n", "SystemExit in my_env.py, line 2: 3"),
    ],
)
def test_an_import_that_fails_is_named(text, message, write, capsys):
    write(text)
    assert message in sentence_of(capsys, "my_env.py::walk")
    (write(text).parent / "folder").mkdir()
    write(text, "folder/my_env.py")
    assert message in sentence_of(capsys, "folder.my_env::walk")


# --- Whole ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_one_that_keeps_the_contract_is_tried(name, write, capsys):
    write(FILES[name])
    args = (f"my_env.py::{name}", "--steps", "20", "--num-envs", "2")
    with as_command("envs", *args):
        launch(main, Command)
    assert re.search(r"contract +kept in [\d,]+ random steps of 4 env.*speed", words(capsys))


def test_actions_without_bounds_are_tried(write, capsys):
    """A uniform sample between infinite bounds would be nan."""
    text = TASK.replace("Discrete(3)", "Box(-np.inf, np.inf, ())").replace("+ action", "+ 0")
    write(text.replace("place * slope", "place + action"))
    with as_command("envs", "my_env.py::walk", "--steps", "20", "--num-envs", "2"):
        launch(main, Command)
    assert "mean return" in (text := words(capsys)) and "nan" not in text


def words(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", FILES)
def test_it_is_an_environment_like_any_other(name, write):
    file = write(FILES[name])
    env = make(f"{file}::{name}")
    check_conformance(env)
    *_, terminated, truncated, info = random_rollout(env, 100)
    assert terminated.any() and truncated.any() and not (terminated & truncated).any()
    assert info["episode_length"].max() == {"walk": 9, "Guess": 6, "drift": 7}[name]
    assert make(f"{file}::{name}") is env
    assert make(f"{file}::{name}", delay=1, time_limit=4).max_steps == 4


def test_options_reach_the_code(write):
    write(TASK)
    write(GYMNASIUM, "guess.py")
    write(
        "def any_of(**options):\n    import my_env\n    return my_env.walk(**options)\n", "far.py"
    )
    assert make("my_env.py::walk", max_steps=4).max_steps == 4
    assert make("far.py::any_of", max_steps=5).max_steps == 5  # it imports the file beside it
    env = make("guess.py::Guess", size=5, max_steps=3)
    assert env.observation_space.shape == (5,) and env.max_steps == 3
    write(GYMNASIUM + "class Other(Guess):\n    def __init__(self, **up): super().__init__(**up)\n")
    assert make("my_env.py::Other", size=4, max_steps=5).max_steps == 5
    cart = make("gymnax.environments.classic_control.cartpole::CartPole", max_steps_in_episode=9)
    assert cart.max_steps == 9
    key = jax.random.key(0)
    np.testing.assert_array_equal(cart.reset(key)[0], make("gymnax::CartPole-v1").reset(key)[0])


def test_arguments_are_the_users_own(write):
    """Their names and defaults mean what the user says, and max_steps is the limit."""
    longer = GYMNASIUM.replace("length: int = 6,", "length: int = 6, max_steps: int = 50,")
    write(longer.replace("size: int = 3,", "size: int = 3, frame_rate: float = 30.0,"))
    assert make("my_env.py::Guess").max_steps == 50
    env = make("my_env.py::Guess", max_steps=2000, frame_rate=60.0, length=0)
    assert env.max_steps == 2000
    with pytest.raises(ValueError, match="my_env.py::Guess has no option 'lenth'"):
        make("my_env.py::Guess", lenth=3)


def test_trials_are_not_for_classes_whose_seed_decides_all(write):
    write(GYMNASIUM)
    with pytest.raises(ValueError, match="its random numbers would be the same in every trial"):
        make("my_env.py::Guess", trials=3)
    write(TASK)
    assert make("my_env.py::walk", trials=3).max_steps == 27


def test_a_film_steps_an_object_of_its_own_once_a_frame(write):
    write(DRAWN)
    env = make("my_env.py::Counted")
    obs, state = env.reset(jax.random.key(0))
    states = [state.task]
    for _ in range(19):
        _, state, *_ = env.step(jax.random.key(0), state, 1)
        states.append(state.task)
    Counted = find("my_env.py::Counted")  # noqa: N806
    Counted.made, Counted.steps = 0, 0
    pictures = [env.render(jax.device_get(task))[0, 0, 0] for task in states]
    assert pictures == list(range(20)) and (Counted.made, Counted.steps) == (1, 19)
    assert env.render(jax.device_get(states[3]))[0, 0, 0] == 3
    assert (Counted.made, Counted.steps) == (1, 22)


def test_a_file_that_changed_is_another_environment(write):
    write(TASK)
    old = make("my_env.py::walk")
    write(TASK.replace("= 9", "= 8"))
    assert (old.max_steps, make("my_env.py::walk").max_steps) == (9, 8)


# --- Gymnasium's interface, by replay -------------------------------------------------------------


def test_a_state_is_replayed_where_no_object_is_there(write):
    """A program that has just been started computes what the first one did, whatever the order."""
    write(GYMNASIUM)

    def play(env):
        keys = jax.random.split(jax.random.key(0), 3)
        obs, state = jax.vmap(env.reset)(keys)
        results = [(obs, state)]
        for t in range(8):
            action = jax.numpy.array([t % 3, 1, 2])
            obs, state, reward, *rest = jax.vmap(env.step)(keys, state, action)
            results.append((obs, state, reward, *rest))
        return results

    env = make("my_env.py::Guess")
    results = play(env)
    _make.cache_clear()
    other = make("my_env.py::Guess")
    assert other is not env
    keys = jax.random.split(jax.random.key(0), 3)
    for t in (5, 2, 7, 2):
        action = jax.numpy.array([t % 3, 1, 2])
        again = jax.vmap(other.step)(keys, results[t][1], action)
        jax.tree.map(np.testing.assert_array_equal, again, results[t + 1])
    jax.tree.map(np.testing.assert_array_equal, play(env), results)


def test_any_bits_are_a_state(write):
    """The checkpoint of a stranger plays some episode, and no more than that."""
    write(GYMNASIUM)
    env = make("my_env.py::Guess")
    _, state = env.reset(jax.random.key(0))
    forged = jax.tree.map(lambda x: jax.numpy.full_like(x, 2**31 - 1), state.task)
    obs, *_ = env.step(jax.random.key(1), state._replace(task=forged), 0)
    assert np.isfinite(obs).all()


def test_few_objects_serve_many_episodes(write):
    """Also when there are not enough of them, and episodes have to be replayed."""
    write(GYMNASIUM)
    Guess = find("my_env.py::Guess")  # noqa: N806
    made = []

    def make_one():
        made.append(Guess())
        return made[-1]

    first = make_one()
    host = Host(make_one, first, Box(-2.0, 2.0, (3,)), first.action_space, max_steps=4)
    seeds = np.arange(5)
    for _ in range(3):
        host.reset(seeds)
        for time in range(4):
            actions = np.ones((5, 4), np.int32)
            host.step(seeds, np.full(5, time), actions, np.ones(5, np.int32))
    assert len(made) == 5

    crowd = np.arange(2 * KEPT)
    host.reset(crowd)
    assert len(made) <= KEPT + 5
    actions = np.ones((1, 4), np.int32)
    for seed in (0, 2 * KEPT - 1):  # one whose object was used again, and one that is there
        *_, obs = host.step(np.array([seed]), np.zeros(1, int), actions, np.ones(1, np.int32))
        fresh = Guess()
        fresh.reset(seed=seed)
        np.testing.assert_array_equal(obs[0], fresh.step(1)[0])


# --- Runs -----------------------------------------------------------------------------------------


def config_of(name, module=ppo, **changes):
    """The config of a run in one's own environment: six updates, an evaluation after three."""
    sizes = {"env": f"my_env.py::{name}", "env_kwargs": {}, "log": ("file",), "log_every": 2}
    config = tiny(module, **sizes | changes)
    steps = config.steps_per_update
    return replace(config, total_steps=6 * steps, eval_every=3 * steps)


@pytest.mark.parametrize("name", FILES)
def test_it_trains_and_resumes_exactly(name, write, monkeypatch):
    folder = write(FILES[name]).parent
    config = config_of(name, rppo)
    rppo.main(replace(config, run_dir="whole"))

    next_chunk = Run.next_chunk

    def stop(run, state):
        run.signal = signal.SIGTERM if int(state.updates[0]) == 5 else None
        return next_chunk(run, state)

    with monkeypatch.context() as patches, pytest.raises(SystemExit):
        patches.setattr(Run, "next_chunk", stop)
        rppo.main(replace(config, run_dir="broken"))
    if name == "Guess":
        _make.cache_clear()  # as in a new process: nothing is left of the episodes
    rppo.main(replace(config, resume="broken"))
    assert records(folder / "broken") == records(folder / "whole")
    about = json.loads((folder / "broken" / "config.json").read_text())
    assert f"my_env.py::{name}" in about["sources"]


def run(capsys, *args):
    """What ppo.py writes to the standard error, and its exit code."""
    code = 0
    with as_command("ppo", *args):
        try:
            launch(ppo.main, ppo.Config)
        except SystemExit as ended:
            code = ended.code
    return capsys.readouterr().err, code


TRAP = "\nimport pathlib\npathlib.Path('executed').touch()\n"


@pytest.fixture
def trained(write, capsys):
    """A run in `run` whose environment is a file that leaves a trace where it is executed."""
    file = write(TASK)
    ppo.main(replace(config_of("walk"), run_dir="run"))
    file.write_text(TASK + TRAP)
    capsys.readouterr()
    return file


def test_code_that_a_run_names_is_executed_only_for_those_who_name_it_too(trained, capsys):
    for option in ("--resume", "--evaluate", "--init-from"):
        for given in ((), ("--env", "gymnax::CartPole-v1")):
            error, code = run(capsys, option, "run", *given)
            fact = "error: the environment of 'run' is code in the file 'my_env.py'"
            assert error == f"{fact}: give --env my_env.py::walk again to run it\n" and code == 2
            assert not (trained.parent / "executed").exists()


def test_a_module_that_a_run_names_is_not_imported(trained, capsys):
    path = trained.parent / "run" / "config.json"
    path.write_text(path.read_text().replace('"my_env.py::walk"', '"trap.inner::walk"'))
    (trained.parent / "trap").mkdir()
    (trained.parent / "trap" / "__init__.py").write_text(TRAP)
    for option in ("--resume", "--evaluate"):
        error, code = run(capsys, option, "run")
        assert "is code in the module 'trap.inner': give --env trap.inner::walk again" in error
        assert code == 2 and "trap" not in sys.modules
    assert not (trained.parent / "executed").exists()


def test_another_version_of_the_file_is_noticed(trained, capsys):
    """As with the project's own sources: --resume refuses it, --evaluate goes on."""
    same = ("--env", "my_env.py::walk")
    error, code = run(capsys, "--resume", "run", *same)
    assert error == "error: 'run' was begun with another version of my_env.py::walk\n" and code == 2
    error, code = run(capsys, "--evaluate", "run", *same)
    assert "my_env.py::walk is not what 'run' was trained with: its code has changed" in error
    assert code == 0
    trained.write_text(TASK)
    error, code = run(capsys, "--evaluate", "run", *same)
    assert code == 0 and not error
    error, code = run(capsys, "--resume", "run", *same)
    assert code == 0 and not error


def test_a_run_without_a_name_gets_a_short_one(write):
    env = f"{write(TASK)}::walk"
    name = str(unused_name(replace(config_of("walk"), env=env), "ppo"))
    assert name.startswith("runs/my_env.py-walk__ppo__seed0__")


def test_the_template_of_the_readme_trains_at_once(write, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (template,) = [block for block in blocks if "def recall(" in block]
    assert 30 <= len(template.splitlines()) <= 45
    folder = write(template).parent
    with as_command("envs", "my_env.py::recall", "--steps", "20", "--num-envs", "2"):
        launch(main, Command)
    assert "contract     kept in 21 random steps" in capsys.readouterr().out
    ppo.main(replace(config_of("recall", env_kwargs={"size": 3}), run_dir="run"))
    assert list((folder / "run" / "checkpoints").iterdir())
