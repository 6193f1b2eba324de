"""What the tests share: the path to the module, a compilation cache, a tiny model."""

import functools
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Compilation is most of the time of the tests. The cache serves all workers, and the
# processes that the tests start as well. It is empty again for the next run.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# It is also less than half as long if XLA does not optimise. Set this to 0 to test the
# code as it runs outside of the tests.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import optax
import pytest

# Equal schedules and optimizers shall be one object: jit traces train_step and
# eval_step again for another one.
for _name in ("warmup_cosine_decay_schedule", "adam"):
    setattr(optax, _name, functools.cache(getattr(optax, _name)))

import transformer_model as tm

# Accelerators round the inputs of float32 products to fewer bits unless told not to.
jax.config.update("jax_default_matmul_precision", "highest")

VOCAB = 11
TINY = tm.TransformerConfig(
    src_vocab_size=VOCAB,
    tgt_vocab_size=VOCAB,
    d_model=16,
    num_heads=4,
    num_layers=2,
    d_ff=32,
    max_len=12,
    # Untrained, a shared matrix makes every token's likeliest successor itself.
    share_embeddings=False,
)


def randomized(params, seed=0):
    """Adds noise to all parameters, also to the zeros and ones they start with."""
    rng = np.random.default_rng(seed)

    def add_noise(x):
        # Much of it where tokens meet, so that outputs depend on their inputs; little
        # in biases and LayerNorm, which would favour one token whatever the input.
        scale = 0.7 if x.ndim > 1 else 0.1
        return x + scale * rng.standard_normal(x.shape).astype(np.float32)

    return jax.tree.map(add_noise, params)


def random_tokens(rows, length, seed=0, lengths=None, bos=False):
    """Random symbols, int32 [rows, length], PAD from `lengths` on."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(tm.FIRST_SYMBOL_ID, VOCAB, (rows, length), dtype=np.int32)
    if bos:
        tokens[:, 0] = tm.BOS_ID
    if lengths is not None:
        tokens[np.arange(length) >= np.array(lengths)[:, None]] = tm.PAD_ID
    return tokens


@pytest.fixture(scope="session", params=[False, True], ids=["post-norm", "pre-norm"])
def tiny(request):
    """A tiny model with random parameters: (jitted apply, params, model).

    Post-norm has two layers, and pre-norm one, which saves compilation. Deeper models
    of both are in test_reference.py.
    """
    layers = 1 if request.param else 2
    config = tm.dataclasses.replace(TINY, norm_first=request.param, num_layers=layers)
    model = tm.Transformer(config)
    src, tgt = random_tokens(1, 3), random_tokens(1, 3)
    params = randomized(jax.jit(model.init)(jax.random.key(0), src, tgt)["params"])
    return jax.jit(model.apply, static_argnames=("method", "mutable")), params, model


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: item.path.name != "test_scaling.py")


# The smallest model of the command line. Its tokens are bytes, and with so short pairs
# all batches have one shape.
OPTIONS = ["--d-model", "16", "--num-heads", "2", "--num-layers", "1", "--max-len", "7"]
LEARN = [*OPTIONS, "--batch-size", "16", "--vocab-size", "259"]


def run(capsys, *args):
    """Runs `main` in this process: (status, stdout, stderr)."""
    status = tm.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(result, *words, status=2):
    """One line on stderr with all the words in it, and nothing on stdout."""
    returned, out, err = result
    assert returned == status, err
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err


def write_pairs(path, pairs):
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return path


@pytest.fixture
def without_evaluation(monkeypatch):
    """For tests of training and saving: half of what a run compiles is to measure it."""
    monkeypatch.setattr(tm, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(tm, "show_attention", lambda *_: None)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    return write_pairs(path, tm.demo_pairs(200, 7, seed=0))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, pairs_file):
    """A checkpoint of a model that has hardly learnt anything."""
    path = tmp_path_factory.mktemp("model") / "model.msgpack"
    args = ["--pairs", pairs_file, "--checkpoint", path, "--steps", 5, *LEARN]
    assert tm.main([str(arg) for arg in args]) == 0
    return path
