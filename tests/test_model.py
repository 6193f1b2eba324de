"""The model against other computations of the same: PyTorch's stacks (golden.npz),
Flax's attention layer, and the paper's equations in plain float64 arithmetic. Then its
configuration, the parameters it starts with, dropout and bfloat16.

In the comparisons all parameters are random, those of biases and LayerNorms too,
because a zero or a one could hide a mistake.
"""

import dataclasses
import doctest
import functools
import itertools
import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params

import transformer_model as tm


def assert_close(actual, expected, tolerance=1e-5):
    """Asserts the same shape, and values that differ by rounding alone."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ---- PyTorch's stacks and Flax's attention layer -------------------------------------


def from_torch(weights, kind, order):
    """Returns PyTorch's weights as the parameters of our Encoder or Decoder.

    PyTorch's matrices are [out, in], Flax's kernels [in, out].
    """

    def linear(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def attention(name):  # Theirs has biases, which the paper and ours do not have.
        for bias in ("in_proj_bias", "out_proj.bias"):
            assert not weights[f"{name}.{bias}"].any()
        # One matrix on top of the other: query, key, value.
        matrices = [*np.split(weights[f"{name}.in_proj_weight"], 3)]
        matrices.append(weights[f"{name}.out_proj.weight"])
        names = "query", "key", "value", "output"
        return {name: {"kernel": x.T} for name, x in zip(names, matrices)}

    params = {}
    for i in range(2):
        layer = f"{kind}.layers.{i}"
        block = {"self_attention": attention(f"{layer}.self_attn")}
        if kind == "decoder":
            block["cross_attention"] = attention(f"{layer}.multihead_attn")
        block["feed_forward"] = {
            "inner": linear(f"{layer}.linear1"),
            "outer": linear(f"{layer}.linear2"),
        }
        for j in range(2 if kind == "encoder" else 3):
            block[f"add_and_norm_{j}"] = {"norm": norm(f"{layer}.norm{j + 1}")}
        params[f"blocks_{i}"] = block
    if order == "pre_norm":
        params["norm"] = norm(f"{kind}.norm")
    return {"params": params}


@pytest.mark.parametrize("order", ["post_norm", "pre_norm"])
def test_stacks_are_pytorchs(order):
    with np.load(pathlib.Path(__file__).with_name("golden.npz")) as arrays:
        golden = dict(arrays)
    src, tgt = (
        np.where(np.arange(width) < golden[lengths][:, None], tm.EOS_ID, tm.PAD_ID)
        for lengths, width in [("source_lengths", 7), ("target_lengths", 5)]
    )
    memory_mask = tm.padding_mask(src)

    def decode(decoder, x, memory):
        blocks = decoder.blocks
        memory_kv = [block.cross_attention.project_kv(memory) for block in blocks]
        self_mask = tm.padding_mask(tgt) & tm.causal_mask(5)
        return decoder(x, self_mask, memory_kv, memory_mask)[0]

    # It has the sizes of theirs: width 16, 4 heads, 2 layers, d_ff 32.
    config = dataclasses.replace(TINY, norm_first=order == "pre_norm")
    encoder, decoder = tm.Encoder(config), tm.Decoder(config)
    params = {kind: from_torch(golden, kind, order) for kind in ("encoder", "decoder")}
    encode = jax.jit(encoder.apply)
    memory = encode(params["encoder"], golden["source"], memory_mask)
    decode = jax.jit(functools.partial(decoder.apply, method=decode))
    output = decode(params["decoder"], golden["target"], golden[f"{order}.memory"])
    for name, actual, tokens in ("memory", memory, src), ("output", output, tgt):
        real = tokens != tm.PAD_ID
        assert_close(actual[real], golden[f"{order}.{name}"][real])


@pytest.mark.parametrize(
    "mask_shape",
    [None, (3, 1, 1, 7), (5, 7), (3, 1, 5, 7), (3, 2, 5, 7)],
    ids=["no_mask", "by_key", "by_query", "by_query_and_key", "by_head"],
)
def test_attention_is_flaxs(mask_shape):
    config = tm.TransformerConfig(d_model=12, num_heads=2)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 5, 12)).astype(np.float32)
    memory = rng.normal(size=(3, 7, 12)).astype(np.float32)
    mask = None
    if mask_shape is not None:
        mask = rng.random(mask_shape) < 0.5
        mask[..., 3] = True  # Flax has another answer for a query without a key

    ours = tm.MultiHeadAttention(config)
    params = random_params(ours, x, memory, seed=2)
    theirs = nn.MultiHeadDotProductAttention(
        num_heads=2, use_bias=False, deterministic=True
    )
    their_params = {  # theirs keep H and K apart
        name: {"kernel": params[name]["kernel"].reshape(12, 2, 6)}
        for name in ("query", "key", "value")
    }
    their_params["out"] = {"kernel": params["output"]["kernel"].reshape(2, 6, 12)}

    sown = {"mutable": ["intermediates"]}
    output, state = ours.apply({"params": params}, x, memory, mask, **sown)
    their_output, their_state = theirs.apply(
        {"params": their_params}, x, memory, mask=mask, sow_weights=True, **sown
    )
    assert_close(output, their_output)
    (weights,) = state["intermediates"]["weights"]
    (their_weights,) = their_state["intermediates"]["attention_weights"]
    assert_close(weights, their_weights)


# ---- The paper's equations -----------------------------------------------------------
# For one sequence without a batch, xs and memory being arrays [L, D]. Only the names of
# the parameters are our model's.


def paper_linear(params, xs):
    return xs @ params["kernel"] + params["bias"]


def paper_layer_norm(params, xs):
    """Each x [D] with mean 0 and variance 1, then scaled and shifted."""
    mean, variance = xs.mean(-1, keepdims=True), xs.var(-1, keepdims=True)
    return params["scale"] * (xs - mean) / np.sqrt(variance + 1e-6) + params["bias"]


def paper_softmax(scores, mask=True):
    """By row, over the scores in the mask; zeros where there is none."""
    exponentials = np.where(mask, np.exp(scores - scores.max()), 0)
    return exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-99)


def paper_position(position, i, d_model):
    """Entry i of a position's encoding (section 3.5)."""
    if i % 2 == 0:
        return math.sin(position / 10000 ** (i / d_model))
    return math.cos(position / 10000 ** ((i - 1) / d_model))


