"""Times transformer_model.py against its peers and prints the results as one table.

    pip install torch transformers            the peers (CPU: torch's CPU build will do)
    python tests/benchmark.py                 everything
    python tests/benchmark.py --only train,rate --rounds 5

All run on the same device, in float32, on the same sizes and with all processor cores.
Contenders take turns, round after round. A ratio is ours to theirs (ours / theirs), the
median of the rounds' ratios, with their middle half in brackets. A peer that is not
installed is left out.

    train     a training step: forward, backward, Adam; dropout 0.1, smoothing 0.1
    decode    greedy and beam search with caches, as many tokens in every row
    rate      operations per second, in a training step and in bare matrix products
    tokens    time per new token of greedy decoding, for longer and longer outputs
    compile   what a first call takes more than the next, without and with JAX's
              persistent compilation cache
    memory    what a process that trains takes at most; against that, four times the
              parameters: themselves, their gradients, and Adam's two moments
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import transformer_model as tm

SMALL = {"d_model": 128, "num_heads": 4, "num_layers": 2, "d_ff": 512}
SIZES = {  # the model, the batch size, and the length of both sources and targets
    "base": (tm.TransformerConfig(8000, 8000), 16, 64),
    "small": (tm.TransformerConfig(64, 64, **SMALL), 64, 16),
}
DROPOUT, SMOOTHING, EPSILON = 0.1, 0.1, 1e-6
LEARNING_RATE, BETAS, ADAM_EPSILON = 1e-4, (0.9, 0.98), 1e-9

# ---- Taking turns, and the table -----------------------------------------------------


def print_row(work, ours, against, theirs="", ratio=""):
    print(f"{work:<21} {ours:>9}  {against:<19} {theirs:>9}  {ratio}", flush=True)


def duration(seconds):
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def ratio(ours, theirs, form=".2f"):
    low, middle, high = np.percentile(np.divide(ours, theirs), [25, 50, 75])
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(runs, rounds):
    """Dict of functions that work and wait -> dict of their seconds in every round."""
    times, calls, names = {name: [] for name in runs}, {}, list(runs)
    for name, run in runs.items():
        run()  # compiles
        calls[name] = max(1, round(0.3 / timed(run)))  # so that no turn is too short
    for first in range(rounds):
        for name in np.roll(names, -first).tolist():
            turn = [timed(runs[name]) for _ in range(calls[name])]
            times[name].append(np.mean(turn))
    return times


def compare(work, ours, peers, rounds):
    """Prints a row for each peer; `peers` is a dict of functions that make its `run`."""
    runs, left_out = {"ours": ours}, {}
    for name, make in peers.items():
        try:
            run = make()
            run()
            runs[name] = run
        except ImportError as error:
            left_out[name] = f"left out: no {error.name}"
        except Exception:  # such as no C++ compiler for torch.compile
            traceback.print_exc()
            left_out[name] = "left out: does not run"
    times = take_turns(runs, rounds)
    ours = duration(np.median(times["ours"]))
    for name in peers:
        if name in left_out:
            print_row(work, ours, name, left_out[name])
        else:
            theirs = duration(np.median(times[name]))
            print_row(work, ours, name, theirs, ratio(times["ours"], times[name]))


def random_tokens(batch_size, length):
    """Symbols of both vocabularies, without PAD: int32 [batch_size, length]."""
    rng, symbols = np.random.default_rng(0), (tm.FIRST_SYMBOL_ID, 64)
    return rng.integers(*symbols, (batch_size, length), np.int32)


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


@functools.cache
def num_params(config):
    tokens, key = jnp.ones((1, 1), int), jax.random.key(0)
    return count(jax.eval_shape(tm.Transformer(config).init, key, tokens, tokens))


def positions(config, length):
    zeros = jnp.zeros((1, length, config.d_model))
    return np.asarray(tm.PositionalEncoding(config).apply({}, zeros))


# ---- Training: ours, Flax's own layers, torch's own layers ---------------------------


def our_training(config, src, tgt):
    optimizer = optax.adam(LEARNING_RATE, *BETAS, ADAM_EPSILON)
    state = tm.create_train_state(config, jax.random.key(0), optimizer)
    batch = {"src": jnp.asarray(src), "tgt": jnp.asarray(tgt)}

    def run():
        nonlocal state
        state, metrics = tm.train_step(state, batch, SMOOTHING)
        jax.block_until_ready((state, metrics))

    return run


class FlaxBlock(nn.Module):
    """An encoder block; with a memory, a decoder block."""

    config: tm.TransformerConfig

    @nn.compact
    def __call__(self, x, mask, memory=None, memory_mask=None):
        def add_and_norm(x, y):
            y = nn.Dropout(DROPOUT, deterministic=False)(y)
            return nn.LayerNorm(EPSILON)(x + y)

        def attention(*inputs, mask):
            heads = self.config.num_heads
            return nn.MultiHeadDotProductAttention(heads)(*inputs, mask=mask)

        x = add_and_norm(x, attention(x, mask=mask))
        if memory is not None:
            x = add_and_norm(x, attention(x, memory, mask=memory_mask))
        y = nn.Dense(self.config.d_model)(nn.relu(nn.Dense(self.config.d_ff)(x)))
        return add_and_norm(x, y)


class FlaxTransformer(nn.Module):
    config: tm.TransformerConfig

    @nn.compact
    def __call__(self, src, tgt):
        config, width = self.config, self.config.d_model
        normal = nn.initializers.normal(width**-0.5)
        embed = nn.Embed(config.tgt_vocab_size, width, embedding_init=normal)

        def enter(tokens):
            x = embed(tokens) * width**0.5 + positions(config, tokens.shape[1])
            return nn.Dropout(DROPOUT, deterministic=False)(x)

        def mask(queries, keys):
            return nn.make_attention_mask(jnp.ones_like(queries), keys != tm.PAD_ID)

        memory, x = enter(src), enter(tgt)
        for _ in range(config.num_layers):
            memory = FlaxBlock(config)(memory, mask(src, src))
        self_mask = nn.combine_masks(mask(tgt, tgt), nn.make_causal_mask(tgt))
        for _ in range(config.num_layers):
            x = FlaxBlock(config)(x, self_mask, memory, mask(tgt, src))
        return embed.attend(x)


def flax_training(config, src, tgt):
    model, key = FlaxTransformer(config), jax.random.key(0)
    src, inputs, labels = map(jnp.asarray, (src, tgt[:, :-1], tgt[:, 1:]))
    params = jax.jit(model.init)({"params": key, "dropout": key}, src, inputs)["params"]
    optimizer = optax.adam(LEARNING_RATE, *BETAS, ADAM_EPSILON)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    assert count(params) == num_params(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, src, inputs, labels):
        def loss_fn(params):
            rngs = {"dropout": jax.random.fold_in(key, state.step)}
            logits = state.apply_fn({"params": params}, src, inputs, rngs=rngs)
            targets = jax.nn.one_hot(labels, config.tgt_vocab_size)
            targets = optax.smooth_labels(targets, SMOOTHING)
            losses = optax.softmax_cross_entropy(logits, targets)
            is_label, hits = labels != tm.PAD_ID, logits.argmax(-1) == labels
            return losses.mean(where=is_label), hits.mean(where=is_label)

        metrics, gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients), metrics

    def run():
        nonlocal state
        state, metrics = train_step(state, src, inputs, labels)
        jax.block_until_ready((state, metrics))

    return run


def setup_torch():
    """Returns torch, and the device that is JAX's."""
    import torch

    torch.set_num_threads(os.cpu_count())
    if jax.default_backend() != "gpu":
        return torch, "cpu"
    torch.set_float32_matmul_precision("high")  # TensorFloat-32, JAX's default
    return torch, "cuda"


