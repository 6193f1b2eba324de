"""What the tests share: the path to the module, a compilation cache, a tiny model.

The model, its training and its search (test_shapes_and_masks.py, test_model.py,
test_training.py and test_inference.py) are tested as users run them, with all of XLA's
optimisations. What is around them, text, data and the program, may ask for the fixture
`without_optimizations`: then XLA compiles in less than half of the time, and programs
that a test starts do so if they get WITHOUT_OPTIMIZATIONS in their environment.
"""

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

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_model as tm

# Accelerators round the inputs of float32 products to fewer bits unless told not to.
jax.config.update("jax_default_matmul_precision", "highest")

WITHOUT_OPTIMIZATIONS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

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


def random_params(module, *inputs, seed=0):
    """Draws parameters for a module, none of them zero or one, without compiling its
    initialisation.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, x):
        noise = rng.normal(size=x.shape)
        if x.ndim == 2:  # a kernel or an embedding
            noise /= np.sqrt(x.shape[1])
        else:
            noise = noise / 2 + (path[-1].key == "scale")
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session", params=[False, True], ids=["post-norm", "pre-norm"])
def tiny(request):
    """A tiny model with random parameters: (jitted apply, params, model).

    One layer is enough to see through masks, and saves compilation.
    """
    config = tm.dataclasses.replace(TINY, norm_first=request.param, num_layers=1)
    model = tm.Transformer(config)
    apply = jax.jit(model.apply, static_argnames=("method", "mutable"))
    tokens = random_tokens(1, 3)
    return apply, random_params(model, tokens, tokens), model


@pytest.fixture(scope="module")
def without_optimizations():
    """Makes XLA leave out most optimisations while the tests of a module run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # jit would give what was compiled here to the tests after these.
    jax.clear_caches()


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
    """Writes the pairs to a file of lines source<TAB>target, and returns its path."""
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return path


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: item.path.name != "test_program.py")