def paper_embed(embedding, tokens):
    """Section 3.4 and 3.5: [V, D] and tokens [L] -> [L, D]."""
    length, d_model = len(tokens), embedding.shape[1]
    places = itertools.product(range(length), range(d_model))
    encodings = [paper_position(position, i, d_model) for position, i in places]
    xs = embedding[tokens] * math.sqrt(d_model)
    return xs + np.reshape(encodings, (length, d_model))


def paper_attention(params, num_heads, xs, memory, mask):
    """Section 3.2.2; mask [T, S] says which query may attend to which key."""
    queries = xs @ params["query"]["kernel"]
    keys, values = memory @ params["key"]["kernel"], memory @ params["value"]["kernel"]
    heads = []
    for columns in np.split(np.arange(xs.shape[1]), num_heads):
        scores = queries[:, columns] @ keys[:, columns].T / math.sqrt(len(columns))
        heads.append(paper_softmax(scores, mask) @ values[:, columns])
    return np.concatenate(heads, axis=1) @ params["output"]["kernel"]


def paper_feed_forward(params, xs):
    inner = paper_linear(params["inner"], xs)
    return paper_linear(params["outer"], np.where(inner > 0, inner, 0))


def paper_transformer(params, config, src, tgt):
    """Returns memory [S, D], hidden states [T, D], logits and softmax [T, V]."""
    is_source = src != tm.PAD_ID
    is_past = (tgt != tm.PAD_ID) & (np.arange(len(tgt)) <= np.arange(len(tgt))[:, None])

    def run_block(block, xs, mask, memory):
        def self_attention(y):
            return paper_attention(
                block["self_attention"], config.num_heads, y, y, mask
            )

        def cross_attention(y):
            params = block["cross_attention"]
            return paper_attention(params, config.num_heads, y, memory, is_source)

        def feed_forward(y):
            return paper_feed_forward(block["feed_forward"], y)

        sublayers = [self_attention, cross_attention, feed_forward]
        if memory is None:
            sublayers.remove(cross_attention)
        for i, sublayer in enumerate(sublayers):
            norm = block[f"add_and_norm_{i}"]["norm"]
            if config.norm_first:
                xs = xs + sublayer(paper_layer_norm(norm, xs))
            else:
                xs = paper_layer_norm(norm, xs + sublayer(xs))
        return xs

    def run_stack(stack, xs, mask, memory=None):
        for i in range(config.num_layers):
            xs = run_block(stack[f"blocks_{i}"], xs, mask, memory)
        return paper_layer_norm(stack["norm"], xs) if config.norm_first else xs

    names = "src_embedding", "tgt_embedding", "output"
    if config.share_embeddings:
        names = ("embedding",) * 3
    src_embedding, tgt_embedding, output = (params[name] for name in names)
    memory = run_stack(params["encoder"], paper_embed(src_embedding, src), is_source)
    xs = paper_embed(tgt_embedding, tgt)
    hidden = run_stack(params["decoder"], xs, is_past, memory)
    logits = hidden @ output.T
    return memory, hidden, logits, paper_softmax(logits)


