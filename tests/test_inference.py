"""Section 9: the cached step, greedy decoding and beam search. Then what an output has
attended to, and searches of many sources.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params, random_tokens, randomized

import transformer_model as tm

SRC = random_tokens(5, 7, seed=5, lengths=[7, 4, 5, 7, 1])
SMALL = dataclasses.replace(
    TINY, tgt_vocab_size=4, num_layers=1, max_len=9, norm_first=True
)
MODEL = tm.Transformer(SMALL)
SEEDS = (3, 17, 33, 35)  # some rows end at once, some later, some never


@functools.cache
def small_params(seed):
    """Random parameters for 4 target tokens, so that EOS comes early and often."""
    tokens = np.ones((1, 2), np.int32)
    return randomized(random_params(MODEL, tokens, tokens), seed)


@functools.cache
def deep():
    """A model of two layers, and its parameters."""
    model = tm.Transformer(TINY)
    return model, randomized(random_params(model, SRC, SRC), seed=1)


@functools.cache
def jitted_apply(model):
    return jax.jit(model.apply, static_argnames=("method", "mutable"))


def log_probabilities(model, params, src, tokens):
    """Of each token [N, L], by the parallel forward pass: float [N, L]."""
    bos = np.full((len(tokens), 1), tm.BOS_ID)
    inputs = np.concatenate([bos, tokens[:, :-1]], axis=1)
    logits = jitted_apply(model)({"params": params}, src, inputs)
    log_p = jax.nn.log_softmax(logits)
    return np.take_along_axis(np.array(log_p), tokens[..., None], axis=-1)[..., 0]


def lengths_of(tokens):
    """The number of tokens up to EOS, EOS included, of each row."""
    ends = np.array(tokens) == tm.EOS_ID
    return np.where(ends.any(-1), ends.argmax(-1) + 1, tokens.shape[-1])


# ---- The cached step -----------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3])
def test_cached_steps_equal_the_parallel_pass_at_every_position(step):
    """Whether the cache is filled token by token or by three tokens at a time."""
    model, params = deep()
    apply = jitted_apply(model)
    # PAD within a target too: the cache has to hide it as the parallel pass does.
    tgt = random_tokens(5, 12, seed=6, lengths=[12, 5, 9, 2, 12], bos=True)
    tgt[2, 3:5] = tm.PAD_ID
    expected = apply({"params": params}, SRC, tgt)
    memory = apply({"params": params}, SRC, method="encode")
    memory_kv = apply({"params": params}, memory, method="project_kv")
    # Garbage in the cache, so that reading a position before it is written shows. It
    # has room for more than this target.
    cache = jax.tree.map(lambda kv: jnp.full((5, 4, 14, 4), 1e3), memory_kv)
    is_token = np.pad(tgt != tm.PAD_ID, ((0, 0), (0, 2)))[:, None, None]
    for start in range(0, 12, step):
        positions = np.arange(start, start + step)
        logits, cache = apply(
            {"params": params},
            tgt[:, positions],
            positions,
            is_token & (np.arange(14) <= positions[:, None]),
            memory_kv,
            tm.padding_mask(SRC),
            cache,
            start,
            method="decode",
        )
        np.testing.assert_allclose(logits, expected[:, positions], atol=1e-4)


# ---- Greedy decoding -----------------------------------------------------------------


def decoded_without_cache(model, params, src, max_len):
    """Greedy decoding by the parallel forward pass over everything, again and again."""
    apply = jitted_apply(model)
    tokens = np.full((len(src), max_len + 1), tm.PAD_ID, np.int32)
    tokens[:, 0] = tm.BOS_ID
    ended = np.zeros(len(src), bool)
    for position in range(max_len):
        logits = apply({"params": params}, src, tokens[:, :-1])
        token = np.array(jnp.argmax(logits[:, position], axis=-1))
        tokens[:, position + 1] = np.where(ended, tm.PAD_ID, token)
        ended |= token == tm.EOS_ID
    return tokens[:, 1:]


def test_greedy_rows_end_at_different_times_and_stay_ended():
    """A search that stops with the first row, or goes on in an ended one, shows here."""
    seen = set()
    for seed in SEEDS:
        params = small_params(seed)
        decoded = np.array(tm.greedy_decode(MODEL, params, SRC, max_len=7))
        expected = decoded_without_cache(MODEL, params, SRC, max_len=7)
        np.testing.assert_array_equal(decoded, expected)
        beam, _ = tm.beam_search(MODEL, params, SRC, 7, 1, alpha=0.0)
        np.testing.assert_array_equal(beam[:, 0], expected)  # A beam of 1 is greedy.
        for row, length in zip(decoded, lengths_of(decoded)):
            assert (row[length:] == tm.PAD_ID).all()
        seen.update(lengths_of(decoded).tolist())
    assert len(seen) >= 4 and 7 in seen, seen


def test_search_goes_on_until_every_row_has_ended():
    def goes_on(position, *rows):
        return bool(tm.is_unfinished((position, jnp.array(rows), "the rest")))

    assert goes_on(1, [1, 3, 0, 0], [1, 2, 0, 0])
    assert not goes_on(1, [1, 2, 0, 0], [1, 2, 0, 0])
    assert goes_on(2, [1, 3, 3, 0], [1, 3, 2, 0])
    assert not goes_on(3, [1, 3, 3, 3], [1, 3, 3, 2])  # no room is left


# ---- Beam search ---------------------------------------------------------------------


def best_of_all(params, src_row, max_len, alpha):
    """Every possible output's score, best first: [(score, tokens up to EOS)]."""
    tokens = np.array(list(itertools.product(range(4), repeat=max_len)), np.int32)
    src = np.repeat(src_row[None], len(tokens), axis=0)
    log_p = log_probabilities(MODEL, params, src, tokens)
    found = {}
    for row, log_ps, length in zip(tokens, log_p, lengths_of(tokens)):
        total = np.float64(log_ps[:length]).sum()
        found[tuple(row[:length])] = total / ((5 + length) / 6) ** alpha
    return sorted(((score, row) for row, score in found.items()), reverse=True)


