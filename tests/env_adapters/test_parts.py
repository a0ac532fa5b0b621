"""Observations with several parts, and actions with several parts, from environments to agents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, sentence_of

from env_adapters import host_own
from env_adapters.environment import Preprocessed
from env_adapters.task import as_joint, as_parts, parts_of
from envs import Box, Discrete, MultiDiscrete, Task, make
from harness.errors import UsageError
from replay import Transition

# --- Three kinds of environments, all alike -------------------------------------------------------

# What all of them show at a time t of an episode, and which actions they want.
OBSERVE = """
def observe(t, xp, unit, count):
    image = xp.zeros((4, 4, 1), xp.uint8) + xp.uint8(10 * t)
    vector = xp.stack([unit, unit * t]).astype(xp.float32)
    grid = xp.stack([count(t % 2 + 1), count(t % 3)])
    return {"image": image, "body": (vector, count(t % 3 + 2)), "grid": grid}
"""
TASK = (
    OBSERVE
    + """
import jax, jax.numpy as jnp
from envs import Box, Discrete, MultiDiscrete, Task

def make():
    def show(t):
        return observe(t, jnp, jnp.float32(0.5), lambda x: x)

    def reset(key):
        return show(jnp.int32(0)), jnp.int32(0)

    def step(key, t, action):
        reward = 10.0 * action[0] + action[1]
        return show(t + 1), t + 1, reward, False, t + 1 >= 4

    space = {
        "image": Box(0, 255, (4, 4, 1), jnp.uint8),
        "body": (Box(-9.0, 9.0, (2,)), Discrete(3, start=2)),
        "grid": MultiDiscrete((2, 3), start=(1, 0)),
    }
    return Task(reset, step, space, MultiDiscrete((3, 2), start=(1, 5)), 4)
"""
)
GYMNAX = (
    OBSERVE
    + """
import collections, jax, jax.numpy as jnp
from gymnasium import spaces as starting
from gymnax.environments import spaces

class Env:
    max_steps = 4

    def observation_space(self):
        body = spaces.Tuple([spaces.Box(-9.0, 9.0, (2,)), starting.Discrete(3, start=2)])
        grid = starting.MultiDiscrete([2, 3], start=[1, 0])
        image = spaces.Box(0, 255, (4, 4, 1), jnp.uint8)
        return spaces.Dict({"image": image, "body": body, "grid": grid})

    def action_space(self):
        return starting.MultiDiscrete([3, 2], start=[1, 5])

    def reset(self, key):
        return self.show(jnp.int32(0)), jnp.int32(0)

    def show(self, t):
        return collections.OrderedDict(observe(t, jnp, jnp.float32(0.5), lambda x: x))

    def step(self, key, t, action):
        return self.show(t + 1), t + 1, 10.0 * action[0] + action[1], False, {}

make = Env()
"""
)
GYMNASIUM = (
    OBSERVE
    + """
import gymnasium, numpy as np
from gymnasium import spaces

class make(gymnasium.Env):
    def __init__(self):
        body = spaces.Tuple((spaces.Box(-9.0, 9.0, (2,)), spaces.Discrete(3, start=2)))
        self.observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (4, 4, 1), np.uint8),
            body=body,
            grid=spaces.MultiDiscrete([2, 3], start=[1, 0]),
        )
        self.action_space = spaces.MultiDiscrete([3, 2], start=[1, 5])

    def show(self):
        return observe(self.t, np, np.float32(0.5), np.int64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        return self.show(), float(10 * action[0] + action[1]), False, self.t >= 4, {}
"""
)
KINDS = {"task": TASK, "gymnax": GYMNAX, "gymnasium": GYMNASIUM}


@pytest.fixture
def write_make(write):
    """Write a file with a function `make`; returns the environment's name."""

    def write_make(text):
        write(text)
        return "my_env.py::make"

    return write_make


def shown(t):
    """What an agent is to see at time t."""
    vector = np.array([0.5, 0.5 * t], np.float32)
    grid = np.concatenate([np.eye(2)[t % 2], np.eye(3)[t % 3]]).astype(np.float32)
    image = np.full((4, 4, 1), 10 * t, np.uint8)
    return {
        "image": image,
        "body": (vector, np.eye(3, dtype=np.float32)[t % 3]),
        "grid": grid,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_parts_arrive_as_vectors_images_and_one_hot_integers(kind, write_make):
    env = make(write_make(KINDS[kind]))
    obs, state = env.reset(jax.random.key(0))
    assert_same(obs, shown(0))
    space = env.observation_space
    jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype) or pytest.fail(), obs, space)
    assert env.action_space.nvec == (3, 2) and env.action_space.start == ()
    assert env.task_action_space.start == (1, 5)
    step = jax.jit(env.step)
    for t in range(1, 6):
        action = jnp.array([t % 3, t % 2])
        obs, state, reward, terminated, truncated, info = step(jax.random.key(t), state, action)
        assert reward == 10 * (t % 3 + 1) + t % 2 + 5  # the task's own numbers
        assert truncated == (t == 4) and not terminated
        time = t if t <= 4 else t - 4
        assert_same(info["final_obs"], shown(time))  # also where the episode was truncated
        assert_same(obs, shown(time % 4))


