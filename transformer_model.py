"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017), in JAX, Flax.

The complete encoder-decoder model with its training and its inference, in the order of
the paper (arXiv:1706.03762), to which "section", "Eq.", "Table" and "Figure" refer.

    python transformer_model.py                          learn a toy task, and show it
    python transformer_model.py train PAIRS MODEL        learn from your own pairs
    python transformer_model.py resume PAIRS MODEL       go on with that
    python transformer_model.py translate MODEL [TEXT]   use what was learnt

Sections 1 to 7 are the model, 8 is its training, 9 its inference, 10 a demo: these are
the lesson. Sections 11 to 16 are the program, for sentence pairs of your own. To Python
it offers `read_pairs`, `hold_out`, `fit` and `translate`.

Not as in the paper, a batch is counted in pairs, not in tokens; a moving average of the
parameters stands for the mean of the last checkpoints; and what is trained here is
smaller than the base model, and warms up in fewer steps.

Shapes are written with the same letters everywhere:

    B  batch             D  d_model, the width         H  num_heads
    S  source length     K  D // H, width of a head    F  d_ff, the inner width
    T  target length     V  target vocabulary          W  beams
    L  any length        C  length of a cache

So K and V are sizes, and not the paper's keys and values: those are a `kv`, a pair, each
[B, H, L, K]. A token is an integer, its place in the vocabulary. A mask is boolean, True
where attention is allowed.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import sys
import time
import traceback
import unicodedata
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# ---- 1 Configuration -----------------------------------------------------------------

PAD_ID = 0  # fills up short rows; never attended to, never counted in the loss
BOS_ID = 1  # "beginning of sequence", the decoder's first input
EOS_ID = 2  # "end of sequence", the last token of every source and target
FIRST_SYMBOL_ID = 3


class InputError(ValueError):
    """A mistake that the user can mend. The program says it and ends with status 2."""


def require(condition, rule, value):
    """Raises an InputError, which says the rule and the value, where it is broken."""
    if not condition:
        raise InputError(f"{rule}, not {value!r}")


def require_least(owner, least, *names):
    """Raises an InputError where one of these fields of the owner is below `least`."""
    for name in names:
        value = getattr(owner, name)
        require(value >= least, f"{name} must be at least {least}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What defines a model. The defaults are the paper's base model (Table 3).

    It is hashable, and so can be a static argument of a jitted function.
    """

    src_vocab_size: int = 37000
    tgt_vocab_size: int = 37000
    d_model: int = 512
    num_heads: int = 8
    num_layers: int = 6  # in each of the two stacks
    d_ff: int = 2048
    dropout_rate: float = 0.1
    max_len: int = 512  # of a source and of a decoder input, in tokens
    norm_first: bool = False  # False: post-norm, the paper's; True: pre-norm
    share_embeddings: bool = True  # one matrix for source, target, output (section 3.4)
    # What comes out: "logits", "softmax" (probabilities) or, to put a layer of your own
    # on top, "none" (the decoder's hidden states, [B, T, D]).
    head: str = "logits"
    dtype: str = "float32"  # or "bfloat16"; the parameters are float32 all the same

    def __post_init__(self):
        require_least(self, 1, "d_model", "num_heads", "num_layers", "d_ff", "max_len")
        # A vocabulary holds the three special tokens and at least one symbol.
        require_least(self, 4, "src_vocab_size", "tgt_vocab_size")
        width, rate = self.d_model, self.dropout_rate
        heads = f"d_model must be a multiple of num_heads, {self.num_heads}"
        require(width % self.num_heads == 0, heads, width)
        require(width % 2 == 0, "d_model must be even, for sines and cosines", width)
        require(0 <= rate < 1, "dropout_rate must be at least 0 and below 1", rate)
        sizes = self.src_vocab_size, self.tgt_vocab_size
        fits = sizes[0] == sizes[1] or not self.share_embeddings
        require(fits, "share_embeddings needs two vocabularies of one size", sizes)
        outputs, dtypes = ("logits", "softmax", "none"), ("float32", "bfloat16")
        require(self.head in outputs, f"head must be one of {outputs}", self.head)
        require(self.dtype in dtypes, f"dtype must be one of {dtypes}", self.dtype)


# ---- 2 Masks -------------------------------------------------------------------------


def padding_mask(tokens):
    """int [B, L] -> bool [B, 1, 1, L]: no query may attend to a key that is PAD.

    The two axes of length 1 stand for all heads and all queries. A query that is itself
    PAD needs no mask: no one attends to what comes out there, and the loss skips it.

    >>> print(padding_mask(np.array([[5, 7, PAD_ID]]))[0, 0])
    [[ True  True False]]
    """
    return (tokens != PAD_ID)[:, None, None, :]


def causal_mask(length):
    """bool [1, 1, L, L]: query i may attend to the keys 0 to i (section 3.2.3).

    >>> print(causal_mask(3)[0, 0].astype(int))  # queries down, keys across
    [[1 0 0]
     [1 1 0]
     [1 1 1]]
    """
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


# ---- 3 Positional encoding -----------------------------------------------------------


def positional_encoding(max_len, d_model):
    """The encodings of the positions 0 to max_len - 1, float32 [max_len, D] (3.5).

    PE(pos, 2i) = sin(pos / 10000^(2i / D)), PE(pos, 2i + 1) = cos(pos / 10000^(2i / D))

    >>> print(positional_encoding(max_len=3, d_model=4).round(2))
    [[ 0.    1.    0.    1.  ]
     [ 0.84  0.54  0.01  1.  ]
     [ 0.91 -0.42  0.02  1.  ]]
    """
    pos = np.arange(max_len)[:, None]  # [max_len, 1]
    two_i = np.arange(0, d_model, 2)  # [D / 2]
    angle = pos / 10000 ** (two_i / d_model)  # [max_len, D / 2]
    encoding = np.zeros((max_len, d_model), np.float32)
    encoding[:, 0::2] = np.sin(angle)
    encoding[:, 1::2] = np.cos(angle)
    return encoding


# ---- 4 Attention ---------------------------------------------------------------------

# An einsum that sums up and returns in float32, even if its inputs are bfloat16, whose
# three digits are too few for what goes into a softmax.
einsum_float32 = partial(jnp.einsum, preferred_element_type=jnp.float32)


def scaled_dot_product_attention(query, key, value, mask=None):
    """softmax(query key^T / sqrt(K)) value, for all heads at once (Eq. 1).

    A score is a sum of K products, which grows like sqrt(K). Without the division,
    softmax would give nearly all weight to one key, and hardly any gradient.

    Args:
      query: float [B, H, T, K].
      key, value: float [B, H, S, K].
      mask: bool, broadcastable to [B, H, T, S]; None allows everything.

    Returns:
      The output [B, H, T, K], and the weights, float32 [B, H, T, S]. A query that may
      attend to nothing, as when all tokens are PAD, gets zeros in both.
    """
    scores = einsum_float32("bhtk,bhsk->bhts", query, key) / query.shape[-1] ** 0.5
    # With `where`, a key that is not allowed gets the weight 0, even if that is so for a
    # whole row. There the paper's scores of -inf would give 0 / 0, and NaN gradients.
    weights = jax.nn.softmax(scores, where=mask)
    return jnp.einsum("bhts,bhsk->bhtk", weights.astype(value.dtype), value), weights


class Dense(nn.Module):
    """x W + b at every position; at the start W is Xavier-uniform and b is zero."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        """x [B, L, any width] -> [B, L, features]."""
        xavier, shape = nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        kernel = self.param("kernel", xavier, shape, jnp.float32)
        # All positions of the batch are the rows of one matrix. With nn.Dense, which
        # multiplies x as it is, a training step takes 1.1 to 1.2 times as long on CPUs.
        y = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
        if self.use_bias:
            zeros = nn.initializers.zeros
            y = y + self.param("bias", zeros, shape[1:], jnp.float32).astype(x.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each in a subspace of width K (section 3.2.2).

    head_i = Attention(x W_i^Q, memory W_i^K, memory W_i^V)
    MultiHead(x, memory) = Concat(head_1, ..., head_H) W^O

    The memory is what x attends to: the encoder's output or, in self-attention, x. The
    W_i^Q of all heads, D x K each, stand side by side in one D x D matrix, and so do
    the W_i^K and the W_i^V. The attention weights go to Flax's collection
    "intermediates".
    """

    config: TransformerConfig

    def setup(self):
        width = self.config.d_model
        self.query, self.key = Dense(width, False), Dense(width, False)
        self.value, self.output = Dense(width, False), Dense(width, False)

    def __call__(self, x, memory, mask=None):
        """x [B, T, D] attends to memory [B, S, D], both float -> [B, T, D]."""
        return self.attend(x, self.project_kv(memory), mask)

    def split_heads(self, x):
        """x [B, L, D] -> [B, H, L, K]: every head gets K neighbouring columns of x."""
        return x.reshape(*x.shape[:2], self.config.num_heads, -1).swapaxes(1, 2)

    def project_kv(self, memory):
        """memory [B, S, D] -> its kv, of length S."""
        return self.split_heads(self.key(memory)), self.split_heads(self.value(memory))

    def attend(self, x, kv, mask=None):
        """x [B, T, D], kv of length S, mask broadcast to [B, H, T, S] -> [B, T, D]."""
        query = self.split_heads(self.query(x))
        heads, weights = scaled_dot_product_attention(query, *kv, mask)
        self.sow("intermediates", "weights", weights)
        return self.output(heads.swapaxes(1, 2).reshape(x.shape))  # concatenates


# ---- 5 Feed-forward network ----------------------------------------------------------


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2 (Eq. 2), at every position alike."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x):
        """x [B, L, D] -> [B, L, D], by way of [B, L, F]."""
        x = nn.relu(Dense(self.config.d_ff, name="inner")(x))
        return Dense(self.config.d_model, name="outer")(x)


# ---- 6 Blocks ------------------------------------------------------------------------


def layer_norm(config):
    """Layer normalisation, with the epsilon of the paper's code. Flax computes the mean
    and the variance in float32, whatever the dtype of the result.
    """
    return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype)


