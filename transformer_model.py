"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017), in JAX, Flax.

The complete encoder-decoder model with its training and its inference, in the order of
the paper (arXiv:1706.03762), to which "section", "Eq.", "Table" and "Figure" refer.

    python transformer_model.py                     learn a toy task, and show it
    python transformer_model.py --pairs pairs.tsv   learn from your own sentence pairs
    python transformer_model.py --help              everything else

Sections: 1 Configuration, 2 Masks, 3 Positional encoding, 4 Attention, 5 Feed-forward
network, 6 Blocks, 7 The model, 8 Training, 9 Inference, 10 Text, 11 Data, 12 Check-
points, 13 Translation, 14 A training run, 15 Command line. The architecture ends with
section 7. Sections 8 to 11 train it, search with it and feed it, as the paper does. The
rest is a program around that.

Shapes are written with the same letters everywhere:

    B  batch             D  d_model, the width         H  num_heads
    S  source length     K  D // H, width of a head    F  d_ff, the inner width
    T  target length     V  target vocabulary          W  beams
    L  any length

A token is an integer, its place in the vocabulary. A mask is boolean, True where
attention is allowed. `kv` is a pair, the keys and the values, each [B, H, L, K].
"""

import signal

if __name__ == "__main__":
    # JAX takes seconds to import. Meanwhile, Ctrl-C ends the process at once, without a
    # traceback. The last lines of this file restore Python's handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import os
import re
import secrets
import sys
import time
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# ---- 1 Configuration -----------------------------------------------------------------

PAD_ID = 0  # fills up short rows; never attended to, never counted in the loss
BOS_ID = 1  # "beginning of sequence", the decoder's first input
EOS_ID = 2  # "end of sequence", the last token of every source and target
FIRST_SYMBOL_ID = 3


class InputError(ValueError):
    """A mistake that the user can mend; the command line tells it in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What defines a model. The defaults are the paper's base model (Table 3).

    It is hashable, and so can be a static argument of a jitted function. A value that
    cannot work raises an InputError naming the field, the value and what is allowed.
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
        def require(name, condition, wanted):
            if not condition:
                value = getattr(self, name)
                raise InputError(f"{name} must be {wanted}, not {value!r}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # isinstance would take True for an int. An int may stand for a float.
            kinds = [int, float] if field.type is float else [field.type]
            require(field.name, type(value) in kinds, f"of type {field.type.__name__}")
            if field.type is int:
                # A vocabulary holds the three special tokens and at least one symbol.
                least = FIRST_SYMBOL_ID + 1 if "vocab_size" in field.name else 1
                require(field.name, value >= least, f"at least {least}")
        divides = self.d_model % self.num_heads == 0
        require("d_model", divides, f"a multiple of num_heads, {self.num_heads}")
        require("d_model", self.d_model % 2 == 0, "even, for sines and cosines")
        require("dropout_rate", 0 <= self.dropout_rate < 1, "at least 0 and below 1")
        sizes = self.src_vocab_size, self.tgt_vocab_size
        fits = sizes[0] == sizes[1] or not self.share_embeddings
        require("share_embeddings", fits, f"False for vocabularies of sizes {sizes}")
        outputs, dtypes = ("logits", "softmax", "none"), ("float32", "bfloat16")
        require("head", self.head in outputs, f"one of {outputs}")
        require("dtype", self.dtype in dtypes, f"one of {dtypes}")


# ---- 2 Masks -------------------------------------------------------------------------


def check_tokens(tokens):
    """Raises a ValueError unless tokens are integers [B, L] of at least [1, 1]."""
    shape, dtype = jnp.shape(tokens), jnp.result_type(tokens)
    if len(shape) != 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, L], got {dtype} {shape}")


def padding_mask(tokens):
    """int [B, L] -> bool [B, 1, 1, L]: no query may attend to a key that is PAD.

    The two axes of length 1 stand for all heads and all queries.

    >>> print(padding_mask(np.array([[5, 7, PAD_ID]]))[0, 0])
    [[ True  True False]]
    """
    check_tokens(tokens)
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

# An einsum that sums up and returns in float32, even if its inputs are bfloat16, for
# products that go into a softmax.
einsum_float32 = partial(jnp.einsum, preferred_element_type=jnp.float32)


def scaled_dot_product_attention(query, key, value, mask=None):
    """softmax(query key^T / sqrt(K)) value, for all heads at once (Eq. 1).

    Args:
      query: float [B, H, T, K].
      key, value: float [B, H, S, K].
      mask: bool, broadcastable to [B, H, T, S]; None allows everything.

    Returns:
      The output [B, H, T, K], and the weights, float32 [B, H, T, S]. A query that may
      attend to nothing, as when all tokens are PAD, gets zeros in both.

    Inputs of other types, and shapes that do not fit, raise a ValueError.
    """
    for x in (query, key, value):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            need = "query, key and value must be float [B, H, L, K]"
            raise ValueError(f"{need}, got {x.dtype} {x.shape}")
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask must be bool, True: may attend; got {mask.dtype}")
    scores = einsum_float32("bhtk,bhsk->bhts", query, key) / np.sqrt(query.shape[-1])
    # The argument `where` makes the weights 0 where the mask is False, even in a row
    # that is False throughout, for which the paper's scores of -inf would give NaN.
    weights = jax.nn.softmax(scores, where=mask)
    return jnp.einsum("bhts,bhsk->bhtk", weights.astype(value.dtype), value), weights


class Dense(nn.Module):
    """x W + b at every position; at the start W is Xavier-uniform and b is zero."""

    features: int

    @nn.compact
    def __call__(self, x):
        """x [B, L, any width] -> [B, L, features]."""
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        kernel = self.param("kernel", xavier, (x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.features,))
        # One product of two matrices is faster on CPUs than the B products of nn.Dense.
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ kernel.astype(x.dtype) + bias.astype(x.dtype)
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
        self.query, self.key = Dense(width), Dense(width)
        self.value, self.output = Dense(width), Dense(width)

    def __call__(self, x, memory, mask=None):
        """x [B, T, D] attends to memory [B, S, D], both float -> [B, T, D]."""
        return self.attend(x, self.project_kv(memory), mask)

    def project_kv(self, memory):
        """memory [B, S, D] -> its kv, of length S."""
        return self.split_heads(self.key(memory)), self.split_heads(self.value(memory))

    def attend(self, x, kv, mask=None):
        """x [B, T, D], kv of length S, mask broadcast to [B, H, T, S] -> [B, T, D]."""
        query = self.split_heads(self.query(x))
        heads, weights = scaled_dot_product_attention(query, *kv, mask)
        self.sow("intermediates", "weights", weights)
        return self.output(heads.swapaxes(1, 2).reshape(x.shape))  # concatenates

    def split_heads(self, x):
        """x [B, L, D] -> [B, H, L, K]: every head gets K neighbouring columns of x."""
        return x.reshape(*x.shape[:2], self.config.num_heads, -1).swapaxes(1, 2)


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