def test_widest_beam_finds_the_best_of_all():
    """With room for all of the outputs, the search has to find each of them."""
    src, max_len, wide = SRC[:2], 4, 4**4
    firsts = set()
    for seed, alpha in itertools.product(SEEDS, (0.0, 0.6, 2.0)):
        params = small_params(seed)
        tokens, scores = tm.beam_search(MODEL, params, src, max_len, wide, alpha)
        for row in range(len(src)):
            expected = best_of_all(params, src[row], max_len, alpha)
            assert len(expected) < wide  # the rest of the places is empty
            np.testing.assert_allclose(
                scores[row, : len(expected)], [s for s, _ in expected], atol=1e-4
            )
            assert (scores[row, len(expected) :] == -jnp.inf).all()
            best = np.array(tokens[row, 0])
            assert tuple(best[: lengths_of(best)]) == expected[0][1]
            firsts.add(expected[0][1])
    assert len(firsts) > 1


def test_scores_are_what_the_model_assigns():
    """Hypotheses that go on with the memory of another source, or the cache of another
    parent, have scores that the parallel pass does not give them.
    """
    model, params = deep()
    tokens, scores = tm.beam_search(model, params, SRC, max_len=12)
    assert tokens.shape == (5, 4, 12) and tokens.dtype == jnp.int32
    assert scores.shape == (5, 4) and scores.dtype == jnp.float32
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    tokens, lengths = np.array(tokens), lengths_of(np.array(tokens))
    for beam in range(4):
        log_p = log_probabilities(model, params, SRC, tokens[:, beam])
        kept = np.arange(12) < lengths[:, beam, None]
        assert (tokens[:, beam][~kept] == tm.PAD_ID).all()
        expected = (log_p * kept).sum(-1) / ((5 + lengths[:, beam]) / 6) ** 0.6
        np.testing.assert_allclose(scores[:, beam], expected, atol=1e-4)
    for row in tokens:
        assert len(np.unique(row, axis=0)) == 4  # four different hypotheses


