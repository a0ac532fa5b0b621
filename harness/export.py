"""A trained policy as a program of its own, which runs without this project.

    agent.jaxexport  `jax.export`, for CPUs and CUDA; agent.jaxexport.json describes it
    agent.onnx       ONNX, for onnxruntime and others; its metadata describe it

Both are one greedy step of any number of environments at once:

    (obs, carry, start, previous_action, previous_reward) -> (action, next carry)

The last input is the action mask, with environments that have one.

Of observations with several parts each part is an input, as obs.image. Observations, rewards and
actions are those of the task, but for whole numbers in observations, which are one-hot:
normalisation, the bounds of actions, and the number that they count from are part of the program.
"""

import contextlib
import inspect
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from harness.errors import UsageError, import_optional
from harness.real import simplified
from harness.run_dir import script_of

NEEDED = {".onnx": "jax2onnx", ".jaxexport": "flatbuffers"}
PLATFORMS = ("cpu", "cuda")
OPSET = 21  # the version of ONNX's operations
BATCH = "batch"  # the name of the first axis of every input and output


class Array(NamedTuple):
    """What is known of an input or output."""

    name: str
    shape: tuple[int, ...]  # without the batch
    dtype: np.dtype
    meaning: str

    def describe(self) -> dict:
        return self._asdict() | {"shape": [BATCH, *self.shape], "dtype": self.dtype.name}


class Seen(NamedTuple):
    """What an environment scales for a learner, by the names of the fields."""

    obs: Any
    reward: Any


class Agent:
    """The greedy policy of one seed as a function of arrays, and what each of them means.

    Attributes:
      inputs: an `Array` for each input of `step`, in its order.
      outputs: likewise.
    """

    def __init__(self, evaluate, state, env, seed=0):
        """
        Args:
          evaluate: that of the state's script.
          state: of all seeds.
          seed: which of them, counted from 0.
        """
        self.config = state.config
        if hasattr(state, "buffer"):  # acting does not read it, and a copy of it may not fit
            state = state.replace(buffer=())
        state = jax.tree.map(lambda x: x[seed : seed + 1], state)
        self.env, self.policy, initialize = greedy_policy(evaluate, state, env)
        carry = jax.eval_shape(lambda: initialize(1))
        leaves, self.structure = jax.tree.flatten_with_path(carry)
        self.is_complex = [jnp.iscomplexobj(leaf) for _, leaf in leaves]
        self.carries = [describe_carry(path, leaf) for path, leaf in leaves]

        actions = env.task_action_space
        before = "where start is True, of any value"
        choice = range_of(actions)
        action = Array("action", actions.shape, np.dtype(actions.dtype), f"what to do: {choice}")
        parts, self.parts = jax.tree.flatten_with_path(env.raw.observation_space)
        self.observations = [describe_part(path, part) for path, part in parts]
        self.inputs = [
            *self.observations,
            *self.carries,
            Array("start", (), np.dtype(bool), "obs is the first of an episode: forget the carry"),
            action._replace(name="previous_action", meaning=f"the action before obs; {before}"),
            Array("previous_reward", (), np.dtype(np.float32), f"the reward before obs; {before}"),
        ]
        if env.has_action_mask:
            meaning = "which actions are valid now"
            self.inputs.append(Array("action_mask", (actions.n,), np.dtype(bool), meaning))
        self.outputs = [action, *(next_of(array) for array in self.carries)]

    def step(self, obs, carry, start, previous_action, previous_reward, *action_mask):
        """One step of a batch: the action, and the carry for the next step.

        Args:
          carry: name -> array, of all inputs whose names begin with "carry"; complex ones as pairs
            of real numbers along a last axis.
        """
        leaves = [carry[array.name] for array in self.carries]
        memory = self.structure.unflatten(map(from_pairs, leaves, self.is_complex))
        seen = self.env.preprocess(None, Seen(obs, previous_reward))
        action = self.env.from_task(previous_action)
        unused = jax.random.key(0)  # nothing is drawn
        obs = self.env.with_mask(seen.obs, *action_mask)
        memory, action = self.policy(memory, obs, start, action, seen.reward, unused)
        leaves = map(to_pairs, jax.tree.leaves(memory), self.is_complex)
        names = [array.name for array in self.carries]
        return self.env.to_task(action), dict(zip(names, leaves, strict=True))

    def arguments(self, batch) -> list:
        """The shapes and dtypes of the arguments of `step`."""
        return self.arrange(
            {x.name: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in self.inputs}
        )

    def arrange(self, inputs: dict) -> list:
        """The arguments of `step`, from what is known by the names of the inputs."""
        inputs = dict(inputs)
        carry = {array.name: inputs.pop(array.name) for array in self.carries}
        obs = self.parts.unflatten([inputs.pop(array.name) for array in self.observations])
        return [obs, carry, *inputs.values()]

    def describe(self) -> dict:
        """What the program is, takes and returns, for its metadata."""
        config = self.config
        return {
            "program": "(obs, carry, start, previous_action, previous_reward) -> (action, carry)",
            "policy": "greedy",
            "script": script_of(config).stem,
            "env": self.env.id,
            "env_kwargs": dict(config.env_kwargs),
            "mask": list(config.mask),
            "cell": getattr(config, "cell", ""),
            "inputs": [array.describe() for array in self.inputs],
            "outputs": [array.describe() for array in self.outputs],
        }