# 0 is PAD, 1 BOS, 2 EOS. PAD is at the end, but also in between and, where a query has
# nothing to attend to, at the start of a target and all over a source.
SRC = np.array([[3, 5, 4, 9, 6, 10, 2], [7, 0, 8, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
TGT = np.array([[1, 9, 3, 0, 0, 0], [0, 1, 7, 7, 10, 4], [1, 6, 0, 4, 2, 0]])


@pytest.mark.parametrize(
    "norm_first, share_embeddings",
    [(False, True), (True, False)],
    ids=["post_norm-shared", "pre_norm-separate"],
)
def test_model_is_the_papers(norm_first, share_embeddings):
    config = dataclasses.replace(
        TINY,
        tgt_vocab_size=11 if share_embeddings else 13,
        norm_first=norm_first,
        share_embeddings=share_embeddings,
    )
    model = tm.Transformer(config)
    params = random_params(model, SRC, TGT, seed=3)
    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = [paper_transformer(params64, config, *pair) for pair in zip(SRC, TGT)]
    memory, hidden, logits, probabilities = map(np.array, zip(*rows))

    @jax.jit
    def apply(params):
        outputs = {"encode": model.apply({"params": params}, SRC, method="encode")}
        for head in ("logits", "softmax", "none"):
            if head == "none":  # has no last linear layer of its own
                params = {k: v for k, v in params.items() if k != "output"}
            with_head = tm.Transformer(dataclasses.replace(config, head=head))
            outputs[head] = with_head.apply({"params": params}, SRC, TGT)
        return outputs

    outputs = apply(params)
    assert_close(outputs["encode"], memory)
    assert_close(outputs["none"], hidden)
    assert_close(outputs["logits"], logits)
    assert_close(outputs["softmax"], probabilities)


def test_positional_encoding_is_the_papers():
    encoding = tm.positional_encoding(max_len=512, d_model=512)
    assert encoding.shape == (512, 512) and encoding.dtype == np.float32
    for position in (0, 1, 2, 3, 100, 101, 510, 511):
        for i in (0, 1, 2, 3, 64, 65, 254, 255, 256, 257, 510, 511):
            expected = paper_position(position, i, 512)
            assert encoding[position, i] == pytest.approx(expected, abs=1e-6)


# ---- The loss ------------------------------------------------------------------------


loss_and_gradient = jax.jit(jax.value_and_grad(tm.cross_entropy_loss), static_argnums=2)


def paper_loss(logits, labels, label_smoothing):
    """Returns the loss, and its gradient with respect to the logits."""
    num_classes, is_label = logits.shape[-1], (labels != tm.PAD_ID)[..., None]
    targets = (1 - label_smoothing) * np.eye(num_classes)[labels]
    targets += label_smoothing / num_classes
    p = paper_softmax(logits)
    loss = -(targets * np.log(p) * is_label).sum() / is_label.sum()
    return loss, (p - targets) * is_label / is_label.sum()


@pytest.mark.parametrize("label_smoothing", [None, 0.0, 0.1, 1.0])
def test_loss_and_gradient_are_the_formulas(label_smoothing):
    rng = np.random.default_rng(5)
    logits = 3 * rng.normal(size=(3, 4, 6)).astype(np.float32)
    logits[0, 1] += 100  # float32 cannot hold exp(100)
    labels = np.array([[3, 5, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0]])  # 0 is PAD
    smoothing = () if label_smoothing is None else (label_smoothing,)
    loss, gradient = loss_and_gradient(logits, labels, *smoothing)
    expected_loss, expected_gradient = paper_loss(
        logits.astype(np.float64), labels, label_smoothing or 0.0
    )
    assert_close(loss, np.float64(expected_loss), 1e-6)
    assert_close(gradient, expected_gradient, 1e-6)
    assert not gradient[labels == tm.PAD_ID].any()


def test_loss_without_labels_is_zero():
    logits, labels = np.ones((1, 2, 6), np.float32), np.full((1, 2), tm.PAD_ID)
    loss, gradient = loss_and_gradient(logits, labels, 0.1)
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("label", [-1, 6, -(2**31), 2**31 - 1])
def test_loss_of_a_label_outside_the_vocabulary_is_nan(label):
    """An index of -1 would take the last class."""
    logits, labels = np.ones((1, 2, 6), np.float32), np.array([[3, label]], np.int32)
    for label_smoothing in (0.0, 0.1):
        assert np.isnan(tm.cross_entropy_loss(logits, labels, label_smoothing))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int64"])
def test_labels_of_every_integer_type(dtype):
    """300 classes are more than 8 bits can count."""
    logits = np.random.default_rng(6).normal(size=(1, 2, 300)).astype(np.float32)
    labels = np.array([[5, min(299, np.iinfo(dtype).max)]])
    expected, _ = paper_loss(logits.astype(np.float64), labels, 0)
    loss, _ = loss_and_gradient(logits, labels.astype(dtype))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    loss, _ = loss_and_gradient(logits, np.array([[5, -1]]).astype(dtype))
    assert np.isnan(loss) == (dtype != "uint8")  # in which -1 is the class 255


def test_loss_allows_a_probability_of_zero_for_what_is_no_label():
    """Four classes share the probability, and the fifth has a logit of -inf. A product
    of the logits with a one-hot label has 0 times -inf, which is NaN, though XLA may
    simplify it away.
    """
    logits, labels = np.zeros((1, 1, 5), np.float32), np.array([[3]])
    logits[..., 4] = -np.inf
    loss, gradient = loss_and_gradient(logits, labels)
    for found in (loss, tm.cross_entropy_loss(logits, labels)):
        np.testing.assert_allclose(found, math.log(4), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[0.25, 0.25, 0.25, -0.75, 0]]], rtol=1e-6)


# ---- Configuration -------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, values",
    [
        ("src_vocab_size must be at least 4, not 3", {"src_vocab_size": 3}),
        ("tgt_vocab_size must be at least 4, not 3", {"tgt_vocab_size": 3}),
        ("d_model must be at least 1, not 0", {"d_model": 0}),
        ("d_model must be a multiple of num_heads, 4, not 18", {"d_model": 18}),
        ("d_model must be a multiple of num_heads, 3, not 16", {"num_heads": 3}),
        ("d_model must be even.*, not 15", {"d_model": 15, "num_heads": 3}),
        ("num_heads must be at least 1, not 0", {"num_heads": 0}),
        ("num_layers must be at least 1, not 0", {"num_layers": 0}),
        ("d_ff must be at least 1, not 0", {"d_ff": 0}),
        ("max_len must be at least 1, not 0", {"max_len": 0}),
        ("dropout_rate must be at least 0 and .*, not 1.0", {"dropout_rate": 1.0}),
        ("dropout_rate must be .* below 1, not -0.1", {"dropout_rate": -0.1}),
        ("dropout_rate must be .*, not nan", {"dropout_rate": float("nan")}),
        (r"share_embeddings .*, not \(11, 12\)", {"tgt_vocab_size": 12}),
        ("head must be one of .*'softmax'.*, not 'Softmax'", {"head": "Softmax"}),
        ("dtype must be one of .*'bfloat16'.*, not 'bf16'", {"dtype": "bf16"}),
    ],
)
def test_config_refuses_by_name_and_value(rule, values):
    sharing = {"share_embeddings": "share_embeddings" in rule}
    with pytest.raises(tm.InputError) as error:
        dataclasses.replace(TINY, **sharing, **values)
    assert isinstance(error.value, ValueError)
    assert re.fullmatch(rule, str(error.value))  # which is one line