def torch_training(config, src, tgt, is_compiled):
    torch, device = setup_torch()
    heads, layers, width = config.num_heads, config.num_layers, config.d_model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            stacks = torch.nn.Transformer(
                *(width, heads, layers, layers, config.d_ff, DROPOUT),
                layer_norm_eps=EPSILON,
                batch_first=True,
            )
            # Post-norm ends in no other norm; dropout is only where the paper has it.
            stacks.encoder.norm = stacks.decoder.norm = None
            for layer in (*stacks.encoder.layers, *stacks.decoder.layers):
                layer.dropout = torch.nn.Identity()
                layer.self_attn.dropout = 0.0
            for layer in stacks.decoder.layers:
                layer.multihead_attn.dropout = 0.0
            self.stacks, self.dropout = stacks, torch.nn.Dropout(DROPOUT)
            self.embedding = torch.nn.Embedding(config.tgt_vocab_size, width)
            torch.nn.init.normal_(self.embedding.weight, std=width**-0.5)
            length = src.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).triu(1)
            self.register_buffer("causal", causal)
            table = torch.tensor(positions(config, length))
            self.register_buffer("positions", table)

        def forward(self, src, tgt):
            def enter(tokens):
                x = self.embedding(tokens) * width**0.5 + self.positions
                return self.dropout(x)

            inputs, labels = tgt[:, :-1], tgt[:, 1:]
            src_pad = src == tm.PAD_ID
            x = self.stacks(
                *(enter(src), enter(inputs)),
                tgt_mask=self.causal,
                src_key_padding_mask=src_pad,
                tgt_key_padding_mask=inputs == tm.PAD_ID,
                memory_key_padding_mask=src_pad,
            )
            logits = x @ self.embedding.weight.T
            loss = torch.nn.functional.cross_entropy(
                *(logits.flatten(0, 1), labels.flatten()),
                ignore_index=tm.PAD_ID,
                label_smoothing=SMOOTHING,
            )
            return loss, (logits.argmax(-1) == labels)[labels != tm.PAD_ID].sum()

    model = Model().to(device)
    assert sum(x.numel() for x in model.parameters()) == num_params(config)
    adam = {"lr": LEARNING_RATE, "betas": BETAS, "eps": ADAM_EPSILON}
    optimizer = torch.optim.Adam(model.parameters(), fused=True, **adam)
    forward = torch.compile(model) if is_compiled else model
    src, tgt = (torch.tensor(x, dtype=torch.long, device=device) for x in (src, tgt))

    def run():
        optimizer.zero_grad()
        forward(src, tgt)[0].backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def train(sizes, rounds):
    for size, (config, batch_size, length) in sizes.items():
        src, tgt = (random_tokens(batch_size, length + extra) for extra in (0, 1))
        job = config, src, tgt
        peers = {
            "Flax's own layers": functools.partial(flax_training, *job),
            "torch, eager": functools.partial(torch_training, *job, False),
            "torch, compiled": functools.partial(torch_training, *job, True),
        }
        compare(f"train step, {size}", our_training(*job), peers, rounds)


