"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017) in JAX and Flax.

The complete encoder-decoder model with its training and inference, in the order of the
paper (arXiv:1706.03762), to which "section", "Eq." and "Figure" refer.

    python transformer_model.py                     learn to reverse words, and show it
    python transformer_model.py --pairs pairs.tsv   learn from your own sentence pairs
    python transformer_model.py --help              everything else

Sections: 1 Configuration, 2 Masks, 3 Positional encoding, 4 Attention, 5 Feed-forward
network, 6 Blocks, 7 The model, 8 Training, 9 Inference, 10 Data, 11 Checkpoints, 12
Command line. The architecture is complete at the end of section 7.

Shapes are written with the same letters everywhere:

    B  batch             D  d_model, the width        H  num_heads
    S  source length     K  D / H, width of a head    F  d_ff, the inner width
    T  target length     V  target vocabulary         W  beams
    L  any length        kv a pair: keys and values, both [B, H, L, K]

Tokens are int32. A mask is boolean, True where attention is allowed, and None allows
everything. `deterministic=True`, the default everywhere, switches dropout off.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import os
import signal
import sys
import time
from functools import partial
from typing import Any, NamedTuple

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

PAD_ID = 0  # fills up a row; never attended to, never counted in the loss
BOS_ID = 1  # "beginning of sequence", the decoder's first input
EOS_ID = 2  # "end of sequence", the last token of a source and of a target
FIRST_SYMBOL_ID = 3


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What defines a model. The defaults are the paper's base model (Table 3).

    It is hashable, and so can be a static argument of a jitted function. A value that
    cannot work raises a ValueError naming the field, the value and what is allowed.
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
    head: str = "logits"  # "softmax": probabilities; "none": hidden states [B, T, D]
    dtype: Any = jnp.float32  # of the computation; the parameters are always float32

    def __post_init__(self):
        def require(field, is_allowed, allowed):
            if not is_allowed:
                value = getattr(self, field)
                raise ValueError(f"{field} must be {allowed}, not {value!r}")

        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if field.type is int:
                # A vocabulary has three special tokens and at least one symbol.
                least = FIRST_SYMBOL_ID + 1 if "vocab" in name else 1
                is_int = isinstance(value, (int, np.integer)) and value is not True
                require(name, is_int and value >= least, f"an integer >= {least}")
            elif field.type is bool:
                require(name, isinstance(value, bool), "True or False")
        heads, rate = self.num_heads, self.dropout_rate
        require("d_model", self.d_model % heads == 0, f"a multiple of {heads} (heads)")
        require("d_model", self.d_model % 2 == 0, "even (sines and cosines)")
        is_rate = isinstance(rate, (int, float, np.floating)) and 0 <= rate < 1
        require("dropout_rate", is_rate, "a number >= 0 and < 1")
        sizes = self.src_vocab_size, self.tgt_vocab_size
        can_share = not self.share_embeddings or sizes[0] == sizes[1]
        require("share_embeddings", can_share, f"False for two vocabularies {sizes}")
        outputs = ("logits", "softmax", "none")
        require("head", self.head in outputs, f"one of {outputs}")
        # The very objects: equal ones, such as np.dtype("float32"), hash differently.
        is_dtype = self.dtype is jnp.float32 or self.dtype is jnp.bfloat16
        require("dtype", is_dtype, "jnp.float32 or jnp.bfloat16")


# ---- 2 Masks -------------------------------------------------------------------------


def padding_mask(tokens):
    """int [B, L] -> bool [B, 1, 1, L]: no query may attend to a key that is PAD."""
    if jnp.ndim(tokens) != 2:
        raise ValueError(f"tokens must be [B, L], got shape {jnp.shape(tokens)}")
    return (tokens != PAD_ID)[:, None, None, :]


def causal_mask(length):
    """bool [1, 1, L, L]: query i (down) may attend to keys 0 to i (across; 3.2.3)."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


# ---- 3 Positional encoding -----------------------------------------------------------


class PositionalEncoding(nn.Module):
    """Adds to every embedding the encoding of its position (section 3.5).

    PE(pos, 2i) = sin(pos / 10000^(2i / D)),  PE(pos, 2i + 1) = cos(the same angle)
    """

    config: TransformerConfig

    def __call__(self, x, position=None):
        """x [B, L, D], at positions 0 to L - 1 or all at `position` -> [B, L, D]."""
        max_len, d_model = self.config.max_len, self.config.d_model
        if position is None and not 1 <= x.shape[1] <= max_len:
            raise ValueError(f"{x.shape} [B, L, D]: L must be 1 to max_len {max_len}")
        divisor = 10000 ** (np.arange(0, d_model, 2) / d_model)  # [D / 2]
        angle = np.arange(max_len)[:, None] / divisor  # [max_len, D / 2]
        table = np.stack([np.sin(angle), np.cos(angle)], axis=-1)  # [max_len, D / 2, 2]
        table = jnp.asarray(table.reshape(max_len, d_model), x.dtype)
        return x + (table[: x.shape[1]] if position is None else table[position])


# ---- 4 Attention ---------------------------------------------------------------------


def scaled_dot_product_attention(query, key, value, mask=None):
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V (Eq. 1), for all heads at once.

    The paper's d_k, the width of query and key, is the last axis, K.

    Args:
      query: [B, H, T, K].
      key, value: [B, H, S, K].
      mask: broadcastable to [B, H, T, S].

    Returns:
      The output [B, H, T, K], and the weights, float32 [B, H, T, S]. A query that may
      attend to nothing gets zeros in both.

    Raises:
      ValueError: for shapes that do not fit, or a mask that is not boolean.
    """
    head_shapes = {x.shape[:-2] + x.shape[-1:] for x in (query, key, value)}
    if query.ndim != 4 or len(head_shapes) > 1 or key.shape != value.shape:
        got = f"{query.shape}, {key.shape} and {value.shape}"
        need = "query must be [B, H, T, K], key and value [B, H, S, K]"
        raise ValueError(f"{need}, got {got}")
    # The scores and their softmax are float32, whatever the inputs are.
    scores = jnp.einsum(
        "bhtk,bhsk->bhts", query, key, preferred_element_type=jnp.float32
    )
    scores = scores / np.sqrt(query.shape[-1])
    if mask is None:
        weights = jax.nn.softmax(scores)
    else:
        pairs = zip(mask.shape, scores.shape)
        if mask.ndim != 4 or any(size not in (1, full) for size, full in pairs):
            raise ValueError(f"mask {mask.shape} does not fit scores {scores.shape}")
        if mask.dtype != bool:
            raise ValueError(f"mask must be bool, True: may attend; got {mask.dtype}")
        # Not -inf: the softmax of a row of nothing else is NaN. With the least float32
        # it is uniform, and the second `where` makes zeros of it.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.where(mask, jax.nn.softmax(scores), 0.0)
    return jnp.einsum("bhts,bhsk->bhtk", weights.astype(value.dtype), value), weights