class DecoderBlock(nn.Module):
    """Masked self-attention, attention to memory, feed-forward (Figure 1, right)."""

    config: TransformerConfig

    def setup(self):
        self.self_attention = MultiHeadAttention(self.config)
        self.cross_attention = MultiHeadAttention(self.config)
        self.feed_forward = FeedForward(self.config)
        self.add_and_norm = [AddAndNorm(self.config) for _ in range(3)]

    def __call__(self, x, self_mask, memory_kv, memory_mask, cache=None, start=0):
        """In training, x is a whole target. Decoding goes token by token: T is 1, and
        the keys and values of the tokens before come from a cache, to save computing
        them anew for every token.

        Args:
          x: [B, T, D].
          self_mask: broadcastable to [B, H, T, T] or, with a cache, [B, H, T, L].
          memory_kv: cross_attention.project_kv(memory), of length S.
          memory_mask: broadcastable to [B, H, T, S].
          cache: a kv of length L, filled at the positions below `start`. Its layout is
            the one in which attention reads it, [B, H, L, K]. With [B, L, H, K], XLA
            would transpose the whole cache at every token.
          start: the position of the first token of x.

        Returns:
          x after the block, [B, T, D], and the kv that self-attention attended to: that
          of x, or the updated cache.
        """
        first, second, third = self.add_and_norm

        inputs = first.before(x)
        kv = self.self_attention.project_kv(inputs)
        if cache is not None:
            kv = tuple(  # Axis 2 is that of the positions, L.
                jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=2)
                for old, new in zip(cache, kv)
            )
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

    Dropout is on if `apply` gets rngs={"dropout": key}. To get the attention weights as
    well, of a decoder block's attention to the source, for example:

        logits, more = model.apply(variables, src, tgt, mutable=["intermediates"])
        block = more["intermediates"]["decoder"]["blocks_0"]
        (weights,) = block["cross_attention"]["weights"]  # [B, H, T, S], in a tuple

    By default, this is the tree of the parameters:

        embedding                           [V, D]
        encoder
          blocks_0, blocks_1, ...
            self_attention
              query, key, value, output     kernel [D, D], bias [D]
            feed_forward
              inner                         kernel [D, F], bias [F]
              outer                         kernel [F, D], bias [D]
            add_and_norm_0, add_and_norm_1
              norm                          scale [D], bias [D]
        decoder     the same, with a cross_attention and an add_and_norm_2 in each block

    A token outside the vocabulary gives NaN, see `embed`. Shapes that do not fit, or a
    length above max_len, raise a ValueError.
    """

    config: TransformerConfig

    def setup(self):
        normal = nn.initializers.normal(self.config.d_model**-0.5)

        def matrix(name, rows, init=normal):
            return self.param(name, init, (rows, self.config.d_model))

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
        memory_mask = padding_mask(src)
        self_mask = padding_mask(tgt) & causal_mask(tgt.shape[1])
        if src.shape[0] != tgt.shape[0]:
            got = f"{src.shape} and {tgt.shape}"
            raise ValueError(f"src and tgt must be [B, S] and [B, T], got {got}")
        memory_kv = self.project_kv(self.encode(src))
        return self.decode(tgt, self_mask, memory_kv, memory_mask)[0]

    def encode(self, src):
        """Source tokens, int [B, S] -> the memory, [B, S, D]."""
        return self.encoder(self.embed(self.src_embedding, src), padding_mask(src))

    def project_kv(self, memory):
        """The memory [B, S, D] -> the list of kv that the decoder blocks make of it."""
        blocks = self.decoder.blocks
        return [block.cross_attention.project_kv(memory) for block in blocks]

    def decode(self, tgt, self_mask, memory_kv, memory_mask, cache=None, start=0):
        """Target tokens, int [B, T], at positions from `start` on, all below max_len ->
        the logits for the tokens after them, float32 [B, T, V], and the decoder's kv
        (see `Decoder`).
        """
        x = self.embed(self.tgt_embedding, tgt, start)
        x, kv = self.decoder(x, self_mask, memory_kv, memory_mask, cache, start)
        if self.config.head == "none":
            return x, kv
        logits = einsum_float32("btd,vd->btv", x, self.output.astype(x.dtype))
        if self.config.head == "softmax":
            return jax.nn.softmax(logits), kv
        return logits, kv

    def embed(self, embedding, tokens, start=0):
        """int [B, L], the first at position `start` -> [B, L, D] (3.4 and 3.5)."""
        check_tokens(tokens)
        max_len, d_model = self.config.max_len, self.config.d_model
        if tokens.shape[1] > max_len:
            raise ValueError(f"tokens {tokens.shape} [B, L]: L is above {max_len=}")
        # jnp.take gives NaN for a token that is too large. A negative one would count
        # from the end; as uint32 it is too large as well, -1 being 2^32 - 1.
        x = jnp.take(embedding, tokens.astype("uint32"), axis=0) * d_model**0.5
        position = start + jnp.arange(tokens.shape[1])
        x = x + jnp.asarray(positional_encoding(max_len, d_model))[position]
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        return x.astype(self.config.dtype)


# ---- 8 Training ----------------------------------------------------------------------


def mean_over_labels(values, labels):
    """The mean of values [B, T] where labels [B, T] are not PAD; without any, 0."""
    is_label = labels != PAD_ID
    return jnp.where(is_label, values, 0).sum() / jnp.maximum(is_label.sum(), 1)


def cross_entropy_loss(logits, labels, label_smoothing=0.0):
    """Mean cross-entropy of the labels that are not PAD, in nats.

    Label smoothing (section 5.4) takes the share `label_smoothing` of the probability
    away from the label and spreads it evenly over all V classes.

    logits [B, T, V], labels int [B, T] -> float32 []. A label outside the vocabulary
    gives NaN; another type or shape, or a share outside 0 to 1, raises a ValueError.
    """
    check_tokens(labels)
    if logits.shape[:-1] != labels.shape:
        got = f"{logits.shape} and {labels.shape}"
        raise ValueError(f"logits and labels must be [B, T, V] and [B, T], got {got}")
    # In a caller's jit, label_smoothing may be a tracer, which has no value to check.
    is_number = isinstance(label_smoothing, (int, float))
    if is_number and not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be 0 to 1, not {label_smoothing}")
    vocab_size = logits.shape[-1]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, vocab_size), label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    # one_hot makes zeros of a label outside the vocabulary, which would hide it.
    losses = jnp.where((labels >= 0) & (labels < vocab_size), losses, jnp.nan)
    return mean_over_labels(losses, labels)


def paper_schedule(d_model, warmup_steps=4000):
    """The learning rate as a function of the number of steps done (Eq. 3).

    lrate = D^-0.5 min(step^-0.5, step warmup_steps^-1.5), where the first step is 1

    >>> rate = paper_schedule(d_model=512)
    >>> [f"{rate(step - 1):.1e}" for step in (1, 2000, 4000, 16000)]
    ['1.7e-07', '3.5e-04', '7.0e-04', '3.5e-04']
    """

    def schedule(steps_done):
        step = steps_done + 1.0
        return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)

    return schedule


class TrainState(train_state.TrainState):
    """Flax's TrainState (step, params, optimizer and its state) with a random key."""

    dropout_key: jax.Array  # jax.random.key_data: can be saved, and used like a key


def init_params(config, key):
    """The parameters that a model of this configuration starts with."""
    tokens = jnp.full((1, 1), BOS_ID)
    return Transformer(config).init(key, tokens, tokens)["params"]


