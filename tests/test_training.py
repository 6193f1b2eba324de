"""Section 8: schedule, train state, train step, averaged parameters and eval step."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, random_tokens

import transformer_model as tm

CONFIG = dataclasses.replace(TINY, num_layers=1)
MODEL = tm.Transformer(CONFIG)
WITHOUT_DROPOUT = tm.Transformer(dataclasses.replace(CONFIG, dropout_rate=0.0))
OPTIMIZER = optax.adam(5e-3)
# Made once, so that train_step does not compile for each state anew.
APPLY = {model: model.apply for model in (MODEL, WITHOUT_DROPOUT)}


@functools.cache
def first_state(seed):
    return tm.create_train_state(CONFIG, jax.random.key(seed), OPTIMIZER)


def new_state(seed=0, model=MODEL):
    """A copy, because train_step takes the memory of what it gets."""
    state = first_state(seed).replace(apply_fn=APPLY[model])
    return jax.tree.map(jnp.copy, state)


def make_batch():
    """Four pairs of different lengths, with BOS and EOS."""
    lengths = np.array([9, 5, 7, 3])
    src = random_tokens(4, 8, seed=3, lengths=[8, 4, 6, 2])
    tgt = random_tokens(4, 9, seed=4, lengths=lengths, bos=True)
    tgt[np.arange(4), lengths - 1] = tm.EOS_ID
    return {"src": src, "tgt": tgt}


def to_numpy(tree):
    return jax.tree.map(np.array, tree)


@jax.jit
def log_probabilities(params, batch):
    """What the model gives for each token of the batch, without dropout: [B, T, V]."""
    inputs = batch["src"], batch["tgt"][:, :-1]
    return jax.nn.log_softmax(MODEL.apply({"params": params}, *inputs))


# ---- Learning rate and optimizer -----------------------------------------------------


def test_schedule_before_at_and_after_its_peak():
    rate = tm.paper_schedule(d_model=512, warmup_steps=4000)
    peak = 1 / np.sqrt(512 * 4000)
    np.testing.assert_allclose(rate(0), peak / 4000, rtol=1e-5)  # step 1, not 0
    np.testing.assert_allclose(rate(999), peak / 4, rtol=1e-5)
    np.testing.assert_allclose(rate(3999), peak, rtol=1e-5)
    np.testing.assert_allclose(rate(15999), peak / 2, rtol=1e-5)
    assert (rate(jnp.array([3998, 4000])) < peak).all()
    np.testing.assert_array_equal(tm.paper_schedule(512)(7), rate(7))


@pytest.mark.parametrize("warmup_steps", [None, 100])
def test_papers_optimizer_is_adam_with_that_schedule(warmup_steps):
    """Adam's first step is the learning rate times the sign of the gradient."""
    if warmup_steps is None:  # what a train state gets by default
        create = functools.partial(tm.create_train_state, CONFIG)
        optimizer = jax.eval_shape(create, jax.random.key(0)).tx
    else:
        optimizer = tm.paper_optimizer(16, warmup_steps)
    update = jax.jit(optimizer.update)
    step, opt_state = update(jnp.ones(()), optimizer.init(jnp.ones(())))
    rate = 16**-0.5 * (warmup_steps or 4000) ** -1.5
    np.testing.assert_allclose(step, -rate, rtol=1e-5)
    # b1 = 0.9 and b2 = 0.98, from how the second step forgets the first.
    _, (adam, _) = update(jnp.zeros(()), opt_state)
    np.testing.assert_allclose(adam.mu, 0.1 * 0.9, rtol=1e-5)
    np.testing.assert_allclose(adam.nu, 0.02 * 0.98, rtol=1e-5)
    # eps = 1e-9 halves the step for a gradient of the same size.
    step, _ = update(jnp.float32(1e-9), optimizer.init(jnp.ones(())))
    np.testing.assert_allclose(step, -rate / 2, rtol=1e-3)


# ---- The first state -----------------------------------------------------------------


