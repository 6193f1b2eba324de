"""Sections 1 to 7: configuration, masks, shapes, causality, padding, dropout."""

import dataclasses
import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, VOCAB, random_tokens

import transformer_model as tm

SRC = random_tokens(3, 7, seed=1, lengths=[7, 4, 5])
TGT = random_tokens(3, 6, seed=2, lengths=[6, 6, 3], bos=True)


def initialized(module, *args, **kwargs):
    """The module's parameters and its jitted apply."""
    variables = jax.jit(module.init)(jax.random.key(0), *args, **kwargs)
    return variables, jax.jit(module.apply)


# ---- Configuration


@pytest.mark.parametrize(
    "field, value",
    [
        ("src_vocab_size", 3),
        ("tgt_vocab_size", 10.0),
        ("d_model", 0),
        ("d_model", -16),
        ("d_model", 18),  # not a multiple of 4 heads
        ("num_heads", 0),
        ("num_heads", 3),
        ("num_layers", 0),
        ("num_layers", True),
        ("d_ff", "32"),
        ("dropout_rate", 1.0),
        ("dropout_rate", -0.1),
        ("dropout_rate", float("nan")),
        ("dropout_rate", None),
        ("max_len", 0),
        ("norm_first", 1),
        ("share_embeddings", None),
        ("head", "Softmax"),
        ("dtype", "float16"),
        ("dtype", "bf16"),
        ("dtype", np.dtype("float32")),
    ],
)
def test_config_refuses_by_name_and_value(field, value):
    with pytest.raises(tm.InputError) as error:
        dataclasses.replace(TINY, **{field: value})
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert repr(value) in message or repr(TINY.d_model) in message
    assert message.startswith((f"{field} must be", "d_model must be a multiple of"))
    assert "\n" not in message


def test_config_refuses_odd_width_and_unequal_shared_vocabularies():
    with pytest.raises(ValueError, match="d_model must be even.*, not 15"):
        dataclasses.replace(TINY, d_model=15, num_heads=3)
    with pytest.raises(ValueError, match=r"share_embeddings must be False .*\(5, 6\)"):
        tm.TransformerConfig(src_vocab_size=5, tgt_vocab_size=6)


def test_config_defaults_are_the_base_model_and_hashable():
    config = tm.TransformerConfig()
    assert (config.d_model, config.num_heads, config.num_layers) == (512, 8, 6)
    assert (config.d_ff, config.dropout_rate, config.max_len) == (2048, 0.1, 512)
    assert not config.norm_first and config.share_embeddings
    assert config.head == "logits" and config.dtype == "float32"
    assert hash(config) == hash(tm.TransformerConfig())
    assert tm.TransformerConfig(dropout_rate=0)
    with pytest.raises(TypeError, match="positional"):
        tm.TransformerConfig(9, 9)


# ---- Masks


def test_padding_mask_by_hand():
    tokens = jnp.array([[5, 7, 0], [5, 0, 0], [0, 0, 0]])
    expected = [[[[1, 1, 0]]], [[[1, 0, 0]]], [[[0, 0, 0]]]]
    mask = tm.padding_mask(tokens)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)


def test_causal_mask_by_hand():
    mask = tm.causal_mask(3)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]])