def create_train_state(config, key, optimizer=None):
    """New parameters, drawn from `key`, with what it takes to train them.

    `optimizer` is optax's; None stands for the paper's, Adam with the learning rate of
    Eq. 3 (section 5.3).
    """
    if config.head != "logits":
        raise ValueError(f'head must be "logits" for training, not {config.head!r}')
    if optimizer is None:
        schedule = paper_schedule(config.d_model)
        optimizer = optax.adam(schedule, b1=0.9, b2=0.98, eps=1e-9)
    params_key, dropout_key = jax.random.split(key)
    params = jax.jit(init_params, static_argnames="config")(config, params_key)
    return TrainState(
        # After a step it is an array. With an int here, jit would compile twice.
        step=jnp.zeros((), jnp.int32),
        apply_fn=Transformer(config).apply,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(params),
        dropout_key=jax.random.key_data(dropout_key),
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
      "accuracy". The latter is the share of labels that have the highest logit. Both
      stay on the device, so that a caller need not wait for them.
    """
    rngs = {"dropout": jax.random.fold_in(state.dropout_key, state.step)}

    def loss_fn(params):
        return loss_and_metrics(state, params, batch, label_smoothing, rngs)

    gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients), metrics


@jax.jit
def eval_step(state, batch):
    """The metrics of a batch as in `train_step`, without dropout and smoothing."""
    return loss_and_metrics(state, state.params, batch)[1]


# ---- 9 Inference ---------------------------------------------------------------------


def start_decoding(model, params, src, max_len, beam_size=1):
    """Encodes src, int [B, S], and makes room for W = beam_size hypotheses of each.

    All that is returned has B * W rows, those of a source one below the other:

      encoded: the pair (memory_kv, memory_mask), which the `Decoder` takes.
      tokens: int32 [B * W, L], where L is max_len + 1. BOS comes first, then PAD, which
        the search replaces.
      cache: empty, of length L, so that it fits the mask made of `tokens`. (Its last
        place is never used, as the decoder never gets the last token.)
    """
    if model.config.head != "logits":
        raise ValueError(f'head must be "logits", not {model.config.head!r}')
    if not 1 <= max_len <= model.config.max_len or beam_size < 1:
        limits = f"max_len must be 1 to {model.config.max_len}, beam_size at least 1"
        raise ValueError(f"{limits}; got {max_len} and {beam_size}")
    apply = partial(model.apply, {"params": params})
    memory_kv = apply(apply(src, method="encode"), method="project_kv")
    repeat = partial(jnp.repeat, repeats=beam_size, axis=0)
    encoded = jax.tree.map(repeat, (memory_kv, padding_mask(src)))
    _, num_heads, _, width = memory_kv[0][0].shape  # [B, H, S, K]
    rows, length = src.shape[0] * beam_size, max_len + 1
    tokens = jnp.full((rows, length), PAD_ID).at[:, 0].set(BOS_ID)
    empty = jnp.zeros((rows, num_heads, length, width), memory_kv[0][0].dtype)
    return encoded, tokens, [(empty, empty) for _ in memory_kv]


def next_logits(model, params, encoded, tokens, position, cache):
    """Runs the decoder on the token at `position` alone; the cache stands for the rest.

    Args:
      encoded: from `start_decoding`.
      tokens: int32 [B * W, L], the hypotheses so far, with PAD after `position`.
      cache: a list of kv of length L, filled before `position`.

    Returns:
      The logits for the tokens at position + 1, float32 [B * W, V], and the cache,
      filled up to `position`.
    """
    last = tokens[:, position][:, None]  # [B * W, 1]
    # What comes after `position` is PAD, and this mask hides it. So no causal mask is
    # needed. (A PAD that the model itself has chosen is hidden, as in training.)
    self_mask = padding_mask(tokens)
    decode = partial(model.apply, {"params": params}, method="decode")
    logits, cache = decode(last, self_mask, *encoded, cache=cache, start=position)
    return logits[:, 0], cache


def has_ended(tokens):
    """int [..., L] -> bool [...], whether there is an EOS."""
    return (tokens == EOS_ID).any(axis=-1)


def is_unfinished(carry):
    """Whether a search goes on. The carry, its state between two steps, is a tuple: the
    position of the last token, all tokens so far, and what else the search needs.
    """
    position, tokens, *_ = carry
    return (position < tokens.shape[-1] - 1) & ~has_ended(tokens).all()


@partial(jax.jit, static_argnames=("model", "max_len"))
def greedy_decode(model, params, src, max_len):
    """Takes the likeliest token at every step.

    src int [B, S] -> int32 [B, max_len], without BOS, PAD after EOS. Where the model's
    logits are NaN, the tokens are -1.
    """
    encoded, tokens, cache = start_decoding(model, params, src, max_len)

    def step(carry):
        position, tokens, cache = carry
        logits, cache = next_logits(model, params, encoded, tokens, position, cache)
        # Like argmax, and faster on CPUs. NaN counts as the highest logit.
        highest, token = jax.lax.top_k(logits, 1)  # both [B, 1]
        token = jnp.where(jnp.isnan(highest), -1, token)[:, 0]
        token = jnp.where(has_ended(tokens), PAD_ID, token)
        return position + 1, tokens.at[:, position + 1].set(token), cache

    _, tokens, _ = jax.lax.while_loop(is_unfinished, step, (0, tokens, cache))
    return tokens[:, 1:]


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
    """((5 + length) / 6)^alpha: int [..., L] -> float32 [...]; EOS counts in length."""
    length = jnp.argmax(tokens == EOS_ID, axis=-1) + 1
    length = jnp.where(has_ended(tokens), length, tokens.shape[-1])
    return ((5 + length) / 6) ** alpha


@partial(jax.jit, static_argnames=("model", "max_len", "beam_size"))
def beam_search(model, params, src, max_len, beam_size=4, alpha=0.6):
    """Looks for the W = `beam_size` likeliest targets of each source (section 6.1).

    At each step the W likeliest hypotheses of a source are kept, ended ones among them.
    `alpha` is the exponent of the length penalty. src int [B, S] ->

      tokens: int32 [B, W, max_len], without BOS, PAD after EOS, best first.
      scores: float32 [B, W], log P / ((5 + length) / 6)^alpha.

    Where the model's logits are NaN, so are the scores, and the tokens are -1.
    """
    encoded, tokens, cache = start_decoding(model, params, src, max_len, beam_size)
    shape = src.shape[0], beam_size
    source = jnp.arange(shape[0])[:, None]  # 0 to B - 1, [B, 1]

    def step(carry):
        position, tokens, log_p, cache = carry  # log_p [B, W]
        logits, cache = next_logits(model, params, encoded, tokens, position, cache)
        next_log_p = jax.nn.log_softmax(logits).reshape(*shape, -1)
        choose = jax.vmap(best_continuations)  # source by source
        ended = has_ended(tokens).reshape(shape)
        log_p, parent, token = choose(log_p, ended, next_log_p)  # all [B, W]
        # A hypothesis goes on with its parent's tokens and cache. The memory's kv can
        # stay: it is the same for all hypotheses of a source.
        row = (source * beam_size + parent).ravel()  # the parent's, [B * W]
        tokens, cache = jax.tree.map(lambda x: x[row], (tokens, cache))
        tokens = tokens.at[:, position + 1].set(token.ravel())
        return position + 1, tokens, log_p, cache

    # All hypotheses start out alike. The first alone gets a probability that is not 0,
    # or the search would find the same target W times.
    log_p = jnp.full(shape, -jnp.inf).at[:, 0].set(0)
    carry = 0, tokens, log_p, cache
    _, tokens, log_p, _ = jax.lax.while_loop(is_unfinished, step, carry)
    tokens = tokens[:, 1:].reshape(*shape, max_len)  # without BOS
    scores = log_p / length_penalty(tokens, alpha)
    # All V continuations of a hypothesis with NaN are NaN, even if it has ended, and
    # top_k prefers NaN. So NaN can only spread among the hypotheses of a source.
    tokens = jnp.where(jnp.isnan(scores)[..., None], -1, tokens)
    order = jnp.argsort(-scores, axis=1)
    scores = jnp.take_along_axis(scores, order, axis=1)
    return jnp.take_along_axis(tokens, order[..., None], axis=1), scores


# ---- 10 Text -------------------------------------------------------------------------

FIRST_MERGE_ID = FIRST_SYMBOL_ID + 256  # The symbols before it are the 256 bytes.
# A space belongs to the word after it. Of several, each but the last is a word of its
# own: "a  b" has the words "a", " " and " b".
WORD = re.compile(r" ?[^ ]+| ")


def spell(word):
    """The bytes of a word as tokens, each written as one character, chr(token), so that
    byte-pair encoding can merge two tokens by str.replace.

    >>> [ord(character) for character in spell("low")]
    [111, 114, 122]
    """
    return "".join(chr(byte + FIRST_SYMBOL_ID) for byte in word.encode())


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
            if not FIRST_SYMBOL_ID <= min(left, right) <= max(left, right) < token:
                raise InputError(f"{left} and {right} cannot merge into token {token}")
            self.bytes_of[token] = self.bytes_of[left] + self.bytes_of[right]
            self.token_of[chr(left) + chr(right)] = chr(token)
        self.vocab_size = len(self.bytes_of)
        self.known_words = {}  # word -> tokens, so that each is encoded once

    @classmethod
    def learn(cls, texts, vocab_size):
        """Merges the most frequent pair of tokens, again and again; of equally frequent
        pairs the one with the smaller tokens. Stops early when no pair occurs twice.
        """
        if vocab_size < FIRST_MERGE_ID:
            least = f"vocab_size must be at least {FIRST_MERGE_ID}"
            raise InputError(f"{least}, not {vocab_size}")
        words = collections.Counter(w for text in texts for w in WORD.findall(text))
        spelled = {word: spell(word) for word in words}
        counts = collections.Counter()  # how often each pair occurs in all texts
        words_with = collections.defaultdict(set)  # pair -> words that have or had it

        def count_pairs(word, times):  # Negative times take a count back.
            for pair in itertools.pairwise(spelled[word]):
                counts[pair] += times
                words_with[pair].add(word)

        for word, times in words.items():
            count_pairs(word, times)
        merges = []
        while FIRST_MERGE_ID + len(merges) < vocab_size:
            highest = max(counts.values(), default=0)
            if highest < 2:
                break
            pair = min(pair for pair, number in counts.items() if number == highest)
            both, token = "".join(pair), chr(FIRST_MERGE_ID + len(merges))
            # Only words that contain the pair change, and only they are counted anew.
            for word in list(words_with[pair]):  # count_pairs writes to these sets.
                if both in spelled[word]:  # It may have lost the pair since.
                    count_pairs(word, -words[word])
                    spelled[word] = spelled[word].replace(both, token)
                    count_pairs(word, words[word])
            merges.append(tuple(map(ord, pair)))
        return cls(merges)

    def encode(self, text):
        """str -> list of tokens, without special tokens."""
        tokens = []
        for word in WORD.findall(text):
            if word not in self.known_words:
                spelled = spell(word)
                for pair, token in self.token_of.items():  # in the order of learning
                    spelled = spelled.replace(pair, token)
                self.known_words[word] = [*map(ord, spelled)]
            tokens += self.known_words[word]
        return tokens

    def decode(self, tokens):
        """Tokens up to EOS -> str; bytes that are no UTF-8 become U+FFFD. It raises a
        KeyError for a token outside the vocabulary.
        """
        tokens = itertools.takewhile(lambda token: token != EOS_ID, tokens)
        text = b"".join(self.bytes_of[token] for token in tokens)
        return text.decode(errors="replace")


# ---- 11 Data -------------------------------------------------------------------------


def demo_pairs(num_pairs, max_len, seed):
    """The demo's task: random words of 4 to max_len letters, no two alike, reversed."""
    rng = np.random.default_rng(seed)
    words = {}  # not a set, whose order changes from run to run
    while len(words) < num_pairs:
        letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(4, max_len + 1))
        words[bytes(letters.tolist()).decode()] = None
    return [(word, word[::-1]) for word in words]