class AddAndNorm(nn.Module):
    """The "Add & Norm" around each sub-layer (Figure 1), in two halves.

    post-norm (3.1 and 5.4):   LayerNorm(x + Dropout(sublayer(x)))
    pre-norm (`norm_first`):   x + Dropout(sublayer(LayerNorm(x)))

    Dropout is on where `apply` gets a random key for it, rngs={"dropout": key}.
    """

    config: TransformerConfig

    def setup(self):
        self.norm = layer_norm(self.config)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def before(self, x):
        """x [B, L, D] -> what the sub-layer gets, [B, L, D]."""
        return self.norm(x) if self.config.norm_first else x

    def after(self, x, y):
        """x as given to `before`, y from the sub-layer, both [B, L, D] -> [B, L, D]."""
        x = x + self.dropout(y, deterministic=not self.has_rng("dropout"))
        return x if self.config.norm_first else self.norm(x)


class EncoderBlock(nn.Module):
    """Self-attention, then the feed-forward network (Figure 1, left)."""

    config: TransformerConfig

    def setup(self):
        self.self_attention = MultiHeadAttention(self.config)
        self.feed_forward = FeedForward(self.config)
        self.add_and_norm = [AddAndNorm(self.config) for _ in range(2)]

    def __call__(self, x, mask=None):
        """x [B, S, D], mask broadcastable to [B, H, S, S] -> [B, S, D]."""
        first, second = self.add_and_norm

        inputs = first.before(x)
        y = self.self_attention(inputs, inputs, mask)
        x = first.after(x, y)

        y = self.feed_forward(second.before(x))
        return second.after(x, y)


def write_to_cache(cache, kv, start):
    """Puts a kv into the cache, which is a longer one, from `start` on."""
    return tuple(  # Axis 2 is that of the length.
        jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=2)
        for old, new in zip(cache, kv)
    )


class DecoderBlock(nn.Module):
    """Masked self-attention, attention to memory, feed-forward (Figure 1, right).

    In training, x is a whole target. In decoding, x is the last token alone, or those of
    W hypotheses for one source, side by side on the axis of length T. The keys and values
    of the tokens before come from a cache then. Those of the memory have been computed
    once for all tokens, which is why the block takes memory_kv, and not the memory.
    """

    config: TransformerConfig

    def setup(self):
        self.self_attention = MultiHeadAttention(self.config)
        self.cross_attention = MultiHeadAttention(self.config)
        self.feed_forward = FeedForward(self.config)
        self.add_and_norm = [AddAndNorm(self.config) for _ in range(3)]

    def __call__(self, x, self_mask, memory_kv, memory_mask, cache=None, start=0):
        """Runs the block on x.

        Args:
          x: [B, T, D].
          self_mask: broadcastable to [B, H, T, T] or, with a cache, [B, H, T, C].
          memory_kv: cross_attention.project_kv(memory), of length S.
          memory_mask: broadcastable to [B, H, T, S].
          cache: a kv of length C, filled before `start`, where that of x goes.

        Returns:
          x after the block, [B, T, D], and the kv that self-attention attended to: that
          of x or, with a cache, the updated cache.
        """
        first, second, third = self.add_and_norm

        inputs = first.before(x)
        kv = self.self_attention.project_kv(inputs)
        if cache is not None:
            kv = write_to_cache(cache, kv, start)
        y = self.self_attention.attend(inputs, kv, self_mask)
        x = first.after(x, y)

        y = self.cross_attention.attend(second.before(x), memory_kv, memory_mask)
        x = second.after(x, y)

        y = self.feed_forward(third.before(x))
        return third.after(x, y), kv


# ---- 7 The model ---------------------------------------------------------------------


class Encoder(nn.Module):
    """The stack of encoder blocks (section 3.1).

    A post-norm block ends in a LayerNorm. Pre-norm blocks only ever add to x, so that
    after the last of them one more LayerNorm has to bring the sum back to scale.
    """

    config: TransformerConfig

    def setup(self):
        self.blocks = [EncoderBlock(self.config) for _ in range(self.config.num_layers)]
        if self.config.norm_first:
            self.norm = layer_norm(self.config)

    def __call__(self, x, mask=None):
        """x [B, S, D], mask broadcastable to [B, H, S, S] -> the memory, [B, S, D]."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) if self.config.norm_first else x


class Decoder(nn.Module):
    """The stack of decoder blocks (section 3.1), and pre-norm's LayerNorm after it."""

    config: TransformerConfig

    def setup(self):
        self.blocks = [DecoderBlock(self.config) for _ in range(self.config.num_layers)]
        if self.config.norm_first:
            self.norm = layer_norm(self.config)

    def __call__(self, x, self_mask, memory_kv, memory_mask, cache=None, start=0):
        """Takes and returns what a `DecoderBlock` does, except that memory_kv, the
        cache and the kv returned are lists, with an entry for each block.
        """
        all_kv = []
        for i, block in enumerate(self.blocks):
            old = cache[i] if cache else None
            x, kv = block(x, self_mask, memory_kv[i], memory_mask, old, start)
            all_kv.append(kv)
        if self.config.norm_first:
            x = self.norm(x)
        return x, all_kv


