"""The model against other computations of the same: PyTorch's stacks (golden.npz),
Flax's attention layer, and the paper's equations in plain float64 arithmetic. Then its
configuration, the parameters it starts with, dropout and bfloat16.

In the comparisons all parameters are random, those of biases and LayerNorms too,
because a zero or a one could hide a mistake.
"""

import dataclasses
import doctest
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params, random_tokens

import transformer_model as tm


def assert_close(actual, expected, tolerance=1e-5):
    """Asserts the same shape, and values that differ by rounding alone."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ---- PyTorch's stacks ----------------------------------------------------------------


def from_torch(weights, kind, order):
    """Returns PyTorch's weights as the parameters of our Encoder or Decoder.

    PyTorch's matrices are [out, in], Flax's kernels [in, out].
    """

    def dense(weight, bias):
        return {"kernel": weight.T, "bias": bias}

    def linear(name):
        return dense(weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def attention(name):  # one matrix on top of the other: query, key, value
        matrices = np.split(weights[f"{name}.in_proj_weight"], 3)
        biases = np.split(weights[f"{name}.in_proj_bias"], 3)
        projections = zip(("query", "key", "value"), map(dense, matrices, biases))
        return {**dict(projections), "output": linear(f"{name}.out_proj")}

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


@pytest.fixture(scope="module")
def golden():
    """What make_golden.py has saved, by name."""
    with np.load(pathlib.Path(__file__).with_name("golden.npz")) as arrays:
        return dict(arrays)


def golden_config(order):
    return tm.TransformerConfig(
        d_model=16,
        num_heads=4,
        num_layers=2,
        d_ff=32,
        norm_first=order == "pre_norm",
    )


def tokens_of_lengths(lengths, width):
    """Returns [B, width] tokens that are PAD from each row's length on."""
    return np.where(np.arange(width) < lengths[:, None], tm.EOS_ID, tm.PAD_ID)


@pytest.mark.parametrize("order", ["post_norm", "pre_norm"])
def test_encoder_is_pytorchs(golden, order):
    encoder = tm.Encoder(golden_config(order))
    src = tokens_of_lengths(golden["source_lengths"], 7)
    memory = jax.jit(encoder.apply)(
        from_torch(golden, "encoder", order), golden["source"], tm.padding_mask(src)
    )
    real = src != tm.PAD_ID
    assert_close(memory[real], golden[f"{order}.memory"][real])


@pytest.mark.parametrize("order", ["post_norm", "pre_norm"])
def test_decoder_is_pytorchs(golden, order):
    decoder = tm.Decoder(golden_config(order))
    variables = from_torch(golden, "decoder", order)
    src = tokens_of_lengths(golden["source_lengths"], 7)
    tgt = tokens_of_lengths(golden["target_lengths"], 5)

    @jax.jit
    def apply(x, memory):
        def project_kv(decoder):
            blocks = decoder.blocks
            return [block.cross_attention.project_kv(memory) for block in blocks]

        memory_kv = decoder.apply(variables, method=project_kv)
        self_mask = tm.padding_mask(tgt) & tm.causal_mask(5)
        memory_mask = tm.padding_mask(src)
        output, _ = decoder.apply(variables, x, self_mask, memory_kv, memory_mask)
        return output

    output = apply(golden["target"], golden[f"{order}.memory"])
    real = tgt != tm.PAD_ID
    assert_close(output[real], golden[f"{order}.output"][real])


# ---- Flax's attention layer ----------------------------------------------------------


@pytest.mark.parametrize(
    "mask_shape",
    [None, (3, 1, 1, 7), (3, 1, 5, 7), (3, 2, 5, 7)],
    ids=["no_mask", "by_key", "by_query_and_key", "by_head"],
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
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True)
    their_params = {  # theirs keep H and K apart
        name: {
            "kernel": params[name]["kernel"].reshape(12, 2, 6),
            "bias": params[name]["bias"].reshape(2, 6),
        }
        for name in ("query", "key", "value")
    }
    their_params["out"] = {
        "kernel": params["output"]["kernel"].reshape(2, 6, 12),
        "bias": params["output"]["bias"],
    }

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


