"""A short causal convolution over time that respects episode starts and can be continued from a carry."""

import jax.numpy as jnp


def causal_conv(kernel, buffer, xs, starts):
    """Depthwise convolution y_t = sum_j kernel[j] * x_(t - K + 1 + j), without reaching back over an episode's start.

    Args:
      kernel: (K, D); kernel[-1] meets the current input.
      buffer: (B, K - 1, D) the inputs before xs[0], oldest first; zeros where there was none in this episode.
      xs: (T, B, D).
      starts: (T, B) bool.

    Returns:
      The buffer after the last step (B, K - 1, D), and ys (T, B, D).
    """
    width, steps = len(kernel), len(xs)
    episode = jnp.cumsum(starts, axis=0)  # (T, B); 0 continues the episode that the buffer belongs to
    padded = jnp.concatenate([jnp.moveaxis(buffer, 1, 0), xs])  # (K - 1 + T, B, D)
    padded_episode = jnp.concatenate([jnp.zeros((width - 1, xs.shape[1]), episode.dtype), episode])

    def same_episode(taps, tap_episode, episode):
        return jnp.where((tap_episode == episode)[..., None], taps, 0.0)

    ys = 0.0
    for j in range(width):
        tap = slice(j, j + steps)
        ys += kernel[j] * same_episode(padded[tap], padded_episode[tap], episode)
    last = slice(steps, steps + width - 1)
    buffer = same_episode(padded[last], padded_episode[last], episode[-1])
    return jnp.moveaxis(buffer, 0, 1), ys