class Transformer(nn.Module):
    """All of Figure 1: source and target tokens to logits for the next target tokens.

        model = Transformer(TransformerConfig())
        variables = model.init(jax.random.key(0), src, tgt)  # {"params": ...}
        logits = model.apply(variables, src, tgt)

    Dropout is on if `apply` gets rngs={"dropout": key}. The attention weights come out
    as well with mutable=["intermediates"], see `attention_weights`. A token outside the
    vocabulary gives NaN; a length above max_len, a ValueError.
    """

    config: TransformerConfig

    def setup(self):
        normal = nn.initializers.normal(self.config.d_model**-0.5)

        def matrix(name, rows, init=normal):
            return self.param(name, init, (rows, self.config.d_model), jnp.float32)

        if self.config.share_embeddings:
            shared = matrix("embedding", self.config.tgt_vocab_size)
            self.src_embedding = self.tgt_embedding = self.output = shared  # [V, D]
        else:
            self.src_embedding = matrix("src_embedding", self.config.src_vocab_size)
            self.tgt_embedding = matrix("tgt_embedding", self.config.tgt_vocab_size)
            if self.config.head != "none":
                xavier = nn.initializers.xavier_uniform()  # as in Dense
                self.output = matrix("output", self.config.tgt_vocab_size, xavier)
        self.dropout = nn.Dropout(self.config.dropout_rate)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, src, tgt):
        """The forward pass for all target positions in parallel, as in training.

        src int [B, S] and the decoder's input tgt int [B, T], BOS first -> float32
        [B, T, V]; the logits at position t are for the token at t + 1. With another
        `head` (see TransformerConfig), probabilities or hidden states.
        """
        position = jnp.arange(tgt.shape[1])
        self_mask = padding_mask(tgt) & causal_mask(tgt.shape[1])
        memory_kv = self.project_kv(self.encode(src))
        return self.decode(tgt, position, self_mask, memory_kv, padding_mask(src))[0]

    def encode(self, src):
        """Source tokens, int [B, S] -> the memory, [B, S, D]."""
        x = self.embed(self.src_embedding, src, jnp.arange(src.shape[1]))
        return self.encoder(x, padding_mask(src))

    def project_kv(self, memory):
        """The memory [B, S, D] -> the list of kv that the decoder blocks make of it."""
        blocks = self.decoder.blocks
        return [block.cross_attention.project_kv(memory) for block in blocks]

    def decode(
        self, tgt, position, self_mask, memory_kv, memory_mask, cache=None, start=0
    ):
        """Target tokens, int [B, T], at the positions int [T], or all at the same, int
        [] -> the logits for the tokens after them, float32 [B, T, V], and the decoder's
        kv (see `Decoder`).
        """
        x = self.embed(self.tgt_embedding, tgt, position)
        x, kv = self.decoder(x, self_mask, memory_kv, memory_mask, cache, start)
        if self.config.head == "none":
            return x, kv
        logits = einsum_float32("btd,vd->btv", x, self.output.astype(x.dtype))
        if self.config.head == "softmax":
            return jax.nn.softmax(logits), kv
        return logits, kv

    def embed(self, embedding, tokens, position):
        """Tokens, int [B, L], at the positions int [L], or all at the same, int [] ->
        [B, L, D] (3.4 and 3.5). Positions are below max_len.

        The matrix starts with entries of size D^-0.5, as suits the logits, for which it
        serves too. Times D^0.5 they are of size 1, as are the encodings.
        """
        max_len, d_model = self.config.max_len, self.config.d_model
        if jnp.size(position) > max_len:
            raise ValueError(f"tokens {tokens.shape} [B, L]: L is above {max_len=}")
        # jnp.take gives NaN for a token that is too large. A negative one would count
        # from the end, so it is made too large, in a type with room for that.
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32))
        tokens = jnp.where(tokens < 0, len(embedding), tokens)
        x = jnp.take(embedding, tokens, axis=0) * d_model**0.5
        x = x + jnp.asarray(positional_encoding(max_len, d_model))[position]
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        return x.astype(self.config.dtype)


# ---- 8 Training ----------------------------------------------------------------------


def mean_over_labels(values, labels):
    """The mean of values [B, T] where labels [B, T] are not PAD; without any, 0."""
    is_label = labels != PAD_ID
    total = jnp.where(is_label, values, 0).astype(jnp.float32).sum()
    return total / jnp.maximum(is_label.sum(), 1)


def cross_entropy_loss(logits, labels, label_smoothing=0.0):
    """Mean cross-entropy of the labels that are not PAD, in nats.

    Label smoothing (section 5.4) takes the share `label_smoothing` of the probability
    away from the label and spreads it evenly over all V classes.

    logits [B, T, V], labels int [B, T] -> float32 []; a label that is no class, NaN.
    """
    logits = logits.astype(jnp.float32)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # room for V
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing > 0:  # With 0, a logit may be -inf; 0 times inf is NaN.
        # The mean over classes v of -log p(v), which is logsumexp(logits) - logit v.
        of_all = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * of_all
    # optax would count a negative label from the end.
    losses = jnp.where((0 <= labels) & (labels < logits.shape[-1]), losses, jnp.nan)
    return mean_over_labels(losses, labels)


def paper_schedule(d_model, warmup_steps=4000):
    """The learning rate as a function of the number of steps done (Eq. 3).

    lrate = D^-0.5 min(step^-0.5, step warmup_steps^-1.5), where the first step is 1

    >>> rate = paper_schedule(d_model=512)
    >>> [f"{rate(step - 1):.1e}" for step in (1, 2000, 4000, 16000)]
    ['1.7e-07', '3.5e-04', '7.0e-04', '3.5e-04']
    """

    def schedule(steps_done):
        step = jnp.float32(steps_done) + 1
        return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)

    return schedule


def paper_optimizer(d_model, warmup_steps=4000):
    """Adam with the learning rate of Eq. 3 (section 5.3)."""
    return optax.adam(paper_schedule(d_model, warmup_steps), b1=0.9, b2=0.98, eps=1e-9)


class TrainState(train_state.TrainState):
    """Flax's TrainState (step, params, optimizer and its state), and two things more.

    The paper evaluates a model with the mean of its last checkpoints (section 6.1).
    Here `average` is a moving average of the parameters over about the last tenth of
    the steps, however many they are, so that a run may end at any of them.
    """

    average: dict  # like params
    dropout_key: jax.Array  # uint32 [2], the data of a key, which can be saved


def create_train_state(config, key, optimizer=None, params=None):
    """Returns the TrainState with which training begins.

    Parameters are drawn from the random `key`, if None are given (to go on with, in fine-
    tuning). The optimizer is one of optax; None stands for the paper's.
    """
    require(config.head == "logits", 'head must be "logits" for training', config.head)
    if optimizer is None:
        optimizer = paper_optimizer(config.d_model)
    params_key, dropout_key = jax.random.split(key)
    model, tokens = Transformer(config), jnp.full((1, 1), BOS_ID)
    if params is None:
        params = jax.jit(model.init)(params_key, tokens, tokens)["params"]
    # train_step "donates" the state: it writes the new one over it. So the parameters of
    # the caller are copied, and the average is a copy of its own.
    params, average = (jax.tree.map(jnp.array, params) for _ in range(2))
    return TrainState(
        # After a step it is an array. With an int here, jit would compile twice.
        step=jnp.zeros((), jnp.int32),
        apply_fn=model.apply,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(params),
        average=average,
        dropout_key=jax.random.bits(dropout_key, (2,), jnp.uint32),
    )


def loss_and_metrics(state, params, batch, label_smoothing=0.0, rngs=None):
    """The loss, which training differentiates, and the metrics of `train_step`."""
    # The shift: given the tokens up to position t, the label is the token at t + 1.
    inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, 1:]
    logits = state.apply_fn({"params": params}, batch["src"], inputs, rngs=rngs)
    loss = cross_entropy_loss(logits, labels, label_smoothing)
    hits = jnp.argmax(logits, axis=-1) == labels
    return loss, {"loss": loss, "accuracy": mean_over_labels(hits, labels)}