# ---- Decoding: ours, and Marian of Hugging Face's transformers -----------------------


def our_decoding(config, src, num_tokens, beam_size=1):
    model, src = tm.Transformer(config), jnp.asarray(src)
    params = jax.jit(model.init)(jax.random.key(0), src, src)["params"]
    # The special tokens, EOS among them, get a logit of 0: never one of the highest.
    params["embedding"] = params["embedding"].at[: tm.FIRST_SYMBOL_ID].set(0)

    def run():
        if beam_size == 1:
            tokens = tm.greedy_decode(model, params, src, num_tokens)
        else:
            tokens, _ = tm.beam_search(model, params, src, num_tokens, beam_size)
        assert np.min(tokens) >= tm.FIRST_SYMBOL_ID, "a row ended early"

    return run


def marian_decoding(config, src, num_tokens, beam_size):
    torch, device = setup_torch()
    import transformers

    stacks = {}
    for stack in ("encoder", "decoder"):
        stacks[f"{stack}_layers"] = config.num_layers
        stacks[f"{stack}_attention_heads"] = config.num_heads
        stacks[f"{stack}_ffn_dim"] = config.d_ff
    marian_config = transformers.MarianConfig(
        **stacks,
        vocab_size=config.tgt_vocab_size,
        d_model=config.d_model,
        max_position_embeddings=config.max_len,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=tm.PAD_ID,
        bos_token_id=tm.BOS_ID,
        decoder_start_token_id=tm.BOS_ID,
        eos_token_id=tm.EOS_ID,
        forced_eos_token_id=None,
    )
    model = transformers.MarianMTModel(marian_config).eval().to(device)
    src = torch.tensor(src, dtype=torch.long, device=device)
    options = {"num_beams": beam_size, "do_sample": False, "use_cache": True}
    options |= {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}

    @torch.no_grad()
    def run():
        mask = torch.ones_like(src)
        tokens = model.generate(src, attention_mask=mask, **options)[:, 1:].cpu()
        assert tokens.shape[1] == num_tokens and (tokens != tm.EOS_ID).all()

    return run