@pytest.mark.parametrize(
    "tokens, got",
    [
        (np.array([4, 5, 6]), r"int\d+ \(3,\)"),
        (np.ones((1, 2, 3), int), r"int\d+ \(1, 2, 3\)"),
        (np.ones((2, 3), np.float32), r"float32 \(2, 3\)"),
        (np.ones((2, 3), bool), r"bool \(2, 3\)"),
        (np.ones((0, 3), int), r"int\d+ \(0, 3\)"),
        (np.ones((2, 0), int), r"int\d+ \(2, 0\)"),
    ],
    ids=["1D", "3D", "float", "bool", "no-rows", "no-columns"],
)
def test_tokens_that_are_none_are_refused_everywhere(tokens, got, tiny):
    """As source, as target, as labels, and where only a mask is asked for."""
    apply, params, model = tiny
    message = rf"tokens must be integers \[B, L\], got {got}"
    with pytest.raises(ValueError, match=message):
        tm.padding_mask(tokens)
    with pytest.raises(ValueError, match=message):
        tm.cross_entropy_loss(jnp.zeros((*tokens.shape, VOCAB)), tokens)
    good = np.full((tokens.shape[0] or 1, 3), 3)
    with pytest.raises(ValueError, match=message):
        apply({"params": params}, good, tokens)
    with pytest.raises(ValueError, match=message):
        apply({"params": params}, tokens, good)
    with pytest.raises(ValueError, match=message):
        tm.greedy_decode(model, params, tokens, 3)
    with pytest.raises(ValueError, match=message):
        tm.beam_search(model, params, tokens, 3, 2)


# ---- Attention


def attention_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.standard_normal((2, 3, length, 8)), dtype)
        for length in (4, 5, 5)
    )


def test_attention_weights_sum_to_one_where_allowed_and_are_zero_elsewhere():
    mask = jnp.array([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0]], bool)[:, None, None, :]
    output, weights = tm.scaled_dot_product_attention(*attention_inputs(), mask)
    assert output.shape == (2, 3, 4, 8) and weights.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (weights[~jnp.broadcast_to(mask, weights.shape)] == 0).all()
    value = attention_inputs()[2]
    np.testing.assert_allclose(output[1], value[1, :, [1] * 4].swapaxes(0, 1))


def test_query_that_may_attend_to_nothing_gives_zeros_and_finite_gradients():
    mask = jnp.ones((1, 1, 4, 5), bool).at[:, :, 2].set(False)
    output, weights = tm.scaled_dot_product_attention(*attention_inputs(), mask)
    assert (output[:, :, 2] == 0).all() and (weights[:, :, 2] == 0).all()
    assert (output[:, :, 1] != 0).all()

    def total(inputs):
        output, weights = tm.scaled_dot_product_attention(*inputs, mask)
        return jnp.sum(output**2) + jnp.sum(weights**2)

    gradients = jax.grad(total)(attention_inputs())
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert (gradients[0][:, :, 2] == 0).all()


def test_attention_of_bfloat16_has_float32_weights():
    output, weights = tm.scaled_dot_product_attention(*attention_inputs(jnp.bfloat16))
    assert output.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_attention_refuses_types_and_shapes_that_do_not_fit():
    query, key, value = attention_inputs()
    attend = tm.scaled_dot_product_attention
    four_heads = jnp.ones((2, 4, 5, 8))
    for inputs in (
        (query, key[..., :4], value),
        (query, four_heads, four_heads),
        (query, key, value[:, :, :4]),
        (query, key, value, jnp.ones((2, 1, 5, 4), bool)),
        (query, key, value, jnp.ones((2, 2, 4, 5), bool)),
    ):
        with pytest.raises(ValueError):
            attend(*inputs)
    with pytest.raises(ValueError, match=r"\[B, H, L, K\], got float32 \(3, 4, 8\)"):
        attend(query[0], key[0], value[0])
    for i, name in enumerate(("query", "key", "value")):
        inputs = [query, key, value]
        inputs[i] = jnp.ones(inputs[i].shape, jnp.int32)
        with pytest.raises(ValueError, match=rf"{name}.* must be float.*got int32"):
            attend(*inputs)
    for dtype in (jnp.float32, jnp.int32):
        with pytest.raises(ValueError, match=f"bool.*{dtype.__name__}"):
            attend(query, key, value, jnp.zeros((1, 1, 4, 5), dtype))