class Dense(nn.Module):
    """x W + b at every position; at the start W is Xavier-uniform and b is zero."""

    config: TransformerConfig
    features: int

    @nn.compact
    def __call__(self, x):
        """x [B, L, any] -> [B, L, features]."""
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        kernel = self.param("kernel", xavier, (x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.features,))
        # XLA computes the gradient of a product of two matrices faster than that of
        # one with a batch: a training step of the base model was 1.18 times as fast.
        y = x.reshape(-1, x.shape[-1]) @ kernel.astype(self.config.dtype)
        return (y + bias.astype(y.dtype)).reshape(*x.shape[:-1], self.features)


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each in a subspace of width K (section 3.2.2).

    MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W^O
    head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)

    The W_i of all heads stand side by side in one D x D matrix. Each call sows its
    weights as "weights" into the collection "intermediates".
    """

    config: TransformerConfig

    def setup(self):
        self.query, self.key, self.value, self.output = (
            Dense(self.config, self.config.d_model) for _ in range(4)
        )

    def __call__(self, x, memory, mask=None):
        """x [B, T, D] attends to memory [B, S, D], mask as in Eq. 1 -> [B, T, D]."""
        return self.attend(x, self.project_kv(memory), mask)

    def project_kv(self, memory):
        """Memory [B, S, D] -> its kv, apart from `attend` so that it can be kept."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def attend(self, x, kv, mask=None):
        """x [B, T, D] attends to kv -> [B, T, D]."""
        query = self._split(self.query(x))
        heads, weights = scaled_dot_product_attention(query, *kv, mask)
        self.sow("intermediates", "weights", weights)
        return self.output(heads.swapaxes(1, 2).reshape(x.shape))  # concatenates

    def _split(self, x):  # [B, L, D] -> [B, H, L, K]
        return x.reshape(*x.shape[:2], self.config.num_heads, -1).swapaxes(1, 2)


# ---- 5 Feed-forward network ----------------------------------------------------------


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2 (Eq. 2), at every position alike."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x):
        """x [B, L, D] -> [B, L, D], by way of [B, L, F]."""
        inner = nn.relu(Dense(self.config, self.config.d_ff)(x))
        return Dense(self.config, self.config.d_model)(inner)


# ---- 6 Blocks ------------------------------------------------------------------------


def layer_norm(config):
    """Layer normalisation with float32 statistics; epsilon as in the paper's code."""
    return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype)


class AddAndNorm(nn.Module):
    """The "Add & Norm" around each sub-layer (Figure 1), in two halves.

    post-norm (3.1 and 5.4):   LayerNorm(x + Dropout(sublayer(x)))
    pre-norm (`norm_first`):   x + Dropout(sublayer(LayerNorm(x)))
    """

    config: TransformerConfig

    def setup(self):
        self.norm = layer_norm(self.config)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def enter(self, x):
        """x [B, L, D] -> what the sub-layer sees of it."""
        return self.norm(x) if self.config.norm_first else x

    def leave(self, x, y, deterministic=True):
        """x as given to `enter`, y from the sub-layer, both [B, L, D] -> [B, L, D]."""
        x = x + self.dropout(y, deterministic)
        return x if self.config.norm_first else self.norm(x)


class EncoderBlock(nn.Module):
    """Self-attention, then the feed-forward network (Figure 1, left)."""

    config: TransformerConfig

    def setup(self):
        self.self_attention = MultiHeadAttention(self.config)
        self.feed_forward = FeedForward(self.config)
        self.add_and_norm = [AddAndNorm(self.config) for _ in range(2)]

    def __call__(self, x, mask=None, deterministic=True):
        """x [B, S, D], mask broadcastable to [B, H, S, S] -> [B, S, D]."""
        y = self.add_and_norm[0].enter(x)
        y = self.self_attention(y, y, mask)
        x = self.add_and_norm[0].leave(x, y, deterministic)

        y = self.feed_forward(self.add_and_norm[1].enter(x))
        return self.add_and_norm[1].leave(x, y, deterministic)


class DecoderBlock(nn.Module):
    """Masked self-attention, attention to the memory, feed-forward (Figure 1, right).

    Decoding keeps two kv from token to token: that of the memory, which depends on the
    source alone, and the cache, the self-attention's kv of all the tokens so far.
    """

    config: TransformerConfig

    def setup(self):
        self.self_attention = MultiHeadAttention(self.config)
        self.cross_attention = MultiHeadAttention(self.config)
        self.feed_forward = FeedForward(self.config)
        self.add_and_norm = [AddAndNorm(self.config) for _ in range(3)]

    def __call__(
        self,
        x,  # [B, T, D]
        memory_kv,  # cross_attention.project_kv(memory), of length S
        self_mask=None,  # broadcastable to [B, H, T, L], L = T without a cache
        memory_mask=None,  # broadcastable to [B, H, T, S]
        cache=None,  # kv of length L; x's own replaces its part from `start` on
        start=0,
        deterministic=True,
    ):
        """Returns x after the block, [B, T, D], and the self-attention's kv."""
        y = self.add_and_norm[0].enter(x)
        kv = self.self_attention.project_kv(y)
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
            kv = tuple(write(old, new, start) for old, new in zip(cache, kv))
        y = self.self_attention.attend(y, kv, self_mask)
        x = self.add_and_norm[0].leave(x, y, deterministic)

        y = self.add_and_norm[1].enter(x)
        y = self.cross_attention.attend(y, memory_kv, memory_mask)
        x = self.add_and_norm[1].leave(x, y, deterministic)

        y = self.feed_forward(self.add_and_norm[2].enter(x))
        return self.add_and_norm[2].leave(x, y, deterministic), kv


# ---- 7 The model ---------------------------------------------------------------------


