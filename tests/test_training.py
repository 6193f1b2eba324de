"""Section 8: schedule, train state, train step and eval step."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, random_tokens

import transformer_model as tm

CONFIG = dataclasses.replace(TINY, num_layers=1)
OPTIMIZER = optax.adam(5e-3)


@functools.cache
def apply_fn(config):
    return tm.Transformer(config).apply


@functools.cache
def jitted_apply():
    return jax.jit(apply_fn(CONFIG))


@functools.cache
def first_state(seed, config, optimizer):
    state = tm.create_train_state(config, jax.random.key(seed), optimizer)
    # The same function and optimizer, so that train_step does not compile again.
    return state.replace(apply_fn=apply_fn(config))


def new_state(seed=0, optimizer=OPTIMIZER, **change):
    """A copy, because train_step takes the memory of what it gets."""
    state = first_state(seed, dataclasses.replace(CONFIG, **change), optimizer)
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), state)


def make_batch():
    lengths = np.array([9, 5, 7, 3])
    src = random_tokens(4, 8, seed=3, lengths=[8, 4, 6, 2])
    tgt = random_tokens(4, 9, seed=4, lengths=lengths, bos=True)
    tgt[np.arange(4), lengths - 1] = tm.EOS_ID
    return {"src": src, "tgt": tgt}


def test_schedule_before_at_and_after_its_peak():
    rate = tm.paper_schedule(d_model=512, warmup_steps=4000)
    peak = 1 / np.sqrt(512 * 4000)
    np.testing.assert_allclose(rate(0), peak / 4000, rtol=1e-5)  # step 1, not 0
    np.testing.assert_allclose(rate(999), peak / 4, rtol=1e-5)
    np.testing.assert_allclose(rate(3999), peak, rtol=1e-5)
    np.testing.assert_allclose(rate(15999), peak / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(jnp.array([3998, 4000])) < peak, True)


def test_default_optimizer_is_the_papers():
    """Adam's first step is the learning rate times the sign of the gradient."""
    optimizer = tm.create_train_state(CONFIG, jax.random.key(0)).tx
    update = jax.jit(optimizer.update)
    step, opt_state = update(jnp.ones(()), optimizer.init(jnp.ones(())))
    np.testing.assert_allclose(step, -(16**-0.5) * 4000**-1.5, rtol=1e-5)
    # b2 = 0.98 and b1 = 0.9, from how the second step forgets the first.
    _, (adam, _) = update(jnp.zeros(()), opt_state)
    np.testing.assert_allclose(adam.mu, 0.1 * 0.9, rtol=1e-5)
    np.testing.assert_allclose(adam.nu, 0.02 * 0.98, rtol=1e-5)


def test_other_heads_cannot_be_trained():
    with pytest.raises(ValueError, match="head must be .logits.*'softmax'"):
        new_state(head="softmax")


def test_step_moves_every_parameter_once_and_compiles_once():
    state, batch = new_state(), make_batch()
    before = jax.tree.map(jnp.copy, state.params)
    old = state
    state, _ = tm.train_step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), "not donated"
    compiled = tm.train_step._cache_size()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, state.params)
    for path, has_moved in jax.tree_util.tree_leaves_with_path(moved):
        # What is added to all keys shifts a query's scores alike, and softmax not.
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            assert has_moved, jax.tree_util.keystr(path)
    for _ in range(2):
        state, metrics = tm.train_step(state, batch)
    assert int(state.step) == 3 and tm.train_step._cache_size() == compiled
    assert isinstance(metrics["loss"], jax.Array) and metrics["loss"].shape == ()


def test_metrics_by_hand():
    """The label of position t is token t + 1, and PAD labels do not count."""
    state, batch = new_state(), make_batch()
    metrics = tm.eval_step(state, batch)
    tgt = batch["tgt"]
    logits = jitted_apply()({"params": state.params}, batch["src"], tgt[:, :-1])
    losses, hits = [], []
    for row in range(4):
        for position in range(8):
            label = tgt[row, position + 1]
            if label != tm.PAD_ID:
                scores = np.float64(logits[row, position])
                losses.append(np.log(np.exp(scores).sum()) - scores[label])
                hits.append(scores.argmax() == label)
    assert len(losses) == 8 + 4 + 6 + 2
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(hits), rtol=1e-5)