@pytest.mark.parametrize("kind", KINDS)
def test_one_action_can_stand_for_all_parts(kind, write_make):
    env = make(write_make(KINDS[kind]), joint_actions=True)
    assert isinstance(env.action_space, Discrete) and env.action_space.n == 6
    _, state = env.reset(jax.random.key(0))
    for joint in range(6):
        first, second = np.unravel_index(joint, (3, 2))
        reward = env.step(jax.random.key(1), state, joint)[2]
        assert reward == 10 * (first + 1) + second + 5
        np.testing.assert_array_equal(env.to_task(joint), [first + 1, second + 5])
        assert env.from_task(jnp.array([first + 1, second + 5])) == joint


def test_joint_actions_are_numbered_like_numpys(rng):
    space = MultiDiscrete((4, 3, 2))
    for action in range(24):
        parts = as_parts(jnp.int32(action), space)
        np.testing.assert_array_equal(parts, np.unravel_index(action, (4, 3, 2)))
        assert as_joint(parts, space) == action


# --- What is refused ------------------------------------------------------------------------------


FAULTS = [
    (
        "gymnasium",
        "spaces.Box(-9.0, 9.0, (2,))",
        "spaces.Text(3)",
        "is a Text, not a Box, Discrete",
    ),
    (
        "gymnasium",
        "spaces.Box(-9.0, 9.0, (2,))",
        "spaces.Sequence(spaces.Discrete(2))",
        "is a Sequence, not a Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of",
    ),
    (
        "gymnasium",
        "spaces.Box(-9.0, 9.0, (2,))",
        "spaces.Graph(spaces.Discrete(2), None)",
        "is a Graph, not a Box",
    ),
    (
        "gymnasium",
        "spaces.Box(-9.0, 9.0, (2,))",
        "spaces.OneOf([spaces.Discrete(2)])",
        "is a OneOf, not a Box",
    ),
    (
        "gymnasium",
        "return self.show(), float",
        "return {'image': 0}, float",
        "step of my_env.py::make returns an observation that has no part body.0, and observation",
    ),
    (
        "gymnasium",
        "xp.uint8(10 * t)",
        "10.5 * t",
        "an observation whose part image is of dtype float64, observation_space says the dtype u",
    ),
    (
        "task",
        "return show(t + 1), t",
        "return show(t + 1) | {'image': jnp.zeros(3)}, t",
        "an observation whose part image is of shape (3,), observation_space says the shape (4,",
    ),
    (
        "task",
        "return show(t + 1), t",
        "return {'grid': show(t)['grid']}, t",
        "an observation with the parts grid, observation_space has body.0 and body.1 and grid",
    ),
    (
        "task",
        "Discrete(3, start=2)",
        "Discrete(3)",
        "an observation whose part body.1 is outside of its space: it is ",
    ),
    ("task", '"grid": MultiDiscrete', '"gr.id": MultiDiscrete', "must be a text without dots, got"),
    (
        "task",
        "start=(1, 5)), 4)",
        "start=(1, 5)), 4, action_mask=lambda t: jnp.ones(3, bool))",
        "action_mask of my_env.py::make is for Discrete actions, and these are a MultiDiscrete",
    ),
]