def test_best_continuations_by_hand():
    """Three hypotheses and the tokens PAD, BOS, EOS and one symbol."""
    no = -np.inf

    def choose(log_p, ended, next_log_p):
        arrays = np.float32(log_p), np.array(ended), np.float32(next_log_p)
        log_p, *chosen = map(np.array, tm.best_continuations(*arrays))
        return [*zip(log_p.round(4).tolist(), *(x.tolist() for x in chosen))]

    rows = [[-9, -8, -1, -2], [-9, -1.5, -7, -8], [-3, -9, -9, -9]]
    # At the start only the first may go on, and with different tokens.
    chosen = choose([0, no, no], [False] * 3, rows)
    assert chosen == [(-1, 0, 2), (-2, 0, 3), (-8, 0, 1)]
    # Of all continuations the likeliest, whosever they are.
    chosen = choose([-1, -1, -1], [False] * 3, rows)
    assert chosen == [(-2, 0, 2), (-2.5, 1, 1), (-3, 0, 3)]
    # What has ended goes on as it is, PAD costing it nothing, if it is among the best.
    chosen = choose([-1, -2.5, -1], [False, True, False], rows)
    assert chosen == [(-2, 0, 2), (-2.5, 1, 0), (-3, 0, 3)]
    chosen = choose([-1, -50, -1], [False, True, False], rows)
    assert chosen == [(-2, 0, 2), (-3, 0, 3), (-4, 2, 0)]
    chosen = choose([-3, -1, -2], [True] * 3, rows)
    assert sorted(chosen) == [(-3, 0, 0), (-2, 2, 0), (-1, 1, 0)]
    # With too few continuations, places stay empty, and an empty place stays last.
    few = [[no, no, -1, no], [no] * 4, [no] * 4]
    chosen = choose([0, -5, no], [False, True, True], few)
    assert chosen[:2] == [(-1, 0, 2), (-5, 1, 0)] and chosen[2][0] == no


def test_length_penalty_by_hand():
    """The length counts EOS, and no PAD after it."""
    tokens = np.array([[[3, 2, 0, 0], [3, 3, 3, 2], [3, 3, 3, 3], [2, 0, 0, 0]]])
    expected = [[(7 / 6) ** 0.6, (9 / 6) ** 0.6, (9 / 6) ** 0.6, 1.0]]
    np.testing.assert_allclose(tm.length_penalty(tokens, 0.6), expected, rtol=1e-6)
    assert (tm.length_penalty(tokens, 0.0) == 1).all()


@pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])
def test_output_depends_neither_on_other_rows_nor_on_padding(beam_size):
    """Each source gets the same output in a batch, in a batch of another order, beside
    a source with a token outside the vocabulary, and alone with two more columns of
    padding.
    """

    def search(params, src):
        if beam_size is None:
            return np.array(tm.greedy_decode(MODEL, params, src, 7)), np.zeros(len(src))
        tokens, scores = tm.beam_search(MODEL, params, src, 7, beam_size)
        return np.array(tokens), np.array(scores)

    order, rest, every = [3, 1, 4, 0, 2], [0, 2, 3, 4], slice(None)
    broken, wider = SRC.copy(), np.pad(SRC, ((0, 0), (0, 2)))
    broken[1, 2] = -1  # Of this source, the logits are NaN.
    cases = [(SRC[order], every, order), (broken, rest, rest)]
    cases += [(wider[row : row + 1], every, [row]) for row in range(5)]
    for seed in SEEDS:
        params = small_params(seed)
        tokens, scores = search(params, SRC)
        for src, found, rows in cases:
            other_tokens, other_scores = search(params, src)
            np.testing.assert_array_equal(other_tokens[found], tokens[rows])
            np.testing.assert_allclose(other_scores[found], scores[rows], atol=1e-4)


# ---- What an output has attended to --------------------------------------------------