def test_more_padding_changes_no_metric():
    state, batch = new_state(), make_batch()
    wider = {name: np.pad(x, ((0, 1), (0, 3))) for name, x in batch.items()}
    expected, metrics = tm.eval_step(state, batch), tm.eval_step(state, wider)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


def test_training_has_smoothing_and_dropout_and_evaluation_has_not():
    batch = make_batch()
    plain = float(tm.eval_step(new_state(), batch)["loss"])
    smoothed = float(tm.train_step(new_state(dropout_rate=0.0), batch)[1]["loss"])
    by_default = float(tm.train_step(new_state(), batch)[1]["loss"])
    # The smoothed loss by hand: a tenth of it is that of an even guess at every label.
    state, tgt = new_state(), batch["tgt"]
    logits = jitted_apply()({"params": state.params}, batch["src"], tgt[:, :-1])
    log_p = np.array(jax.nn.log_softmax(logits))[tgt[:, 1:] != tm.PAD_ID]
    expected = 0.9 * plain - 0.1 * log_p.mean()
    np.testing.assert_allclose(smoothed, expected, rtol=1e-5)
    assert by_default != smoothed != plain  # dropout; smoothing
    exact = float(tm.train_step(new_state(dropout_rate=0.0), batch, 0.0)[1]["loss"])
    np.testing.assert_allclose(exact, plain, rtol=1e-6)


def test_masks_of_dropout_change_from_step_to_step():
    """With an optimizer that changes nothing, only the dropout masks change the loss."""
    batch, losses = make_batch(), []
    state = new_state(optimizer=optax.set_to_zero())
    for _ in range(3):
        state, metrics = tm.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_same_seed_same_run():
    batch = make_batch()

    def run(seed):
        state, losses = new_state(seed), []
        for _ in range(3):
            state, metrics = tm.train_step(state, batch)
            losses.append(float(metrics["loss"]))
        return losses

    assert run(0) == run(0)
    assert not set(run(0)) & set(run(1))


def test_fixed_batch_is_learnt_by_heart_and_decoded():
    state, batch = new_state(dropout_rate=0.0), make_batch()
    for _ in range(150):
        state, _ = tm.train_step(state, batch, 0.0)
    metrics = tm.eval_step(state, batch)
    assert metrics["loss"] < 0.02 and metrics["accuracy"] == 1
    model = tm.Transformer(dataclasses.replace(CONFIG, dropout_rate=0.0))
    decoded = tm.greedy_decode(model, state.params, batch["src"], max_len=8)
    np.testing.assert_array_equal(decoded, batch["tgt"][:, 1:])


def test_batch_that_does_not_fit_is_refused():
    state, batch = new_state(), make_batch()
    src, tgt = batch["src"], batch["tgt"]
    for wrong, message in [
        ({"tgt": tgt[:3]}, r"\(4, 8\) and \(3, 8\)"),
        ({"src": src.astype(np.float32)}, r"integers.*float32 \(4, 8\)"),
        ({"tgt": tgt.astype(np.float32)}, r"integers.*float32 \(4, 8\)"),
        ({"src": src[:0], "tgt": tgt[:0]}, r"integers.*\(0, 8\)"),
        ({"src": src[:, :0]}, r"integers.*\(4, 0\)"),
        ({"tgt": tgt[:, :1]}, r"integers.*\(4, 0\)"),
    ]:
        for step in (tm.train_step, tm.eval_step):
            with pytest.raises(ValueError, match=message):
                step(state, {**batch, **wrong})
    for share in (-0.1, 1.5):
        with pytest.raises(
            ValueError, match=f"label_smoothing must be 0 to 1.*{share}"
        ):
            tm.train_step(state, batch, share)


def test_batch_with_a_token_outside_the_vocabulary_has_a_nan_loss():
    for name, place in (("src", (0, 1)), ("tgt", (0, 3)), ("tgt", (0, 8))):
        for token in (-1, 11):
            batch = make_batch()
            batch[name][place] = token
            assert np.isnan(tm.eval_step(new_state(), batch)["loss"])


def test_label_smoothing_is_the_papers_by_default():
    parameters = inspect.signature(tm.train_step).parameters
    assert parameters["label_smoothing"].default == 0.1
