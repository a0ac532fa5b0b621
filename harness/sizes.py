"""The memory that a run will take, from shapes and dtypes, before anything of it is made."""

import jax

from harness.errors import UsageError


def num_bytes(tree) -> int:
    """The size of a pytree of arrays, or of their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def free_memory(num_devices: int = 1) -> int:
    """Bytes that so many devices have left; the machine, where they are its CPU."""
    import psutil

    device = jax.local_devices()[0].memory_stats()
    if device:
        return num_devices * (device["bytes_limit"] - device.get("bytes_in_use", 0))
    return psutil.virtual_memory().available


def check_memory(config, shapes, num_devices: int = 1):
    """The shapes and dtypes of a run's state, from `shapes()`, once it is sure to fit.

    Counted are the state and what a rollout, a minibatch and an evaluation keep of it. Activations
    and gradients come on top.

    Raises:
      UsageError: this takes more than the free memory.
    """
    # Some memories compute their first parameters outside of jax, even for shapes only.
    matrix = 4 * config.num_seeds * config.hidden_size**2
    check_parts(config, {"a matrix of hidden_size": matrix}, num_devices)
    like = shapes()
    inputs = like.obs if hasattr(like, "obs") else like.inputs
    playing = num_bytes((like.env_state, inputs, getattr(like, "carry", ())))
    learning = (like.params, getattr(like, "target_params", ()), like.opt_state)
    eval_envs = min(config.num_eval_envs, config.eval_episodes)
    parts = {
        "a network of hidden_size": num_bytes(learning),
        "a batch of num_envs": playing,
        "an evaluation in num_eval_envs": playing * eval_envs // config.num_envs,
        "a table of eval_episodes": 8 * config.eval_episodes * config.num_seeds,
    }
    if hasattr(like, "buffer"):
        buffer = num_bytes(like.buffer)
        length = getattr(config, "burn_in", 0) + getattr(config, "sequence_length", 1)
        drawn = config.batch_size * length  # steps
        parts["a replay buffer of buffer_size"] = buffer
        parts["a minibatch of batch_size"] = buffer * drawn // config.buffer_size
    else:
        parts["a rollout of num_steps"] = num_bytes(inputs) * config.num_steps
    check_parts(config, parts, num_devices)
    return like


def check_parts(config, parts: dict, num_devices: int) -> None:
    """Refuse a run whose parts, name -> bytes, are together larger than the free memory.

    Raises:
      UsageError: names the option that the largest part comes from.
    """
    largest = max(parts, key=parts.get)
    free = free_memory(num_devices)
    if sum(parts.values()) <= free:
        return
    field = largest.split()[-1]
    what = f"{largest} {getattr(config, field)}"
    if field == "num_steps":
        what += f" with num_envs {config.num_envs}"
    if config.num_seeds > 1:
        what += f" for num_seeds {config.num_seeds}"
    sizes = (parts[largest], sum(parts.values()), free)
    needed, whole, there = (f"{size / 2**30:,.1f} GiB" for size in sizes)
    raise UsageError(f"{what} takes {needed}, the run at least {whole}; there are {there}")