def paper_linear(params, x):
    return x @ params["kernel"] + params["bias"]


def paper_layer_norm(params, x):
    """x [D] with mean 0 and variance 1, then scaled and shifted."""
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return params["scale"] * (x - mean) / math.sqrt(variance + 1e-6) + params["bias"]


def paper_softmax(scores):
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return np.array([e / sum(exponentials) for e in exponentials])


def paper_position(position, i, d_model):
    """Entry i of a position's encoding (section 3.5)."""
    if i % 2 == 0:
        return math.sin(position / 10000 ** (i / d_model))
    return math.cos(position / 10000 ** ((i - 1) / d_model))


def paper_embed(embedding, tokens):
    """Section 3.4 and 3.5: [V, D] and tokens [L] -> [L, D]."""
    d_model = embedding.shape[1]
    xs = np.empty((len(tokens), d_model))
    for position, token in enumerate(tokens):
        for i in range(d_model):
            xs[position, i] = embedding[token, i] * math.sqrt(d_model)
            xs[position, i] += paper_position(position, i, d_model)
    return xs


def paper_attention(params, num_heads, xs, memory, may_attend):
    """Section 3.2.2; may_attend(t, s) says if query t may attend to key s."""
    queries = paper_linear(params["query"], xs)
    keys = paper_linear(params["key"], memory)
    values = paper_linear(params["value"], memory)
    width = xs.shape[1] // num_heads
    outputs = []
    for t in range(len(xs)):
        allowed = [s for s in range(len(memory)) if may_attend(t, s)]
        heads = []
        for h in range(num_heads):
            mine = slice(h * width, (h + 1) * width)
            scores = [
                queries[t, mine] @ keys[s, mine] / math.sqrt(width) for s in allowed
            ]
            head = np.zeros(width)  # which it stays where there is nothing to attend to
            for s, weight in zip(allowed, paper_softmax(scores)):
                head += weight * values[s, mine]
            heads.append(head)
        outputs.append(paper_linear(params["output"], np.concatenate(heads)))
    return np.array(outputs)


def paper_feed_forward(params, xs):
    inner = paper_linear(params["inner"], xs)
    return paper_linear(params["outer"], np.where(inner > 0, inner, 0))


def paper_sublayer(params, norm_first, xs, sublayer):
    """The connection around a sub-layer: LayerNorm(x + f(x)) or x + f(LayerNorm(x))."""

    def norm(xs):
        return np.array([paper_layer_norm(params["norm"], x) for x in xs])

    return xs + sublayer(norm(xs)) if norm_first else norm(xs + sublayer(xs))


def paper_transformer(params, config, src, tgt):
    """Returns memory [S, D], hidden states [T, D], logits and softmax [T, V]."""
    num_heads, norm_first = config.num_heads, config.norm_first

    def final_norm(stack, xs):
        if not norm_first:
            return xs
        return np.array([paper_layer_norm(params[stack]["norm"], x) for x in xs])

    def is_source(t, s):
        return src[s] != tm.PAD_ID

    def is_past_target(t, s):
        return tgt[s] != tm.PAD_ID and s <= t

    if config.share_embeddings:
        src_embedding = tgt_embedding = output = params["embedding"]
    else:
        src_embedding = params["src_embedding"]
        tgt_embedding = params["tgt_embedding"]
        output = params["output"]

    def encoder_block(block, xs):
        def self_attention(y):
            return paper_attention(block["self_attention"], num_heads, y, y, is_source)

        def feed_forward(y):
            return paper_feed_forward(block["feed_forward"], y)

        xs = paper_sublayer(block["add_and_norm_0"], norm_first, xs, self_attention)
        return paper_sublayer(block["add_and_norm_1"], norm_first, xs, feed_forward)

    def decoder_block(block, xs, memory):
        def self_attention(y):
            params = block["self_attention"]
            return paper_attention(params, num_heads, y, y, is_past_target)

        def cross_attention(y):
            params = block["cross_attention"]
            return paper_attention(params, num_heads, y, memory, is_source)

        def feed_forward(y):
            return paper_feed_forward(block["feed_forward"], y)

        xs = paper_sublayer(block["add_and_norm_0"], norm_first, xs, self_attention)
        xs = paper_sublayer(block["add_and_norm_1"], norm_first, xs, cross_attention)
        return paper_sublayer(block["add_and_norm_2"], norm_first, xs, feed_forward)

    memory = paper_embed(src_embedding, src)
    for i in range(config.num_layers):
        memory = encoder_block(params["encoder"][f"blocks_{i}"], memory)
    memory = final_norm("encoder", memory)
    hidden = paper_embed(tgt_embedding, tgt)
    for i in range(config.num_layers):
        hidden = decoder_block(params["decoder"][f"blocks_{i}"], hidden, memory)
    hidden = final_norm("decoder", hidden)
    logits = np.array([[x @ row for row in output] for x in hidden])
    return memory, hidden, logits, np.array([paper_softmax(row) for row in logits])