def test_bool_mask_of_fewer_axes_is_broadcast():
    mask = np.random.default_rng(0).random((4, 5)) < 0.7
    attend = jax.jit(tm.scaled_dot_product_attention)
    output, weights = attend(*attention_inputs(), mask)
    whole, _ = attend(*attention_inputs(), np.broadcast_to(mask, (2, 3, 4, 5)))
    np.testing.assert_array_equal(output, whole)
    assert (weights[:, :, ~mask] == 0).all() and (weights[:, :, mask] > 0).all()


def test_heads_are_independent():
    """A change in one head's part of the values reaches that part of the heads alone."""
    module = tm.MultiHeadAttention(TINY)
    x = np.random.default_rng(1).standard_normal((2, 5, 16)).astype(np.float32)
    variables, apply = initialized(module, x, x)
    identity = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
    params = {**variables["params"], "output": identity}
    changed = jax.tree.map(jnp.copy, params)
    changed["value"]["kernel"] = params["value"]["kernel"].at[:, 4:8].add(1.0)
    difference = apply({"params": params}, x, x) - apply({"params": changed}, x, x)
    assert (difference[..., 4:8] != 0).all()
    assert (difference[..., :4] == 0).all() and (difference[..., 8:] == 0).all()


# ---- Shapes and types of the modules


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_module_alone(dtype, norm_first):
    config = dataclasses.replace(TINY, dtype=dtype, norm_first=norm_first)
    x, memory = jnp.ones((2, 5, 16), dtype), jnp.ones((2, 7, 16), dtype)
    kv = (jnp.ones((2, 4, 7, 4), dtype), jnp.ones((2, 4, 7, 4), dtype))
    cache = jax.tree.map(lambda x: jnp.ones((2, 4, 9, 4), dtype), kv)

    def shape_of(module, *args, **kwargs):
        init = functools.partial(module.init, **kwargs)
        variables = jax.eval_shape(init, jax.random.key(0), *args)
        leaves = jax.tree.leaves(variables.get("params", {}))
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
        variables = {name: variables[name] for name in variables if name == "params"}
        apply = functools.partial(module.apply, **kwargs)
        return jax.eval_shape(apply, variables, *args)

    for module, args in [
        (tm.Dense(16), (x,)),
        (tm.MultiHeadAttention(config), (x, memory)),
        (tm.FeedForward(config), (x,)),
        (tm.EncoderBlock(config), (x,)),
        (tm.Encoder(config), (x,)),
    ]:
        out = shape_of(module, *args)
        assert out.shape == (2, 5, 16) and out.dtype == dtype, module
    key, value = shape_of(tm.MultiHeadAttention(config), memory, method="project_kv")
    assert key.shape == value.shape == (2, 4, 7, 4) and key.dtype == dtype
    for cached, length in (None, 5), (cache, 9):
        args = x, None, kv, None, cached, 2
        out, (key, value) = shape_of(tm.DecoderBlock(config), *args)
        assert out.shape == (2, 5, 16) and out.dtype == dtype
        assert key.shape == value.shape == (2, 4, length, 4) and key.dtype == dtype
        args = x, None, [kv, kv], None, cached and [cached, cached], 2
        out, new_kv = shape_of(tm.Decoder(config), *args)
        assert out.shape == (2, 5, 16) and len(new_kv) == config.num_layers
        assert all(x.shape == (2, 4, length, 4) for pair in new_kv for x in pair)


def test_positional_encoding_has_a_row_for_each_position():
    encoding = tm.positional_encoding(12, 16)
    assert encoding.shape == (12, 16) and encoding.dtype == np.float32
    np.testing.assert_array_equal(tm.positional_encoding(5, 16), encoding[:5])