@pytest.mark.parametrize(("kind", "right", "wrong", "message"), FAULTS)
def test_what_no_agent_can_read_is_refused_in_one_sentence(
    kind, right, wrong, message, write_make, capsys
):
    assert right in KINDS[kind]
    write_make(KINDS[kind].replace(right, wrong))
    assert message in sentence_of(capsys, "my_env.py::make", "--steps", "5")


def test_more_joint_actions_than_a_network_has_values_for_are_refused(write_make):
    name = write_make(
        TASK.replace("MultiDiscrete((3, 2), start=(1, 5))", "MultiDiscrete((128, 2))")
    )
    assert make(name, joint_actions=True).action_space.n == 256
    name = write_make(
        TASK.replace("MultiDiscrete((3, 2), start=(1, 5))", "MultiDiscrete((257, 1))")
    )
    assert make(name).action_space.nvec == (257, 1)
    with pytest.raises(
        ValueError, match="257 x 1 = 257 combinations, joint_actions is for at most"
    ):
        make(name, joint_actions=True)


# --- Wrappers -------------------------------------------------------------------------------------


def played(name, steps=6, **options):
    """The environment, and its observations as rows of arrays."""
    env = make(name, **options)

    def step(state, key):
        obs, state, *_ = env.step(key, state, jnp.zeros(2, int))
        return state, obs

    first, state = env.reset(jax.random.key(0))
    _, later = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(1), steps)))(
        state
    )
    rows = jax.tree.map(lambda x, y: np.concatenate([x[None], y]), first, later)
    jax.tree.map(
        lambda x, s: (x.shape[1:], x.dtype) == (s.shape, s.dtype) or pytest.fail(f"{x} {s}"),
        rows,
        env.observation_space,
    )
    return rows


