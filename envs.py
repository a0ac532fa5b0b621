"""One factory for every environment: `make("namespace::id")`.

    env = make("gymnax::CartPole-v1", mask="velocity")
    obs, state = env.reset(key)
    obs, state, reward, terminated, truncated, info = env.step(key, state, action)

An environment is single and made of pure functions: use `jax.vmap` for many of them, and
`jax.lax.scan` for rollouts.

An episode ends in one of two ways, never in both at once:
  terminated: the task is over, and the future is worth nothing;
  truncated: the time limit ended the episode, and the future is worth V(final_obs).
The step that ends an episode already returns the first observation of the next one (same-step
auto-reset). `info["final_obs"]` is always the true next observation; it differs from `obs` only in
steps that end an episode.

`env_adapters/` has one file per library and what they share; its README says how to add one, and
how to train in an environment of one's own, `path/to/file.py::name`.
From the command line:

    python envs.py                                     # the namespaces
    python envs.py gymnax                              # the ids of one
    python envs.py gymnax::CartPole-v1 --steps 1000    # random actions in an environment
    python envs.py path/to/file.py::name               # one's own: does it keep the contract?
"""

from env_adapters.environment import Environment, EnvState, Preprocessed
from env_adapters.episodes import Episodes, Recording, play, record, write_gif
from env_adapters.registry import NAMESPACES, full_id, known_ids, make, make_asymmetric
from env_adapters.task import (
    AsymmetricObs,
    Box,
    Discrete,
    MaskedObs,
    MultiDiscrete,
    Task,
    each_part,
    greatest_entropy,
    only_valid,
    random_valid,
    seen_by,
    without_mask,
)

__all__ = [
    "NAMESPACES",
    "AsymmetricObs",
    "Box",
    "Discrete",
    "EnvState",
    "Environment",
    "Episodes",
    "MaskedObs",
    "MultiDiscrete",
    "Preprocessed",
    "Recording",
    "Task",
    "each_part",
    "full_id",
    "greatest_entropy",
    "known_ids",
    "make",
    "make_asymmetric",
    "only_valid",
    "play",
    "random_valid",
    "record",
    "seen_by",
    "without_mask",
    "write_gif",
]

if __name__ == "__main__":
    from env_adapters.cli import Command, main
    from harness.options import launch

    launch(main, Command)
