"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017), in JAX, Flax.

The complete encoder-decoder model with its training and its inference, in the order of
the paper (arXiv:1706.03762), to which "section", "Eq.", "Table" and "Figure" refer.

    python transformer_model.py                          learn a toy task, and show it
    python transformer_model.py train PAIRS MODEL        learn from your own pairs
    python transformer_model.py translate MODEL [TEXT]   use what was learnt

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

import argparse
import collections
import dataclasses
import hashlib
import itertools
import os
import re
import sys
import time
import traceback
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


class RunError(RuntimeError):
    """What ends a run whose input was right. The program ends with status 1."""


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


def padding_mask(tokens):
    """int [B, L] -> bool [B, 1, 1, L]: no query may attend to a key that is PAD.

    The two axes of length 1 stand for all heads and all queries.

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
    """
    scores = einsum_float32("bhtk,bhsk->bhts", query, key) / np.sqrt(query.shape[-1])
    # softmax returns 0 wherever `where` is False, even in a row that is all False. There
    # the paper's scores of -inf would give 0 / 0, in the gradient too.
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
        # All positions of the batch are the rows of one matrix. With nn.Dense, which
        # multiplies x as it is, a training step takes 1.1 to 1.2 times as long on CPUs.
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

    A token outside the vocabulary gives NaN; a length above max_len, a ValueError.
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
        max_len, d_model = self.config.max_len, self.config.d_model
        if tokens.shape[1] > max_len:
            raise ValueError(f"tokens {tokens.shape} [B, L]: L is above {max_len=}")
        # jnp.take gives NaN for a token that is too large. A negative one would count
        # from the end, so it is made too large.
        tokens = jnp.where(tokens < 0, len(embedding), tokens)
        x = jnp.take(embedding, tokens, axis=0) * d_model**0.5
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

    logits [B, T, V], labels int [B, T] -> float32 []; a label that is no class, NaN.
    """
    logits = logits.astype(jnp.float32)
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
        step = steps_done + 1.0
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
    dropout_key: jax.Array  # jax.random.key_data: can be saved, and used like a key


def create_train_state(config, key, optimizer=None):
    """New parameters, drawn from `key`, and what it takes to train them with an optax
    optimizer; None stands for the paper's.
    """
    if config.head != "logits":
        raise ValueError(f'head must be "logits" for training, not {config.head!r}')
    if optimizer is None:
        optimizer = paper_optimizer(config.d_model)
    params_key, dropout_key = jax.random.split(key)
    model, tokens = Transformer(config), jnp.full((1, 1), BOS_ID)
    params = jax.jit(model.init)(params_key, tokens, tokens)["params"]
    return TrainState(
        # After a step it is an array. With an int here, jit would compile twice.
        step=jnp.zeros((), jnp.int32),
        apply_fn=model.apply,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params),  # train_step takes the memory of both
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
      "accuracy", the share of labels that have the highest logit. Both stay on the
      device, so that a caller need not wait for them.
    """
    rngs = {"dropout": jax.random.fold_in(state.dropout_key, state.step)}

    def loss_fn(params):
        return loss_and_metrics(state, params, batch, label_smoothing, rngs)

    (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    # A moving average that takes over one part in m at each step has a memory of about
    # m steps. Here m is about a tenth of the steps so far, and 1 at the first of them.
    share = 10 / (9 + state.step)
    average = optax.incremental_update(state.params, state.average, share)
    return state.replace(average=average), metrics


@jax.jit
def eval_step(state, batch):
    """Metrics as in `train_step`, of `average` and without dropout and smoothing."""
    return loss_and_metrics(state, state.average, batch)[1]


# ---- 9 Inference ---------------------------------------------------------------------


def start_decoding(model, params, src, max_len, beam_size=1):
    """Encodes src, int [B, S], and makes room for W = beam_size hypotheses of each.

    All that is returned has B * W rows, those of a source one below the other:

      encoded: the pair (memory_kv, memory_mask), which the `Decoder` takes.
      tokens: int32 [B * W, L], where L is max_len + 1. BOS comes first, then PAD, which
        the search replaces.
      cache: empty, of the same length L: the mask of `tokens` hides what is not filled.
    """
    if model.config.head != "logits":
        raise ValueError(f'head must be "logits", not {model.config.head!r}')
    if max_len > model.config.max_len:
        raise ValueError(f"{max_len=} is above the model's, {model.config.max_len}")
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
    encoded, tokens, cache = start_decoding(model, params, src, max_len)

    def step(carry):
        position, tokens, cache = carry
        logits, cache = next_logits(model, params, encoded, tokens, position, cache)
        _, token = jax.lax.top_k(logits, 1)  # [B, 1]; jnp.argmax is slower on CPUs.
        token = jnp.where(has_ended(tokens), PAD_ID, token[:, 0])
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
    """Tokens without BOS, int [..., L] -> ((5 + length) / 6)^alpha; EOS counts, PAD not."""
    length = jnp.argmax(tokens == EOS_ID, axis=-1) + 1
    length = jnp.where(has_ended(tokens), length, tokens.shape[-1])
    return ((5 + length) / 6) ** alpha


@partial(jax.jit, static_argnames=("model", "max_len", "beam_size"))
def beam_search(model, params, src, max_len, beam_size=4, alpha=0.6):
    """Looks for the W = `beam_size` likeliest targets of each source (section 6.1).

    At each step the W likeliest hypotheses of a source are kept, ended ones among them.
    src int [B, S] ->

      tokens: int32 [B, W, max_len], without BOS, PAD after EOS, best first.
      scores: float32 [B, W], log P / ((5 + length) / 6)^alpha.
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
    order = jnp.argsort(-scores, axis=1)
    scores = jnp.take_along_axis(scores, order, axis=1)
    return jnp.take_along_axis(tokens, order[..., None], axis=1), scores


# ---- 10 Text -------------------------------------------------------------------------

FIRST_MERGE_ID = FIRST_SYMBOL_ID + 256  # The symbols before it are the 256 bytes.
# A word is what stands between spaces, with one of the spaces before it. Any other space
# is a word by itself: "a  b" has the words "a", " " and " b".
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
        times = collections.Counter(w for text in texts for w in WORD.findall(text))
        spelled = {word: spell(word) for word in times}
        counts = collections.Counter()  # how often each pair occurs in all texts

        def count_pairs(word, sign):
            for pair in itertools.pairwise(spelled[word]):
                counts[pair] += sign * times[word]

        for word in times:
            count_pairs(word, +1)
        merges = []
        while FIRST_MERGE_ID + len(merges) < vocab_size:
            highest = max(counts.values(), default=0)
            if highest < 2:
                break
            pair = min(pair for pair, count in counts.items() if count == highest)
            both, token = "".join(pair), chr(FIRST_MERGE_ID + len(merges))
            # The words that have the pair are taken out of the counts, spelled with the
            # new token, and counted again. To count all words again would be slow.
            for word, spelling in spelled.items():
                if both in spelling:
                    count_pairs(word, -1)
                    spelled[word] = spelling.replace(both, token)
                    count_pairs(word, +1)
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


def demo_pairs(num_pairs, seed):
    """The demo's task: random words of 4 to 12 letters, no two alike, reversed."""
    rng = np.random.default_rng(seed)
    words = {}  # not a set, whose order changes from run to run
    while len(words) < num_pairs:
        letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(4, 13))
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
                raise InputError(f"{where}: not source<TAB>target: {text[:40]!r}")
            pairs.append(pair)
    return pairs