class Encoder(nn.Module):
    """The stack of encoder blocks (section 3.1). Pre-norm ends in one more LayerNorm."""

    config: TransformerConfig

    def setup(self):
        self.blocks = [EncoderBlock(self.config) for _ in range(self.config.num_layers)]
        if self.config.norm_first:
            self.norm = layer_norm(self.config)

    def __call__(self, x, mask=None, deterministic=True):
        """x [B, S, D], mask broadcastable to [B, H, S, S] -> the memory, [B, S, D]."""
        for block in self.blocks:
            x = block(x, mask, deterministic)
        return self.norm(x) if self.config.norm_first else x


class Decoder(nn.Module):
    """The stack of decoder blocks (section 3.1). Pre-norm ends in one more LayerNorm."""

    config: TransformerConfig

    def setup(self):
        self.blocks = [DecoderBlock(self.config) for _ in range(self.config.num_layers)]
        if self.config.norm_first:
            self.norm = layer_norm(self.config)

    def project_kv(self, memory):
        """Memory [B, S, D] -> every block's kv of it, as a list."""
        return [block.cross_attention.project_kv(memory) for block in self.blocks]

    def __call__(
        self,
        x,
        memory_kv,
        self_mask=None,
        memory_mask=None,
        cache=None,
        start=0,
        deterministic=True,
    ):
        """As `DecoderBlock`; memory_kv, cache and the kv returned are lists, of which
        every block has its entry.
        """
        rest = start, deterministic
        new_cache = []
        for i, block in enumerate(self.blocks):
            old = None if cache is None else cache[i]
            x, kv = block(x, memory_kv[i], self_mask, memory_mask, old, *rest)
            new_cache.append(kv)
        return self.norm(x) if self.config.norm_first else x, new_cache


class Transformer(nn.Module):
    """All of Figure 1: source and target tokens to logits for the next target tokens.

        model = Transformer(TransformerConfig())
        variables = model.init(jax.random.key(0), src, tgt)  # {"params": ...}
        logits = model.apply(variables, src, tgt)

    Dropout takes deterministic=False and rngs={"dropout": key}. The attention weights
    of every layer come with mutable=["intermediates"]. A token above the vocabulary
    gives NaN; shapes that do not fit, or a length above `max_len`, a ValueError.
    """

    config: TransformerConfig

    def setup(self):
        def matrix(name, rows, init):
            return self.param(name, init, (rows, self.config.d_model))

        src_size, tgt_size = self.config.src_vocab_size, self.config.tgt_vocab_size
        normal = nn.initializers.normal(self.config.d_model**-0.5)
        if self.config.share_embeddings:
            shared = matrix("embedding", tgt_size, normal)
            self.src_embedding = self.tgt_embedding = self.output = shared
        else:
            self.src_embedding = matrix("src_embedding", src_size, normal)
            self.tgt_embedding = matrix("tgt_embedding", tgt_size, normal)
            if self.config.head != "none":
                xavier = nn.initializers.xavier_uniform()
                self.output = matrix("output", tgt_size, xavier)
        self.positions = PositionalEncoding(self.config)
        self.dropout = nn.Dropout(self.config.dropout_rate)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, src, tgt, deterministic=True):
        """The forward pass for all target positions in parallel, as in training.

        src int [B, S] and the decoder's input tgt int [B, T], BOS first -> float32
        [B, T, V]; the logits at position t are for the token at t + 1.
        """
        if jnp.ndim(src) != 2 or jnp.ndim(tgt) != 2 or src.shape[0] != tgt.shape[0]:
            got = f"{jnp.shape(src)} and {jnp.shape(tgt)}"
            raise ValueError(f"src and tgt must be [B, S] and [B, T], got {got}")
        memory_kv = self.project_kv(self.encode(src, deterministic))
        masks = padding_mask(tgt) & causal_mask(tgt.shape[1]), padding_mask(src)
        return self.decode(tgt, memory_kv, *masks, deterministic=deterministic)[0]

    def encode(self, src, deterministic=True):
        """Source tokens, int [B, S] -> the memory, [B, S, D]."""
        x = self._embed(self.src_embedding, src, deterministic)
        return self.encoder(x, padding_mask(src), deterministic)

    def project_kv(self, memory):
        """The memory [B, S, D] -> every decoder block's kv of it."""
        return self.decoder.project_kv(memory)

    def decode(
        self,
        tgt,
        memory_kv,  # project_kv(memory)
        self_mask,
        memory_mask,  # padding_mask(src)
        cache=None,
        position=None,
        deterministic=True,
    ):
        """Returns the logits for the next tokens, and every block's kv.

        The parallel pass, without a cache: tgt int [B, T], self_mask broadcastable to
        [B, H, T, T] -> [B, T, V].

        One step of decoding: tgt int [B, W], the tokens at `position` of W targets of
        each source; the cache, every block's kv, of length L * W; self_mask broadcast-
        able to [B, H, W, L * W] -> [B, W, V]. The kv of target w's token at position p
        is entry p * W + w of the cache.
        """
        start = 0 if cache is None else position * tgt.shape[1]
        x = self._embed(self.tgt_embedding, tgt, deterministic, position)
        masks = self_mask, memory_mask
        x, cache = self.decoder(x, memory_kv, *masks, cache, start, deterministic)
        return self._project(x), cache

    def _embed(self, embedding, tokens, deterministic, position=None):
        x = jnp.take(embedding, tokens, axis=0) * self.config.d_model**0.5  # 3.4
        x = self.dropout(self.positions(x, position), deterministic)
        return x.astype(self.config.dtype)  # [B, L] -> [B, L, D]

    def _project(self, x):  # [B, T, D] -> [B, T, V], or as `head` says
        if self.config.head == "none":
            return x
        output = self.output.astype(x.dtype)
        logits = jnp.einsum(
            "btd,vd->btv", x, output, preferred_element_type=jnp.float32
        )
        return jax.nn.softmax(logits) if self.config.head == "softmax" else logits


# ---- 8 Training ----------------------------------------------------------------------


def cross_entropy_loss(logits, labels, label_smoothing=0.0):
    """Mean cross-entropy of the labels that are not PAD, in nats; 0 if all are.

    Label smoothing (section 5.4) takes the share `label_smoothing` of the probability
    away from the label and spreads it evenly over all V classes.

    Args:
      logits: [B, T, V].
      labels: int [B, T], below V, which is not checked.
    """
    if logits.shape[:-1] != labels.shape:
        got = f"{logits.shape} and {labels.shape}"
        raise ValueError(f"logits and labels must be [B, T, V] and [B, T], got {got}")
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.smooth_labels(targets, label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    return _mean_over_labels(losses, labels)


def _mean_over_labels(values, labels):
    is_label = labels != PAD_ID
    return jnp.where(is_label, values, 0).sum() / jnp.maximum(is_label.sum(), 1)


def paper_schedule(d_model, warmup_steps=4000):
    """The learning rate as a function of the number of steps done (Eq. 3).

    lrate = D^-0.5 min(step^-0.5, step warmup_steps^-1.5), with the first step 1
    """

    def schedule(steps_done):
        step = steps_done + 1.0
        return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)

    return schedule