def decode(sizes, rounds):
    for size, (config, batch_size, length) in sizes.items():
        src = random_tokens(batch_size, length)
        for beam_size, name in ((1, "greedy"), (4, "beam of 4")):
            job = config, src, length, beam_size
            peers = {"Marian.generate": functools.partial(marian_decoding, *job)}
            compare(f"{name}, {size}", our_decoding(*job), peers, rounds)


# ---- Ours against the machine, and against itself; all at the base size --------------


def num_operations(config, batch_size, length):
    """Multiplications and additions in all matrix products of a training step."""
    width = config.d_model
    attention = 4 * width**2 + 2 * length * width  # query, key, value, output; Eq. 1
    feed_forward = 2 * width * config.d_ff
    blocks = config.num_layers * (3 * attention + 2 * feed_forward)
    multiply_adds = blocks + width * config.tgt_vocab_size  # for a source and a target
    # Every product of the forward pass has two in the backward pass.
    return 3 * 2 * multiply_adds * batch_size * length


def bare_product(rows, width, inner, times, dtype):
    """Returns a `run` that computes x W_1 W_2, `times` over, and its operations."""
    shapes = (rows, width), (width, inner), (inner, width)
    x, w_1, w_2 = (
        jax.random.normal(jax.random.key(0), shape, dtype) / shape[0] ** 0.5
        for shape in shapes
    )

    @jax.jit
    def chain(x, w_1, w_2):
        return jax.lax.fori_loop(0, times, lambda _, x: x @ w_1 @ w_2, x)

    operations = 2 * 2 * rows * width * inner * times
    return lambda: chain(x, w_1, w_2).block_until_ready(), operations


def rate(sizes, rounds):
    config, batch_size, length = sizes["base"]
    src, tgt = (random_tokens(batch_size, length + extra) for extra in (0, 1))
    step = our_training(config, src, tgt), num_operations(config, batch_size, length)
    chain = bare_product(1024, 512, 2048, 32, config.dtype)
    square = bare_product(4096, 4096, 4096, 1, config.dtype)
    jobs = {"step": step, "chain": chain, "square": square}
    times = take_turns({name: run for name, (run, _) in jobs.items()}, rounds)
    rates = {name: jobs[name][1] / np.array(times[name]) for name in jobs}
    best = max(rates["chain"], rates["square"], key=np.median)
    ours, theirs = (f"{np.median(x) / 1e9:,.0f} G/s" for x in (rates["step"], best))
    share = ratio(rates["step"], best, ".0%")
    print_row("train step, base", ours, "bare product", theirs, share)


def tokens(sizes, rounds):
    config, batch_size, length = sizes["base"]
    src, lengths = random_tokens(batch_size, length), (32, 64, 128, 256)
    times = take_turns({n: our_decoding(config, src, n) for n in lengths}, rounds)
    each = {n: np.array(times[n]) / n for n in lengths}
    for n in lengths[1:]:
        ours, theirs = (duration(np.median(each[i])) for i in (n, lengths[0]))
        work, against = (f"per token, {i} tokens" for i in (n, lengths[0]))
        print_row(work, ours, against, theirs, ratio(each[n], each[lengths[0]]))


