"""Section 9: the cached step, greedy decoding and beam search."""

import dataclasses
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
SEEDS = (1, 2, 5, 6)  # some rows end at once, some later, some never


def small_model(seed):
    """A random model of 4 target tokens, so that EOS comes early and often."""
    model = tm.Transformer(SMALL)
    tokens = np.ones((1, 2), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"]
    return model, randomized(params, seed)


def log_probabilities(model, params, src, tokens):
    """Of each token [N, L], by the parallel forward pass: float [N, L]."""
    bos = np.full((len(tokens), 1), tm.BOS_ID)
    inputs = np.concatenate([bos, tokens[:, :-1]], axis=1)
    logits = jax.jit(model.apply)({"params": params}, src, inputs)
    log_p = jax.nn.log_softmax(logits)
    return np.take_along_axis(np.array(log_p), tokens[..., None], axis=-1)[..., 0]


def lengths_of(tokens):
    """The number of tokens up to EOS, EOS included, of each row."""
    ends = np.array(tokens) == tm.EOS_ID
    return np.where(ends.any(-1), ends.argmax(-1) + 1, tokens.shape[-1])


@pytest.mark.parametrize("num_targets", [1, 2])
def test_cached_step_equals_the_parallel_pass_at_every_position(num_targets, tiny):
    apply, params, _ = tiny
    # PAD within a target too: the cache has to hide it as the parallel pass does.
    tgt = random_tokens(6, 9, seed=6, lengths=[9, 5, 9, 2, 9, 9], bos=True)
    tgt[2, 3:5] = tm.PAD_ID
    # Each source has its own target and, with two, the one of the row above as well.
    targets = [np.roll(tgt, shift, axis=0) for shift in range(num_targets)]
    expected = [apply({"params": params}, SRC, one) for one in targets]
    memory = apply({"params": params}, SRC, method="encode")
    memory_kv = apply({"params": params}, memory, method="project_kv")
    # Garbage in the cache, so that reading a position before it is written shows.
    length = 9 * num_targets
    cache = jax.tree.map(lambda kv: jnp.full((6, 4, length, 4), 1e3), memory_kv)
    tokens = np.stack(targets, axis=1)  # [B, W, L]
    for position in range(9):
        # A target may see the tokens so far that are its own and are not PAD.
        mask = (tokens != tm.PAD_ID) & (np.arange(9) <= position)
        mask = mask[..., None] & np.eye(num_targets, dtype=bool)[None, :, None]
        logits, cache = apply(
            {"params": params},
            tokens[:, :, position],
            memory_kv,
            mask.reshape(6, 1, num_targets, length),
            tm.padding_mask(SRC),
            cache,
            position,
            method="decode",
        )
        assert logits.shape == (6, num_targets, 11)
        for i, one in enumerate(expected):
            np.testing.assert_allclose(logits[:, i], one[:, position], atol=1e-5)


def decoded_without_cache(model, params, src, max_len):
    """Greedy decoding by the parallel forward pass over everything, again and again."""
    apply = jax.jit(model.apply)
    tokens = np.full((len(src), max_len + 1), tm.PAD_ID, np.int32)
    tokens[:, 0] = tm.BOS_ID
    ended = np.zeros(len(src), bool)
    for position in range(max_len):
        logits = apply({"params": params}, src, tokens[:, :-1])
        token = np.array(jnp.argmax(logits[:, position], axis=-1))
        tokens[:, position + 1] = np.where(ended, tm.PAD_ID, token)
        ended |= token == tm.EOS_ID
    return tokens[:, 1:]


def test_greedy_equals_decoding_without_cache(tiny):
    _, params, model = tiny
    expected = decoded_without_cache(model, params, SRC, max_len=12)
    decoded = tm.greedy_decode(model, params, SRC, max_len=12)
    assert decoded.shape == (6, 12) and decoded.dtype == jnp.int32
    np.testing.assert_array_equal(decoded, expected)
    assert len(np.unique(expected, axis=0)) > 1


@pytest.mark.parametrize("tiny", [True], indirect=True)
def test_decoding_past_the_first_length_of_the_cache(tiny):
    _, params, model = tiny
    model = tm.Transformer(dataclasses.replace(model.config, max_len=70))
    expected = decoded_without_cache(model, params, SRC, max_len=70)
    assert max(lengths_of(expected)) == 70
    decoded = tm.greedy_decode(model, params, SRC, max_len=70)
    np.testing.assert_array_equal(decoded, expected)
    tokens, scores = tm.beam_search(model, params, SRC, 70, 2, alpha=0.0)
    for beam in range(2):
        log_p = log_probabilities(model, params, SRC, np.array(tokens[:, beam]))
        kept = np.arange(70) < lengths_of(tokens[:, beam])[:, None]
        np.testing.assert_allclose(scores[:, beam], (log_p * kept).sum(-1), rtol=1e-4)


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


@pytest.mark.parametrize("beam_size", [1, 3])
def test_loop_stops_when_every_row_has_ended(beam_size, monkeypatch):
    positions = []
    decode = tm.Transformer.decode

    def spy(self, tgt, memory_kv, self_mask, memory_mask, cache, position):
        jax.debug.callback(lambda p: positions.append(int(p)), position)
        return decode(self, tgt, memory_kv, self_mask, memory_mask, cache, position)

    src, model, params = SRC[:5], *small_model(6)
    tokens, _ = tm.beam_search(model, params, src, 7, beam_size)
    longest = lengths_of(np.array(tokens)).max()
    assert 1 < longest < 7
    # Another max_len is another function to compile, with the spy in it.
    other = tm.Transformer(dataclasses.replace(SMALL, max_len=8))
    monkeypatch.setattr(tm.Transformer, "decode", spy)
    tm.beam_search(other, params, src, 7, beam_size)[0].block_until_ready()
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


def test_finished_hypotheses_are_neither_lost_nor_extended():
    """What a shorter search finished is still there when the search goes on."""
    src = SRC[:4]
    for seed in SEEDS:
        model, params = small_model(seed)
        for max_len in (2, 4):
            early = tm.beam_search(model, params, src, max_len, 3)
            late = tm.beam_search(model, params, src, 7, 3)
            for row in range(len(src)):
                later = {
                    tuple(t.tolist()): float(s)
                    for t, s in zip(np.array(late[0][row]), late[1][row])
                }
                for t, s in zip(np.array(early[0][row]), early[1][row]):
                    if tm.EOS_ID in t:
                        whole = tuple(np.pad(t, (0, 7 - max_len)).tolist())
                        np.testing.assert_allclose(later[whole], s, atol=1e-5)


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


def test_beam_of_one_is_greedy_and_a_wider_one_scores_no_worse():
    src = SRC[:5]
    for seed in SEEDS:
        model, params = small_model(seed)
        one, score = tm.beam_search(model, params, src, 7, 1, alpha=0.0)
        greedy = tm.greedy_decode(model, params, src, 7)
        np.testing.assert_array_equal(one[:, 0], greedy)
        _, wide = tm.beam_search(model, params, src, 7, 64, alpha=0.0)
        assert (wide[:, 0] >= score[:, 0] - 1e-5).all()


def test_searches_that_cannot_work_are_refused():
    model, params = small_model(0)
    with pytest.raises(ValueError, match="max_len 8 is above the model's 7"):
        tm.greedy_decode(model, params, SRC[:2], max_len=8)
    softmax = tm.Transformer(dataclasses.replace(SMALL, head="softmax"))
    with pytest.raises(ValueError, match="'softmax'"):
        tm.beam_search(softmax, params, SRC[:2], max_len=3)
    with pytest.raises(ValueError, match="max_len 7"):
        tm.greedy_decode(model, params, np.full((2, 8), 3), max_len=3)