def greedy_policy(evaluate, state, env):
    """The environment, the policy and the initial memory with which `evaluate` plays.

    It is not compiled here: the policy is to hold the parameters, and not what stands for them
    while JAX compiles a function.
    """
    found = []

    def keep(env, policy, initialize, key, num_envs, episodes):
        found.extend((env, policy, initialize))
        return ()

    inspect.unwrap(evaluate)(state, env, 1, play=keep)
    return found


def range_of(space) -> str:
    """The values that an action can have."""
    if hasattr(space, "n"):
        return f"{space.start} to {space.start + space.n - 1}"
    if hasattr(space, "nvec"):
        starts = space.start or (0,) * len(space.nvec)
        parts = [f"{low} to {low + n - 1}" for low, n in zip(starts, space.nvec, strict=True)]
        return "; ".join(parts)
    low, high = (np.broadcast_to(x, space.shape).tolist() for x in (space.low, space.high))
    return f"between {low} and {high}"


def describe_part(path, space) -> Array:
    meaning = "observation as the environment gives it"
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if name:
        return Array(
            f"obs.{name}", space.shape, np.dtype(space.dtype), f"part {name} of the {meaning}"
        )
    return Array("obs", space.shape, np.dtype(space.dtype), meaning)


def describe_carry(path, leaf) -> Array:
    keys = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", "")))) for key in path]
    name = "_".join(["carry", *keys])
    meaning = "memory before obs, of any value where start is True"
    if jnp.iscomplexobj(leaf):
        pairs = "; the last axis: real and imaginary part"
        return Array(name, (*leaf.shape[1:], 2), np.dtype(np.float32), meaning + pairs)
    return Array(name, leaf.shape[1:], np.dtype(leaf.dtype), meaning)


def next_of(carry: Array) -> Array:
    return carry._replace(name=f"next_{carry.name}", meaning=f"{carry.name} of the next step")


def from_pairs(x, is_complex):
    if not is_complex:
        return x
    part = partial(jax.lax.index_in_dim, x, axis=-1, keepdims=False)
    return jax.lax.complex(part(0), part(1))


def to_pairs(x, is_complex):
    return jnp.stack([x.real, x.imag], axis=-1) if is_complex else x


# --- Files ---------------------------------------------------------------------------------------


def check_exporters(paths) -> None:
    """Refuse to write what needs a library that is not installed.

    Raises:
      UsageError: names it.
    """
    for path in paths:
        suffix = Path(path).suffix
        import_optional(NEEDED[suffix], f"--export to {suffix}")


def export(path: str, agent: Agent, origin: dict) -> None:
    """Write an agent to a file of the kind that its suffix names.

    Args:
      origin: what else the metadata are to tell.

    Raises:
      UsageError: the file cannot be written, or ONNX has no counterpart for the agent.
    """
    about = origin | agent.describe()
    try:
        if Path(path).suffix == ".onnx":
            Path(path).write_bytes(as_onnx(agent, about))
        else:
            Path(path).write_bytes(as_jaxexport(agent))
            Path(f"{path}.json").write_text(json.dumps(about, indent=2) + "\n")
    except NotImplementedError as error:
        raise UsageError(f"{path!r} cannot be written: {error}") from None
    except OSError as error:
        raise UsageError(f"{path!r} cannot be written: {error.strerror}") from None


def as_jaxexport(agent: Agent) -> bytes:
    """The program as `jax.export.deserialize` reads it."""
    (batch,) = jax.export.symbolic_shape(BATCH)
    make = jax.export.export(jax.jit(agent.step), platforms=PLATFORMS)
    return bytes(make(*agent.arguments(batch)).serialize())


def as_onnx(agent: Agent, about: dict) -> bytes:
    """The program as a model of ONNX."""
    to_onnx = import_optional("jax2onnx", "--export to .onnx").to_onnx
    (batch,) = jax.export.symbolic_shape(BATCH)
    shapes, structure = jax.tree.flatten(agent.arguments(batch))
    names = jax.tree.leaves(agent.arrange({array.name: array.name for array in agent.inputs}))
    results = ["action", *(f"next_{name}" for name in names if name.startswith("carry"))]

    def step(*args):
        return jax.tree.leaves(agent.step(*structure.unflatten(args)))

    with quiet("onnx_ir"):
        model = to_onnx(
            simplified(step, *shapes),
            shapes,
            model_name=f"{about['script']} {about['env']}",
            opset=OPSET,
            input_names=names,
            output_names=results,
        )
    for key, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=key, value=text)
    meanings = {array.name: array.meaning for array in [*agent.inputs, *agent.outputs]}
    for value in [*model.graph.input, *model.graph.output]:
        value.doc_string = meanings[value.name]
    return model.SerializeToString()


@contextlib.contextmanager
def quiet(name: str):
    """Within, the logger of this name reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