@pytest.mark.parametrize("tiny", [True], indirect=True, ids=["pre-norm"])
def test_heads_of_the_model(tiny):
    apply, params, model = tiny
    logits = apply({"params": params}, SRC, TGT)
    assert logits.shape == (3, 6, VOCAB) and logits.dtype == jnp.float32
    memory = apply({"params": params}, SRC, method="encode")
    assert memory.shape == (3, 7, 16)

    def output(**change):
        other = tm.Transformer(dataclasses.replace(model.config, **change))
        return jax.jit(other.apply)({"params": params}, SRC, TGT)

    softmax, hidden = output(head="softmax"), output(head="none")
    np.testing.assert_allclose(softmax, jax.nn.softmax(logits), atol=1e-6)
    assert hidden.shape == (3, 6, 16)
    np.testing.assert_allclose(hidden @ params["output"].T, logits, atol=1e-4)


def test_bfloat16_stays_close_to_float32():
    """A rounding to bfloat16 is off by up to 2^-9, or 0.2%; a few dozen of them add up
    to about 1% of the logits' spread, in float32 logits from float32 parameters.
    """
    model = tm.Transformer(dataclasses.replace(TINY, dtype="bfloat16"))
    variables, apply = initialized(model, SRC, TGT)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = apply(variables, SRC, TGT)
    assert logits.dtype == jnp.float32
    expected = jax.jit(tm.Transformer(TINY).apply)(variables, SRC, TGT)
    relative = float((logits - expected).std() / expected.std())
    assert 1e-3 < relative < 0.02, relative


def test_shared_and_separate_embeddings():
    shared = dataclasses.replace(TINY, share_embeddings=True)
    names = {}
    for config in (shared, TINY, dataclasses.replace(TINY, head="none")):
        init = tm.Transformer(config).init
        params = jax.eval_shape(init, jax.random.key(0), SRC, TGT)["params"]
        names[config] = set(params) - {"encoder", "decoder"}
    assert names[shared] == {"embedding"}
    assert names[TINY] == {"src_embedding", "tgt_embedding", "output"}
    assert len(set(map(frozenset, names.values()))) == 3


def test_initial_parameters():
    config = dataclasses.replace(
        TINY, num_layers=1, d_model=128, d_ff=256, share_embeddings=True
    )
    init = jax.jit(tm.Transformer(config).init)
    params = init(jax.random.key(0), SRC, TGT)["params"]
    np.testing.assert_allclose(params["embedding"].std(), 128**-0.5, rtol=0.1)
    block = params["encoder"]["blocks_0"]
    query = block["self_attention"]["query"]
    limit = np.sqrt(6 / (128 + 128))  # Xavier-uniform
    assert 0.95 * limit < jnp.abs(query["kernel"]).max() <= limit
    assert (query["bias"] == 0).all()
    inner = block["feed_forward"]["inner"]["kernel"]
    assert inner.shape == (128, 256)
    assert 0.95 * np.sqrt(6 / 384) < jnp.abs(inner).max() <= np.sqrt(6 / 384)


def test_attention_weights_by_layer_and_kind(tiny):
    apply, params, model = tiny
    _, variables = apply({"params": params}, SRC, TGT, mutable=("intermediates",))
    found = variables["intermediates"]
    layers = [f"blocks_{i}" for i in range(model.config.num_layers)]
    assert set(found["encoder"]) == set(found["decoder"]) == set(layers)
    for layer in layers:
        (weights,) = found["encoder"][layer]["self_attention"]["weights"]
        assert weights.shape == (3, 4, 7, 7)
        (weights,) = found["decoder"][layer]["self_attention"]["weights"]
        assert weights.shape == (3, 4, 6, 6)
        assert (np.triu(weights, 1) == 0).all()
        (weights,) = found["decoder"][layer]["cross_attention"]["weights"]
        assert weights.shape == (3, 4, 6, 7)
        assert (weights[1, :, :, 4:] == 0).all() and (weights[0] > 0).all()


