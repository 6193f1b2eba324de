"""Which shapes come out, and who may see whom.

The sections follow the data: masks, attention, shapes, and then the whole model with
its three promises: no position sees a later one, nobody sees padding, and no row of a
batch sees another.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, VOCAB, random_params, random_tokens

import transformer_model as tm

# Three sources of width 7, with 0, 3 and 2 tokens of padding, and three targets of
# width 6, with 0, 0 and 3. All tests of the whole model run on these shapes.
SRC = random_tokens(3, 7, seed=1, lengths=[7, 4, 5])
TGT = random_tokens(3, 6, seed=2, lengths=[6, 6, 3], bos=True)


# ---- Masks ---------------------------------------------------------------------------


def test_padding_mask_hides_the_keys_that_are_pad():
    mask = tm.padding_mask(jnp.array([[5, 7, 0], [5, 0, 0], [0, 0, 0]]))
    assert mask.dtype == bool
    assert mask.shape == (3, 1, 1, 3)  # batch, any head, any query, keys
    np.testing.assert_array_equal(mask[:, 0, 0], [[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def test_causal_mask_hides_the_keys_after_the_query():
    """Queries go down and keys across: the transpose would show the future alone."""
    mask = tm.causal_mask(3)
    assert mask.dtype == bool
    assert mask.shape == (1, 1, 3, 3)  # any row, any head, queries, keys
    np.testing.assert_array_equal(mask[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])


# ---- Attention -----------------------------------------------------------------------


def test_attention_by_hand():
    """The score 2 ln 2 over sqrt(4) is ln 2. So the first key gets twice the weight of
    the second, and the third is hidden.
    """
    query = np.array([[[[2 * np.log(2), 0, 0, 0]]]], np.float32)
    key = np.array([[[[1, 0, 0, 0], [0, 1, 0, 0], [9, 9, 9, 9]]]], np.float32)
    value = np.array([[[[3, 0, 0, 6], [0, 3, 0, 6], [9, 9, 9, 9]]]], np.float32)
    mask = np.array([True, True, False])
    output, weights = tm.scaled_dot_product_attention(query, key, value, mask)
    np.testing.assert_allclose(weights, [[[[2 / 3, 1 / 3, 0]]]], rtol=1e-6)
    np.testing.assert_allclose(output, [[[[2, 1, 0, 6]]]], rtol=1e-6)


def test_query_that_may_attend_to_nothing_gives_zeros_and_no_nan():
    """Scores of -inf throughout a row would give NaN, and scores of -1e9, which is
    usual, the mean of all that is hidden. Either may show in the gradient alone.
    """
    mask = np.ones((1, 1, 4, 5), bool)
    mask[:, :, 2] = False
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, 3, n, 8)).astype(np.float32) for n in (4, 5, 5)]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients_and_outputs(inputs):
        output, weights = tm.scaled_dot_product_attention(*inputs, mask)
        return jnp.sum(output**2) + jnp.sum(weights**2), (output, weights)

    gradients, (output, weights) = gradients_and_outputs(inputs)
    assert (output[:, :, 2] == 0).all() and (weights[:, :, 2] == 0).all()
    assert (output[:, :, 1] != 0).all()
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[0][:, :, 2] == 0).all()  # of that query
    assert (gradients[0][:, :, 1] != 0).any()


# ---- Shapes --------------------------------------------------------------------------
# Of the letters in the module's docstring, each has another size, so that no axis can
# be taken for another.

B, S, T, L, W = 2, 7, 5, 9, 6
H, K, D, F = 4, 3, 12, 20
SRC_V, V = 13, 11
CONFIG = tm.TransformerConfig(
    src_vocab_size=SRC_V,
    tgt_vocab_size=V,
    d_model=D,
    num_heads=H,
    num_layers=2,
    d_ff=F,
    max_len=10,
    share_embeddings=False,
)


@pytest.fixture
def tokens():
    """Makes arrays of tokens. With JAX_ENABLE_X64 these have 64 bits, and nothing that
    comes out of the model, its training and its searches.
    """
    jax.config.update("jax_enable_x64", True)
    yield functools.partial(np.full, fill_value=3)
    jax.config.update("jax_enable_x64", False)


def traced(module, *args, **kwargs):
    """What comes out of a module with its first parameters, as shapes and dtypes. For
    that JAX needs to compute nothing.
    """

    def apply(key):
        variables = module.init(key, *args, **kwargs)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables["params"]))
        return module.apply({"params": variables["params"]}, *args, **kwargs)

    return jax.eval_shape(apply, jax.random.key(0))


def assert_floats(x, *shape, dtype="float32"):
    assert (x.shape, x.dtype) == (shape, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_shapes_of_the_modules(norm_first, dtype):
    config = dataclasses.replace(CONFIG, norm_first=norm_first, dtype=dtype)

    def ones(*shape):
        return jnp.ones(shape, dtype)

    x, memory, mask = ones(B, T, D), ones(B, S, D), jnp.ones((B, 1, 1, T), bool)
    assert_floats(traced(tm.Dense(F), x), B, T, F, dtype=dtype)
    for module, args in [
        (tm.FeedForward(config), ()),
        (tm.MultiHeadAttention(config), (memory,)),
        (tm.MultiHeadAttention(config), (memory, jnp.ones((B, 1, 1, S), bool))),
        (tm.EncoderBlock(config), (mask,)),
        (tm.Encoder(config), (mask,)),
    ]:
        assert_floats(traced(module, x, *args), B, T, D, dtype=dtype)
    for kv in traced(tm.MultiHeadAttention(config), memory, method="project_kv"):
        assert_floats(kv, B, H, S, K, dtype=dtype)

    memory_kv, memory_mask = (ones(B, H, S, K),) * 2, jnp.ones((B, 1, 1, S), bool)
    cache = (ones(B, H, L, K),) * 2
    for old, length in [(None, T), (cache, L)]:
        self_mask = jnp.ones((B, 1, T, length), bool)
        block, stack = tm.DecoderBlock(config), tm.Decoder(config)
        y, kv = traced(block, x, self_mask, memory_kv, memory_mask, old, 2)
        assert_floats(y, B, T, D, dtype=dtype)
        old = old and [old, old]
        z, kvs = traced(stack, x, self_mask, [memory_kv] * 2, memory_mask, old, 2)
        assert_floats(z, B, T, D, dtype=dtype)
        for array in jax.tree.leaves([kv, kvs]):
            assert_floats(array, B, H, length, K, dtype=dtype)
        assert len(kv) == 2 and [len(pair) for pair in kvs] == [2, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_of_the_model(dtype, tokens):
    """What the softmax gets is float32, whatever the model computes in."""
    model = tm.Transformer(dataclasses.replace(CONFIG, dtype=dtype))
    src, tgt = tokens((B, S)), tokens((B, T))
    assert_floats(traced(model, src, tgt), B, T, V)
    init = jax.eval_shape(model.init, jax.random.key(0), src, tgt)
    assert init.keys() == {"params"}

    def apply(*args, **kwargs):
        return jax.eval_shape(lambda v: model.apply(v, *args, **kwargs), init)

    _, sown = apply(src, tgt, mutable=["intermediates"])
    assert {x.dtype.name for x in jax.tree.leaves(sown)} == {"float32"}
    assert_floats(apply(src, method="encode"), B, S, D, dtype=dtype)
    memory_kv = apply(jnp.ones((B, S, D), dtype), method="project_kv")
    for array in jax.tree.leaves(memory_kv):
        assert_floats(array, B, H, S, K, dtype=dtype)
    assert [len(pair) for pair in memory_kv] == [2, 2]
    for head, width, dtype_out in [("softmax", V, "float32"), ("none", D, dtype)]:
        other = tm.Transformer(dataclasses.replace(model.config, head=head))
        assert_floats(traced(other, src, tgt), B, T, width, dtype=dtype_out)


def test_shapes_of_the_functions(tokens):
    assert_floats(tm.paper_schedule(D)(0))
    assert_floats(tm.length_penalty(tokens((B, W, L)), 0.6), B, W)
    logits = jnp.ones((B, T, V), jnp.float32)
    assert_floats(jax.eval_shape(tm.cross_entropy_loss, logits, tokens((B, T))))


def test_shapes_of_training(tokens):
    batch = {"src": tokens((B, S)), "tgt": tokens((B, T + 1))}
    create = functools.partial(tm.create_train_state, CONFIG)
    state = jax.eval_shape(create, jax.random.key(0))
    dtypes = {x.dtype.name for x in jax.tree.leaves(state)}
    assert dtypes == {"float32", "int32", "uint32"}
    after, metrics = jax.eval_shape(tm.train_step, state, batch)
    assert after == state
    assert state.average == state.params
    for found in (metrics, jax.eval_shape(tm.eval_step, state, batch)):
        assert found.keys() == {"loss", "accuracy"}
        assert_floats(found["loss"])
        assert_floats(found["accuracy"])


def test_shapes_of_the_searches(tokens):
    model, src = tm.Transformer(CONFIG), tokens((B, S))
    variables = jax.eval_shape(model.init, jax.random.key(0), src, src)

    def search(params):
        output = tm.greedy_decode(model, params, src, L)
        weights = tm.attention_weights(model, params, src, output)
        return output, weights, tm.beam_search(model, params, src, L, beam_size=W)

    output, weights, (outputs, scores) = jax.eval_shape(search, variables["params"])
    assert (output.shape, output.dtype) == ((B, L), jnp.int32)
    assert (outputs.shape, outputs.dtype) == ((B, W, L), jnp.int32)
    assert_floats(scores, B, W)
    assert_floats(weights, B, L, S)


# ---- Who sees whom -------------------------------------------------------------------


def test_no_logit_depends_on_a_later_target_token(tiny):
    apply, params, _ = tiny
    tgt = random_tokens(3, 6, seed=2, bos=True)  # no PAD: that would be a mask too
    logits = apply({"params": params}, SRC, tgt)
    for position in range(1, 6):
        changed = tgt.copy()
        changed[:, position] = (changed[:, position] - 2) % 8 + 3
        difference = jnp.abs(apply({"params": params}, SRC, changed) - logits)
        assert (difference[:, :position] == 0).all()
        assert (difference[:, position:].max(axis=(1, 2)) > 1e-3).all()


def test_what_stands_at_padded_positions_does_not_matter(tiny):
    """The embedding of PAD may be anything: no real position sees it. A mask that is
    missing anywhere, in cross-attention for example, shows here.
    """
    apply, params, _ = tiny
    expected = apply({"params": params}, SRC, TGT)
    other = {
        name: params[name].at[tm.PAD_ID].set(100.0)
        for name in ("src_embedding", "tgt_embedding")
    }
    logits = apply({"params": {**params, **other}}, SRC, TGT)
    real = TGT != tm.PAD_ID
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)
    assert (jnp.abs(logits - expected)[~real] > 1e-3).any()  # It is there.


def test_every_weight_on_padding_or_the_future_is_zero(tiny):
    """Each kind of attention gives its weights, by layer."""
    apply, params, model = tiny
    _, more = apply({"params": params}, SRC, TGT, mutable=("intermediates",))
    found = more["intermediates"]
    layers = [f"blocks_{i}" for i in range(model.config.num_layers)]
    assert set(found["encoder"]) == set(found["decoder"]) == set(layers)
    is_source, is_target = tm.padding_mask(SRC), tm.padding_mask(TGT)
    for layer in layers:
        for stack, kind, queries, mask in [
            ("encoder", "self_attention", 7, is_source),
            ("decoder", "self_attention", 6, is_target & tm.causal_mask(6)),
            ("decoder", "cross_attention", 6, is_source),
        ]:
            (weights,) = found[stack][layer][kind]["weights"]
            assert weights.shape == (3, 4, queries, mask.shape[-1])
            allowed = np.broadcast_to(mask, weights.shape)
            assert (weights[~allowed] == 0).all()
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_rows_of_a_batch_are_independent(tiny):
    apply, params, _ = tiny
    logits = apply({"params": params}, SRC, TGT)
    for order in ([2, 0, 1], [1, 1, 1]):
        others = apply({"params": params}, SRC[order], TGT[order])
        np.testing.assert_allclose(others, logits[np.array(order)], atol=1e-5)


def test_order_of_the_source_matters(tiny):
    """Without positional encodings, attention could not tell one from another."""
    apply, params, _ = tiny
    src = random_tokens(3, 7, seed=1)
    difference = apply({"params": params}, src[:, ::-1], TGT)
    difference -= apply({"params": params}, src, TGT)
    assert (jnp.abs(difference).max(axis=-1) > 1e-3).all()


# ---- What is no token, or too long ---------------------------------------------------


def test_token_outside_the_vocabulary_gives_nan_to_its_row_alone(tiny):
    """Arrays take a negative index from their end, and JAX clips one that is too large.
    Both would give numbers that look right.
    """
    apply, params, _ = tiny
    expected = apply({"params": params}, SRC, TGT)
    for token in (-1, VOCAB, -(2**31), 2**31 - 1):
        src, tgt = SRC.copy(), TGT.copy()
        src[0, 2] = tgt[1, 0] = token
        logits = apply({"params": params}, src, tgt)
        assert jnp.isnan(logits[:2]).all()
        np.testing.assert_allclose(logits[2], expected[2], atol=1e-5)


def test_tokens_of_every_integer_type():
    """A vocabulary of 300 is more than 8 bits can count."""
    sizes = {"src_vocab_size": 300, "tgt_vocab_size": 300, "num_layers": 1}
    model = tm.Transformer(dataclasses.replace(TINY, **sizes))
    apply, plain = jax.jit(model.apply), np.array([[3, 255, 127, 299]], np.int32)
    params = {"params": random_params(model, plain, plain)}
    for dtypes in ("int8", "uint8"), ("int16", "int8"), ("uint16", "int64"):
        rows = [np.minimum(plain, min(299, np.iinfo(dtype).max)) for dtype in dtypes]
        inputs = [row.astype(dtype) for row, dtype in zip(rows, dtypes)]
        expected, logits = apply(params, *rows), apply(params, *inputs)
        np.testing.assert_allclose(logits, expected, atol=1e-6)
        for tokens, wrapped in itertools.product(inputs, (-1, 200)):
            kept, tokens[0, 2] = tokens[0, 2], np.array(wrapped).astype(tokens.dtype)
            is_finite = jnp.isfinite(apply(params, *inputs)).any()
            assert is_finite == (tokens[0, 2] in range(300)), (tokens.dtype, wrapped)
            tokens[0, 2] = kept


def test_length_above_max_len_is_refused(tiny):
    apply, params, _ = tiny
    longest, long = random_tokens(3, TINY.max_len), random_tokens(3, TINY.max_len + 1)
    for src, tgt in ((long, TGT), (SRC, long)):
        with pytest.raises(ValueError, match=r"\(3, 13\).*above max_len=12"):
            apply({"params": params}, src, tgt)
    shape = jax.eval_shape(apply, {"params": params}, longest, longest).shape
    assert shape == (3, 12, VOCAB)