class TrainState(train_state.TrainState):
    """Flax's TrainState (step, params, optimizer, its state), and the dropout key."""

    dropout_key: jax.Array  # its two uint32, which a checkpoint can hold


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
    model = Transformer(config)
    params_key, dropout_key = jax.random.split(key)
    tokens = jnp.full((1, 1), BOS_ID)
    params = jax.jit(model.init)(params_key, tokens, tokens)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),  # from an int, train_step would compile twice
        apply_fn=model.apply,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(params),
        dropout_key=jax.random.key_data(dropout_key),
    )


@partial(jax.jit, donate_argnames="state")
def train_step(state, batch, label_smoothing=0.1):
    """One step of gradient descent.

    Args:
      state: a TrainState; its memory is reused, so go on with the one returned.
      batch: {"src": int [B, S], "tgt": int [B, T + 1]}, tgt from BOS to EOS.

    Returns:
      The new state and the batch's metrics before the step, on the device: "loss" and
      "accuracy", the share of labels that have the highest logit.
    """
    dropout_key = jax.random.wrap_key_data(state.dropout_key)
    dropout = {
        "deterministic": False,
        "rngs": {"dropout": jax.random.fold_in(dropout_key, state.step)},
    }

    def loss_fn(params):
        return _loss_and_metrics(state, params, batch, label_smoothing, **dropout)

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (_, metrics), gradients = value_and_grad(state.params)
    return state.apply_gradients(grads=gradients), metrics


@jax.jit
def eval_step(state, batch):
    """The metrics of a batch as in `train_step`, without dropout and smoothing."""
    return _loss_and_metrics(state, state.params, batch)[1]


def _loss_and_metrics(state, params, batch, label_smoothing=0.0, **dropout):
    # The shift: seeing the target up to position t, the model predicts its t + 1.
    inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, 1:]
    logits = state.apply_fn({"params": params}, batch["src"], inputs, **dropout)
    loss = cross_entropy_loss(logits, labels, label_smoothing)
    hits = jnp.argmax(logits, axis=-1) == labels
    return loss, {"loss": loss, "accuracy": _mean_over_labels(hits, labels)}


# ---- 9 Inference ---------------------------------------------------------------------


def greedy_decode(model, params, src, max_len):
    """The likeliest token at every step, which is beam search with a beam of one.

    src int [B, S] -> int32 [B, max_len], without BOS, PAD after EOS.
    """
    return beam_search(model, params, src, max_len, beam_size=1)[0][:, 0]


@partial(jax.jit, static_argnames=("model", "max_len", "beam_size"))
def beam_search(model, params, src, max_len, beam_size=4, alpha=0.6):
    """Looks for the W likeliest targets of each source (section 6.1).

    Each row has W = `beam_size` places for hypotheses. One that ends in EOS keeps a
    place; at each step the likeliest continuations of the others share what is left.
    The search ends when all have ended, or at `max_len` tokens, where some may be
    without EOS.

    Args:
      src: int [B, S].
      max_len: the most tokens of a target; at most the model's own `max_len`.
      alpha: the length penalty's exponent; 0 is none.

    Returns:
      tokens: int32 [B, W, max_len], without BOS, PAD after EOS, best first.
      scores: float32 [B, W], log P / ((5 + length) / 6)^alpha; EOS counts in length.
        -inf marks an empty place, for want of so many targets; ignore its tokens.
    """
    config = model.config
    if config.head != "logits":
        raise ValueError(f'head must be "logits" to decode, not {config.head!r}')
    if max_len > config.max_len:
        raise ValueError(f"max_len {max_len} is above the model's {config.max_len}")
    batch_size, vocab_size = src.shape[0], config.tgt_vocab_size
    rows = jnp.arange(batch_size)[:, None]
    apply = partial(model.apply, {"params": params})

    memory_kv = apply(apply(src, method="encode"), method="project_kv")
    memory_mask = padding_mask(src)

    def lengthen(length, x):  # along axis 2, with zeros
        return jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])

    def unfinished(room, carry):
        position, _, _, ended, *_ = carry
        return (position < room) & ~ended.all()

    def step(carry):
        position, tokens, log_p, ended, lineage, cache = carry
        last = tokens[:, :, position]  # [B, W]
        # A hypothesis sees its own last token, and it alone does; if PAD, none does.
        own = jnp.eye(beam_size, dtype=bool) & (last != PAD_ID)[..., None]
        lineage = lineage.at[:, :, position].set(own)
        masks = lineage.reshape(batch_size, 1, beam_size, -1), memory_mask
        logits, cache = apply(last, memory_kv, *masks, cache, position, method="decode")
        new_log_p = jax.nn.log_softmax(logits)  # [B, W, V]
        # A hypothesis that has ended has one continuation, PAD, and it ranks first.
        pad_only = jnp.where(jnp.arange(vocab_size) == PAD_ID, 0, -jnp.inf)
        new_log_p = jnp.where(ended[..., None], pad_only, new_log_p)
        total = log_p[..., None] + new_log_p
        rank = jnp.where(ended[..., None] & (total > -jnp.inf), jnp.inf, total)
        _, chosen = jax.lax.top_k(rank.reshape(batch_size, -1), beam_size)
        beam, token = chosen // vocab_size, chosen % vocab_size  # both [B, W]

        log_p = total[rows, beam, token]
        ended = ended[rows, beam] | ((token == EOS_ID) & (log_p > -jnp.inf))
        tokens = tokens[rows, beam].at[:, :, position + 1].set(token)
        return position + 1, tokens, log_p, ended, lineage[rows, beam], cache

    tokens = jnp.full((batch_size, beam_size, max_len + 1), PAD_ID)
    tokens = tokens.at[:, :, 0].set(BOS_ID)
    # All beams start out the same: only the first may be continued.
    log_p = jnp.full((batch_size, beam_size), -jnp.inf).at[:, 0].set(0)
    ended = jnp.zeros((batch_size, beam_size), bool)
    # A row's places share one cache, to which each step adds W keys and values. When a
    # hypothesis changes its place they stay where they are, and its line of `lineage`,
    # [B, W, L, W], goes along: it is True at [p, v] if its token at position p was
    # added by place v. That is the self-attention's mask.
    lineage = jnp.zeros((batch_size, beam_size, 0, beam_size), bool)
    cache = jax.tree.map(lambda x: x[:, :, :0], memory_kv)
    carry = (0, tokens, log_p, ended, lineage, cache)
    # A step takes its time for the whole length of the cache, filled or not. So that
    # has room for 32 steps at first, and for twice as many whenever it is full, or for
    # all where twice as many are not to come.
    room = 0
    while room < max_len:
        room = 2 * room or 32
        if 2 * room > max_len:
            room = max_len
        *others, lineage, cache = carry
        lineage = lengthen(room, lineage)
        cache = jax.tree.map(partial(lengthen, room * beam_size), cache)
        carry = *others, lineage, cache
        carry = jax.lax.while_loop(partial(unfinished, room), step, carry)
    _, tokens, log_p, *_ = carry

    tokens = tokens[..., 1:]
    is_eos = tokens == EOS_ID
    length = jnp.where(is_eos.any(-1), is_eos.argmax(-1) + 1, max_len)
    scores = log_p / ((5 + length) / 6) ** alpha
    order = jnp.argsort(-scores, axis=1)
    return tokens[rows, order], scores[rows, order]