def first_calls(config, batch_size, length):
    """Returns how much more seconds first calls take, and the memory of training."""
    device = jax.local_devices()[0]

    def bytes_used(now_or_peak):
        if stats := device.memory_stats():  # not on a CPU
            return stats[
                {"now": "bytes_in_use", "peak": "peak_bytes_in_use"}[now_or_peak]
            ]
        if sys.platform != "linux":
            return float("nan")
        field = {"now": "VmRSS:", "peak": "VmHWM:"}[now_or_peak]
        status = Path("/proc/self/status").read_text().split()
        return 1024 * int(status[status.index(field) + 1])

    src, tgt = (random_tokens(batch_size, length + extra) for extra in (0, 1))
    before = bytes_used("now")
    run = our_training(config, src, tgt)
    result = {"train step": timed(run) - timed(run)}
    result["memory"] = bytes_used("peak") - before
    run = our_decoding(config, src, length)
    return {**result, "greedy": timed(run) - timed(run)}


def in_new_process(config, cache=None):
    """Returns what `first_calls` returns, of a new process."""
    env = dict(os.environ, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = cache
    command = [sys.executable, __file__, "--first-calls"]
    command += ["--bf16"] * (config.dtype == jnp.bfloat16)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def compilation(sizes, rounds):
    config = sizes["base"][0]
    with tempfile.TemporaryDirectory() as cache:
        in_new_process(config, cache)  # fills it
        caches = [None, cache] * min(rounds, 3)
        results = [in_new_process(config, cache) for cache in caches]
    for name in ("train step", "greedy"):
        times = [result[name] for result in results]
        without, cached = times[::2], times[1::2]
        ours, theirs = (duration(np.median(x)) for x in (without, cached))
        quotient = ratio(without, cached, ".1f")
        print_row(f"compile {name}", ours, "JAX's cache", theirs, quotient)


def memory(sizes, rounds):
    config = sizes["base"][0]
    with tempfile.TemporaryDirectory() as cache:
        in_new_process(config, cache)  # compiles, which also takes memory
        result = in_new_process(config, cache)
    least = 4 * 4 * num_params(config)  # four times float32
    ours, theirs = (f"{x / 1e6:,.0f} MB" for x in (result["memory"], least))
    quotient = f"{result['memory'] / least:.2f}"
    print_row("memory of training", ours, "4 x parameters", theirs, quotient)


# ---- Command line --------------------------------------------------------------------

WORKS = {
    "train": train,
    "decode": decode,
    "rate": rate,
    "tokens": tokens,
    "compile": compilation,
    "memory": memory,
}


def machine():
    device = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        device = platform.processor() or platform.machine()
        with contextlib.suppress(OSError):
            names = Path("/proc/cpuinfo").read_text().partition("model name")[2]
            device = names.partition("\n")[0].strip("\t :") or device
        device += f", {os.cpu_count()} cores"
    versions = []
    for name in ("jax", "flax", "optax", "torch", "transformers"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{device}\n{', '.join(versions)}"


def main():
    parser = argparse.ArgumentParser(description="Compares the model with its peers.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default 9")
    parser.add_argument(
        "--only", metavar="WORK[,WORK...]", help="of " + ", ".join(WORKS)
    )
    parser.add_argument("--bf16", action="store_true", help="ours in bfloat16")
    parser.add_argument("--first-calls", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(WORKS)
    if unknown := set(names) - set(WORKS):
        parser.error(f"--only: no {', '.join(unknown)} among {', '.join(WORKS)}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    sizes = dict(SIZES)
    if args.bf16:
        for name, (config, *lengths) in SIZES.items():
            config = dataclasses.replace(config, dtype=jnp.bfloat16)
            sizes[name] = config, *lengths
    if args.first_calls:
        print(json.dumps(first_calls(*sizes["base"])))
        return
    print(machine())
    precision = "ours bfloat16, peers float32" if args.bf16 else "float32"
    for size, (config, batch_size, length) in sizes.items():
        print(
            f"{size}: {config.num_layers} layers, {config.d_model} wide, vocabulary "
            f"{config.tgt_vocab_size}, batch {batch_size} x {length} tokens, {precision}"
        )
    print()
    print_row("work", "ours", "against", "theirs", f"ratio ({args.rounds} rounds)")
    for name in names:
        WORKS[name](sizes, args.rounds)


if __name__ == "__main__":
    main()