@partial(jax.jit, static_argnames="label_smoothing", donate_argnames="state")
def train_step(state, batch, label_smoothing=0.1):
    """One step of gradient descent.

    Args:
      state: a TrainState. Its arrays are used up, so go on with the one returned.
      batch: {"src": int [B, S], "tgt": int [B, T + 1]}, tgt from BOS to EOS.

    Returns:
      The new state, and the metrics of the batch before the step, "loss" and
      "accuracy", the share of labels that have the highest logit. Who does not read
      them need not wait for the device.
    """
    key = jax.random.wrap_key_data(state.dropout_key, impl="threefry2x32")
    rngs = {"dropout": jax.random.fold_in(key, state.step)}  # others at each step

    def loss_fn(params):
        return loss_and_metrics(state, params, batch, label_smoothing, rngs)

    (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    # Each step replaces one part in m of the average, which so remembers about the last
    # m steps: here, a tenth of the steps so far.
    m = jnp.maximum(1, jnp.float32(state.step) / 10)
    average = optax.incremental_update(state.params, state.average, 1 / m)
    return state.replace(average=average), metrics


@jax.jit
def eval_step(state, batch):
    """Metrics as in `train_step`, of `average` and without dropout and smoothing."""
    return loss_and_metrics(state, state.average, batch)[1]


# ---- 9 Inference ---------------------------------------------------------------------
# A search is one jitted loop over positions, in which no shape may change. So tokens and
# caches have their full length from the start. A search is compiled for each shape of
# the sources, and each max_len.
#
# The W hypotheses of a source share one cache. At position p, hypothesis w writes its key
# and value to the slot p W + w, which is written only once. So a hypothesis that goes on
# from another copies nothing: it notes, for each position, which of the W wrote there
# what is now its past, and the mask hides the other slots.


def start_decoding(model, params, src, max_len, beam_size=1):
    """Encodes src, int [B, S], and makes room for W = beam_size hypotheses of each.

    Returns:
      encoded: the pair (memory_kv, memory_mask), which the `Decoder` takes.
      tokens: int32 [B, W, L], where L is max_len + 1. BOS comes first, then PAD, which
        the search replaces.
      writer: int32 [B, W, L], see `next_logits`. At the position of BOS, each hypothesis
        is its own.
      cache: a list of empty kv of length C = L * W.
    """
    head = model.config.head
    require(head == "logits", 'head must be "logits" for a search', head)
    longest = model.config.max_len
    require(max_len <= longest, f"max_len must be at most {longest}", max_len)
    apply = partial(model.apply, {"params": params})
    memory_kv = apply(apply(src, method="encode"), method="project_kv")
    rows, num_heads, _, width = memory_kv[0][0].shape  # [B, H, S, K]
    tokens = jnp.full((rows, beam_size, max_len + 1), PAD_ID, jnp.int32)
    tokens = tokens.at[..., 0].set(BOS_ID)
    number = jnp.arange(beam_size, dtype=jnp.int32)
    writer = jnp.zeros_like(tokens).at[..., 0].set(number)
    # Attention reads a cache as [B, H, C, K]. Kept in another order, XLA would transpose
    # all of it at every token.
    shape = rows, num_heads, (max_len + 1) * beam_size, width
    empty = jnp.zeros(shape, memory_kv[0][0].dtype)
    cache = [(empty, empty) for _ in memory_kv]
    return (memory_kv, padding_mask(src)), tokens, writer, cache


def next_logits(model, params, encoded, tokens, writer, position, cache):
    """Runs the decoder on the tokens at `position` alone; the cache stands for the rest.

    Args:
      encoded: from `start_decoding`.
      tokens: int32 [B, W, L], the hypotheses so far, with PAD after `position`.
      writer: int32 [B, W, L]. A number w at position p says that the cache has the token
        there in slot p W + w: with W = 2, 0 1 1 stands for the slots 0, 3 and 5.
      cache: a list of kv of length C = L * W, filled before `position`.

    Returns:
      The logits for the tokens at position + 1, float32 [B, W, V], and the cache, filled
      up to `position`.
    """
    batch_size, beam_size, length = tokens.shape
    # A hypothesis attends to its own slots: 0 1 1 makes the mask 10 01 01. What comes
    # after `position` is PAD, and hidden as such, so that no causal mask is needed. (A
    # PAD that the model itself has chosen is hidden, as in training.)
    is_own = writer[..., None] == jnp.arange(beam_size)  # [B, W, L, W], queries first
    self_mask = is_own & (tokens != PAD_ID)[..., None]
    self_mask = self_mask.reshape(batch_size, 1, beam_size, length * beam_size)
    decode = partial(model.apply, {"params": params}, method="decode")
    start, last = position * beam_size, tokens[:, :, position]  # [B, W]
    return decode(last, position, self_mask, *encoded, cache=cache, start=start)


def has_ended(tokens):
    """int [..., L] -> bool [...], whether there is an EOS."""
    return (tokens == EOS_ID).any(axis=-1)


def is_unfinished(carry):
    """Whether a search goes on. The carry is its state between two steps, a tuple: the
    position of the last token, all tokens so far, and what else the search needs.
    """
    position, tokens, *_ = carry
    return (position < tokens.shape[-1] - 1) & ~has_ended(tokens).all()


@partial(jax.jit, static_argnames=("model", "max_len"))
def greedy_decode(model, params, src, max_len):
    """Takes the likeliest token at every step: src int [B, S] -> int32 [B, max_len],
    without BOS, PAD after EOS.
    """
    encoded, tokens, writer, cache = start_decoding(model, params, src, max_len)
    forward = partial(next_logits, model, params, encoded)

    def step(carry):
        # The only hypothesis has the number 0, which `writer` holds everywhere already.
        position, tokens, cache = carry
        logits, cache = forward(tokens, writer, position, cache)
        _, token = jax.lax.top_k(logits, 1)  # [B, 1, 1]; jnp.argmax is slower on CPUs.
        token = jnp.where(has_ended(tokens), PAD_ID, token[..., 0])
        return position + 1, tokens.at[..., position + 1].set(token), cache

    _, tokens, _ = jax.lax.while_loop(is_unfinished, step, (0, tokens, cache))
    return tokens[:, 0, 1:]


def best_continuations(log_p, ended, next_log_p):
    """Chooses the next W hypotheses of one source: the likeliest of all continuations.

    Args:
      log_p: float32 [W], of the hypotheses so far.
      ended: bool [W], which of them have ended.
      next_log_p: float32 [W, V], of each next token.

    Returns:
      log_p [W] of the new hypotheses; parent, int [W], the number of the hypothesis
      that each of them continues; token, int [W], what it adds to that.

    Here, hypotheses 0 and 1 have the probabilities 0.5 and 0.4. As 1 has ended, PAD is
    added to it, and it keeps 0.4. Token 3, added to 0, gives 0.5 times 0.6.

    >>> p, ended = np.array([0.5, 0.4]), np.array([False, True])
    >>> next_p = np.array([[0.01, 0.01, 0.38, 0.6], [0.25, 0.25, 0.25, 0.25]])
    >>> log_p, *chosen = best_continuations(np.log(p), ended, np.log(next_p))
    >>> print(np.exp(log_p).round(2), *chosen)
    [0.4 0.3] [1 0] [0 3]
    """
    beam_size, vocab_size = next_log_p.shape
    # A hypothesis that has ended has one continuation, PAD, which costs nothing.
    pad_alone = jnp.where(jnp.arange(vocab_size) == PAD_ID, 0, -jnp.inf)  # [V]
    total = log_p[:, None] + jnp.where(ended[:, None], pad_alone, next_log_p)  # [W, V]
    # In total.ravel(), hypothesis w continued by token v is number w V + v.
    log_p, number = jax.lax.top_k(total.ravel(), beam_size)
    return log_p, number // vocab_size, number % vocab_size


def length_penalty(tokens, alpha):
    """Tokens without BOS, int [..., L] -> ((5 + length up to EOS) / 6)^alpha, [...]."""
    length = jnp.argmax(tokens == EOS_ID, axis=-1) + 1
    length = jnp.where(has_ended(tokens), length, tokens.shape[-1])
    return ((5 + length.astype(jnp.float32)) / 6) ** alpha


@partial(jax.jit, static_argnames=("model", "max_len", "beam_size"))
def beam_search(model, params, src, max_len, beam_size=4, alpha=0.6):
    """Looks for the W = `beam_size` likeliest targets of each source (section 6.1).

    At each step the W likeliest hypotheses of a source are kept, ended ones among them.
    The length penalty ranks those that are left at the end.
    src int [B, S] ->

      tokens: int32 [B, W, max_len], without BOS, PAD after EOS, best first.
      scores: float32 [B, W], log P / ((5 + length) / 6)^alpha.
    """
    encoded, tokens, writer, cache = start_decoding(
        model, params, src, max_len, beam_size
    )
    forward = partial(next_logits, model, params, encoded)
    choose = jax.vmap(best_continuations)  # source by source
    number = writer[..., 0]  # 0 to W - 1, [B, W]

    def step(carry):
        position, tokens, log_p, writer, cache = carry  # log_p [B, W]
        logits, cache = forward(tokens, writer, position, cache)
        next_log_p = jax.nn.log_softmax(logits)
        log_p, parent, token = choose(log_p, has_ended(tokens), next_log_p)
        # A hypothesis goes on with its parent's past, and writes its next slot itself.
        take = partial(jnp.take_along_axis, indices=parent[..., None], axis=1)
        tokens = take(tokens).at[..., position + 1].set(token)
        writer = take(writer).at[..., position + 1].set(number)
        return position + 1, tokens, log_p, writer, cache

    # All hypotheses start out alike. The first alone gets a probability that is not 0,
    # or the search would find the same target W times.
    log_p = jnp.full(tokens.shape[:2], -jnp.inf, jnp.float32).at[:, 0].set(0)
    carry = 0, tokens, log_p, writer, cache
    _, tokens, log_p, *_ = jax.lax.while_loop(is_unfinished, step, carry)
    tokens = tokens[..., 1:]  # without BOS
    scores = log_p / length_penalty(tokens, alpha)
    order = jnp.argsort(-scores, axis=1)
    scores = jnp.take_along_axis(scores, order, axis=1)
    return jnp.take_along_axis(tokens, order[..., None], axis=1), scores


# ---- 10 The demo ---------------------------------------------------------------------


def pad(rows, width):
    """Lists of tokens -> int32 [len(rows), width], with PAD at the end of each row."""
    padded = np.full((len(rows), width), PAD_ID, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def to_batch(pairs, width):
    """Pairs of lists of tokens -> a batch for `train_step`.

    >>> for name, rows in to_batch([([7, 8], [9])], width=4).items():
    ...     print(name, rows)
    src [[7 8 2 0]]
    tgt [[1 9 2 0 0]]
    """
    src = pad([[*source, EOS_ID] for source, _ in pairs], width)
    tgt = pad([[BOS_ID, *target, EOS_ID] for _, target in pairs], width + 1)
    return {"src": src, "tgt": tgt}


def random_words(number, seed):
    """Different words of 4 to 12 letters, each a tuple of tokens, 3 for "a" to 28."""
    rng, words = np.random.default_rng(seed), {}  # A set's order differs between runs.
    while len(words) < number:
        length = rng.integers(4, 13)
        letters = rng.integers(FIRST_SYMBOL_ID, FIRST_SYMBOL_ID + 26, length)
        words[tuple(letters.tolist())] = None
    return list(words)


def to_letters(tokens):
    """Tokens -> str; the special ones stand for no letter."""
    letters = [token - FIRST_SYMBOL_ID for token in tokens if token >= FIRST_SYMBOL_ID]
    return "".join(chr(ord("a") + letter) for letter in letters)


@partial(jax.jit, static_argnames="model")
def attention_weights(model, params, src, outputs):
    """How outputs attend to their sources in the last block, the mean of its heads.

    src int [B, S], outputs int [B, T] as a search returns them -> float32 [B, T, S]. Row
    t is what the decoder looked at to find token t of the output.
    """
    # The decoder's input is what training would make of the output: BOS, and all but
    # its last token.
    tgt = jnp.pad(outputs[:, :-1], ((0, 0), (1, 0)), constant_values=BOS_ID)
    variables, record = {"params": params}, "intermediates"
    _, recorded = model.apply(variables, src, tgt, mutable=[record])
    # The blocks are in the order in which they ran; a weight is the last of a tuple.
    last_block = list(recorded[record]["decoder"].values())[-1]
    return last_block["cross_attention"]["weights"][-1].mean(axis=1)


def draw_attention(weights, columns, rows):
    """Draws weights [T, S] as text: a table with these names of columns and rows."""
    width, shades = max(map(len, [*columns, *rows])), " .:-=+*#%@"
    levels = np.minimum(weights * len(shades), len(shades) - 1).astype(int)
    table = [["", *columns]]
    for name, row in zip(rows, levels):
        table.append([name, *(width * shades[level] for level in row)])
    lines = [" ".join(f"{cell:>{width}}" for cell in row).rstrip() for row in table]
    title = "Cross-attention in the last block, the mean of its heads: source across,\n"
    title += f"output down, shaded from none to all like this: {shades!r}\n"
    return "\n".join([title, *lines])


def demo(steps=1000, seed=0):
    """Learns to reverse words, by the paper's recipe, and shows what was learnt."""
    words = random_words(40_512, seed)
    known, unseen = words[512:], words[:512]
    config = TransformerConfig(
        src_vocab_size=29,
        tgt_vocab_size=29,
        d_model=64,
        num_heads=4,
        num_layers=1,
        d_ff=256,
        max_len=13,  # twelve letters and EOS
    )
    optimizer = paper_optimizer(config.d_model, warmup_steps=200)
    state = create_train_state(config, jax.random.key(seed), optimizer)
    print(f"{optax.tree.size(state.params):,} parameters", flush=True)

    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        chosen = [known[i] for i in rng.integers(len(known), size=64)]
        batch = to_batch([(word, word[::-1]) for word in chosen], config.max_len)
        state, metrics = train_step(state, batch)
        if step % 100 == 0 or step == steps:  # Smoothing keeps the loss above 0.63.
            print(f"step {step:4}   loss {metrics['loss']:.4f}", flush=True)

    # From here on, the averaged parameters and words that were never trained on.
    batch = to_batch([(word, word[::-1]) for word in unseen], config.max_len)
    model, params, src = Transformer(config), state.average, batch["src"]
    tokens, _ = beam_search(model, params, src, config.max_len)
    best, labels = tokens[:, 0], batch["tgt"][:, 1:]
    right = int((best == labels).all(axis=1).sum())
    print(f"\n{right} of {len(unseen)} unseen words reversed without a mistake")
    for word, output in zip(unseen[:6], best.tolist()):
        print(f"  {to_letters(word)} -> {to_letters(output)}")

    (weights,) = attention_weights(model, params, src[:1], best[:1])
    columns = [*to_letters(src[0]), "EOS"]
    rows = [*to_letters(best[0].tolist()), "EOS"]
    picture = draw_attention(weights[: len(rows), : len(columns)], columns, rows)
    print("\n" + picture, flush=True)


# The lesson ends here. The program does with texts of your own what the demo does with
# words: it cuts them into tokens, trains, searches; and saves what it has learnt.

# ---- 11 Text -------------------------------------------------------------------------

FIRST_MERGE_ID = FIRST_SYMBOL_ID + 256  # The symbols before it are the 256 bytes.
# A word is a run of at most 64 characters without a space, as some texts have no spaces,
# and the space before it if there is one. Other spaces are words of their own.
WORD = re.compile(r" ?[^ ]{1,64}| ")


def spell(word):
    """The bytes of a word as tokens, each written as one character, chr(token), so that
    byte-pair encoding can merge two tokens by str.replace.

    >>> [ord(character) for character in spell("low")]
    [111, 114, 122]
    """
    return "".join(chr(byte + FIRST_SYMBOL_ID) for byte in word.encode())


def learn_merges(word_counts, number):
    """The merges of byte-pair encoding, each the str of two tokens.

    Merges the most frequent pair of tokens, again and again; of equally frequent pairs
    the one with the smaller tokens. Stops early when no pair occurs twice.
    """

    def pairs_of(spelling):
        return [left + right for left, right in itertools.pairwise(spelling)]

    words = [(spell(word), times) for word, times in word_counts.items()]
    counts = collections.Counter()  # how often each pair occurs
    places = collections.defaultdict(set)  # the numbers of the words it occurs in
    for i, (spelling, times) in enumerate(words):
        for pair in pairs_of(spelling):
            counts[pair] += times
            places[pair].add(i)
    # A heap knows its smallest entry: here that of the most frequent pair. A pair whose
    # count changes gets a new entry, and the old one is passed over when it comes up.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges = []
    while len(merges) < number and heap and heap[0][0] <= -2:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            continue
        token = chr(FIRST_MERGE_ID + len(merges))
        changes = collections.Counter()
        for i in places.pop(pair):  # Some may have lost it since: they do not change.
            spelling, times = words[i]
            new = spelling.replace(pair, token)  # The pair occurs no more.
            words[i] = new, times
            for other in pairs_of(spelling):
                changes[other] -= times
            for other in pairs_of(new):
                changes[other] += times
                places[other].add(i)
        for other, change in changes.items():
            if change:
                counts[other] += change
                heapq.heappush(heap, (-counts[other], other))
        merges.append(pair)
    return merges


class Tokenizer:
    """Byte-pair encoding of UTF-8 text (section 5.1): any text has an encoding.

    Byte b is token b + 3. Every merge makes one more token of two that often follow one
    another in a word.

    >>> tokenizer = Tokenizer.learn(["low", "lower", "slow"], vocab_size=261)
    >>> tokenizer.merges  # "l" and "o" become token 259, then that and "w" token 260
    [(111, 114), (259, 122)]
    >>> tokenizer.encode("lows"), tokenizer.decode([260, 118])
    ([260, 118], 'lows')
    """

    def __init__(self, merges=()):
        """`merges` are pairs of tokens; without any, the tokens are the bytes alone."""
        self.merges = [(int(left), int(right)) for left, right in merges]
        self.bytes_of = dict.fromkeys((PAD_ID, BOS_ID, EOS_ID), b"")
        self.bytes_of |= {b + FIRST_SYMBOL_ID: bytes([b]) for b in range(256)}
        self.token_of = {}  # what each pair becomes, both as str
        for token, (left, right) in enumerate(self.merges, FIRST_MERGE_ID):
            self.bytes_of[token] = self.bytes_of[left] + self.bytes_of[right]
            self.token_of[chr(left) + chr(right)] = chr(token)
        self.vocab_size = len(self.bytes_of)
        # Most words come again and again, and merging takes time.
        self.merge = functools.lru_cache(maxsize=2**16)(self.merge)

    @classmethod
    def learn(cls, texts, vocab_size):
        """Learns from texts, an iterable of str, to make at most vocab_size tokens."""
        least = FIRST_MERGE_ID
        require(vocab_size >= least, f"vocab_size must be at least {least}", vocab_size)
        counts = collections.Counter(w for text in texts for w in WORD.findall(text))
        merges = learn_merges(counts, vocab_size - least)
        return cls([map(ord, pair) for pair in merges])

    def merge(self, word):
        """A word -> its tokens, as str."""
        spelling = spell(word)
        for pair, token in self.token_of.items():  # in the order of learning
            spelling = spelling.replace(pair, token)
        return spelling

    def encode(self, text):
        """str -> list of tokens, without special tokens."""
        return [ord(token) for word in WORD.findall(text) for token in self.merge(word)]

    def decode(self, tokens):
        """Tokens up to EOS -> str; bytes that are no UTF-8 become U+FFFD. It raises a
        KeyError for a token outside the vocabulary.
        """
        tokens = itertools.takewhile(lambda token: token != EOS_ID, tokens)
        text = b"".join(self.bytes_of[token] for token in tokens)
        return text.decode(errors="replace")


# ---- 12 Data -------------------------------------------------------------------------


def decode_line(line, where):
    """A line of UTF-8 (bytes) -> str, without its end and without a byte order mark."""
    try:
        text = line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    return text.removesuffix("\n").removesuffix("\r")


def one_line(text):
    """The text with a space for each line end in it."""
    return " ".join(text.splitlines())


def read_pairs(path):
    """A UTF-8 file of lines `source<TAB>target` -> list of (source, target), str.

    A line that is no pair raises an InputError that names it. A file that cannot be
    read raises an OSError.
    """
    pairs = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            text = decode_line(line, where)
            pair = tuple(text.split("\t"))
            if len(pair) != 2 or "" in pair:
                hint = " (try `cut -f1,2`)" if len(pair) > 2 else ""
                raise InputError(f"{where}: not source<TAB>target{hint}: {text[:40]!r}")
            pairs.append(pair)
    return pairs


def without_sources(pairs, unseen):
    """The pairs that have no source in common with the unseen ones."""
    sources = {source for source, _ in unseen}
    return [pair for pair in pairs if pair[0] not in sources]


def hold_out(pairs):
    """Returns (pairs to train on, unseen pairs to measure on), without a common source.

    Unseen are a tenth of the sources, at most 500, drawn at random but the same each
    time, each with its last target.
    """
    targets = dict(pairs)
    sources = list(targets)
    number = min(500, max(1, len(sources) // 10))
    chosen = np.random.default_rng(0).permutation(len(sources))[:number]
    unseen = [(sources[i], targets[sources[i]]) for i in chosen]
    return without_sources(pairs, unseen), unseen


def width_of(lists, max_width):
    """The width that lists of tokens, such as the two of a pair, are padded to.

    It has room for the longest of the lists, which is shorter than max_width, and EOS.
    As jit compiles for each width, there are few: max_width, half of it, a quarter, and
    so on, and none below 8.

    >>> [width_of([[5] * n], max_width=32) for n in (20, 15, 1)]
    [32, 16, 8]
    """
    needed = max(len(tokens) + 1 for tokens in lists)
    width = max_width
    while width // 2 >= max(needed, 8):
        width //= 2
    return width


def training_batches(pairs, max_width, batch_size, seed):
    """Yields batches for ever, epoch after epoch, each in a new random order.

    Pairs of like width come together. All batches are full, of batch_size pairs or of
    all there are, and the pairs left over are others in each epoch. The batches follow
    from the arguments alone, so that a run can be taken up again.
    """
    widths = np.array([width_of(pair, max_width) for pair in pairs])
    batch_size = min(batch_size, len(pairs))
    num_batches = len(pairs) // batch_size
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        rows = rng.permutation(len(pairs))[: num_batches * batch_size]
        # The sort is stable: pairs of one width stay in their random order.
        rows = rows[np.argsort(widths[rows], kind="stable")]
        batches = rows.reshape(num_batches, batch_size)
        for batch in rng.permutation(batches):
            yield to_batch([pairs[i] for i in batch], max(widths[batch]))


def batches_by_width(widths, batch_size=64):
    """Sorts rows by width, and yields them in batches: (their numbers, their width).

    >>> list(batches_by_width([8, 32, 16, 8], batch_size=2))
    [([0, 3], 8), ([2, 1], 32)]
    """
    order = sorted(range(len(widths)), key=widths.__getitem__)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, widths[rows[-1]]


# ---- 13 Checkpoints ------------------------------------------------------------------

# A checkpoint is this line, the SHA-256 digest of the content, and the content.
FORMAT = b"transformer_model checkpoint 4\n"


class Checkpoint(NamedTuple):
    """All it takes to use a model, and to train it further."""

    config: TransformerConfig
    tokenizer: Tokenizer
    state: dict  # the TrainState's fields as numpy arrays; `average` is what to use
    notes: dict  # numbers, strings, bytes, None, and lists and dicts of them


def save_checkpoint(path, checkpoint):
    """Writes a Checkpoint into one file. An old file at `path` stays there until the new
    one is complete. What cannot be written raises an OSError that names `path`.
    """
    content = {
        "config": asdict(checkpoint.config),
        "merges": [list(pair) for pair in checkpoint.tokenizer.merges],
        "state": checkpoint.state,
        "notes": checkpoint.notes,
    }
    content = flax.serialization.msgpack_serialize(content)
    target = os.path.realpath(path)  # A link stays a link.
    unfinished = f"{target}.{os.getpid()}.tmp"  # Two runs have two.
    try:
        with open(unfinished, "wb") as file:
            file.write(FORMAT + hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote -> Checkpoint. A file that is no checkpoint, is
    damaged, or is of another model than this file defines, raises an InputError.
    """
    with open(path, "rb") as file:
        content = file.read()
    if not content.startswith(FORMAT):
        raise InputError(f"{path}: not a checkpoint of this edition of the program")
    content = content.removeprefix(FORMAT)
    digest, content = content[:32], content[32:]
    if digest != hashlib.sha256(content).digest():
        raise InputError(f"{path}: damaged or cut short")
    content = flax.serialization.msgpack_restore(content)
    try:
        config, state = TransformerConfig(**content["config"]), content["state"]
    except (TypeError, InputError) as error:
        raise InputError(f"{path}: its configuration does not fit: {error}") from None
    init = partial(Transformer(config).init, jax.random.key(0))
    tokens, shapes = np.full((1, 1), BOS_ID), partial(jax.tree.map, np.shape)
    expected = jax.eval_shape(init, tokens, tokens)["params"]
    if not shapes(state["params"]) == shapes(state["average"]) == shapes(expected):
        raise InputError(f"{path}: its parameters are not those of this file's model")
    return Checkpoint(config, Tokenizer(content["merges"]), state, content["notes"])


# ---- 14 Translation ------------------------------------------------------------------


def find_best(model, params, beam_size, with_weights, src, max_len):
    """The best output for each source, src int [B, S] -> a tuple: int32 [B, max_len] and,
    if asked for, how it attended to the source, float32 [B, max_len, S].
    """
    if beam_size == 1:
        best = greedy_decode(model, params, src, max_len)
    else:
        tokens, _ = beam_search(model, params, src, max_len, beam_size)
        best = tokens[:, 0]
    if with_weights:
        return best, attention_weights(model, params, src, best)
    return (best,)


def search_all(search, sources, longest):
    """Runs a search on sources, lists of fewer tokens than `longest`, in batches.

    `search(src, max_len)` returns a tuple of arrays that have a row for each source, as
    `find_best` does. Returned are these rows, a list for each source. An output has at
    most 50 tokens more than its padded source (section 6.1).
    """
    found = [None] * len(sources)
    # A search is compiled for each number of rows, so there are few: powers of 2. What is
    # missing in the last batch is filled up with its first row.
    batch_size = 1
    while batch_size < min(64, len(sources)):
        batch_size *= 2
    widths = [width_of([source], longest) for source in sources]
    for rows, width in batches_by_width(widths, batch_size):
        filled = rows + rows[:1] * (batch_size - len(rows))
        src = pad([[*sources[i], EOS_ID] for i in filled], width)
        arrays = search(src, min(width + 50, longest))
        for i, *results in zip(rows, *map(np.asarray, arrays)):
            found[i] = results
    return found


def encode_source(checkpoint, text, where):
    """str -> tokens; more than the model can take raise an InputError that says where."""
    source, longest = checkpoint.tokenizer.encode(text), checkpoint.config.max_len
    rule = f"{where}: the number of tokens must be below {longest}"
    require(len(source) < longest, rule, len(source))
    return source


def translate(checkpoint, texts, beam_size=4):
    """Texts (a list of str) -> their translations, the same; "" for "".

    A text that has too many tokens raises an InputError with its number, from 1.
    """
    numbered = enumerate(texts, 1)
    sources = [encode_source(checkpoint, text, f"text {i}") for i, text in numbered]
    model, params = Transformer(checkpoint.config), checkpoint.state["average"]
    search = partial(find_best, model, jax.device_put(params), beam_size, False)
    found = search_all(search, sources, checkpoint.config.max_len)
    decode = checkpoint.tokenizer.decode
    return [decode(output) if s else "" for s, (output,) in zip(sources, found)]


# ---- 15 Training on pairs ------------------------------------------------------------


def option(default, text):
    """A field of Options: its default, and its help on the command line."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What defines a training run, beside its pairs. What cannot work, raises an
    InputError.
    """

    steps: int = option(11_000, "training steps in all")
    batch_size: int = option(128, "pairs in a step, on all devices together")
    warmup_steps: int = option(1000, "steps in which the learning rate rises (Eq. 3)")
    dropout_rate: float = option(0.1, "of dropout (5.4); 0 suits very many pairs")
    label_smoothing: float = option(0.1, "share of the smoothing (5.4)")
    d_model: int = option(128, "width; the inner width d_ff is 4 times that")
    num_heads: int = option(4, "attention heads")
    num_layers: int = option(2, "blocks in each stack")
    max_len: int = option(128, "longest source and target in tokens, with EOS")
    vocab_size: int = option(500, "size of the vocabulary of subwords; 259 is bytes")
    dtype: str = option("float32", "of the computation; or bfloat16")
    seed: int = option(0, "of all that is random")

    def __post_init__(self):
        require_least(self, 1, "steps", "batch_size", "warmup_steps")
        require_least(self, 0, "seed")
        require_least(self, FIRST_MERGE_ID, "vocab_size")
        share = self.label_smoothing
        require(0 <= share <= 1, "label_smoothing must be 0 to 1", share)
        self.config(self.vocab_size)  # refuses what cannot work in the other fields

    def config(self, vocab_size):
        """The configuration of the model, when the vocabulary has been learnt."""
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        same = {name: value for name, value in asdict(self).items() if name in names}
        sizes = {"src_vocab_size": vocab_size, "tgt_vocab_size": vocab_size}
        return TransformerConfig(**sizes, **same, d_ff=4 * self.d_model)


def log(text):
    """Prints progress to stderr. Of several processes, only the first does."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def digest_of(data):
    """32 bytes by which the data can be recognised."""
    return hashlib.sha256(json.dumps(data).encode()).digest()


def options_of(checkpoint):
    """The Options of the run that a checkpoint is of."""
    if "options" not in checkpoint.notes:
        raise InputError("the checkpoint is not one of `fit`")
    return Options(**checkpoint.notes["options"])


def require_same_run(checkpoint, notes):
    """Raises an InputError unless a run with these notes can go on from there."""
    for name, old in asdict(options_of(checkpoint)).items():
        new = notes["options"][name]
        if name == "steps":
            require(new >= old, f"steps must be at least {old}, as in the run", new)
        else:
            require(new == old, f"{name} must be {old!r}, as in the run", new)
    for name in ("pairs", "unseen pairs"):
        if notes[name] != checkpoint.notes[name]:
            need = "the same PAIRS, and the same --valid if it had one"
            raise InputError(f"the {name} are not those of the run, which needs {need}")


def encode_pairs(name, pairs, tokenizer, max_len):
    """Pairs of texts -> pairs of lists of tokens, without those that are too long."""
    encoded = [tuple(map(tokenizer.encode, pair)) for pair in pairs]
    short = [pair for pair in encoded if max(map(len, pair)) < max_len]  # EOS counts
    limit = f"within max_len, {max_len} tokens with EOS"
    log(f"{name}: {len(short):,} of {len(pairs):,} are {limit}")
    if not short:
        need = "a run needs a pair, and an unseen pair with another source"
        raise InputError(f"{name}: {need}, {limit}")
    return short


def to_arrays(state):
    """A TrainState -> the dict of numpy arrays that a Checkpoint has."""
    return flax.serialization.to_state_dict(jax.device_get(state))


def start_run(pairs, unseen, options, checkpoint):
    """What `fit` begins with: TrainState, Checkpoint, and the pairs as tokens."""
    if options is None:
        options = Options() if checkpoint is None else options_of(checkpoint)
    notes = {"options": asdict(options)}
    notes |= {"pairs": digest_of(pairs), "unseen pairs": digest_of(unseen)}
    pairs = without_sources(pairs, unseen)
    if checkpoint is None:
        tokenizer = Tokenizer.learn(itertools.chain(*pairs), options.vocab_size)
    else:
        require_same_run(checkpoint, notes)
        tokenizer = checkpoint.tokenizer
    pairs = encode_pairs("pairs", pairs, tokenizer, options.max_len)
    unseen = encode_pairs("unseen pairs", unseen, tokenizer, options.max_len)
    config = options.config(tokenizer.vocab_size)
    optimizer = paper_optimizer(options.d_model, options.warmup_steps)
    state = create_train_state(config, jax.random.key(options.seed), optimizer)
    if checkpoint is not None:
        state = flax.serialization.from_state_dict(state, checkpoint.state)
    # Where several processes train together, each computes its part of one batch. So they
    # need the same pairs and options.
    digest = digest_of([repr(notes), int(state.step)])
    try:
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint8))
    except AssertionError:
        raise InputError("the processes have different pairs or options") from None
    return state, Checkpoint(config, tokenizer, to_arrays(state), notes), pairs, unseen


def spread(state):
    """Puts the state on all devices, those of other processes too. Returns it, and the
    function that splits an array of a batch, which every process has, among them.

    To train_step the parts are one array, [B, L]: it takes the mean over the labels on
    all devices, and jit adds the communication that this needs.
    """
    mesh = Mesh(jax.devices(), ("data",))  # all in a row
    by_row = NamedSharding(mesh, PartitionSpec("data"))

    def split(array):
        # Rows of PAD, which count nothing, make it a multiple of the devices.
        array = np.pad(array, ((0, -len(array) % mesh.size), (0, 0)))
        return jax.make_array_from_callback(array.shape, by_row, array.__getitem__)

    # A copy, as train_step uses it up: the arrays may be those of a caller's checkpoint.
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(state, everywhere, may_alias=False), split


def unseen_loss(state, pairs, max_len):
    """The mean loss of the averaged parameters over all labels of the pairs."""
    # Each process evaluates alone. So what eval_step needs of the state, which is on the
    # devices of all processes, has to leave them.
    state = jax.device_get(state.replace(params=(), opt_state=()))
    losses, num_labels = [], []
    for rows, width in batches_by_width([width_of(pair, max_len) for pair in pairs]):
        batch = to_batch([pairs[i] for i in rows], width)
        losses.append(eval_step(state, batch)["loss"])
        num_labels.append(np.sum(batch["tgt"][:, 1:] != PAD_ID))
    return np.average(losses, weights=num_labels)


def log_score(checkpoint, pairs):
    """Translates pairs of lists of tokens, and logs how many come out right."""
    texts = [tuple(map(checkpoint.tokenizer.decode, pair)) for pair in pairs]
    outputs = translate(checkpoint, [source for source, _ in texts])
    right = sum(target == output for (_, target), output in zip(texts, outputs))
    share_right = f"{right / len(texts):.1%}"
    log(f"{right} of {len(texts)} unseen pairs exactly right ({share_right})")
    for (source, target), output in zip(texts[:6], outputs):
        wrong = "" if output == target else f"   not {target}"
        log("  " + one_line(f"{source} -> {output}{wrong}"))


def fit(pairs, unseen, options=None, path=None, checkpoint=None):
    """Trains on pairs of texts, (source, target), and returns a Checkpoint.

    It trains on no pair that has the source of an unseen one, and measures on those. It
    reports, on stderr, and saves to `path` after each twentieth of the steps (at most
    500), and when the last report is a minute old. From a checkpoint of this very run it
    goes on as if nothing had interrupted it; of its options, the steps may have grown.
    What cannot work raises an InputError. A loss that is not finite raises a
    FloatingPointError, and `path` has the last good checkpoint.
    """
    state, checkpoint, pairs, unseen = start_run(pairs, unseen, options, checkpoint)
    options, is_first = options_of(checkpoint), jax.process_index() == 0
    if path and is_first:  # What cannot be written is to be known before training.
        save_checkpoint(path, checkpoint)
    state, split = spread(state)
    start, every = int(state.step), max(1, min(options.steps // 20, 500))
    batches = training_batches(pairs, options.max_len, options.batch_size, options.seed)
    batches = itertools.islice(batches, start, None)  # without those of the steps done
    began, reported, metrics = time.monotonic(), time.monotonic(), None
    for step, batch in zip(range(start + 1, options.steps + 1), batches):
        before, batch = metrics, jax.tree.map(split, batch)
        state, metrics = train_step(state, batch, options.label_smoothing)
        # The loop waits for the step before. So the devices always have this one to do.
        jax.block_until_ready(before)
        is_due = step % every == 0 or step == options.steps
        if is_due or time.monotonic() - reported > 60:
            arrays = to_arrays(state)
            # A step can have a finite loss, and break the parameters all the same.
            numbers = jax.tree.leaves((metrics, arrays["params"]))
            if all(np.isfinite(x).all() for x in numbers):
                checkpoint = checkpoint._replace(state=arrays)
                if path and is_first:
                    save_checkpoint(path, checkpoint)
                reported = time.monotonic()
                loss = unseen_loss(state, unseen, options.max_len)
                losses = f"loss {metrics['loss']:.4f}, unseen {loss:.4f}"
                seconds = f"{reported - began:.0f} s"
                log(f"step {step} of {options.steps}: {losses}, {seconds}")
            elif is_due:  # in all processes, or in none, for their clocks may differ
                problem = "the loss or a parameter is not finite"
                raise FloatingPointError(f"after step {step} {problem}")
    if is_first:
        log_score(checkpoint, unseen)
    return checkpoint


# ---- 16 Command line -----------------------------------------------------------------


def join_job():
    """Makes this process one of several that train together.

    JAX finds such a job by itself under Slurm and Open MPI and on Cloud TPU. Elsewhere
    three variables tell: JAX_COORDINATOR_ADDRESS, which JAX reads, and the two below.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        job = {key: int(os.environ[v]) for key, v in names.items() if v in os.environ}
        jax.distributed.initialize(**job)
    except ValueError as error:
        needs = ", ".join(["JAX_COORDINATOR_ADDRESS", *names.values()])
        raise InputError(f"--distributed needs {needs}: {error}") from None


def run_training(args):
    """The commands `train` and `resume`."""
    if args.distributed:
        join_job()
    names = [field.name for field in dataclasses.fields(Options)]
    given = {name: getattr(args, name) for name in names if name in args}
    if args.command == "train":
        if os.path.exists(args.model):
            raise InputError(f"{args.model} exists; `resume` goes on with it")
        if args.model == "":
            raise InputError("MODEL is an empty word")
        checkpoint, options = None, Options(**given)
    else:
        checkpoint = load_checkpoint(args.model)
        options = dataclasses.replace(options_of(checkpoint), **given)
    pairs = read_pairs(args.pairs)
    if args.valid is None:
        pairs, unseen = hold_out(pairs)
    else:
        unseen = read_pairs(args.valid)
    try:
        fit(pairs, unseen, options, args.model, checkpoint)
    except InputError as error:
        files = ", ".join(filter(None, (args.pairs, args.valid, args.model)))
        raise InputError(f"{files}: {error}") from None


def lines_as_they_arrive(file):
    """Yields lists of the lines of a binary file: many of one on disk, a single one that
    is typed, or that comes through a pipe whose writer waits for the answer.
    """
    rest = b""  # of the last block, the beginning of a line
    while True:
        if file.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        block = file.read1(65536)
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        yield lines
    if rest:
        yield [rest]


def draw_translation(tokenizer, source, output, weights):
    """The picture of a source and an output (tokens), with weights [T, S] or more."""

    def name(token):  # without what would tear the table
        text = tokenizer.decode([token]).replace(" ", "_")
        is_wide = any(unicodedata.east_asian_width(c) in "FW" for c in text)
        return ascii(text)[1:-1] if is_wide or not text.isprintable() else text

    output = itertools.takewhile(lambda token: token != EOS_ID, output)
    columns = [*map(name, source), "EOS"]
    rows = [*map(name, output), "EOS"][: len(weights)]
    return draw_attention(weights[: len(rows), : len(columns)], columns, rows)


def run_translation(args):
    """The command `translate`: prints a line for each text, or for each line of stdin. It
    is empty for an empty text, and for one that cannot be translated, which is named on
    stderr. Returns the exit status.
    """
    checkpoint = load_checkpoint(args.model)
    config, tokenizer, state, _ = checkpoint
    model, params = Transformer(config), jax.device_put(state["average"])
    search = partial(find_best, model, params, args.beam_size, args.attention)
    if args.texts:  # as bytes, so that `decode_line` sees what is not UTF-8
        blocks = [[os.fsencode(text) for text in args.texts]]
    else:
        blocks = lines_as_they_arrive(sys.stdin.buffer)
    numbers, status = itertools.count(1), 0
    for lines in blocks:
        sources = []
        for line in lines:
            where = f"line {next(numbers)}"
            try:
                source = encode_source(checkpoint, decode_line(line, where), where)
            except InputError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                source, status = [], 2
            sources.append(source)
        found = search_all(search, sources, config.max_len)
        for source, (output, *weights) in zip(sources, found):
            print(one_line(tokenizer.decode(output)) if source else "", flush=True)
            if source and args.attention:
                picture = draw_translation(tokenizer, source, output, *weights)
                print(picture, flush=True)
    return status


def make_parser():
    """Returns the parser of the command line."""
    description = "The Transformer, as in the paper. Without a command, the demo."
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="learn to reverse words, and show it")
    train = commands.add_parser("train", help="learn from a file of pairs")
    resume = commands.add_parser("resume", help="go on with what `train` has saved")
    translate = commands.add_parser(
        "translate",
        help="translate texts",
        epilog="Options come first or last; a TEXT that begins with - comes after --.",
    )
    shown = " (default: %(default)s)"
    demo.add_argument("--steps", type=int, default=1000, help="in all" + shown)
    demo.add_argument(
        "--seed", type=int, default=0, help="of all that is random" + shown
    )
    for command in (train, resume):
        add = command.add_argument
        add("pairs", metavar="PAIRS", help="a file of lines source<TAB>target")
        add("model", metavar="MODEL", help="the file of the run")
        valid = "measure on these pairs, not on a tenth of PAIRS (at most 500)"
        add("--valid", metavar="FILE", help=valid)
        add("--distributed", action="store_true", help="join a job of processes")
    for field in dataclasses.fields(Options):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"] + shown
        train.add_argument(flag, type=field.type, default=field.default, help=text)
    more, no_value = "in all, if they are to be more", argparse.SUPPRESS
    resume.add_argument("--steps", type=int, default=no_value, help=more)
    add = translate.add_argument
    add("model", metavar="MODEL", help="what `train` has saved")
    add("texts", nargs="*", metavar="TEXT", help="without any, the lines of stdin")
    beam = "hypotheses of the search; 1 is greedy" + shown
    add("--beam-size", type=int, default=4, help=beam)
    add("--attention", action="store_true", help="draw what each output attended to")
    return parser


def run(args):
    """Runs a command; returns the exit status."""
    if args.command in ("train", "resume"):
        run_training(args)
        return 0
    if sys.stdout is None:
        raise InputError("stdout is closed")
    if args.command == "demo":
        Options(steps=args.steps, seed=args.seed)  # refuses what cannot work
        demo(args.steps, args.seed)
        return 0
    require_least(args, 1, "beam_size")
    if sys.stdin is None and not args.texts:
        raise InputError("stdin is closed, and there is no TEXT")
    return run_translation(args)


def main(argv=None):
    """Runs the command line, by default the process's own; returns the exit status.

    0 done; 2 a mistake on the command line or in a file; 130 Ctrl-C; 1 anything else.
    """
    argv = sys.argv[1:] if argv is None else argv
    has_command = argv and (argv[0] in ("-h", "--help") or not argv[0].startswith("-"))
    try:
        return run(make_parser().parse_args(argv if has_command else ["demo", *argv]))
    except InputError as error:
        message, status = error, 2
    except FloatingPointError as error:
        message, status = error, 1
    except OSError as error:
        if error.filename is None:
            raise
        message, status = f"{error.filename}: {error.strerror}", 2
    except SystemExit as error:  # argparse ends so, after a mistake and after --help.
        return error.code
    except KeyboardInterrupt:
        return 130
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is None:  # It was closed, and the next file opened gets its number.
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if sys.stdout:
        sys.stdout.reconfigure(encoding="utf-8")  # wherever it goes, on every system
    try:
        status = main()
    except BrokenPipeError:  # Whoever read the output, as `head` does, has gone.
        status = 1
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        status = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:  # Python would try again at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            status = 1
    if status and jax.distributed.is_initialized():
        # JAX would wait at the exit for other processes, which wait for this one.
        os._exit(status)
    sys.exit(status)