def test_config_defaults_are_the_base_model_and_hashable():
    config = tm.TransformerConfig()
    assert (config.d_model, config.num_heads, config.num_layers) == (512, 8, 6)
    assert (config.d_ff, config.dropout_rate, config.max_len) == (2048, 0.1, 512)
    assert not config.norm_first and config.share_embeddings
    assert config.head == "logits" and config.dtype == "float32"
    assert hash(config) == hash(tm.TransformerConfig())
    assert tm.TransformerConfig(dropout_rate=0)
    assert tm.TransformerConfig(src_vocab_size=5, tgt_vocab_size=5, max_len=1)
    with pytest.raises(TypeError, match="positional"):
        tm.TransformerConfig(9, 9)


# ---- Parameters ----------------------------------------------------------------------


def test_initial_parameters():
    config = dataclasses.replace(
        TINY, num_layers=1, d_model=128, d_ff=256, share_embeddings=True
    )

    @jax.jit
    def init(key):
        params = tm.Transformer(config).init(key, SRC, TGT)["params"]
        block = params["encoder"]["blocks_0"]
        query, inner = block["self_attention"]["query"], block["feed_forward"]["inner"]
        return params["embedding"], query, inner

    embedding, query, inner = init(jax.random.key(0))
    np.testing.assert_allclose(embedding.std(), 128**-0.5, rtol=0.1)
    limit = np.sqrt(6 / (128 + 128))  # Xavier-uniform
    assert 0.95 * limit < jnp.abs(query["kernel"]).max() <= limit
    assert inner["kernel"].shape == (128, 256) and (inner["bias"] == 0).all()
    limit = np.sqrt(6 / (128 + 256))
    assert 0.95 * limit < jnp.abs(inner["kernel"]).max() <= limit