def test_wrappers_treat_every_part(write_make):
    name = write_make(TASK)
    plain = played(name)
    late = played(name, delay=1)
    np.testing.assert_array_equal(late["image"][1:4], plain["image"][:3])
    np.testing.assert_array_equal(late["body"][0][1:4], plain["body"][0][:3])
    stacked = played(name, frame_stack=2)
    assert stacked["image"].shape == (7, 4, 4, 2) and stacked["grid"].shape == (7, 10)
    np.testing.assert_array_equal(stacked["image"][3, ..., 0], plain["image"][2, ..., 0])
    np.testing.assert_array_equal(stacked["grid"][3, 5:], plain["grid"][3])
    hidden = played(name, flicker=0.5, steps=40)
    dark = [~x.reshape(41, -1).any(axis=1) for x in (hidden["body"][1], hidden["grid"])]
    np.testing.assert_array_equal(*dark)  # all parts at once
    assert dark[0].any() and not dark[0].all()
    noisy = make(name, mask=("image",), noise=0.1)
    assert noisy.observation_space["image"] is None
    with pytest.raises(ValueError, match="noise is not for images of whole numbers, which my_env"):
        make(name, noise=0.1)
    trials = played(name, trials=2)
    np.testing.assert_array_equal(trials[1][:, 0], [1, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(trials[0]["image"][:4], plain["image"][:4])


def test_mask_hides_parts_and_entries(write_make):
    name = write_make(TASK)
    plain = played(name)
    rows = played(name, mask=("image", "body.0.1"))
    assert rows["image"] is None
    np.testing.assert_array_equal(rows["body"][0], plain["body"][0][:, :1])
    assert parts_of(make(name, mask=("body",)).observation_space).keys() == {"image", "grid"}
    for mask, message in [
        (("body.0.2",), r"unknown mask 'body.0.2' .*its parts body.0, body.1, grid, image, or an"),
        (("imag",), r"unknown mask 'imag' \(did you mean 'image'\?\)"),
        (("image", "body", "grid"), "mask image body grid hides the whole observation"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(name, mask=mask)


def test_vectors_are_normalised_and_images_are_not(write_make):
    env = make(write_make(TASK), normalize_obs=True)
    reset, step = (jax.vmap(f, axis_name="envs") for f in (env.reset, env.step))
    raw_step = jax.vmap(env.raw.step, axis_name="envs")
    obs, state = reset(jax.random.split(jax.random.key(0), 3))
    raw, raw_state = jax.vmap(env.raw.reset, axis_name="envs")(
        jax.random.split(jax.random.key(0), 3)
    )
    vectors = [raw["body"][0]]
    for t in range(3):
        keys = jax.random.split(jax.random.key(t), 3)
        obs, state, *_ = step(keys, state, jnp.zeros((3, 2), int))
        raw, raw_state, *_ = raw_step(keys, raw_state, jnp.zeros((3, 2), int))
        vectors.append(raw["body"][0])
    assert_same(obs["image"], raw["image"])
    seen = np.concatenate(vectors)
    moments = state.statistics.obs["body"][0]
    np.testing.assert_allclose(moments.mean[0], seen.mean(axis=0), rtol=1e-4)
    expected = (raw["body"][0] - moments.mean) / np.sqrt(moments.var + 1e-8)
    np.testing.assert_allclose(obs["body"][0], expected, rtol=1e-5)
    assert state.statistics.obs["image"] is None

    # What a buffer replays is scaled by its place, whatever its fields are.
    done = jnp.zeros(3, bool)
    item = Transition({"obs": raw}, done, done, jnp.ones(3), raw, done, done)
    scaled = env.preprocess(raw_state, item)
    np.testing.assert_allclose(scaled.next_obs["body"][0], obs["body"][0], rtol=1e-5)
    assert_same(scaled.next_obs["image"], raw["image"])


def test_only_images_cannot_be_normalised():
    def reset(key):
        return {"a": jnp.zeros((4, 4, 1), jnp.uint8)}, jnp.int32(0)

    space = {"a": Box(0, 255, (4, 4, 1), np.uint8)}
    task = Task(reset, None, space, Discrete(2), 4)
    with pytest.raises(ValueError, match="normalize_obs is not for images"):
        Preprocessed("x", task, True, False, 0.99)


# --- Spaces ---------------------------------------------------------------------------------------


def test_binary_parts_keep_their_shape_and_actions_are_pairs():
    from gymnasium import spaces

    space = host_own.observation_space_of("x", spaces.Dict(a=spaces.MultiBinary([4, 4, 2])))
    assert (space["a"].shape, space["a"].dtype) == ((4, 4, 2), np.float32)
    assert host_own.action_space_of("x", spaces.MultiBinary(3)).nvec == (2, 2, 2)
    grid = host_own.action_space_of("x", spaces.MultiDiscrete([[3, 2], [4, 5]]))
    assert grid.nvec == (3, 2, 4, 5)


def test_samples_are_in_their_space():
    space = MultiDiscrete([3, 2], start=[1, 5])
    samples = np.asarray(jax.vmap(space.sample)(jax.random.split(jax.random.key(0), 200)))
    assert set(map(tuple, samples.tolist())) == {(a, b) for a in (1, 2, 3) for b in (5, 6)}
    starts = jax.vmap(Discrete(3, start=-1).sample)(jax.random.split(jax.random.key(0), 50))
    assert set(starts.tolist()) == {-1, 0, 1}


def test_integers_of_a_class_may_have_any_shape(write_make):
    text = GYMNASIUM.replace("spaces.MultiDiscrete([2, 3], start=[1, 0])", "GRID")
    text = text.replace('"grid": grid', '"grid": np.array([[t % 2, 1, 0], [2, t % 3, 3]])')
    text += "\nGRID = spaces.MultiDiscrete(np.full((2, 3), 4))\n"
    obs, _ = make(write_make(text)).reset(jax.random.key(0))
    assert obs["grid"].shape == (24,) and obs["grid"].sum() == 6


def test_one_array_in_the_place_of_parts_is_named(write_make, capsys):
    text = TASK.replace(
        'return {"image": image, "body": (vector, count(t % 3 + 2)), "grid": grid}', "return vector"
    )
    with pytest.raises(
        UsageError, match="observation that is one array, observation_space has the"
    ):
        make(write_make(text))