# ---- 10 Data: pairs of UTF-8 bytes; byte b is token b + 3 ----------------------------

VOCAB_SIZE = FIRST_SYMBOL_ID + 256


class InputError(Exception):
    """A mistake in the command line or in an input file, told in one line."""


def reversal_pairs(num_pairs, max_len, seed):
    """Different random words of 4 to max_len letters, each with its reversal (bytes)."""
    rng = np.random.default_rng(seed)
    words = {}  # not a set, whose order changes from run to run
    while len(words) < num_pairs:
        letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(4, max_len + 1))
        words[bytes(letters.tolist())] = None
    return [(word, word[::-1]) for word in words]


def read_pairs(path):
    """A UTF-8 file of lines `source<TAB>target` -> list of (source, target), bytes.

    Raises:
      InputError: names the file, the line and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if lines == [b""]:
        raise InputError(f"{path}: the file is empty")
    pairs = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        pair = tuple(check_line(line, where).split(b"\t"))
        if len(pair) != 2:
            raise InputError(f"{where}: need exactly one tab, found {len(pair) - 1}")
        if not all(pair):
            raise InputError(f"{where}: empty {'target' if pair[0] else 'source'}")
        pairs.append(pair)
    return pairs


def check_line(line, where):
    """Returns the line (bytes) without a line end, if it is UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    return line.removesuffix(b"\n").removesuffix(b"\r")


def hold_out(pairs, num_sources, seed):
    """Splits pairs into training and validation pairs, which share no source."""
    sources = list(dict.fromkeys(source for source, _ in pairs))
    chosen = np.random.default_rng(seed).permutation(len(sources))[:num_sources]
    held = {sources[i] for i in chosen}
    train_pairs = [pair for pair in pairs if pair[0] not in held]
    return train_pairs, [pair for pair in pairs if pair[0] in held]


def to_tokens(texts, width, first=()):
    """Texts (bytes) -> int32 [len(texts), width]: `first`, the text, EOS, then PAD."""
    rows = np.full((len(texts), width), PAD_ID, np.int32)
    for row, text in zip(rows, texts):
        tokens = [*first, *(byte + FIRST_SYMBOL_ID for byte in text), EOS_ID]
        row[: len(tokens)] = tokens
    return rows


def to_text(tokens):
    """Tokens, of which those from EOS on are left out -> str, in one line."""
    tokens = itertools.takewhile(lambda token: token != EOS_ID, tokens)
    text = bytes(t - FIRST_SYMBOL_ID for t in tokens if t >= FIRST_SYMBOL_ID)
    return text.decode(errors="replace").replace("\n", " ")


def to_batch(pairs, widths):
    """Pairs -> a batch for `train_step`; `widths` of source and decoder input."""
    sources, targets = zip(*pairs)
    tgt = to_tokens(targets, widths[1] + 1, first=[BOS_ID])
    return {"src": to_tokens(sources, widths[0]), "tgt": tgt}


def batches_by_length(items, max_len, batch_size, rng=None):
    """Groups items of like length, for little padding and few shapes to compile.

    Args:
      items: list of tuples of texts (bytes), shorter than `max_len`.
      rng: shuffles items and batches, and leaves out the last items if they are fewer
        than a batch; without it, they make a smaller batch.

    Returns:
      List of (indices, widths): a batch's items, and a width for each of their texts,
      with room for EOS: 16, 24, 32, 48, 64, 96, ..., but at most `max_len`.
    """
    ladder = np.array([step << n for n in range(24) for step in (16, 24)])
    lengths = np.array([[len(text) + 1 for text in item] for item in items])
    widths = np.minimum(ladder[np.searchsorted(ladder, lengths)], max_len)
    batches, rest = [], np.zeros(0, int)
    for shape in np.unique(widths, axis=0):
        # What is left of one group, fewer than a batch, joins the next, wider one.
        group = np.append(rest, np.flatnonzero((widths == shape).all(axis=1)))
        group = group if rng is None else rng.permutation(group)
        full = len(group) // batch_size * batch_size
        batches.extend(group[:full].reshape(-1, batch_size))
        rest = group[full:]
    if rng is not None:
        rng.shuffle(batches)
    elif len(rest):
        batches.append(rest)
    return [(indices, widths[indices].max(axis=0)) for indices in batches]