def test_lengths_and_batches_that_do_not_fit_are_refused(tiny):
    apply, params, _ = tiny
    with pytest.raises(ValueError, match=r"\(3, 7\) and \(2, 6\)"):
        apply({"params": params}, SRC, TGT[:2])
    with pytest.raises(ValueError, match=r"\(1, 7\) and \(3, 6\)"):
        apply({"params": params}, SRC[:1], TGT)
    long = random_tokens(3, 13)
    for src, tgt in ((long, TGT), (SRC, long)):
        with pytest.raises(ValueError, match=r"\(3, 13\).*above max_len=12"):
            apply({"params": params}, src, tgt)


def test_token_outside_the_vocabulary_gives_nan_and_to_its_row_alone(tiny):
    apply, params, _ = tiny
    expected = apply({"params": params}, SRC, TGT)
    for token in (-1, VOCAB, -(2**31), 2**31 - 1):
        src, tgt = SRC.copy(), TGT.copy()
        src[0, 2] = tgt[1, 3] = token
        logits = apply({"params": params}, src, tgt)
        assert jnp.isnan(logits[:2]).all()
        np.testing.assert_allclose(logits[2], expected[2], atol=1e-5)


# ---- The docstrings


def test_examples_of_the_docstrings():
    results = doctest.testmod(tm)
    assert results.failed == 0 and results.attempted >= 9


def drawn_parameters():
    """The tree in Transformer's docstring: paths of two blocks' arrays -> shapes."""
    size = {"V": VOCAB, "D": TINY.d_model, "F": TINY.d_ff}
    drawing = tm.Transformer.__doc__.split("the tree of the parameters:\n\n")[1]
    found, parents = {}, []  # parents: (indentation, paths)
    for line in drawing.split("\n\n")[0].splitlines():
        indentation = len(line) - len(line.lstrip())
        names, _, rest = line.strip().partition("  ")
        while parents and parents[-1][0] >= indentation:
            parents.pop()
        above = parents[-1][1] if parents else [""]
        names = [name for name in names.split(", ") if name != "..."]
        paths = [f"{path}/{name}" for path in above for name in names]
        parents.append((indentation, paths))
        for leaf, shape in re.findall(r"(\w*) ?\[([^]]*)\]", rest):
            shape = tuple(size[letter] for letter in shape.split(", "))
            found |= {f"{path}/{leaf}".rstrip("/"): shape for path in paths}
    return found


def test_drawing_of_the_parameters_is_right():
    """Of the encoder every array is drawn, with its shape. The decoder has the same, and
    in each block what the drawing says; pre-norm, a LayerNorm more in each stack.
    """

    def real(**change):
        model = tm.Transformer(
            dataclasses.replace(TINY, share_embeddings=True, **change)
        )
        tree = jax.eval_shape(model.init, jax.random.key(0), SRC, TGT)["params"]
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            "".join(f"/{key.key}" for key in path): leaf.shape for path, leaf in flat
        }

    drawn, expected = drawn_parameters(), {}
    assert len(drawn) == 1 + 2 * (8 + 4 + 4)
    for path, shape in drawn.items():
        expected[path] = shape
        in_decoder = path.replace("/encoder/", "/decoder/")
        expected[in_decoder] = shape
        cross = in_decoder.replace("self_attention", "cross_attention")
        expected[cross] = shape
        expected[in_decoder.replace("add_and_norm_1", "add_and_norm_2")] = shape
    assert real() == expected
    for stack in ("encoder", "decoder"):
        expected[f"/{stack}/norm/scale"] = expected[f"/{stack}/norm/bias"] = (16,)
    assert real(norm_first=True) == expected


# ---- Causality, padding, rows


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


def test_gradient_of_a_logit_stops_at_its_position():
    x = np.random.default_rng(0).standard_normal((1, 6, 16)).astype(np.float32)
    decoder = tm.Decoder(dataclasses.replace(TINY, num_layers=1))
    kv = [(jnp.ones((1, 4, 3, 4)), jnp.ones((1, 4, 3, 4)))]
    mask = tm.causal_mask(6)
    variables, _ = initialized(decoder, x, mask, kv, None)

    @jax.jit
    def gradient(x, position):
        def output_at(x):
            output, _ = decoder.apply(variables, x, mask, kv, None)
            return (output[0, position] ** 3).sum()

        return jax.grad(output_at)(x)

    for position in range(6):
        reaches = np.abs(gradient(x, position)).max(axis=-1)[0] > 0
        np.testing.assert_array_equal(reaches, np.arange(6) <= position)


