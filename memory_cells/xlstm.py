"""xLSTM (Beck et al. 2024, arXiv 2405.04517, section 2.4): residual blocks of mLSTM and sLSTM.

`pattern` names the blocks from input to output, m or s. With x of H features and a layer norm LN
before each layer:

    m:  x <- x + mLSTM(LN(x))                                                  figure 11
    s:  x <- x + sLSTM(LN(x))                                                  figure 10
        x <- x + W_down(gelu(W_g u) * W_up u),  u = LN(x)

One more layer norm follows the last block. The layers are those of `mlstm.py` and `slstm.py`. The
paper writes xLSTM[a:b] for a mLSTM blocks per b sLSTM blocks. As in the authors' code, widths are
rounded up to multiples of 64, and the more blocks there are, the smaller the outputs start.

Carry: the tuple of the carries of the layers.
Cost per step: that of the layers, plus 6 H F floating-point operations per environment and s block,
with F = `ffn_factor` H.
Sequences: in chunks in m blocks, in a loop in s blocks.
"""

import math

import flax.linen as nn

from memory_cells.masked_rnn import SequenceCell
from memory_cells.mlstm import MLSTM
from memory_cells.parts.checks import check_conv_width, check_impl, check_num_heads
from memory_cells.parts.dense import Dense
from memory_cells.parts.initializers import small_init, wang_init
from memory_cells.slstm import SLSTM


class XLSTM(SequenceCell):
    """xLSTM stack; see the module's docstring.

    Attributes:
      features: H, the size of the residual stream and of the output; a multiple of `num_heads`.
      pattern: the blocks from input to output, m for mLSTM and s for sLSTM.
      num_heads: heads of every layer.
      conv_width: K, the steps that the layers' convolutions see; 0 leaves them out.
      ffn_factor: width of the feed-forward part of s blocks, as a multiple of `features`.
      impl: "auto", "scan" or "parallel", for the mLSTM layers; see `parts/chunkwise.py`.
    """

    pattern: str = "ms"
    num_heads: int = 4
    conv_width: int = 4
    ffn_factor: float = 1.3
    impl: str = "auto"

    def __post_init__(self):
        check_num_heads("xlstm", self.features, self.num_heads)
        check_conv_width("xlstm", self.conv_width)
        check_impl("xlstm", self.impl)
        if not self.pattern or set(self.pattern) - set("ms"):
            raise ValueError(
                f"xlstm needs pattern to be a word of the letters m and s, got {self.pattern!r}"
            )
        if self.ffn_factor <= 0:
            raise ValueError(f"xlstm needs ffn_factor to be greater than 0, got {self.ffn_factor}")
        super().__post_init__()

    def setup(self):
        self.embed = Dense(self.features)
        self.layers = self._layers()
        self.norms = [layer_norm() for _ in self.pattern]
        inner = 64 * math.ceil(self.ffn_factor * self.features / 64)
        self.ffns = [
            FeedForward(self.features, inner, len(self.pattern)) if kind == "s" else None
            for kind in self.pattern
        ]
        self.output_norm = layer_norm()

    @nn.nowrap
    def _layers(self, **kwargs):
        shared = {
            "features": self.features,
            "num_heads": self.num_heads,
            "conv_width": self.conv_width,
            **kwargs,
        }
        num_blocks = len(self.pattern)
        layers = []
        for index, kind in enumerate(self.pattern):
            if kind == "m":
                layer = MLSTM(**shared, num_blocks=num_blocks, impl=self.impl)
            else:
                layer = SLSTM(**shared, depth=index / max(num_blocks - 1, 1))
            layers.append(layer)
        return layers

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        shape = (*input_shape[:-1], self.features)
        return tuple(layer.initialize_carry(rng, shape) for layer in self._layers(parent=None))

    def sequence(self, carry, xs, starts):
        if xs.shape[-1] != self.features:  # the residual stream needs as many inputs as features
            xs = self.embed(xs)
        carries = []
        blocks = zip(self.layers, self.norms, self.ffns, carry, strict=True)
        for layer, norm, ffn, layer_carry in blocks:
            layer_carry, ys = layer.sequence(layer_carry, norm(xs), starts)
            carries.append(layer_carry)
            xs = xs + ys
            if ffn is not None:
                xs = xs + ffn(xs)
        return tuple(carries), self.output_norm(xs)


class FeedForward(nn.Module):
    """The gated feed-forward part of an s block, with its layer norm."""

    features: int
    inner: int
    num_blocks: int

    @nn.compact
    def __call__(self, x):
        up_init = small_init(self.features)
        down_init = wang_init(self.features, self.num_blocks)
        x = layer_norm(name="norm")(x)
        gate = Dense(self.inner, use_bias=False, kernel_init=up_init, name="gate")(x)
        up = Dense(self.inner, use_bias=False, kernel_init=up_init, name="up")(x)
        down = Dense(self.features, use_bias=False, kernel_init=down_init, name="down")
        return down(nn.gelu(gate, approximate=False) * up)


def layer_norm(**kwargs):
    return nn.LayerNorm(epsilon=1e-5, use_bias=False, use_fast_variance=False, **kwargs)