def test_first_state():
    state, other = new_state(), new_state(seed=1)
    # An int would be another type than the array after a step, and compile twice.
    step = first_state(0).step
    assert isinstance(step, jax.Array) and step.dtype == jnp.int32 and step == 0
    jax.tree.map(np.testing.assert_array_equal, state.average, state.params)
    assert state.dropout_key.dtype == jnp.uint32
    assert (state.dropout_key != other.dropout_key).any()
    assert (state.params["output"] != other.params["output"]).all()


def test_given_parameters_are_the_first_and_stay_the_callers():
    """train_step takes the memory of its state, and could not take any of it twice."""
    given, batch = new_state(seed=1).params, make_batch()
    expected = to_numpy(given)
    for params in (given, to_numpy(given)):
        state = tm.create_train_state(CONFIG, jax.random.key(0), OPTIMIZER, params)
        for copy in (state.params, state.average):
            jax.tree.map(np.testing.assert_array_equal, copy, expected)
        tm.train_step(state.replace(apply_fn=APPLY[MODEL]), batch)
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_random_keys_of_every_kind():
    """The data of a key of rbg are four words. A key of old is an array of two."""
    params, batch = new_state().params, make_batch()
    shapes = jax.tree.map(jnp.shape, params)
    of_rbg = functools.partial(jax.random.key, impl="rbg")
    for make_key in (jax.random.key, jax.random.PRNGKey, of_rbg):
        create = functools.partial(tm.create_train_state, CONFIG)
        drawn = jax.eval_shape(create, make_key(0)).params
        assert jax.tree.map(jnp.shape, drawn) == shapes
        state, other = (create(make_key(i), OPTIMIZER, params) for i in range(2))
        assert (state.dropout_key != other.dropout_key).any()
        state = state.replace(apply_fn=APPLY[MODEL])
        assert np.isfinite(tm.train_step(state, batch)[1]["loss"])


def test_other_heads_cannot_be_trained():
    config = dataclasses.replace(CONFIG, head="softmax")
    with pytest.raises(ValueError, match="head must be .logits.*'softmax'"):
        tm.create_train_state(config, jax.random.key(0))


# ---- One step ------------------------------------------------------------------------


def test_metrics_by_hand():
    """The label of position t is token t + 1, and PAD labels do not count: neither the
    loss of the same position nor a mean over all positions would be this one.
    """
    state, batch = new_state(), make_batch()
    log_p, tgt = np.array(log_probabilities(state.params, batch)), batch["tgt"]
    places = [*itertools.product(range(4), range(8))]
    labels = {(row, i): tgt[row, i + 1] for row, i in places if tgt[row, i + 1] != 0}
    assert len(labels) == 8 + 4 + 6 + 2
    losses = [-log_p[place][label] for place, label in labels.items()]
    hits = [log_p[place].argmax() == label for place, label in labels.items()]
    metrics = tm.eval_step(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(hits), rtol=1e-5)


def test_smoothed_loss_by_hand():
    """Label smoothing gives its share to all classes, the label and PAD among them."""
    default = inspect.signature(tm.train_step).parameters["label_smoothing"].default
    assert default == 0.1
    state, batch = new_state(model=WITHOUT_DROPOUT), make_batch()
    labels = batch["tgt"][:, 1:]
    row, position = np.nonzero(labels)
    log_p = log_probabilities(state.params, batch)[row, position]
    of_labels = log_p[np.arange(len(row)), labels[row, position]]
    expected = -(0.7 * of_labels + 0.3 * log_p.mean(axis=1)).mean()
    # Compiled for the loss alone, which is quicker.
    loss = jax.jit(lambda *args: tm.train_step(*args, 0.3)[1]["loss"])(state, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_step_moves_every_parameter_and_gives_up_the_old_ones():
    state, batch = new_state(), make_batch()
    before = to_numpy(state.params)
    old = state
    state, metrics = tm.train_step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), "not donated"
    assert isinstance(metrics["loss"], jax.Array) and metrics["loss"].shape == ()
    assert int(state.step) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, state.params)
    for path, has_moved in jax.tree_util.tree_leaves_with_path(moved):
        assert has_moved, jax.tree_util.keystr(path)