def hold_out(pairs, limit, seed):
    """Chooses pairs to measure on: a tenth of the sources, at most `limit`, at random,
    each with its last target. Training has to leave out all pairs with these sources.
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

    Pairs of like width come together. There have to be `batch_size` of them at least;
    all batches are full, and the pairs left over are others in each epoch. The batches
    follow from the arguments alone, so that a run can be taken up again.
    """
    widths = np.array([width_of(pair, max_width) for pair in pairs])
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


# ---- 12 Checkpoints ------------------------------------------------------------------

# A checkpoint is this line, the SHA-256 digest of the content, and the content.
FORMAT = b"transformer_model checkpoint 3\n"


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns."""

    config: TransformerConfig
    tokenizer: Tokenizer
    state: dict  # the TrainState's fields; flax.serialization.from_state_dict reads it
    notes: dict  # the further arguments of `save_checkpoint`


def save_checkpoint(path, config, tokenizer, state, **notes):
    """Writes all it takes to use a model, or to train it further, into one file.

    An old checkpoint at `path` stays there until the new one is complete. `notes` are
    numbers, strings, bytes, None, and lists and dicts of them.
    """
    content = {
        "config": dataclasses.asdict(config),
        "merges": [list(pair) for pair in tokenizer.merges],
        "state": flax.serialization.to_state_dict(jax.device_get(state)),
        "notes": notes,
    }
    content = flax.serialization.msgpack_serialize(content)
    with open(f"{path}.tmp", "wb") as file:
        file.write(FORMAT + hashlib.sha256(content).digest() + content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote -> Checkpoint.

    A file that is no checkpoint, or is damaged, raises an InputError.
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
    config = TransformerConfig(**content["config"])
    tokenizer = Tokenizer(content["merges"])
    return Checkpoint(config, tokenizer, content["state"], content["notes"])


# ---- 13 Translation ------------------------------------------------------------------


def log(text):
    """Prints progress to stderr, where it does not mix with results. Of several
    processes that train together, only the first does.
    """
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def one_line(text):
    """The text with a space for each line end in it."""
    return " ".join(text.splitlines())


def decode_all(model, params, sources, beam_size):
    """Sources (lists of tokens), shorter than the model's `max_len` -> their outputs.

    An output has at most 50 tokens more than its padded source (section 6.1).
    """
    longest = model.config.max_len
    outputs = [None] * len(sources)
    for rows, width in batches_by_width([width_of([s], longest) for s in sources]):
        src = pad([[*sources[i], EOS_ID] for i in rows], width)
        max_len = min(width + 50, longest)
        if beam_size == 1:
            best = greedy_decode(model, params, src, max_len)
        else:
            tokens, _ = beam_search(model, params, src, max_len, beam_size)
            best = tokens[:, 0]
        for i, tokens in zip(rows, best.tolist()):
            outputs[i] = list(itertools.takewhile(lambda t: t != EOS_ID, tokens))
    return outputs


def draw_attention(model, params, tokenizer, source, output):
    """Draws how an output attends to its source (both lists of tokens), as text.

    A row is what the decoder looked at to find the token that the row is named after.
    """
    # The shift is that of training. An output as long as the model allows has no EOS.
    src, longest = [*source, EOS_ID], model.config.max_len
    tgt, labels = [BOS_ID, *output][:longest], [*output, EOS_ID][:longest]
    inputs = np.array([src]), np.array([tgt])
    _, variables = model.apply({"params": params}, *inputs, mutable="intermediates")
    last_block = f"blocks_{model.config.num_layers - 1}"
    block = variables["intermediates"]["decoder"][last_block]
    (weights,) = block["cross_attention"]["weights"]  # [1, H, T, S]

    def names_of(tokens):  # EOS has no text.
        return [tokenizer.decode([t]).replace(" ", "_") or "EOS" for t in tokens]

    columns, names = names_of(src), names_of(labels)
    width, shades = max(map(len, columns + names)), " .:-=+*#%@"
    levels = np.minimum(np.mean(weights, axis=(0, 1)) * len(shades), len(shades) - 1)
    table = [["", *columns]]
    for name, row in zip(names, levels.astype(int)):
        table.append([name, *(width * shades[level] for level in row)])
    lines = [" ".join(f"{cell:>{width}}" for cell in row).rstrip() for row in table]
    title = "Cross-attention in the last block, the mean of its heads: source across,\n"
    title += f"output down, shaded from none to all like this: {shades!r}\n"
    return "\n".join([title, *lines])


def translate(args):
    """Prints a line for each text, or without any for each line of stdin: its
    translation, or an empty line if it is empty or too long. At a terminal each line is
    answered at once. Returns the exit status, 2 if a line was too long. One that is not
    UTF-8 raises an InputError.
    """
    config, tokenizer, state, _ = load_checkpoint(args.model)
    model, params = Transformer(config), jax.device_put(state["average"])
    # All are bytes, so that `decode_line` sees what is not UTF-8.
    texts = map(os.fsencode, args.texts) if args.texts else sys.stdin.buffer
    is_typed = not args.texts and sys.stdin.isatty()
    lines, status = enumerate(texts, 1), 0
    while True:
        if is_typed:
            print("> ", end="", file=sys.stderr, flush=True)
        sources = []
        for number, line in itertools.islice(lines, 1 if is_typed else 1024):
            source = tokenizer.encode(decode_line(line, f"line {number}"))
            if len(source) >= config.max_len:
                most = f"the most is {config.max_len - 1}"
                log(f"error: line {number}: {len(source)} tokens, {most}")
                source, status = [], 2
            sources.append(source)
        if not sources:
            return status
        outputs = decode_all(model, params, sources, args.beam_size)
        for source, output in zip(sources, outputs):
            print(one_line(tokenizer.decode(output)) if source else "", flush=True)
            if source and args.attention:
                drawing = draw_attention(model, params, tokenizer, source, output)
                print(drawing, flush=True)


# ---- 14 A training run ---------------------------------------------------------------


class Run(NamedTuple):
    """What stays the same from the first step of a training run to the last."""

    args: argparse.Namespace  # the options of the command line (section 15)
    model: Transformer
    tokenizer: Tokenizer
    train_pairs: list  # of pairs of lists of tokens
    valid_pairs: list  # the same, unseen in training, to measure on
    batch_size: int
    notes: dict  # what is saved to recognise the run by, see `check_same_run`


def choose_pairs(args):
    """Returns the pairs of texts to train on, and those to measure on. They have no
    source in common.
    """
    if args.command == "demo":
        pairs = demo_pairs(40_512, args.seed)
        return pairs[512:], pairs[:512]
    pairs = read_pairs(args.pairs)
    valid = read_pairs(args.valid) if args.valid else hold_out(pairs, 500, args.seed)
    unseen = {source for source, _ in valid}
    return [pair for pair in pairs if pair[0] not in unseen], valid


def encode_pairs(path, pairs, tokenizer, max_len):
    """Pairs of texts -> pairs of lists of tokens, without those that are too long."""
    encoded = [tuple(map(tokenizer.encode, pair)) for pair in pairs]
    short = [pair for pair in encoded if max(map(len, pair)) < max_len]  # EOS counts
    limit = f"--max-len {max_len} tokens, with EOS"
    if len(short) < len(pairs):
        number = f"{len(pairs) - len(short):,} of {len(pairs):,} pairs"
        log(f"{path}: left out {number}, longer than {limit}")
    if not short:
        need = "one pair to train on and one, with another source, to measure on"
        raise InputError(f"{path}: a run needs {need}, of at most {limit}")
    return short


def set_up(args):
    """Returns the Run that the options ask for, and its state before the first step."""
    texts, valid_texts = choose_pairs(args)
    tokenizer = Tokenizer.learn(itertools.chain(*texts), args.vocab_size)
    train_pairs = encode_pairs(args.pairs, texts, tokenizer, args.max_len)
    path = args.valid or args.pairs
    valid_pairs = encode_pairs(path, valid_texts, tokenizer, args.max_len)
    # Few pairs make a smaller batch. All devices get the same number of its rows.
    num_devices = jax.device_count()
    batch_size = min(args.batch_size, len(train_pairs))
    batch_size -= batch_size % num_devices
    if batch_size == 0:
        need = f"a batch needs a pair for each of {num_devices} devices"
        raise InputError(f"{args.pairs}: {need}")
    config = TransformerConfig(
        src_vocab_size=tokenizer.vocab_size,
        tgt_vocab_size=tokenizer.vocab_size,
        d_model=args.d_model,
        num_heads=args.num_heads,
        num_layers=args.num_layers,
        d_ff=4 * args.d_model,
        dropout_rate=args.dropout,
        max_len=args.max_len,
        dtype="bfloat16" if args.bf16 else "float32",
    )
    optimizer = paper_optimizer(args.d_model, args.warmup)
    state = create_train_state(config, jax.random.key(args.seed), optimizer)
    # A run may go on with PAIRS and MODEL under other names, on other devices, and to
    # more steps. All other options have to be the same, and so have the pairs.
    may_differ = "command", "pairs", "model", "steps", "distributed"
    numbers = f"{len(train_pairs)} to train on, {len(valid_pairs)} to measure on"
    data = repr((train_pairs, valid_pairs, batch_size))
    notes = {
        "options": {k: v for k, v in vars(args).items() if k not in may_differ},
        "steps": args.steps,  # in all, unless the run is to go on to more
        "pairs": f"{numbers}, in batches of {batch_size}",
        "digest": hashlib.sha256(data.encode()).digest(),
    }
    pairs = train_pairs, valid_pairs
    return Run(args, Transformer(config), tokenizer, *pairs, batch_size, notes), state


def check_same_run(run, checkpoint):
    """Raises an InputError unless the checkpoint is one of this very run."""
    here, there = run.notes, checkpoint.notes
    where = f"{run.args.model}: cannot continue"
    for name, value in here["options"].items():
        if (old := there["options"][name]) != value:
            raise InputError(f"{where}: {name} is {old} there and {value} here")
    if there["digest"] != here["digest"]:
        difference = f"there {there['pairs']}; here {here['pairs']}"
        files = " or ".join(filter(None, [run.args.pairs, run.args.valid]))
        raise InputError(f"{where}: {files} has other pairs: {difference}")


def require_finite(numbers, step):
    """Raises a RunError if a number in the tree `numbers` is not finite."""
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(numbers)):
        problem = f"after step {step} the loss or a parameter is not finite"
        raise RunError(f"{problem}; a longer --warmup may help")


def save(run, state):
    """Saves a checkpoint, if the options name one."""
    state = jax.device_get(state)
    # A step can have a finite loss, and break the parameters all the same.
    require_finite(state.params, state.step)
    if run.args.model:
        config = run.model.config
        save_checkpoint(run.args.model, config, run.tokenizer, state, **run.notes)


def evaluate(run, state, beam_size, num_shown, file):
    """Prints to `file` the score on unseen pairs, and some of them."""
    # The first process evaluates alone. So what eval_step needs of the state, which is
    # on the devices of all processes, has to leave them.
    state = jax.device_get(state.replace(params=(), opt_state=()))
    pairs, losses, num_labels = run.valid_pairs, [], []
    widths = [width_of(pair, run.args.max_len) for pair in pairs]
    for rows, width in batches_by_width(widths):
        batch = to_batch([pairs[i] for i in rows], width)
        losses.append(eval_step(state, batch)["loss"])
        num_labels.append(np.sum(batch["tgt"][:, 1:] != PAD_ID))
    loss = np.average(losses, weights=num_labels)
    sources, decode = [source for source, _ in pairs], run.tokenizer.decode
    outputs = decode_all(run.model, state.average, sources, beam_size)
    texts = [(decode(s), decode(t), decode(o)) for (s, t), o in zip(pairs, outputs)]
    right = sum(target == output for _, target, output in texts)
    share = f"{right} of {len(texts)} exactly right ({right / len(texts):.1%})"
    print(f"unseen pairs: loss {loss:.4f}, {share}", file=file)
    for source, target, output in texts[:num_shown]:
        wrong = "" if output == target else f"   not {target}"
        print(" ", one_line(f"{source} -> {output}{wrong}"), file=file, flush=True)


def split_batch(batch, sharding):
    """Splits a batch, which every process has, among the devices of all of them."""

    def split(x):
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(split, batch)


def training_loop(run, state):
    """Does the steps that are left, and returns the state after the last of them.

    It saves and reports at each twentieth of all steps, or each 500 if that is less, at
    the last step, and when the last report is a minute old. At each fourth of all steps,
    or each 2,500, it also measures the model. Of several processes, the first alone does
    all this, and the others wait for it in their next step.
    """
    args, start = run.args, int(state.step)
    every = max(1, min(args.steps // 20, 500))
    # Every device gets the whole state, and its part of each batch. To train_step, the
    # parts are one array: it takes the mean over the labels of all devices, and jit
    # adds the communication which that needs.
    mesh = Mesh(jax.devices(), ("data",))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    batches = training_batches(run.train_pairs, args.max_len, run.batch_size, args.seed)
    batches = itertools.islice(batches, start, None)  # without those of the steps done
    began = reported = time.monotonic()
    for step, batch in zip(range(start + 1, args.steps + 1), batches):
        batch = split_batch(batch, by_row)
        state, metrics = train_step(state, batch, args.label_smoothing)
        require_finite(metrics, step)  # This waits for the step.
        now = time.monotonic()
        is_due = step % every == 0 or step == args.steps or now - reported > 60
        if is_due and jax.process_index() == 0:
            save(run, state)
            numbers = f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:6.1%}"
            log(f"step {step:5} of {args.steps}  {numbers}  {now - began:.0f} s")
            if step % (5 * every) == 0 and step < args.steps:
                evaluate(run, state, beam_size=1, num_shown=3, file=sys.stderr)
            reported = time.monotonic()
    return state


def train(args, checkpoint):
    """Runs the demo, or trains on a file of pairs; shows what was learnt.

    `checkpoint` is the Checkpoint to go on from; None starts anew.
    """
    run, state = set_up(args)
    if checkpoint:
        check_same_run(run, checkpoint)
        state = flax.serialization.from_state_dict(state, checkpoint.state)
        log(f"{args.model}: goes on after step {state.step}")
    digest = np.frombuffer(run.notes["digest"], np.uint8)
    multihost_utils.assert_equal(digest, "the processes do not have the same pairs")
    log(f"pairs: {run.notes['pairs']}")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    log(f"model: {optax.tree.size(state.params):,} parameters, on {device}")
    is_first = jax.process_index() == 0
    if is_first and state.step < args.steps:
        try:  # What cannot be written is to be known before training.
            save(run, state)
        except OSError as error:
            raise InputError(f"{args.model}: {error.strerror}") from None
    state = training_loop(run, state)
    if is_first:
        print()
        evaluate(run, state, beam_size=4, num_shown=6, file=sys.stdout)
        params, (source, target) = jax.device_get(state.average), run.valid_pairs[0]
        print("\n" + draw_attention(run.model, params, run.tokenizer, source, target))


# ---- 15 Command line -----------------------------------------------------------------


def limited(kind, least, most):
    """The type of an option, for argparse: an int or a float within limits."""

    def number(text):  # argparse shows the name, as in "invalid number value: 'x'".
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text}")
        return value

    return number


def add_option(parser, flag, kind, default, text):
    """Adds an option that takes a number."""
    text = f"{text} (default: %(default)s)"
    parser.add_argument(flag, type=kind, default=default, metavar="N", help=text)


def add_training_options(parser, steps, batch_size, warmup, d_model, num_layers):
    """Adds the options that `demo` and `train` share, with these defaults."""
    count, share = limited(int, 1, 10**9), limited(float, 0, 1)
    add = partial(add_option, parser)
    add("--steps", count, steps, "training steps in all")
    add("--batch-size", count, batch_size, "pairs in a step, on all devices together")
    text = "steps in which the learning rate rises (Eq. 3); 4000 in the paper"
    add("--warmup", count, warmup, text)
    add("--dropout", share, 0.1, "dropout rate (section 5.4); 0 suits very many pairs")
    add("--label-smoothing", share, 0.1, "label smoothing (section 5.4)")
    add("--seed", limited(int, 0, 2**32 - 1), 0, "of all that is random")
    add("--d-model", count, d_model, "width; the inner width d_ff is 4 times that")
    add("--num-heads", count, 4, "attention heads")
    add("--num-layers", count, num_layers, "blocks in each stack")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    text = "join a job of several processes"
    parser.add_argument("--distributed", action="store_true", help=text)


def make_parser():
    """Returns the parser of the command line, and that of its command `train`."""
    parser = argparse.ArgumentParser(
        description="The Transformer, as in the paper. Without a command, the demo."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="learn to reverse words, and show it")
    add_training_options(demo, 1000, 64, warmup=200, d_model=64, num_layers=1)
    demo.set_defaults(pairs="demo", model=None, valid=None, max_len=13, vocab_size=259)

    train = commands.add_parser("train", help="learn from a file of pairs")
    train.add_argument("pairs", metavar="PAIRS", help="lines of source<TAB>target")
    text = "where the model is saved; if it is there, the run that saved it goes on"
    train.add_argument("model", metavar="MODEL", help=text)
    text = "measure on these pairs, not on a tenth of PAIRS (at most 500)"
    train.add_argument("--valid", metavar="FILE", help=text)
    add_training_options(train, 11_000, 128, warmup=1000, d_model=128, num_layers=2)
    text = "longest source and target in tokens, with EOS"
    add_option(train, "--max-len", int, 128, text)
    text = "size of the vocabulary of subwords; 259 is bytes"
    add_option(train, "--vocab-size", int, 500, text)

    translate = commands.add_parser(
        "translate",
        help="translate texts",
        epilog="Options come first or last; a TEXT that begins with - comes after --.",
    )
    translate.add_argument("model", metavar="MODEL", help="what `train` has saved")
    text = "without any, each line of stdin is one"
    translate.add_argument("texts", nargs="*", metavar="TEXT", help=text)
    text = "hypotheses of the search; 1 is greedy"
    add_option(translate, "--beam-size", limited(int, 1, 1000), 4, text)
    text = "draw what each output attended to"
    translate.add_argument("--attention", action="store_true", help=text)
    return parser, train


def join_job():
    """Makes this process one of several that train together.

    JAX finds such a job by itself under Slurm and Open MPI and on Cloud TPU. Elsewhere
    three variables tell: JAX_COORDINATOR_ADDRESS, which JAX reads, and the two below.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    job = {key: int(os.environ[v]) for key, v in names.items() if v in os.environ}
    jax.distributed.initialize(**job)


def main(argv=None):
    """Runs the command line, by default the process's own; returns the exit status.

    0 done; 2 a mistake on the command line or in a file; 130 Ctrl-C; 1 anything else.
    """
    argv = (sys.argv[1:] if argv is None else argv) or ["demo"]
    parser, train_parser = make_parser()
    try:
        args = parser.parse_args(argv)
        if args.command == "translate":
            return translate(args)
        if args.distributed:
            join_job()
        checkpoint = None
        if args.model and os.path.exists(args.model):
            checkpoint = load_checkpoint(args.model)
            notes = checkpoint.notes
            if "options" not in notes:
                raise InputError(f"{args.model}: not saved by the command train")
            # With other defaults: an option that is not given is the checkpoint's.
            train_parser.set_defaults(**notes["options"], steps=notes["steps"])
            args = parser.parse_args(argv)
        train(args, checkpoint)
        return 0
    except SystemExit as error:  # argparse ends so, after a mistake and after --help.
        return error.code
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        if argv[0] != "translate":
            raise
        # `... | head` has read enough. What Python still prints at its exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # wherever it goes, on every system
    try:
        status = main()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        # JAX would wait at the exit for other processes, which wait for this one.
        os._exit(status)
    sys.exit(status)