def test_padding_changes_no_real_position(tiny):
    apply, params, _ = tiny
    expected = apply({"params": params}, SRC[2:, :5], TGT[2:, :3])  # nothing padded
    logits = apply({"params": params}, SRC, TGT)
    np.testing.assert_allclose(logits[2:, :3], expected, atol=1e-5)


def test_what_stands_at_padded_positions_does_not_matter(tiny):
    """The embedding of PAD may be anything: no real position sees it."""
    apply, params, _ = tiny
    expected = apply({"params": params}, SRC, TGT)
    other = {
        name: params[name].at[tm.PAD_ID].set(100.0)
        for name in ("src_embedding", "tgt_embedding")
    }
    logits = apply({"params": {**params, **other}}, SRC, TGT)
    real = TGT != tm.PAD_ID
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)


def test_rows_of_a_batch_are_independent(tiny):
    apply, params, _ = tiny
    logits = apply({"params": params}, SRC, TGT)
    for order in ([2, 0, 1], [1, 1, 1]):
        alone = apply({"params": params}, SRC[order], TGT[order])
        np.testing.assert_allclose(alone, logits[np.array(order)], atol=1e-5)


def test_position_matters(tiny):
    """Attention alone would not tell one order of the source from another."""
    apply, params, _ = tiny
    src = random_tokens(3, 7, seed=1)
    difference = apply({"params": params}, src[:, ::-1], TGT)
    difference -= apply({"params": params}, src, TGT)
    assert (jnp.abs(difference).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("tiny", [True], indirect=True, ids=["pre-norm"])
def test_source_of_nothing_but_padding_is_finite(tiny):
    apply, params, _ = tiny
    src = SRC.copy()
    src[1] = tm.PAD_ID

    @jax.jit
    def loss(params):
        return jnp.sum(apply({"params": params}, src, TGT) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


# ---- Dropout


@pytest.mark.parametrize("tiny", [True], indirect=True, ids=["pre-norm"])
def test_dropout_is_on_where_it_gets_a_key_and_differs_from_key_to_key(tiny):
    apply, params, _ = tiny

    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply({"params": params}, SRC, TGT, rngs=rngs)

    plain = apply({"params": params}, SRC, TGT)
    assert (apply({"params": params}, SRC, TGT, rngs={}) == plain).all()
    other_key = {"params": jax.random.key(0)}
    assert (apply({"params": params}, SRC, TGT, rngs=other_key) == plain).all()
    assert (run(0) == run(0)).all()
    assert (run(0) != run(1)).any() and (run(0) != plain).any()


@pytest.mark.parametrize("has_key", [True, False])
def test_dropout_is_where_the_paper_puts_it(has_key, monkeypatch):
    """On the two embeddings and on each sub-layer's output: 2 + 2 N + 3 N places."""
    places = []

    def spy(self, x, deterministic):
        places.append((self.rate, x.shape, deterministic))
        return x

    monkeypatch.setattr(tm.nn.Dropout, "__call__", spy)
    keys = {"params": jax.random.key(0)}
    if has_key:
        keys["dropout"] = jax.random.key(1)
    jax.eval_shape(lambda: tm.Transformer(TINY).init(keys, SRC, TGT))
    layers = TINY.num_layers
    expected = [(3, 7, 16)] * (1 + 2 * layers) + [(3, 6, 16)] * (1 + 3 * layers)
    assert [shape for _, shape, _ in places] == expected
    assert {(rate, off) for rate, _, off in places} == {
        (TINY.dropout_rate, not has_key)
    }