def test_steps_compile_once():
    state, batch = new_state(), make_batch()
    state, _ = tm.train_step(state, batch)
    compiled = tm.train_step._cache_size()
    for _ in range(2):
        state, _ = tm.train_step(state, batch)
    assert int(state.step) == 3 and tm.train_step._cache_size() == compiled


def test_more_padding_changes_no_metric():
    state, batch = new_state(), make_batch()
    wider = {name: np.pad(x, ((0, 1), (0, 3))) for name, x in batch.items()}
    expected, metrics = tm.eval_step(state, batch), tm.eval_step(state, wider)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


def test_source_of_nothing_but_padding_breaks_no_parameter():
    """Where its scores were -inf, weights and gradients would be NaN."""
    state, batch = new_state(), make_batch()
    batch["src"][1] = tm.PAD_ID
    state, metrics = tm.train_step(state, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, metrics)))


# ---- Dropout -------------------------------------------------------------------------


def test_dropout_is_on_in_training_alone_and_changes_from_step_to_step():
    """The parameters are the same throughout, so only dropout can change the loss."""
    batch = make_batch()

    def loss_of_step(step, seed=0):
        state = new_state().replace(
            step=jnp.int32(step), dropout_key=new_state(seed).dropout_key
        )
        return float(tm.train_step(state, batch)[1]["loss"])

    losses = [loss_of_step(0), loss_of_step(1), loss_of_step(2), loss_of_step(0, 1)]
    assert len(set(losses)) == 4
    assert loss_of_step(1) == losses[1]  # The same state, the same step.

    # Evaluation is the same for all of them, and test_metrics_by_hand has no dropout.
    state = new_state()
    other = state.replace(dropout_key=new_state(1).dropout_key, step=jnp.int32(1))
    assert tm.eval_step(state, batch)["loss"] == tm.eval_step(other, batch)["loss"]


# ---- Averaged parameters, and all together -------------------------------------------


def test_average_by_hand():
    """Step n moves the average by the share 10 / n towards the parameters; the first ten
    steps, all the way.
    """

    def moved(share, old, new):
        return old + share * (new - old)

    state, batch = new_state(), make_batch()
    expected = to_numpy(state.params)
    for n in range(1, 15):
        state, _ = tm.train_step(state, batch)
        params, move = to_numpy(state.params), functools.partial(moved, min(1, 10 / n))
        expected = jax.tree.map(move, expected, params)
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
        jax.tree.map(close, state.average, expected)
    # It has stayed behind the parameters by more than that.
    distance = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, params)
    assert max(jax.tree.leaves(distance)) > 1e-3


def test_eval_step_measures_the_average():
    state, batch = new_state(), make_batch()
    other = new_state(seed=1)
    expected = tm.eval_step(state, batch)
    unchanged = tm.eval_step(state.replace(params=other.params), batch)
    assert unchanged == expected
    changed = tm.eval_step(state.replace(average=other.params), batch)
    assert changed["loss"] != expected["loss"]
    assert changed == tm.eval_step(other, batch)


def test_fixed_batch_is_learnt_by_heart_and_decoded():
    """With everything on, and with the averaged parameters, as programs do it."""
    state, batch = new_state(), make_batch()
    for _ in range(300):
        state, _ = tm.train_step(state, batch)
    metrics = tm.eval_step(state, batch)
    # Smoothing wants 0.1 for all 11 classes together, which leaves -ln 0.91.
    assert metrics["loss"] < 0.2 and metrics["accuracy"] == 1
    decoded = tm.greedy_decode(MODEL, state.average, batch["src"], max_len=8)
    np.testing.assert_array_equal(decoded, batch["tgt"][:, 1:])