def training_batches(pairs, max_len, batch_size, seed, start=0):
    """Yields the batches of step `start`, `start` + 1, ..., epoch after epoch.

    Their order follows from the seed alone, so that a run can be taken up again.
    """
    epoch, skip = divmod(start, len(pairs) // batch_size)
    while True:
        rng = np.random.default_rng([seed, epoch])
        batches = batches_by_length(pairs, max_len, batch_size, rng)
        for indices, widths in batches[skip:]:
            yield to_batch([pairs[i] for i in indices], widths)
        epoch, skip = epoch + 1, 0


# ---- 11 Checkpoints ------------------------------------------------------------------

FORMAT = b"transformer_model checkpoint "  # the first line, followed by the version
VERSION = 1


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns."""

    config: TransformerConfig
    state: dict  # the TrainState's content; the parameters are state["params"]
    notes: dict  # the further arguments of `save_checkpoint`


def save_checkpoint(path, config, state, **notes):
    """Writes all it takes to use a model, or to train it further, into one file.

    At every moment there is a whole checkpoint at `path`, the old one or the new one.
    """
    fields = {**dataclasses.asdict(config), "dtype": jnp.dtype(config.dtype).name}
    state = flax.serialization.to_state_dict(jax.device_get(state))
    content = {"config": fields, "state": state, "notes": notes}
    content = flax.serialization.msgpack_serialize(content)
    digest = hashlib.sha256(content).hexdigest()
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(FORMAT + f"{VERSION}\n{digest}\n".encode())
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path):
    """Reads a file that `save_checkpoint` wrote. To train on, put its state into one
    that was made alike: `flax.serialization.from_state_dict(train_state, state)`.

    Raises:
      InputError: no such file, another kind of file, a damaged one, a later version.
    """
    try:
        with open(path, "rb") as file:
            first, digest, content = file.readline(99), file.readline(99), file.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    version = first.removeprefix(FORMAT).strip()
    if not (first.startswith(FORMAT) and version.isdigit()):
        raise InputError(f"{path}: not a checkpoint of this program")
    if int(version) > VERSION:
        versions = f"version {int(version)}, and this program reads up to {VERSION}"
        raise InputError(f"{path}: made by a later program: {versions}")
    if digest.strip() != hashlib.sha256(content).hexdigest().encode():
        raise InputError(f"{path}: damaged or cut short")
    content = flax.serialization.msgpack_restore(content)
    fields = content["config"]
    config = TransformerConfig(**{**fields, "dtype": getattr(jnp, fields["dtype"])})
    return Checkpoint(config, content["state"], content["notes"])


# ---- 12 Command line -----------------------------------------------------------------

KINDS = {
    "size": (int, "an integer of at least 1", lambda n: 1 <= n < 2**31),
    "rate": (float, "a number above 0", lambda x: 0 < x < float("inf")),
    "share": (float, "a number from 0 to below 1", lambda x: 0 <= x < 1),
    "seed": (int, "an integer from 0 to 2^32 - 1", lambda n: 0 <= n < 2**32),
}
# Options that take a number: kind, default of the demo, default with --pairs, meaning.
NUMBERS = {
    "steps": ("size", 1000, 8000, "training steps in all"),
    "batch_size": ("size", 64, 64, "pairs in a step, on all devices together"),
    "learning_rate": ("rate", 3e-3, 2e-3, "its peak"),
    "dropout": ("share", 0.0, 0.1, "dropout rate"),
    "seed": ("seed", 0, 0, "of parameters, dropout and the order of the data"),
    "d_model": ("size", 64, 128, "width; the inner width is 4 times that"),
    "num_heads": ("size", 4, 4, "attention heads"),
    "num_layers": ("size", 1, 2, "blocks in each stack"),
    "max_len": ("size", 12, 128, "longest source and target, in bytes"),
    "beam_size": ("size", 1, 1, "places of the search; 1 is greedy"),
}


class TrainingError(Exception):
    """What ends training, told in one line."""


def main(argv=None):
    """Runs the command line and returns the exit status.

    0 done; 1 training failed; 2 the command line or an input file is wrong; 130 or 143
    interrupted by Ctrl-C or SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    try:
        args = parse_arguments(argv)
        if args.distributed:
            join_job()
        return train(args) if args.translate is None else translate(args)
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as error:
        return 128 + (error.args or (signal.SIGINT,))[0]
    except BrokenPipeError:  # as in `... | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse_arguments(argv):
    """Returns the options, checked and complete."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):  # argparse's own prints the usage as well, and exits
            raise InputError(message)

    def flag(name):
        return "--" + name.replace("_", "-")

    def parse_number(kind, text):
        convert, allowed, is_allowed = KINDS[kind]
        with contextlib.suppress(ValueError):
            if is_allowed(convert(text)):
                return convert(text)
        raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}")

    description = "The Transformer. Without options, the demo: learns to reverse words."
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--pairs", metavar="FILE", help="learn from its lines, source<TAB>target")
    add("--checkpoint", metavar="FILE", help="save there, and continue from there")
    translate_help = "translate, and exit; without TEXT, the lines of stdin"
    add("--translate", nargs="*", metavar="TEXT", help=translate_help)
    for name, (kind, demo, pairs, meaning) in NUMBERS.items():
        default = demo if demo == pairs else f"{demo}, with --pairs {pairs}"
        text = f"{meaning} (default {default})"
        add(flag(name), type=partial(parse_number, kind), metavar="N", help=text)
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--distributed", action="store_true", help="join a job of several processes")
    args = parser.parse_args(argv)

    given = [name for name in ("pairs", *NUMBERS) if getattr(args, name) is not None]
    given += ["distributed"] * args.distributed
    if args.translate is not None:
        for name in given:
            if name != "beam_size":
                raise InputError(f"{flag(name)} has no meaning with --translate")
        if args.checkpoint is None:
            raise InputError("--translate needs --checkpoint FILE")
    for name, (_, demo, pairs, _) in NUMBERS.items():
        if name not in given:
            setattr(args, name, demo if args.pairs is None else pairs)
    return args


def join_job():
    """Joins a job of several processes. JAX finds Slurm, Kubernetes, Cloud TPU and MPI;
    elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        job = {k: int(os.environ[v]) for k, v in names.items() if v in os.environ}
        jax.distributed.initialize(**job)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--distributed: {error}") from None


def say(text="", file=None):
    """Prints a result to stdout, in the first process of a job."""
    if jax.process_index() == 0:
        print(text, file=file, flush=True)


def log(text):
    """Prints progress to stderr, in the first process of a job."""
    say(text, sys.stderr)


def train(args):
    """Trains on the pairs of a file, or on words to reverse, and shows what was learnt."""
    train_pairs, valid_pairs = split_pairs(args)
    mesh = Mesh(jax.devices(), ("data",))
    if args.batch_size % mesh.size:
        problem = f"cannot be shared out evenly among {mesh.size} devices"
        raise InputError(f"--batch-size {args.batch_size} {problem}")
    config = make_config(args)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 10, args.steps
    )
    optimizer = optax.adam(schedule, b1=0.9, b2=0.98, eps=1e-9)
    state = create_train_state(config, jax.random.key(args.seed), optimizer)
    notes = {"task": "pairs" if args.pairs else "reversal", "seed": args.seed}
    if args.checkpoint and os.path.exists(args.checkpoint):
        state = resume(args.checkpoint, config, state, notes)

    def save():
        """Returns what went wrong, or None."""
        if args.checkpoint and jax.process_index() == 0:
            try:
                save_checkpoint(args.checkpoint, config, state, **notes)
            except OSError as error:
                return f"cannot write {args.checkpoint}: {error.strerror}"

    if problem := save():  # known before training, not after it
        raise InputError(problem)
    show_model(config, state.params, mesh)
    # The state goes to every device whole, and of each batch every device gets a part:
    # from that, jit makes train_step add up gradients over all of them.
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    parts = NamedSharding(mesh, PartitionSpec("data"))
    start = int(state.step)
    if start >= args.steps:
        log(f"{args.checkpoint} has {start} steps: --steps {args.steps} adds none")
    every = max(1, min(500, args.steps // 20))
    batches = training_batches(
        train_pairs, config.max_len, args.batch_size, args.seed, start
    )
    done, since, num_tokens, metrics = start, time.perf_counter(), 0, None
    with catch_signals() as caught:
        for step in range(start + 1, args.steps + 1):
            batch = next(batches)
            num_tokens += int((batch["tgt"][:, 1:] != PAD_ID).sum())
            batch = {
                name: jax.make_array_from_callback(x.shape, parts, x.__getitem__)
                for name, x in batch.items()
            }
            # The device does one step at a time, and meanwhile this prepares the next
            # batch. With many steps under way, processes on CPUs block each other.
            jax.block_until_ready(metrics)
            state, metrics = train_step(state, batch, label_smoothing=0.0)
            # After a SIGTERM to one of several processes, all stop at the same step.
            if multihost_utils.reached_preemption_sync_point(step):
                caught.append(signal.SIGTERM)
            if step % every and step < args.steps and not caught:
                continue
            loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
            norm = float(optax.tree.norm(state.params))
            if not np.isfinite([loss, norm]).all():
                what = f"loss {loss:.4g}, norm of the parameters {norm:.4g}"
                advice = "not saved; try a lower --learning-rate"
                raise TrainingError(f"not finite at step {step}: {what}; {advice}")
            seconds = time.perf_counter() - since
            left = round(seconds / (step - done) * (args.steps - step))
            problem = save()
            log(
                f"step {step:>{len(str(args.steps))}} of {args.steps}  loss {loss:.4f}"
                f"  accuracy {accuracy:6.1%}  {num_tokens / seconds:,.0f} tokens/s"
                f"  {left // 60}:{left % 60:02} left"
            )
            if problem:
                log(f"{problem}; training goes on")
            if caught:
                how = f"saved to {args.checkpoint}" if args.checkpoint else "not saved"
                log(f"interrupted after step {step}, {problem or how}")
                return 128 + caught[0]
            if step % (5 * every) == 0 and step < args.steps:
                evaluate(config, state, valid_pairs, args.beam_size, sys.stderr)
            done, since, num_tokens = step, time.perf_counter(), 0
    show_results(config, state, valid_pairs, args.beam_size)
    if problem:
        raise TrainingError(f"{problem}: the last steps are not saved")
    return 0


def split_pairs(args):
    """Returns the training pairs and the validation pairs that `args` ask for."""
    if args.pairs is None:
        if args.max_len < 4:
            raise InputError("--max-len must be at least 4 to reverse words")
        pairs = short = reversal_pairs(40_000, args.max_len, args.seed)
        num_valid = 512
    else:
        pairs = read_pairs(args.pairs)
        short = [pair for pair in pairs if max(map(len, pair)) <= args.max_len]
        limit = f"--max-len {args.max_len} bytes"
        if not short:
            raise InputError(f"{args.pairs}: no pair is within {limit}")
        if len(short) < len(pairs):
            left_out = f"{len(pairs) - len(short):,} of {len(pairs):,} pairs"
            log(f"left out {left_out}, longer than {limit}")
        num_valid = min(500, max(1, len(short) // 10))
    train_pairs, valid_pairs = hold_out(short, num_valid, args.seed)
    if args.batch_size > len(train_pairs):
        of = f"{len(train_pairs)} of {len(pairs)} pairs of {args.pairs or 'the demo'}"
        raise InputError(f"--batch-size {args.batch_size}: only {of} are to train on")
    return train_pairs, valid_pairs


def make_config(args):
    """Returns the TransformerConfig that `args` ask for."""
    try:
        return TransformerConfig(
            src_vocab_size=VOCAB_SIZE,
            tgt_vocab_size=VOCAB_SIZE,
            d_model=args.d_model,
            num_heads=args.num_heads,
            num_layers=args.num_layers,
            d_ff=4 * args.d_model,
            dropout_rate=args.dropout,
            max_len=args.max_len + 1,  # with EOS, or BOS
            norm_first=True,  # learns sooner: post-norm needs a longer warm-up
            dtype=jnp.bfloat16 if args.bf16 else jnp.float32,
        )
    except ValueError as error:
        raise InputError(error) from None


def resume(path, config, state, notes):
    """Returns `state` with the content of a checkpoint that fits it."""
    checkpoint = load_checkpoint(path)
    theirs = {**dataclasses.asdict(checkpoint.config), **checkpoint.notes}
    ours = {**dataclasses.asdict(config), **notes}
    for name, value in ours.items():
        may_change = name in ("dropout_rate", "dtype")
        if value != theirs.get(name) and not may_change:
            differs = f"{name} is {theirs.get(name)} there and {value} here"
            raise InputError(f"{path}: cannot continue: {differs}")
    return flax.serialization.from_state_dict(state, checkpoint.state)


@contextlib.contextmanager
def catch_signals():
    """Gives a list that gets the number of the first SIGINT (Ctrl-C) or SIGTERM, so
    that the step in hand can end and be saved. A second signal interrupts at once.

    In a job of several processes JAX watches for SIGTERM, and SIGINT is not caught.
    """
    caught = []

    def catch(number, frame):
        if caught:
            raise KeyboardInterrupt(number)
        caught.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM] if jax.process_count() == 1 else []
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def decode_texts(model, params, texts, beam_size):
    """Texts (bytes), shorter than the model's `max_len` -> their best outputs (str)."""
    outputs = [""] * len(texts)
    max_len, batch_size = model.config.max_len, 64
    items = [(text,) for text in texts]
    for indices, (width,) in batches_by_length(items, max_len, batch_size):
        # Repeats the rows of a smaller batch, which would be one more shape to compile.
        src = to_tokens([texts[i] for i in np.resize(indices, batch_size)], width)
        tokens, _ = beam_search(model, params, src, max_len, beam_size)
        for i, row in zip(indices, np.asarray(tokens[:, 0]).tolist()):
            outputs[i] = to_text(row)
    return outputs


def evaluate(config, state, pairs, beam_size, file=None):
    """Decodes the sources of pairs and prints their score; returns what was decoded."""
    if jax.process_index() != 0:
        return None
    state = jax.device_get(state.replace(opt_state=()))  # a copy of this process alone
    state = jax.device_put(state, jax.local_devices()[0])
    total = count = 0
    for indices, widths in batches_by_length(pairs, config.max_len, batch_size=64):
        batch = to_batch([pairs[i] for i in np.resize(indices, 64)], widths)
        batch["tgt"][len(indices) :] = PAD_ID  # rows that are there a second time
        num_labels = (batch["tgt"][:, 1:] != PAD_ID).sum()
        total += float(eval_step(state, batch)["loss"]) * num_labels
        count += num_labels
    sources, targets = zip(*pairs)
    outputs = decode_texts(Transformer(config), state.params, sources, beam_size)
    right = sum(out == target.decode() for out, target in zip(outputs, targets))
    share = f"{right} of {len(pairs)} exactly right ({right / len(pairs):.1%})"
    say(f"unseen pairs: loss {total / count:.4f}, {share}", file)
    return outputs


def translate(args):
    """Prints a translation per text; those that cannot be translated are empty lines."""
    checkpoint = load_checkpoint(args.checkpoint)
    config, params = checkpoint.config, checkpoint.state["params"]
    if not config.src_vocab_size == config.tgt_vocab_size == VOCAB_SIZE:
        sizes = f"{config.src_vocab_size} and {config.tgt_vocab_size}"
        raise InputError(
            f"{args.checkpoint}: not a model of bytes: vocabularies {sizes}"
        )
    if args.bf16:
        config = dataclasses.replace(config, dtype=jnp.bfloat16)
    model, params, status = Transformer(config), jax.device_put(params), 0
    texts = map(os.fsencode, args.translate) if args.translate else sys.stdin.buffer
    numbered = enumerate(texts, 1)
    while chunk := list(itertools.islice(numbered, 1024)):
        lines = []
        for number, line in chunk:
            try:
                line = check_line(line, f"line {number}")
                if len(line) >= config.max_len:
                    limit = f"{len(line)} bytes, the most is {config.max_len - 1}"
                    raise InputError(f"line {number}: {limit}")
            except InputError as error:
                log(f"error: {error}")
                line, status = b"", 2
            lines.append(line)
        filled = [line for line in lines if line]
        outputs = iter(decode_texts(model, params, filled, args.beam_size))
        for line in lines:
            print(next(outputs) if line else "")
        sys.stdout.flush()
    return status


def show_model(config, params, mesh):
    """Prints the configuration, the parameters by part, the device, and the masks."""
    say("Transformer:")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        say(f"  {field.name:<16} {value if field.name != 'dtype' else value.__name__}")
    sizes = {part: optax.tree.size(tree) for part, tree in params.items()}
    parts = ", ".join(f"{part} {size:,}" for part, size in sorted(sizes.items()))
    say(f"Parameters: {sum(sizes.values()):,} ({parts})")
    say(f"Devices: {mesh.size} x {mesh.devices.flat[0].device_kind}\n")
    tokens = to_tokens([b"ab"], 5, first=[BOS_ID])
    masks = padding_mask(tokens), causal_mask(5), padding_mask(tokens) & causal_mask(5)
    grids = [np.broadcast_to(mask[0, 0], (5, 5)) for mask in masks]
    say('Masks for the target "ab", padded: # may be attended to, queries down')
    say("  padding          causal           both, the decoder's")
    names = ["BOS", "a", "b", "EOS", "PAD"]
    for row, name in enumerate(names):
        cells = ("  ".join(".#"[int(cell)] for cell in grid[row]) for grid in grids)
        say("  " + "    ".join(cells) + f"   {name}")


def show_results(config, state, pairs, beam_size):
    """Prints the score on unseen pairs, some of them, and the attention in one."""
    say()
    outputs = evaluate(config, state, pairs, beam_size)
    if outputs is None:
        return
    rows = [(s, t.decode(), out) for (s, t), out in zip(pairs, outputs)]
    for source, target, output in rows[:: -(-len(rows) // 6)]:
        right = output == target
        say(f"  {source.decode()} -> {output}" + ("" if right else f"   not {target}"))
    learnt = [row for row in rows if row[1] == row[2] and len(row[0]) <= 30]
    if learnt:
        source, _, output = learnt[0]
        show_attention(config, state.params, source, output.encode())


def show_attention(config, params, source, target):
    """Draws how the target attends to the source (both bytes), token by token."""
    src = to_tokens([source], len(source) + 1)
    tgt = to_tokens([target], len(target) + 2, first=[BOS_ID])
    apply = jax.jit(Transformer(config).apply, static_argnames="mutable")
    variables = {"params": jax.device_get(params)}
    _, variables = apply(variables, src, tgt[:, :-1], mutable="intermediates")
    block = variables["intermediates"]["decoder"][f"blocks_{config.num_layers - 1}"]
    (weights,) = block["cross_attention"]["weights"]  # [1, H, T, S]
    weights = np.asarray(weights).mean(axis=(0, 1))
    shades = " .:-=+*#%@"
    levels = np.minimum(weights * len(shades), len(shades) - 1).astype(int)
    names = [
        [chr(b) if 32 < b < 127 else "_" if b == 32 else "?" for b in text] + ["EOS"]
        for text in (source, target)
    ]
    say("\nCross-attention in the last block, the mean of its heads: source across,")
    say(f"output down, shaded from none to all like this: {shades!r}\n")
    say("      " + " ".join(names[0]))
    for name, row in zip(names[1], levels):
        say(f"{name:>5} " + "".join(shades[level] * 2 for level in row).rstrip())


if __name__ == "__main__":
    sys.exit(main())