def test_attention_weights_are_those_of_the_parallel_pass():
    """Of cross-attention in the last block, when the output is the target."""
    model, params = deep()
    outputs = random_tokens(5, 12, seed=8, lengths=[12, 5, 9, 2, 12])
    weights = tm.attention_weights(model, params, SRC, outputs)
    tgt = np.pad(outputs[:, :-1], ((0, 0), (1, 0)), constant_values=tm.BOS_ID)
    mutable = {"mutable": ("intermediates",)}
    _, more = jitted_apply(model)({"params": params}, SRC, tgt, **mutable)
    (sown,) = more["intermediates"]["decoder"]["blocks_1"]["cross_attention"]["weights"]
    np.testing.assert_allclose(weights, np.array(sown).mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert weights.shape == (5, 12, 7)


class TiedDecoder(tm.Decoder):
    """A decoder that is one block, called again and again."""

    def setup(self):
        self.blocks = [tm.DecoderBlock(self.config)] * self.config.num_layers


@pytest.mark.parametrize("tied", [False, True])
def test_attention_weights_are_those_of_the_last_block(tied, monkeypatch):
    """Attention now gives the number of its call as its weights. It is called once for
    each of the encoder's 12 blocks and twice for each of the decoder's. By name, the
    last of these would be blocks_9.
    """
    if tied:
        monkeypatch.setattr(tm, "Decoder", TiedDecoder)
    sizes = {"num_layers": 12, "max_len": 8 + tied}
    config = dataclasses.replace(SMALL, norm_first=False, **sizes)
    model, numbers = tm.Transformer(config), itertools.count(1)
    params = random_params(model, SRC, SRC)

    def attention(query, key, value, mask):
        shape = *query.shape[:3], key.shape[2]
        return query, jnp.full(shape, next(numbers), jnp.float32)

    monkeypatch.setattr(tm, "scaled_dot_product_attention", attention)
    weights = tm.attention_weights(model, params, SRC, SRC)
    np.testing.assert_array_equal(weights, np.full((5, 7, 7), 12 + 2 * 12))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_find_best_takes_the_first_of_the_beam(beam_size):
    params = small_params(17)
    expected = tm.beam_search(MODEL, params, SRC, 7, 3)[0][:, 0]
    if beam_size == 1:
        expected = tm.greedy_decode(MODEL, params, SRC, 7)
    (alone,) = tm.find_best(MODEL, params, beam_size, False, SRC, 7)
    best, weights = tm.find_best(MODEL, params, beam_size, True, SRC, 7)
    np.testing.assert_array_equal(alone, expected)
    np.testing.assert_array_equal(best, expected)
    attended = tm.attention_weights(MODEL, params, SRC, expected)
    np.testing.assert_allclose(weights, attended, atol=1e-6)


# ---- Many sources --------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2, 3, 33, 64, 65, 150])
def test_many_sources_are_searched_in_few_shapes(number):
    """They are padded to 8, 17, 35 or 70 tokens with EOS, the short ones together. A
    batch is 64 of them, or a power of two that is enough, and one that would not be full
    has a source several times, because PAD alone would never end. No output has more
    than 70 tokens, or 50 more than its padded source.
    """
    shapes, lengths = [], 1 + 69 * np.random.default_rng(0).random(number) ** 6
    sources = [[3 + i] * int(length) for i, length in enumerate(lengths)]

    def search(src, max_len):
        """Returns the first token of each source, and its length."""
        shapes.append((*src.shape, max_len))
        lengths = (src == tm.EOS_ID).argmax(axis=1)
        for row, length in zip(src.tolist(), lengths):
            assert row[:length] in sources and row[length] == tm.EOS_ID
            assert not any(row[length + 1 :])
        return jnp.array(src[:, 0]), jnp.array(lengths)

    found = tm.search_all(search, sources, 70)
    assert [(int(first), int(n)) for first, n in found] == [
        (s[0], len(s)) for s in sources
    ]
    num_rows = min(64, 1 << max(0, number - 1).bit_length())
    limits = {8: 58, 17: 67, 35: 70, 70: 70}
    widths = sorted(next(w for w in limits if w > len(s)) for s in sources)
    widest = [max(widths[i : i + 64]) for i in range(0, number, 64)]
    assert shapes == [(num_rows, width, limits[width]) for width in widest]


@pytest.mark.parametrize("search", [tm.greedy_decode, tm.beam_search])
def test_searches_that_cannot_work_are_refused(search):
    params = small_params(17)
    with pytest.raises(ValueError, match="max_len must be at most 9, not 10"):
        search(MODEL, params, SRC, 10)
    with pytest.raises(ValueError, match="above max_len=9"):
        search(MODEL, params, np.full((2, 10), 3), 3)
    with pytest.raises((TypeError, ValueError), match="integer"):
        search(MODEL, params, SRC.astype(np.float32), 3)
    for head in ("softmax", "none"):
        other = tm.Transformer(dataclasses.replace(SMALL, head=head))
        with pytest.raises(ValueError, match=f'"logits" .*, not .{head}'):
            search(other, params, SRC, 3)