# 0 is PAD, 1 BOS, 2 EOS. PAD is at the end, but also in between and, where a query has
# nothing to attend to, at the start of a target and all over a source.
SRC = np.array([[3, 5, 4, 9, 6, 10, 2], [7, 0, 8, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
TGT = np.array([[1, 12, 3, 0, 0], [0, 1, 7, 7, 11], [1, 6, 0, 4, 2]])


@pytest.mark.parametrize(
    "norm_first, share_embeddings",
    [(False, True), (True, False)],
    ids=["post_norm-shared", "pre_norm-separate"],
)
def test_model_is_the_papers(norm_first, share_embeddings):
    sizes = {
        "src_vocab_size": 13 if share_embeddings else 11,
        "tgt_vocab_size": 13,
        "d_model": 12,
        "num_heads": 2,
        "num_layers": 2,
        "d_ff": 20,
        "max_len": 7,
        "norm_first": norm_first,
        "share_embeddings": share_embeddings,
    }
    model = tm.Transformer(tm.TransformerConfig(**sizes))
    params = random_params(model, SRC, TGT, seed=3)
    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = [
        paper_transformer(params64, model.config, src, tgt)
        for src, tgt in zip(SRC.tolist(), TGT.tolist())
    ]
    memory, hidden, logits, probabilities = map(np.array, zip(*rows))

    @jax.jit
    def apply(params):
        outputs = {"encode": model.apply({"params": params}, SRC, method="encode")}
        for head in ("logits", "softmax", "none"):
            if head == "none":  # has no last linear layer of its own
                params = {k: v for k, v in params.items() if k != "output"}
            with_head = tm.Transformer(tm.TransformerConfig(**sizes, head=head))
            outputs[head] = with_head.apply({"params": params}, SRC, TGT)
        return outputs

    outputs = apply(params)
    assert_close(outputs["encode"], memory)
    assert_close(outputs["none"], hidden)
    assert_close(outputs["logits"], logits)
    assert_close(outputs["softmax"], probabilities)


def test_positional_encoding_is_the_papers():
    encoding = tm.positional_encoding(max_len=512, d_model=512)
    assert encoding.shape == (512, 512)
    for position in (0, 1, 2, 3, 100, 101, 510, 511):
        for i in (0, 1, 2, 3, 64, 65, 254, 255, 256, 257, 510, 511):
            expected = paper_position(position, i, 512)
            assert encoding[position, i] == pytest.approx(expected, abs=1e-6)


# ---- The loss ------------------------------------------------------------------------


loss_and_gradient = jax.jit(jax.value_and_grad(tm.cross_entropy_loss), static_argnums=2)


def paper_loss(logits, labels, label_smoothing):
    """Returns the loss, and its gradient with respect to the logits."""
    vocab_size = logits.shape[-1]
    loss, gradient, count = 0.0, np.zeros(logits.shape), 0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if labels[b, t] == tm.PAD_ID:
                continue
            count += 1
            probabilities = paper_softmax(logits[b, t])
            for v in range(vocab_size):
                target = label_smoothing / vocab_size
                if v == labels[b, t]:
                    target += 1 - label_smoothing
                loss -= target * math.log(probabilities[v])
                gradient[b, t, v] = probabilities[v] - target
    return loss / count, gradient / count


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


# ---- Parameters ----------------------------------------------------------------------


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


@pytest.mark.parametrize("paper", [True, False], ids=["base", "pre_norm_separate"])
def test_number_of_parameters(paper):
    embedding = 37000 * 512
    attention = 4 * (512 * 512 + 512)  # query, key, value, output: a matrix and a bias
    feed_forward = (512 * 2048 + 2048) + (2048 * 512 + 512)
    norm = 2 * 512  # scale and bias
    encoder_block = attention + feed_forward + 2 * norm
    decoder_block = 2 * attention + feed_forward + 3 * norm
    expected = embedding + 6 * encoder_block + 6 * decoder_block  # 63,082,496

    config = tm.TransformerConfig()
    if not paper:
        config = tm.TransformerConfig(norm_first=True, share_embeddings=False)
        expected += 2 * embedding  # source, target and output have one each
        expected += 2 * norm  # at the end of each stack
    tokens = np.ones((1, 1), np.int32)
    shapes = jax.eval_shape(
        tm.Transformer(config).init, jax.random.key(0), tokens, tokens
    )
    assert shapes.keys() == {"params"}
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


# ---- The docstrings ------------------------------------------------------------------


def test_examples_of_the_docstrings():
    results = doctest.testmod(tm)
    assert results.failed == 0 and results.attempted >= 9
    for example in (tm.causal_mask, tm.positional_encoding, tm.best_continuations):
        assert ">>>" in example.__doc__


# ---- Dropout -------------------------------------------------------------------------


TINY_SRC = random_tokens(3, 7, seed=1, lengths=[7, 4, 5])
TINY_TGT = random_tokens(3, 6, seed=2, lengths=[6, 6, 3], bos=True)


@pytest.mark.parametrize("tiny", [False], indirect=True, ids=["post-norm"])
def test_dropout_is_on_where_it_gets_a_key_and_differs_from_key_to_key(tiny):
    apply, params, _ = tiny

    @jax.jit
    def run(key):
        names = (), ("params",), ("dropout",)
        rngs = [dict.fromkeys(n, key) for n in names]
        return [apply({"params": params}, TINY_SRC, TINY_TGT, rngs=r) for r in rngs]

    plain, other_key, first = run(jax.random.key(0))
    assert (other_key == plain).all()
    assert (first == run(jax.random.key(0))[2]).all()
    assert (first != run(jax.random.key(1))[2]).any() and (first != plain).any()


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
    jax.eval_shape(lambda: tm.Transformer(TINY).init(keys, TINY_SRC, TINY_TGT))
    layers = TINY.num_layers
    expected = [(3, 7, 16)] * (1 + 2 * layers) + [(3, 6, 16)] * (1 + 3 * layers)
    assert [shape for _, shape, _ in places] == expected
    assert {(rate, off) for rate, _, off in places} == {
        (TINY.dropout_rate, not has_key)
    }


# ---- bfloat16 ------------------------------------------------------------------------


def test_bfloat16_stays_close_to_float32():
    """A rounding to bfloat16 is off by up to 2^-9, or 0.2%; a few dozen of them add up
    to about 1% of the logits' spread. Without any, dtype would do nothing.
    """
    config = dataclasses.replace(TINY, num_layers=1)
    params = random_params(tm.Transformer(config), TINY_SRC, TINY_TGT)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = tm.Transformer(dataclasses.replace(config, dtype=dtype))
        logits[dtype] = jax.jit(model.apply)({"params": params}, TINY_SRC, TINY_TGT)
    expected, actual = logits.values()
    relative = float((actual - expected).std() / expected.std())
    assert 1e-3 < relative < 0.02, relative


def test_attention_of_bfloat16_has_float32_weights():
    """Weights of bfloat16 would add up to 1 within half a percent only."""
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(rng.normal(size=(3, 2, 3, 50, 8)), jnp.bfloat16)
    output, weights = tm.scaled_dot_product_attention(query, key, value)
    assert output.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