def test_number_of_parameters():
    embedding, norm = 37000 * 512, 2 * 512  # scale and bias
    attention = 4 * 512 * 512  # a matrix each for query, key, value and output
    feed_forward = (512 * 2048 + 2048) + (2048 * 512 + 512)
    encoder_block = attention + feed_forward + 2 * norm
    decoder_block = 2 * attention + feed_forward + 3 * norm
    base = embedding + 6 * encoder_block + 6 * decoder_block
    assert base == 63_045_632
    # Source, target and output have one embedding each; each stack ends in a LayerNorm.
    other = tm.TransformerConfig(norm_first=True, share_embeddings=False)
    more = base + 2 * embedding + 2 * norm
    for config, expected in (tm.TransformerConfig(), base), (other, more):
        init = tm.Transformer(config).init
        variables = jax.eval_shape(init, jax.random.key(0), SRC, TGT)
        assert variables.keys() == {"params"}
        assert sum(x.size for x in jax.tree.leaves(variables)) == expected


def test_examples_of_the_docstrings():
    results = doctest.testmod(tm)
    assert results.failed == 0 and results.attempted >= 9
    for example in (tm.causal_mask, tm.positional_encoding, tm.best_continuations):
        assert ">>>" in example.__doc__


# ---- Dropout and bfloat16 ------------------------------------------------------------


@pytest.mark.parametrize("tiny", [False], indirect=True, ids=["post-norm"])
def test_dropout_is_on_where_it_gets_a_key_and_differs_from_key_to_key(tiny):
    apply, params, _ = tiny

    def run(**seeds):
        keys = {name: jax.random.key(seed) for name, seed in seeds.items()}
        return apply({"params": params}, SRC, TGT, rngs=keys)

    plain, first = run(), run(dropout=0)
    assert (run(params=0) == plain).all()
    assert (first == run(dropout=0)).all()
    assert (first != run(dropout=1)).any() and (first != plain).any()


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


@pytest.mark.parametrize("tiny", [False], indirect=True, ids=["post-norm"])
def test_bfloat16_stays_close_to_float32(tiny):
    """A rounding to bfloat16 is off by up to 2^-9, or 0.2%; a few dozen of them add up
    to about 1% of the logits' spread. Without any, dtype would do nothing.
    """
    apply, params, model = tiny
    expected = apply({"params": params}, SRC, TGT)
    model = tm.Transformer(dataclasses.replace(model.config, dtype="bfloat16"))
    actual = jax.jit(model.apply)({"params": params}, SRC, TGT)
    relative = float((actual - expected).std() / expected.std())
    assert 1e-3 < relative < 0.02, relative


def test_attention_of_bfloat16_has_float32_weights():
    """Weights of bfloat16 would add up to 1 within half a percent only."""
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(rng.normal(size=(3, 2, 3, 50, 8)), jnp.bfloat16)
    output, weights = tm.scaled_dot_product_attention(query, key, value)
    assert output.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