def decode_line(line, where):
    """A line of UTF-8 (bytes) -> str, without its end and without a byte order mark."""
    try:
        text = line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    return text.removesuffix("\n").removesuffix("\r")


def read_pairs(path):
    """A UTF-8 file of lines `source<TAB>target` -> list of (source, target), str.

    A line that is no pair raises an InputError with file, line and reason. A file that
    cannot be read raises an OSError.
    """
    with open(path, "rb") as file:
        content = file.read().removesuffix(b"\n")
    if not content:
        raise InputError(f"{path}: the file is empty")
    pairs = []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        pair = tuple(decode_line(line, where).split("\t"))
        if len(pair) != 2:
            advice = " (cut -f 1,2 keeps two columns)" if len(pair) > 2 else ""
            found = f"found {len(pair) - 1}{advice}"
            raise InputError(f"{where}: need exactly one tab, {found}")
        if "" in pair:
            raise InputError(f"{where}: empty {'target' if pair[0] else 'source'}")
        pairs.append(pair)
    return pairs


def hold_out(pairs, limit, seed):
    """Chooses pairs to measure on: a tenth of the sources, at most `limit`, at random,
    and one target for each. Training has to leave out all pairs with these sources.
    """
    targets = dict(pairs)
    sources = list(targets)
    limit = min(limit, max(1, len(sources) // 10))
    chosen = np.random.default_rng(seed).permutation(len(sources))[:limit]
    return [(sources[i], targets[sources[i]]) for i in chosen]


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


def width_of(lists, max_width):
    """The width that lists of tokens, such as the two of a pair, are padded to.

    It has room for the longest of the lists, and EOS. As jit compiles for each width,
    there are few: max_width, half of it, a quarter, and so on, rounded down, and none
    below 8.

    >>> [width_of(([5] * n,), max_width=33) for n in (20, 8, 1)]
    [33, 16, 8]
    """
    needed = max(len(tokens) + 1 for tokens in lists)
    width = max_width
    while width // 2 >= max(needed, 8):
        width //= 2
    return width


def batches_by_width(widths, batch_size, rng=None):
    """Sorts rows by width, given the width of each, and cuts them into batches. Returns
    a list of batches (numbers of the rows, width of the widest row).

    With `rng`, the order within a width and that of the batches are random. Rows that
    do not fill a batch are left out; these, too, are drawn at random.

    >>> batches_by_width([8, 32, 16, 8], batch_size=2)
    [(array([0, 3]), 8), (array([2, 1]), 32)]
    """
    widths, rows = np.array(widths), np.arange(len(widths))
    if rng is not None:
        num_whole = len(rows) // batch_size
        rows = rng.permutation(rows)[: num_whole * batch_size]
    rows = rows[np.argsort(widths[rows], kind="stable")]  # Equal ones stay shuffled.
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
    return [(batch, int(widths[batch].max())) for batch in batches]


def training_batches(pairs, max_width, batch_size, seed, start=0):
    """Yields the batches of step `start`, `start` + 1, ..., epoch after epoch.

    They follow from these arguments alone, so that a run can be taken up again. There
    must be at least `batch_size` pairs.
    """
    widths = [width_of(pair, max_width) for pair in pairs]
    step = 0
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        for numbers, width in batches_by_width(widths, batch_size, rng):
            if step >= start:
                yield to_batch([pairs[i] for i in numbers], width)
            step += 1


# ---- 12 Checkpoints ------------------------------------------------------------------

FORMAT = b"transformer_model checkpoint "
FIRST_LINE = FORMAT + b"2"  # Another edition of this program has another number.


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns."""

    config: TransformerConfig
    state: dict  # the TrainState's content; the parameters are state["params"]
    notes: dict  # the further arguments of `save_checkpoint`
    tokenizer: Tokenizer  # made of notes["merges"], or, without them, of bytes


def save_checkpoint(path, config, state, **notes):
    """Writes all it takes to use a model, or to train it further, into one file.

    An old checkpoint at `path` stays there until the new one is complete. `notes` are
    numbers, strings, arrays, and lists and dicts of them.
    """
    state = flax.serialization.to_state_dict(jax.device_get(state))
    content = {"config": dataclasses.asdict(config), "state": state, "notes": notes}
    content = flax.serialization.msgpack_serialize(content)
    digest = hashlib.sha256(content).hexdigest()
    path = os.path.realpath(path)  # A symbolic link is to stay one.
    temporary = f"{path}.saving-{secrets.token_hex(8)}"
    # Removes what killed processes left behind. Another process may still be writing a
    # file that is not an hour old.
    for old in glob.glob(glob.escape(path) + ".saving-" + 16 * "[0-9a-f]"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(old) > 3600:
                os.remove(old)
    with open(temporary, "xb") as file:  # x: an error if there is such a file
        try:
            file.write(b"\n".join([FIRST_LINE, digest.encode(), content]))
            file.flush()
            os.fsync(file.fileno())
            if os.path.exists(path):
                os.chmod(temporary, os.stat(path).st_mode)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # It may be renamed already.
                os.remove(temporary)
            raise


def restore(path, template, content):
    """Returns `content`, read from the checkpoint at `path`, as an object like
    `template`: a TrainState, or parameters. If names, shapes or types differ, it raises
    an InputError. (A template from jax.eval_shape is enough for this check.)
    """

    def describe(x):
        return getattr(x, "shape", None), getattr(x, "dtype", None)

    there = jax.tree.map(describe, content)
    here = jax.tree.map(describe, flax.serialization.to_state_dict(template))
    if there != here:
        raise InputError(f"{path}: its content does not fit its configuration")
    return flax.serialization.from_state_dict(template, content)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote. To train on, create a TrainState with this
    configuration and the same optimizer, and `restore(path, state, checkpoint.state)`.

    A file that is no checkpoint, or damaged, or another edition's is an InputError.
    """
    with open(path, "rb") as file:
        first, _, rest = file.read().partition(b"\n")
    if not first.startswith(FORMAT):
        raise InputError(f"{path}: not a checkpoint of this program")
    if first != FIRST_LINE:
        raise InputError(f"{path}: saved by another edition of this program")
    digest, _, content = rest.partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise InputError(f"{path}: damaged or cut short")
    try:
        content = flax.serialization.msgpack_restore(content)
        config = TransformerConfig(**content["config"])
        state, notes = dict(content["state"]), dict(content["notes"])
        tokenizer = Tokenizer(notes.get("merges", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not what a checkpoint holds: {error}") from None
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    restore(path, params, state.get("params"))  # only to see whether they fit
    return Checkpoint(config, state, notes, tokenizer)


# ---- 13 Translation ------------------------------------------------------------------


class RunError(Exception):
    """What ends a run although nothing was wrong with its input, told in one line."""


def say(text="", file=None):
    """Prints to stdout, unless told else. Of several processes that train together
    (`--distributed`), only the first does.
    """
    if jax.process_index() == 0:
        print(text, file=file, flush=True)


def log(text):
    """Prints progress to stderr, where it does not mix with results."""
    say(text, sys.stderr)


def one_line(text):
    """The text with a space for each line end in it."""
    return " ".join(text.splitlines())


def decode_all(model, params, sources, beam_size, short_len=32):
    """Sources (lists of tokens), shorter than the model's `max_len` -> their outputs.

    Most outputs are short, and attention over a long cache is slow. So every batch is
    decoded to `short_len` tokens first. If all hypotheses have ended by then, a longer
    search would find the same. Otherwise the batch is decoded again, to `max_len`.
    """
    longest = model.config.max_len

    def search(src, max_len):  # -> tokens [rows, W, max_len], best first
        if beam_size == 1:
            tokens = greedy_decode(model, params, src, max_len)[:, None]
        else:
            tokens, _ = beam_search(model, params, src, max_len, beam_size)
        return np.asarray(tokens)

    outputs = [None] * len(sources)
    widths = [width_of((source,), longest) for source in sources]
    for numbers, width in batches_by_width(widths, 64):
        src = pad([[*sources[i], EOS_ID] for i in numbers], width)
        max_len = min(short_len, longest)
        tokens = search(src, max_len)
        if max_len < longest and not has_ended(tokens).all():
            tokens = search(src, longest)
        if (tokens < 0).any():
            raise RunError("the model is of no use: its logits are NaN")
        for i, output in zip(numbers, tokens[:, 0].tolist()):  # the best of W
            outputs[i] = output
    return outputs


def show_attention(model, params, tokenizer, source, target):
    """Draws how the target attends to the source (lists of tokens), token by token.

    A row is what the decoder looked at to find the token that the row is named after.
    """

    def name_of(token):
        text = "EOS" if token == EOS_ID else tokenizer.decode([token])
        text = text.replace(" ", "_").replace("\ufffd", "?")
        return "".join(c if c.isprintable() else "?" for c in text)

    columns = [name_of(token) for token in [*source, EOS_ID]]
    # An output that was cut off at max_len has no EOS.
    labels = [*target, EOS_ID][: model.config.max_len]
    names = [name_of(token) for token in labels]
    margin = max(5, *map(len, names))
    header = " " * (margin + 1) + " ".join(columns)
    if len(header) > 80:
        say(f"(Its attention is {len(header)} columns wide, and not drawn beyond 80.)")
        return
    src = np.array([[*source, EOS_ID]])
    tgt = np.array([[BOS_ID, *labels[:-1]]])
    apply = jax.jit(model.apply, static_argnames="mutable")
    _, variables = apply({"params": params}, src, tgt, mutable="intermediates")
    blocks = variables["intermediates"]["decoder"]  # All of its entries are blocks.
    last = blocks[f"blocks_{len(blocks) - 1}"]
    (weights,) = last["cross_attention"]["weights"]  # [1, H, T, S]
    shades = " .:-=+*#%@"
    say("Cross-attention in the last block, the mean of its heads: source across,")
    say(f"output down, shaded from none to all like this: {shades!r}\n\n{header}")
    for name, row in zip(names, np.mean(weights, axis=(0, 1))):
        levels = np.minimum(row * len(shades), len(shades) - 1).astype(int)
        cells = (shades[n] * (len(column) + 1) for n, column in zip(levels, columns))
        say(f"{name:>{margin}} {''.join(cells)}".rstrip())


def chunks_to_translate(texts):
    """Yields lists of lines, as bytes: not all may be UTF-8. Without `texts`, they come
    from stdin; at a terminal each line is a list of its own, and has a prompt on
    stderr before it.
    """
    if texts:
        yield [os.fsencode(text) for text in texts]
        return
    if not hasattr(sys.stdin, "buffer"):
        raise InputError("--translate: there is no stdin")
    lines, is_typed = sys.stdin.buffer, sys.stdin.isatty()
    while True:
        if is_typed:
            print("> ", end="", file=sys.stderr, flush=True)
        chunk = list(itertools.islice(lines, 1 if is_typed else 1024))
        if not chunk:
            return
        yield chunk


def translate(args):
    """Prints a line for each text: its translation, or an empty one if it has none."""
    config, state, _, tokenizer = load_checkpoint(args.checkpoint)
    sizes = config.src_vocab_size, config.tgt_vocab_size, tokenizer.vocab_size
    if len(set(sizes)) > 1 or config.head != "logits":
        problem = f"vocabularies {sizes}, head {config.head}"
        raise InputError(f"{args.checkpoint}: not a model that translates: {problem}")
    if args.bf16:
        config = dataclasses.replace(config, dtype="bfloat16")
    model, params = Transformer(config), jax.device_put(state["params"])
    longest = config.max_len - 1  # without EOS
    number, status = 0, 0
    for chunk in chunks_to_translate(args.translate):
        # Lists of tokens. For a faulty line the list is empty. It is decoded, too, but
        # an empty line is printed in place of the output.
        sources = []
        for line in chunk:
            number += 1
            try:
                source = tokenizer.encode(decode_line(line, f"line {number}"))
                if len(source) > longest:
                    problem = f"{len(source)} tokens, the most is {longest}"
                    raise InputError(f"line {number}: {problem}")
            except InputError as error:
                log(f"error: {error}")
                source, status = [], 2
            sources.append(source)
        outputs = decode_all(model, params, sources, args.beam_size)
        for source, output in zip(sources, outputs):
            say(one_line(tokenizer.decode(output)) if source else "")
            if source and args.attention:
                output = list(itertools.takewhile(lambda t: t != EOS_ID, output))
                show_attention(model, params, tokenizer, source, output)
    return status


# ---- 14 A training run ---------------------------------------------------------------

# A run that is continued has to keep these options of the command line (section 15),
# which decide on the model (d_ff follows from d_model) and on the order of batches. If
# the pairs to train on have changed, that is reported, but allowed.
FIXED = "post_norm d_model num_heads num_layers max_len vocab_size batch_size seed"


@dataclasses.dataclass
class Run:
    """A training run: its options, its data, and how far it has come."""

    args: argparse.Namespace  # the options
    tokenizer: Tokenizer
    train_pairs: list  # of pairs of lists of tokens
    valid_pairs: list  # of unseen pairs of lists of tokens, to measure on
    model: Transformer
    state: TrainState
    notes: dict  # what else is saved: whatever has to be known to continue


def choose_pairs(args, valid=None):
    """Returns two lists of pairs of texts: those to train on, and those to measure on.

    The latter are `valid`, or, if that is None, chosen here. A pair whose source is
    among them is not trained on.
    """
    if args.pairs:
        pairs, limit = read_pairs(args.pairs), 500
    else:
        pairs, limit = demo_pairs(40_000, args.max_len, args.seed), 512
    if valid is None and args.valid:
        valid = read_pairs(args.valid)
    elif valid is None:
        valid = hold_out(pairs, limit, args.seed)
    sources = {source for source, _ in valid}
    return [pair for pair in pairs if pair[0] not in sources], valid


def encode_pairs(pairs, tokenizer, max_len):
    """Pairs of texts -> pairs of lists of tokens, without those longer than max_len,
    which does not count BOS and EOS here.
    """
    encoded = [tuple(map(tokenizer.encode, pair)) for pair in pairs]
    return [pair for pair in encoded if max(map(len, pair)) <= max_len]


def fixed_options(args):
    """The options that have to be the same when a run is continued, and the task."""
    options = {name: getattr(args, name) for name in FIXED.split()}
    return options | {"task": "pairs" if args.pairs else "demo"}


def make_schedule(args):
    """The learning rate rises for a tenth of the steps, then falls to 0 at the last.
    (That of Eq. 3 never reaches 0, as it does not know the number of steps.)
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=args.learning_rate,
        warmup_steps=args.steps // 10,
        decay_steps=args.steps,
    )


def make_config(args, vocab_size):
    """Returns the TransformerConfig that the options ask for."""
    return TransformerConfig(
        src_vocab_size=vocab_size,
        tgt_vocab_size=vocab_size,
        d_model=args.d_model,
        num_heads=args.num_heads,
        num_layers=args.num_layers,
        d_ff=4 * args.d_model,
        dropout_rate=args.dropout,
        max_len=args.max_len + 1,  # of the text, and one for EOS or BOS
        norm_first=not args.post_norm,  # Pre-norm bears a high rate, see section 15.
        dtype="bfloat16" if args.bf16 else "float32",
    )


def begin(args, valid_texts=None, tokenizer=None):
    """Returns the Run that the options ask for, at its start. `resume` gives it the
    pairs to measure on and the tokenizer of a checkpoint; None stands for new ones.
    """
    train_texts, valid_texts = choose_pairs(args, valid_texts)
    if tokenizer is None:
        tokenizer = Tokenizer.learn(itertools.chain(*train_texts), args.vocab_size)
    train_pairs = encode_pairs(train_texts, tokenizer, args.max_len)
    valid_pairs = encode_pairs(valid_texts, tokenizer, args.max_len)
    limit = f"--max-len {args.max_len} tokens"
    if not valid_pairs:
        raise InputError(
            f"{args.valid or args.pairs}: no pair to measure on within {limit}"
        )
    num_texts = len(train_texts) + len(valid_texts)
    if num_long := num_texts - len(train_pairs) - len(valid_pairs):
        log(f"left out {num_long:,} of {num_texts:,} pairs, longer than {limit}")
    if args.batch_size > (number := len(train_pairs)):
        of = f"only {number} pairs of {args.pairs or 'the demo'} are to train on"
        raise InputError(f"--batch-size {args.batch_size}: {of}")
    config = make_config(args, tokenizer.vocab_size)
    optimizer = optax.adam(make_schedule(args), b1=0.9, b2=0.98, eps=1e-9)
    state = create_train_state(config, jax.random.key(args.seed), optimizer)
    notes = {
        "options": fixed_options(args),
        "steps": args.steps,
        "valid_texts": [list(pair) for pair in valid_texts],
        "digest": hashlib.sha256(repr(train_pairs).encode()).hexdigest(),
        "merges": np.array(tokenizer.merges, np.int32).reshape(-1, 2),
        "beats_guessing": False,  # whether the saved loss is at most ln V, see `report`
    }
    model = Transformer(config)
    return Run(args, tokenizer, train_pairs, valid_pairs, model, state, notes)


def resume(args, old):
    """Returns the Run that goes on from the Checkpoint `old`, if options allow it. It
    begins with the old tokenizer and pairs to measure on, and takes the old state.
    """
    path, notes = args.checkpoint, old.notes
    kinds = {"options": dict, "steps": int, "valid_texts": list}
    kinds |= {"digest": str, "beats_guessing": bool}
    if not all(isinstance(notes.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{path}: cannot continue: not saved by a training run")
    for name, here in fixed_options(args).items():
        if (there := notes["options"].get(name)) != here:
            change = f"{name} is {there} there and {here} here"
            raise InputError(f"{path}: cannot continue: {change}")
    valid_texts = notes["valid_texts"]
    if args.valid and [list(pair) for pair in read_pairs(args.valid)] != valid_texts:
        raise InputError(f"{args.valid}: not the pairs that {path} was measured on")
    run = begin(args, valid_texts, old.tokenizer)
    run.state = restore(path, run.state, old.state)  # the new one is but a template
    run.notes["beats_guessing"] = notes["beats_guessing"]
    if run.notes["digest"] != notes["digest"]:
        log(f"{path}: the pairs to train on have changed since")
    if args.steps != notes["steps"]:
        rate = float(make_schedule(args)(run.state.step))
        change = f"--steps was {notes['steps']} and is {args.steps}"
        log(f"{path}: {change}: the learning rate goes on at {rate:.2g}")
    return run


def show_model(config, params, mesh):
    """Prints the configuration, the parameters by part, the device, and a mask."""
    say("Transformer:")
    for name, value in dataclasses.asdict(config).items():
        say(f"  {name:<16} {value}")
    sizes = {part: optax.tree.size(tree) for part, tree in sorted(params.items())}
    parts = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
    say(f"Parameters: {sum(sizes.values()):,} ({parts})")
    say(f"Devices: {mesh.size} x {mesh.devices.flat[0].device_kind}\n")
    tokens = pad([[BOS_ID, *Tokenizer().encode("ab"), EOS_ID]], width=5)
    mask = (padding_mask(tokens) & causal_mask(5))[0, 0]
    say('The decoder\'s mask for "ab", padded: # may be attended to, queries down')
    for name, row in zip(["BOS", "a", "b", "EOS", "PAD"], mask):
        say(f"  {name:<4}" + "  ".join(".#"[int(cell)] for cell in row))


def evaluate(run, num_shown, file=None):
    """Prints the score on unseen pairs, and some of them; returns their loss."""
    # Only the first process evaluates. So the state has to come to one of its devices.
    state = run.state.replace(opt_state=())  # which is large, and not needed
    state = jax.device_put(jax.device_get(state), jax.local_devices()[0])
    pairs, losses, num_labels = run.valid_pairs, [], []
    widths = [width_of(pair, run.model.config.max_len) for pair in pairs]
    for numbers, width in batches_by_width(widths, 64):
        batch = to_batch([pairs[i] for i in numbers], width)
        losses.append(float(eval_step(state, batch)["loss"]))
        num_labels.append((batch["tgt"][:, 1:] != PAD_ID).sum())
    loss = np.average(losses, weights=num_labels)
    sources, decode = [source for source, _ in pairs], run.tokenizer.decode
    outputs = decode_all(run.model, state.params, sources, run.args.beam_size)
    rows = [(decode(s), decode(t), decode(o)) for (s, t), o in zip(pairs, outputs)]
    right = sum(target == output for _, target, output in rows)
    share = f"{right} of {len(rows)} exactly right ({right / len(rows):.1%})"
    say(f"unseen pairs: loss {loss:.4f}, {share}", file)
    for source, target, output in rows[:num_shown]:
        wrong = "" if output == target else f"   not {one_line(target)}"
        say(f"  {one_line(source)} -> {one_line(output)}{wrong}", file)
    return loss


def save(run):
    """Saves a checkpoint, if options name one. Of several processes, the first does."""
    path = run.args.checkpoint
    if path and jax.process_index() == 0:
        try:
            save_checkpoint(path, run.model.config, run.state, **run.notes)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from None


def saved_so_far(path):
    """Says which step the checkpoint holds, as the end of a sentence."""
    try:
        return f"; {path} holds step {load_checkpoint(path).state['step']}"
    except (InputError, OSError, TypeError):  # no such file, or `path` is None
        return ", and nothing is saved"


def report(run, metrics, steps_per_second, tokens_per_second):
    """Saves the run and prints a line of progress, with the metrics of the last step.

    A loss or a parameter that is not finite raises a RunError. Training may diverge and
    stay finite, too, and a good model has to survive that. So a model that is worse
    than guessing is not saved over one that beats guessing, and the run goes on.
    """
    step, steps = int(run.state.step), run.args.steps
    loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
    values = loss, *jax.tree.leaves(jax.device_get(run.state.params))
    if not all(np.isfinite(x).all() for x in values):
        saved = saved_so_far(run.args.checkpoint)
        what = f"not finite at step {step}: the loss ({loss:.4g}) or a parameter"
        raise RunError(f"{what}; try a lower --learning-rate{saved}")
    guessing = float(np.log(run.model.config.tgt_vocab_size))  # its loss, ln V
    beats_guessing = loss <= guessing
    if run.notes["beats_guessing"] and not beats_guessing:
        log(f"not saved: the loss is above {guessing:.4f}, that of guessing")
    else:
        run.notes["beats_guessing"] = beats_guessing
        save(run)
    left = round((steps - step) / steps_per_second)
    log(
        f"step {step:>{len(str(steps))}} of {steps}  loss {loss:.4f}"
        f"  accuracy {accuracy:6.1%}  {tokens_per_second:,.0f} tokens/s"
        f"  {left // 60}:{left % 60:02} left"
    )


def do_steps(run, sharding):
    """Does the steps that are left. Yields, after each, its number, its metrics and the
    number of its target tokens. `sharding` says which rows of a batch each device gets.
    """
    args, start, max_len = run.args, int(run.state.step), run.model.config.max_len
    batches = training_batches(
        run.train_pairs, max_len, args.batch_size, args.seed, start
    )
    metrics = None
    for step in range(start + 1, args.steps + 1):
        batch = next(batches)
        num_tokens = (batch["tgt"][:, 1:] != PAD_ID).sum()
        # train_step returns at once, and the device works on while this loop makes the
        # next batch. But with two steps under way, processes on CPUs would block each
        # other. So this waits for the previous step.
        jax.block_until_ready(metrics)
        try:
            batch = jax.device_put(batch, sharding)
        except AssertionError:  # JAX asserts that all processes pass the same batch.
            raise InputError("the processes do not have the same pairs") from None
        run.state, metrics = train_step(run.state, batch, args.label_smoothing)
        yield step, metrics, num_tokens


def train_to_the_end(run, sharding):
    """Does the steps that are left, and reports on the way.

    Let `every` be a twentieth of all steps, but at most 500. The first process reports
    at each multiple of it, at the last step, and after a minute without a report. At
    the multiples of 5 * `every`, it also measures the model on unseen pairs. Meanwhile,
    the others wait for it in their next step. If the first fails, JAX ends the others.
    """
    steps = run.args.steps
    every = max(1, min(steps // 20, 500))
    last_unseen, last_seen, losses = np.inf, np.inf, []
    start, num_steps, num_tokens = time.perf_counter(), 0, 0  # since the last report
    for step, metrics, tokens in do_steps(run, sharding):
        num_steps, num_tokens = num_steps + 1, num_tokens + tokens
        is_late = time.perf_counter() - start > 60
        is_due = step % every == 0 or step == steps or is_late
        if not is_due or jax.process_index() != 0:
            continue
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - start
        report(run, metrics, num_steps / seconds, num_tokens / seconds)
        losses.append(float(metrics["loss"]))
        if step % (5 * every) == 0 and step < steps:
            unseen, seen = evaluate(run, 3, sys.stderr), np.mean(losses)
            if unseen > last_unseen and seen < last_seen:
                log("the loss on unseen pairs has risen, on training pairs fallen")
            last_unseen, last_seen, losses = unseen, seen, []
        start, num_steps, num_tokens = time.perf_counter(), 0, 0


def train(args):
    """Trains on the pairs of a file, or on the demo's, and shows what was learnt."""
    mesh = Mesh(jax.devices(), ("data",))
    if args.batch_size % mesh.size:
        problem = f"cannot be shared out evenly among {mesh.size} devices"
        raise InputError(f"--batch-size {args.batch_size} {problem}")
    # All processes of a job have to see this file.
    is_new = not (args.checkpoint and os.path.exists(args.checkpoint))
    run = begin(args) if is_new else resume(args, load_checkpoint(args.checkpoint))
    # Every device gets the whole state, and its part of each batch. To train_step, the
    # parts are one array: it takes the mean over the labels of all devices, and jit
    # adds the communication which that needs.
    run.state = jax.device_put(run.state, NamedSharding(mesh, PartitionSpec()))
    if is_new:
        # If nothing can be written there, that is to be known before training. (By now
        # all processes have looked for the file, as device_put has waited for them.)
        try:
            save(run)
        except RunError as error:
            raise InputError(error) from None
    show_model(run.model.config, run.state.params, mesh)
    if run.state.step >= args.steps:
        has = f"{args.checkpoint} has {run.state.step} steps"
        log(f"{has}: --steps {args.steps} adds none")
    train_to_the_end(run, NamedSharding(mesh, PartitionSpec("data")))
    if jax.process_index() == 0:
        say()
        evaluate(run, 6)
        say()
        params = jax.device_get(run.state.params)
        show_attention(run.model, params, run.tokenizer, *run.valid_pairs[0])
    return 0


# ---- 15 Command line -----------------------------------------------------------------

KINDS = {
    "file": (str, "the name of a file", lambda text: text != ""),
    "size": (int, "an integer of at least 1", lambda n: 1 <= n < 2**31),
    "vocab": (int, "an integer from 259 to 1000000", lambda n: 259 <= n <= 10**6),
    "beam": (int, "an integer from 1 to 1000", lambda n: 1 <= n <= 1000),
    "rate": (float, "a number above 0", lambda x: 0 < x < float("inf")),
    "share": (float, "a number from 0 to below 1", lambda x: 0 <= x < 1),
    "seed": (int, "an integer from 0 to 2^32 - 1", lambda n: 0 <= n < 2**32),
}
# The defaults are not the paper's, whose models are large and took eight GPUs 12 hours
# and more. Minutes have to be enough here. So the learning rate is high, which pre-norm
# bears after a short warm-up (Xiong et al., 2020). And there is no dropout, which slows
# learning down, and helps only where every pair is seen many times.
#
# name: (kind, default of the demo, default with --pairs, what the option means)
OPTIONS = {
    "pairs": ("file", None, None, "learn from its lines, source<TAB>target"),
    "valid": ("file", None, None, "measure on these pairs, not some of --pairs"),
    "checkpoint": ("file", None, None, "save there, and continue from there"),
    "attention": ("flag", False, False, "draw what a translation attended to"),
    "post_norm": ("flag", False, False, "LayerNorm where the paper has it"),
    "bf16": ("flag", False, False, "compute in bfloat16"),
    "distributed": ("flag", False, False, "join a job of several processes"),
    "steps": ("size", 1000, 9000, "training steps in all"),
    "batch_size": ("size", 64, 128, "pairs in a step, on all devices together"),
    "learning_rate": ("rate", 6e-3, 3e-3, "its peak"),
    "dropout": ("share", 0.0, 0.0, "dropout rate"),
    "label_smoothing": ("share", 0.0, 0.1, "label smoothing"),
    "seed": ("seed", 0, 0, "of all that is random"),
    "d_model": ("size", 64, 128, "width; the inner width is 4 times that"),
    "num_heads": ("size", 4, 4, "attention heads"),
    "num_layers": ("size", 1, 2, "blocks in each stack"),
    "max_len": ("size", 12, 128, "longest source and target, in tokens"),
    "vocab_size": ("vocab", 259, 500, "tokens: subwords; 259 is bytes"),
    "beam_size": ("beam", 1, 1, "hypotheses of the search; 1 is greedy"),
}
NEED_PAIRS = "valid", "vocab_size", "label_smoothing"  # The demo does without.
FOR_TRANSLATION = "translate", "checkpoint", "attention", "beam_size", "bf16"


def flag(name):
    """The option of a name: "max_len" -> "--max-len"."""
    return "--" + name.replace("_", "-")


def parse_value(kind, text):
    """Returns what the text after an option stands for."""
    convert, allowed, is_allowed = KINDS[kind]
    with contextlib.suppress(ValueError):
        if is_allowed(convert(text)):
            return convert(text)
    raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors, which `main` prints in one line."""

    def error(self, message):
        raise InputError(message)


def make_parser():
    """Returns a parser without defaults: what is not given is not in its results."""
    description = "The Transformer. Without options, the demo: learns a toy task."
    omit = argparse.SUPPRESS
    parser = Parser(description=description, allow_abbrev=False, argument_default=omit)
    text = "translate, and exit; without TEXT, the lines of stdin"
    parser.add_argument("--translate", nargs="*", metavar="TEXT", help=text)
    for name, (kind, in_demo, with_pairs, text) in OPTIONS.items():
        if kind == "flag":
            parser.add_argument(flag(name), action="store_true", help=text)
            continue
        if kind != "file":
            default = f"{in_demo}, with --pairs {with_pairs}"
            text += f" (default {in_demo if in_demo == with_pairs else default})"
        details = {"metavar": kind.upper(), "help": text}
        parser.add_argument(flag(name), type=partial(parse_value, kind), **details)
    return parser


def split_texts(argv):
    """Takes out the texts: the words after --translate, up to the next that begins with
    two dashes. If they stayed, argparse would take one like "-2" for an option.

    >>> split_texts(["--translate", "one", "-2", "--attention"])
    (['--translate', '--attention'], ['one', '-2'])
    """
    options, texts = [], []
    place = options
    for word in argv:
        if word.startswith("--"):
            options.append(word)
            place = texts if word == "--translate" else options
        else:
            place.append(word)
    return options, texts


def parse_arguments(argv):
    """Returns the options, checked and complete."""
    options, texts = split_texts(argv)
    given = vars(make_parser().parse_args(options))
    is_translation, has_pairs = "translate" in given, "pairs" in given
    for name in given:
        if is_translation and name not in FOR_TRANSLATION:
            raise InputError(f"{flag(name)} has no meaning with --translate")
        if not is_translation and name == "attention":
            raise InputError("--attention has no meaning without --translate")
        if not has_pairs and name in NEED_PAIRS:
            raise InputError(f"{flag(name)} has no meaning without --pairs")
    defaults = {
        name: with_pairs if has_pairs else in_demo
        for name, (_, in_demo, with_pairs, _) in OPTIONS.items()
    }
    args = argparse.Namespace(**{"translate": None, **defaults, **given})
    if is_translation:
        args.translate += texts  # argparse gave [], or [text] for --translate=text.
        if args.checkpoint is None:
            raise InputError("--translate needs --checkpoint FILE")
    elif not has_pairs and args.max_len < 4:
        raise InputError("--max-len must be at least 4 in the demo")
    return args


def start_jax(is_distributed):
    """Finds the devices; with `--distributed`, those of all processes of a job.

    JAX finds such a job by itself under Slurm and Open MPI and on Cloud TPU. Elsewhere
    three variables tell: JAX_COORDINATOR_ADDRESS, which JAX reads, and the two below.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        if is_distributed:
            job = {k: int(os.environ[v]) for k, v in names.items() if v in os.environ}
            # SIGTERM is to end a process, which is always safe, but JAX would catch it.
            # Older versions do not know the option that turns that off.
            with contextlib.suppress(AttributeError):
                jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(**job)
        jax.devices()
    except (ValueError, RuntimeError) as error:
        problem = "--distributed" if is_distributed else "no device"
        raise InputError(f"{problem}: {one_line(str(error))}") from None


def fail(status, message=None):
    """Prints an error in one line, if there is one, and returns the exit status."""
    with contextlib.suppress(OSError):
        if message:
            print(f"error: {one_line(str(message))}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # At its exit, Python flushes all streams that are not closed, and would
            # print a second error.
            with contextlib.suppress(OSError):
                stream.close()
    return status


def main(argv=None):
    """Runs the command line and returns the exit status.

    0 done; 2 the command line or an input file is wrong; 130 Ctrl-C; 1 anything else,
    such as a loss that is no longer finite.
    """
    if sys.stdout is None or sys.stderr is None:
        print("error: stdout or stderr is closed", file=sys.stderr or sys.stdout)
        return 1
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A notebook's streams have no encoding.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    args = argparse.Namespace(translate=None, checkpoint=None)  # until they are parsed
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        start_jax(args.distributed)
        return train(args) if args.translate is None else translate(args)
    except InputError as error:
        return fail(2, error)
    except RunError as error:
        return fail(1, error)
    except KeyboardInterrupt:
        if args.translate is not None:
            return 130  # There is nothing that could be lost.
        return fail(130, f"interrupted{saved_so_far(args.checkpoint)}")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and args.translate is not None:
            return fail(0)  # `... | head` has read enough.
        # An error with a file name is about a file that the user named, one without is
        # about stdout or stderr.
        message = f"{error.filename or 'output'}: {error.strerror}"
        return fail(2 if error.filename else 1, message)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "EXHAUSTED" not in str(error):
            raise
        smaller = "--batch-size, --beam-size, --max-len or the model"
        return fail(1, f"out of memory; make {smaller} smaller")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    if status and jax.distributed.is_initialized():
        # JAX would wait at the exit for other processes, which wait for this one.
        os._exit(status)
    sys.exit(status)
