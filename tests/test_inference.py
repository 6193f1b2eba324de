"""Section 9: the cached step, greedy decoding and beam search."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_tokens, randomized

import transformer_model as tm

SRC = random_tokens(6, 7, seed=5, lengths=[7, 4, 5, 7, 1, 6])
SMALL = dataclasses.replace(
    TINY, tgt_vocab_size=4, num_layers=1, max_len=7, norm_first=True
)
MODEL = tm.Transformer(SMALL)
SEEDS = (1, 2, 5, 6)  # some rows end at once, some later, some never


@functools.cache
def small_model(seed):
    """A random model of 4 target tokens, so that EOS comes early and often."""
    return MODEL, randomized(initial_params(), seed)


@functools.cache
def initial_params():
    tokens = np.ones((1, 2), np.int32)
    return jax.jit(MODEL.init)(jax.random.key(0), tokens, tokens)["params"]


@functools.cache
def jitted_apply(model):
    return jax.jit(model.apply)


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


def test_cached_steps_equal_the_parallel_pass_at_every_position(tiny):
    """Whether the cache is filled token by token or by three tokens at a time."""
    apply, params, model = tiny
    step = 3 if model.config.norm_first else 1
    # PAD within a target too: the cache has to hide it as the parallel pass does.
    tgt = random_tokens(6, 9, seed=6, lengths=[9, 5, 9, 2, 9, 9], bos=True)
    tgt[2, 3:5] = tm.PAD_ID
    expected = apply({"params": params}, SRC, tgt)
    memory = apply({"params": params}, SRC, method="encode")
    memory_kv = apply({"params": params}, memory, method="project_kv")
    # Garbage in the cache, so that reading a position before it is written shows. It
    # has room for more than this target.
    cache = jax.tree.map(lambda kv: jnp.full((6, 4, 11, 4), 1e3), memory_kv)
    is_token = np.pad(tgt != tm.PAD_ID, ((0, 0), (0, 2)))[:, None, None]
    for start in range(0, 9, step):
        positions = np.arange(start, start + step)
        logits, cache = apply(
            {"params": params},
            tgt[:, positions],
            is_token & (np.arange(11) <= positions[:, None]),
            memory_kv,
            tm.padding_mask(SRC),
            cache,
            start,
            method="decode",
        )
        np.testing.assert_allclose(logits, expected[:, positions], atol=1e-5)


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


@pytest.mark.parametrize("tiny", [False], indirect=True, ids=["post-norm"])
def test_greedy_equals_decoding_without_cache(tiny):
    _, params, model = tiny
    expected = decoded_without_cache(model, params, SRC, max_len=12)
    decoded = tm.greedy_decode(model, params, SRC, max_len=12)
    assert decoded.shape == (6, 12) and decoded.dtype == jnp.int32
    np.testing.assert_array_equal(decoded, expected)
    assert len(np.unique(expected, axis=0)) > 1


def test_greedy_rows_end_at_different_times_and_stay_ended():
    src, seen = SRC[:5], set()
    for seed in SEEDS:
        model, params = small_model(seed)
        decoded = np.array(tm.greedy_decode(model, params, src, max_len=7))
        expected = decoded_without_cache(model, params, src, max_len=7)
        np.testing.assert_array_equal(decoded, expected)
        for row, length in zip(decoded, lengths_of(decoded)):
            assert (row[length:] == tm.PAD_ID).all()
        seen.update(lengths_of(decoded).tolist())
    assert len(seen) >= 4 and 7 in seen, seen


@pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])
def test_loop_stops_when_every_row_has_ended(beam_size, monkeypatch):
    positions = []
    decode = tm.Transformer.decode

    def spy(self, *args, start, **kwargs):
        jax.debug.callback(lambda p: positions.append(int(p)), start)
        return decode(self, *args, start=start, **kwargs)

    def search(model):
        if beam_size is None:
            return tm.greedy_decode(model, params, src, 7)
        return tm.beam_search(model, params, src, 7, beam_size)[0]

    src, model, params = SRC[:5], *small_model(6)
    longest = lengths_of(np.array(search(model))).max()
    assert 1 < longest < 7
    # For another max_len there is another function to compile, with the spy in it.
    other = tm.Transformer(dataclasses.replace(SMALL, max_len=8))
    monkeypatch.setattr(tm.Transformer, "decode", spy)
    search(other).block_until_ready()
    jax.effects_barrier()
    assert sorted(positions) == list(range(longest)), longest


def best_of_all(model, params, src_row, max_len, alpha):
    """Every possible output's score, best first: [(score, tokens up to EOS)]."""
    tokens = np.array(list(itertools.product(range(4), repeat=max_len)), np.int32)
    src = np.repeat(src_row[None], len(tokens), axis=0)
    log_p = log_probabilities(model, params, src, tokens)
    found = {}
    for row, log_ps, length in zip(tokens, log_p, lengths_of(tokens)):
        total = np.float64(log_ps[:length]).sum()
        found[tuple(row[:length])] = total / ((5 + length) / 6) ** alpha
    return sorted(((score, row) for row, score in found.items()), reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_widest_beam_finds_the_best_of_all(alpha):
    src, max_len, wide = SRC[:2], 4, 4**4
    firsts = set()
    for seed in SEEDS:
        model, params = small_model(seed)
        tokens, scores = tm.beam_search(model, params, src, max_len, wide, alpha)
        for row in range(len(src)):
            expected = best_of_all(model, params, src[row], max_len, alpha)
            assert len(expected) < wide  # the rest of the places is empty
            np.testing.assert_allclose(
                scores[row, : len(expected)], [s for s, _ in expected], atol=1e-4
            )
            assert (scores[row, len(expected) :] == -jnp.inf).all()
            best = np.array(tokens[row, 0])
            assert tuple(best[: lengths_of(best)]) == expected[0][1]
            firsts.add(expected[0][1])
    assert len(firsts) > 1


@pytest.mark.parametrize("tiny", [False], indirect=True, ids=["post-norm"])
def test_scores_are_what_the_model_assigns(tiny):
    _, params, model = tiny
    tokens, scores = tm.beam_search(model, params, SRC, max_len=10)
    assert tokens.shape == (6, 4, 10) and tokens.dtype == jnp.int32
    assert scores.shape == (6, 4) and scores.dtype == jnp.float32
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    tokens, lengths = np.array(tokens), lengths_of(np.array(tokens))
    for beam in range(4):
        log_p = log_probabilities(model, params, SRC, tokens[:, beam])
        kept = np.arange(10) < lengths[:, beam, None]
        assert (tokens[:, beam][~kept] == tm.PAD_ID).all()
        expected = (log_p * kept).sum(-1) / ((5 + lengths[:, beam]) / 6) ** 0.6
        np.testing.assert_allclose(scores[:, beam], expected, atol=1e-4)
    for row in tokens:
        assert len(np.unique(row, axis=0)) == 4  # four different hypotheses


def test_rows_do_not_affect_each_other():
    src = SRC[:5]
    model, params = small_model(1)
    tokens, scores = tm.beam_search(model, params, src, 7, 3)
    order = np.array([3, 1, 4, 0, 2])
    other_tokens, other_scores = tm.beam_search(model, params, src[order], 7, 3)
    np.testing.assert_array_equal(other_tokens, tokens[order])
    np.testing.assert_allclose(other_scores, scores[order], atol=1e-5)
    for row in range(5):
        tokens_1, _ = tm.beam_search(model, params, src[row : row + 1], 7, 3)
        np.testing.assert_array_equal(tokens_1[0], tokens[row])


def test_beam_of_one_is_greedy():
    src = SRC[:5]
    for seed in SEEDS:
        model, params = small_model(seed)
        one, _ = tm.beam_search(model, params, src, 7, 1, alpha=0.0)
        greedy = tm.greedy_decode(model, params, src, 7)
        np.testing.assert_array_equal(one[:, 0], greedy)


def test_best_continuations_by_hand():
    """Three hypotheses and the tokens PAD, BOS, EOS and one symbol."""
    no = -np.inf

    def choose(log_p, ended, next_log_p):
        arrays = np.float32(log_p), np.array(ended), np.float32(next_log_p)
        log_p, parent, token = tm.best_continuations(*arrays)
        return [
            *zip(np.array(log_p).round(4).tolist(), parent.tolist(), token.tolist())
        ]

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
    tokens = np.array([[[3, 2, 0, 0], [3, 3, 3, 2], [3, 3, 3, 3], [2, 0, 0, 0]]])
    expected = [[(7 / 6) ** 0.6, (9 / 6) ** 0.6, (9 / 6) ** 0.6, 1.0]]
    np.testing.assert_allclose(tm.length_penalty(tokens, 0.6), expected, rtol=1e-6)
    assert (tm.length_penalty(tokens, 0.0) == 1).all()


def test_nan_logits_are_told_apart_from_tokens():
    """Row by row: a token outside the vocabulary makes the logits of its source NaN."""
    src = SRC[:5].copy()
    model, params = small_model(1)
    greedy = tm.greedy_decode(model, params, src, 7)
    tokens, scores = tm.beam_search(model, params, src, 7, 3)
    for bad in (-1, 11):
        src[1, 2] = bad
        other_greedy = np.array(tm.greedy_decode(model, params, src, 7))
        other_tokens, other_scores = tm.beam_search(model, params, src, 7, 3)
        good = np.arange(5) != 1
        assert (other_greedy[1] == -1).all()
        np.testing.assert_array_equal(other_greedy[good], greedy[good])
        assert (other_tokens[1] == -1).all() and np.isnan(other_scores[1]).all()
        np.testing.assert_array_equal(other_tokens[good], tokens[good])
        np.testing.assert_allclose(other_scores[good], scores[good], atol=1e-5)
    nan = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    assert (tm.greedy_decode(model, nan, src, 7) == -1).all()
    assert np.isnan(tm.beam_search(model, nan, src, 7, 3)[1]).all()


def test_searches_that_cannot_work_are_refused():
    model, params = small_model(0)
    softmax = tm.Transformer(dataclasses.replace(SMALL, head="softmax"))
    hidden = tm.Transformer(dataclasses.replace(SMALL, head="none"))
    for search in (tm.greedy_decode, tm.beam_search):
        for max_len in (8, 0, -1):
            with pytest.raises(
                ValueError, match=f"max_len must be 1 to 7.* {max_len} "
            ):
                search(model, params, SRC[:2], max_len)
        for other in (softmax, hidden):
            with pytest.raises(ValueError, match=f'"logits", not .{other.config.head}'):
                search(other, params, SRC[:2], 3)
        with pytest.raises(ValueError, match="above max_len=7"):
            search(model, params, np.full((2, 8), 3), 3)
        for src in (SRC[:0], SRC[:, :0], SRC.astype(np.float32)):
            with pytest.raises(ValueError, match="tokens must be integers"):
                search(model, params, src, 3)
    for beam_size in (0, -1):
        with pytest.raises(ValueError, match=f"beam_size at least 1.* {beam_size}"):
            tm.beam_search(model, params, SRC[:2], 3, beam_size)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_decoding_again_what_has_not_ended_changes_nothing(beam_size):
    sources = [[token for token in row.tolist() if token] for row in SRC[:, :6]]
    lengths = set()
    for seed in SEEDS:
        job = *small_model(seed), sources, beam_size
        short, whole = (tm.decode_all(*job, short_len=n) for n in (2, 7))
        for again, once in zip(short, whole):
            length = lengths_of(np.array(once))
            assert again[:length] == once[:length]
            assert not any(again[length:] + once[length:])
            lengths.add(int(length))
    assert min(lengths) <= 2 and max(lengths) == 7, lengths
