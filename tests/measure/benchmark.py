"""Times transformer_model.py against its peers and prints the results as one table.

    pip install torch transformers ctranslate2      the peers (torch for CPUs will do)
    python tests/measure/benchmark.py               everything, or what --only chooses:

    train     a training step: forward, backward, Adam; dropout 0.1, smoothing 0.1
    decode    greedy and beam search with caches, as many tokens in every row; beside
              Marian of Hugging Face's transformers, and CTranslate2 with our weights
    rate      operations per second in a training step, and in bare matrix products
    tokens    time per new token in greedy decoding, the encoder's part included, for
              longer and longer outputs
    compile   what a first call takes more than the next, without and with JAX's
              persistent compilation cache
    memory    the most that training takes, and four times the parameters: themselves,
              their gradients, Adam's two moments

All run on the same device, in float32, with all processor cores, on the same sizes, and
take turns, of which the first call does not count. A ratio is ours / theirs: the median
of the rounds' ratios and, in brackets, their middle half. All models of the training
step have as many parameters. Let nothing else run: it slows the peers down more than JAX.
"""

import argparse
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
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import transformer_model as tm


def vocabulary(size):
    return {"src_vocab_size": size, "tgt_vocab_size": size}


SMALL = {"d_model": 128, "num_heads": 4, "num_layers": 2, "d_ff": 512}
SIZES = {  # the model, the batch size, and the length of both source and target
    "base": (tm.TransformerConfig(**vocabulary(8000)), 16, 64),
    "small": (tm.TransformerConfig(**vocabulary(64), **SMALL), 64, 16),
}
DROPOUT, SMOOTHING, EPSILON = 0.1, 0.1, 1e-6
PROJECTIONS = "query", "key", "value", "output"
LEARNING_RATE, BETAS, ADAM_EPSILON = 1e-4, (0.9, 0.98), 1e-9

# ---- Taking turns, and the table -----------------------------------------------------


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(runs, rounds):
    """Dict of functions that work and wait -> dict of their seconds in each round."""
    times, calls, names = {name: [] for name in runs}, {}, list(runs)
    for name, run in runs.items():
        run()  # compiles
        calls[name] = max(1, round(0.3 / timed(run)))  # so that no turn is too short
    for first in range(rounds):
        for name in np.roll(names, -first).tolist():
            run = runs[name]
            run()  # gets back the memory that it has lost since its last turn
            times[name].append(np.mean([timed(run) for _ in range(calls[name])]))
    return {name: np.array(seconds) for name, seconds in times.items()}


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def print_row(work, ours, against, theirs, show=duration, form=".2f"):
    """`ours` and `theirs` are of every round; `form` is that of their ratio."""
    low, middle, high = np.quantile(ours / theirs, [0.25, 0.5, 0.75])
    ratio = f"{middle:{form}} ({low:{form}}-{high:{form}})"
    print_line(work, show(np.median(ours)), against, show(np.median(theirs)), ratio)


def print_line(work, ours, against, theirs, ratio):
    print(f"{work:<23} {ours:>9}  {against:<18} {theirs:>9}  {ratio}", flush=True)


def compare(work, ours, peers, rounds):
    """Prints a row for each peer; `peers` is a dict of functions that return a run."""
    runs = {"ours": ours}
    for name, make in peers.items():
        try:
            run = make()
            run()
            runs[name] = run
        except (ImportError, RuntimeError, ValueError) as error:
            # torch.compile needs a compiler, CTranslate2 may lack CUDA.
            is_missing = isinstance(error, ImportError)
            reason = "not installed" if is_missing else "does not run here"
            print_line(work, "", name, "left out", reason)
    times = take_turns(runs, rounds)
    for name in list(runs)[1:]:
        print_row(work, times["ours"], name, times[name])


def random_tokens(batch_size, length):
    """Symbols that are in both vocabularies: int32 [batch_size, length]."""
    rng, symbols = np.random.default_rng(0), (tm.FIRST_SYMBOL_ID, 64)
    return rng.integers(*symbols, (batch_size, length), np.int32)


def random_batch(batch_size, length):
    src, tgt = (random_tokens(batch_size, length + extra) for extra in (0, 1))
    return {"src": src, "tgt": tgt}


# ---- Training: ours, Flax's own layers, torch's own layers ---------------------------


def num_parameters(config):
    """Of our model."""
    init, tokens = tm.Transformer(config).init, random_tokens(1, 1)
    return optax.tree.size(jax.eval_shape(init, jax.random.key(0), tokens, tokens))


def jax_training(config, batch, model=None):
    """Our training step, of our model or of one that is called as ours is."""
    optimizer = optax.adam(LEARNING_RATE, *BETAS, ADAM_EPSILON)
    state = tm.create_train_state(config, jax.random.key(0), optimizer)
    if model is not None:
        keys = dict.fromkeys(("params", "dropout"), jax.random.key(0))
        params = jax.jit(model.init)(keys, batch["src"], batch["src"])["params"]
        assert optax.tree.size(params) == optax.tree.size(state.params)
        average = jax.tree.map(jnp.copy, params)
        new = {
            "params": params,
            "opt_state": optimizer.init(params),
            "average": average,
        }
        state = state.replace(apply_fn=model.apply, **new)
    batch = jax.device_put(batch)

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

        attention = functools.partial(
            nn.MultiHeadDotProductAttention, self.config.num_heads, use_bias=False
        )
        x = add_and_norm(x, attention()(x, mask=mask))
        if memory is not None:
            x = add_and_norm(x, attention()(x, memory, mask=memory_mask))
        y = nn.Dense(self.config.d_model)(nn.relu(nn.Dense(self.config.d_ff)(x)))
        return add_and_norm(x, y)


class FlaxTransformer(nn.Module):
    """The same model, written with the layers that Flax has."""

    config: tm.TransformerConfig

    @nn.compact
    def __call__(self, src, tgt):
        config, width = self.config, self.config.d_model
        normal = nn.initializers.normal(width**-0.5)
        embed = nn.Embed(config.tgt_vocab_size, width, embedding_init=normal)

        def enter(tokens):
            positions = tm.positional_encoding(tokens.shape[1], width)
            x = embed(tokens) * width**0.5 + positions
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


def setup_torch():
    """Returns torch, and the device that is JAX's."""
    import torch

    torch.set_num_threads(os.cpu_count())
    if jax.default_backend() != "gpu":
        return torch, "cpu"
    torch.set_float32_matmul_precision("high")  # TensorFloat-32, JAX's default
    return torch, "cuda"


def torch_training(config, batch, is_compiled):
    torch, device = setup_torch()
    heads, layers, width = config.num_heads, config.num_layers, config.d_model
    length = batch["src"].shape[1]
    positions = tm.positional_encoding(length, width)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = width, heads, layers, layers, config.d_ff, DROPOUT
            options = {"layer_norm_eps": EPSILON, "batch_first": True}
            self.stacks = torch.nn.Transformer(*sizes, **options)
            # As in the paper: no further norm at the end, no biases in attention (with
            # bias=False the other layers would have none), and less dropout.
            self.stacks.encoder.norm = self.stacks.decoder.norm = None
            for module in self.stacks.modules():
                if isinstance(module, torch.nn.MultiheadAttention):
                    module.dropout = 0.0
                    module.in_proj_bias = module.out_proj.bias = None
                elif hasattr(module, "linear1"):
                    module.dropout = torch.nn.Identity()
            self.dropout = torch.nn.Dropout(DROPOUT)
            self.embedding = torch.nn.Embedding(config.tgt_vocab_size, width)
            torch.nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.register_buffer("positions", torch.tensor(positions))
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            self.register_buffer("future", future)

        def enter(self, tokens):
            return self.dropout(self.embedding(tokens) * width**0.5 + self.positions)

        def forward(self, src, tgt):
            inputs, labels = tgt[:, :-1], tgt[:, 1:]
            masks = {
                "tgt_mask": self.future,
                "tgt_is_causal": True,
                "src_key_padding_mask": src == tm.PAD_ID,
                "tgt_key_padding_mask": inputs == tm.PAD_ID,
                "memory_key_padding_mask": src == tm.PAD_ID,
            }
            x = self.stacks(self.enter(src), self.enter(inputs), **masks)
            logits = x @ self.embedding.weight.T
            options = {"ignore_index": tm.PAD_ID, "label_smoothing": SMOOTHING}
            loss = torch.nn.CrossEntropyLoss(**options)
            is_label, hits = labels != tm.PAD_ID, logits.argmax(-1) == labels
            accuracy = (hits & is_label).sum() / is_label.sum()
            return loss(logits.flatten(0, 1), labels.flatten()), accuracy

    model = Model().to(device)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    adam = {"lr": LEARNING_RATE, "betas": BETAS, "eps": ADAM_EPSILON, "fused": True}
    optimizer = torch.optim.Adam(model.parameters(), **adam)
    forward = torch.compile(model) if is_compiled else model
    batch = {k: torch.tensor(x, device=device).long() for k, x in batch.items()}

    def run():
        optimizer.zero_grad()
        forward(**batch)[0].backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def train(sizes, rounds):
    for size, (config, *shape) in sizes.items():
        batch = random_batch(*shape)
        theirs = dataclasses.replace(config, dtype="float32")
        job, model = (theirs, batch), FlaxTransformer(theirs)
        peers = {
            "Flax's own layers": functools.partial(jax_training, *job, model),
            "torch, eager": functools.partial(torch_training, *job, False),
            "torch, compiled": functools.partial(torch_training, *job, True),
        }
        compare(f"training step, {size}", jax_training(config, batch), peers, rounds)


# ---- Decoding: ours, Marian of Hugging Face's transformers, CTranslate2 --------------


def random_params(config):
    """Parameters of ours, with which no output ends early."""
    init, tokens = jax.jit(tm.Transformer(config).init), random_tokens(1, 1)
    params = init(jax.random.key(0), tokens, tokens)["params"]
    # The special tokens, EOS among them, get a logit of 0: never one of the highest.
    params["embedding"] = params["embedding"].at[: tm.FIRST_SYMBOL_ID].set(0)
    return params


def our_decoding(config, src, num_tokens, beam_size=1):
    model, src, params = tm.Transformer(config), jnp.asarray(src), random_params(config)

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

    fields = {"vocab_size": config.tgt_vocab_size, "d_model": config.d_model}
    for stack in ("encoder", "decoder"):
        fields[f"{stack}_layers"] = config.num_layers
        fields[f"{stack}_attention_heads"] = config.num_heads
        fields[f"{stack}_ffn_dim"] = config.d_ff
    fields |= {"activation_function": "relu", "scale_embedding": True}
    fields |= {"decoder_start_token_id": tm.BOS_ID, "pad_token_id": tm.PAD_ID}
    fields |= {"eos_token_id": tm.EOS_ID, "forced_eos_token_id": None}
    model = transformers.MarianMTModel(transformers.MarianConfig(**fields))
    model, src = model.eval().to(device), torch.tensor(src, device=device).long()
    options = {"num_beams": beam_size, "do_sample": False, "use_cache": True}
    options |= {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}

    @torch.no_grad()
    def run():
        mask = torch.ones_like(src)
        tokens = model.generate(src, attention_mask=mask, **options)[:, 1:].cpu()
        assert tokens.shape[1] == num_tokens and (tokens != tm.EOS_ID).all()

    return run


def ctranslate2_spec(specs, config):
    """Our model, with our parameters, as CTranslate2 describes one."""
    params, layers = jax.device_get(random_params(config)), config.num_layers
    spec = specs.TransformerSpec.from_config(layers, config.num_heads, pre_norm=False)
    positions = tm.positional_encoding(config.max_len, config.d_model)
    spec.encoder.embeddings[0].weight = params["embedding"]
    spec.decoder.embeddings.weight = params["embedding"]
    spec.decoder.projection.weight = params["embedding"]

    def fill(linear, *parts):
        linear.weight = np.concatenate([part["kernel"].T for part in parts])
        if "bias" in parts[0]:
            linear.bias = parts[0]["bias"]

    for stack in ("encoder", "decoder"):
        getattr(spec, stack).position_encodings.encodings = positions
        for i, layer in enumerate(getattr(spec, stack).layer):
            block = params[stack][f"blocks_{i}"]
            parts = [layer.self_attention, layer.ffn]
            q, k, v, out = (block["self_attention"][name] for name in PROJECTIONS)
            fill(layer.self_attention.linear[0], q, k, v)
            fill(layer.self_attention.linear[1], out)
            if stack == "decoder":
                parts.insert(1, layer.attention)
                q, k, v, out = (block["cross_attention"][name] for name in PROJECTIONS)
                fill(layer.attention.linear[0], q)
                fill(layer.attention.linear[1], k, v)
                fill(layer.attention.linear[2], out)
            fill(layer.ffn.linear_0, block["feed_forward"]["inner"])
            fill(layer.ffn.linear_1, block["feed_forward"]["outer"])
            for j, part in enumerate(parts):
                norm = block[f"add_and_norm_{j}"]["norm"]
                part.layer_norm.gamma, part.layer_norm.beta = (
                    norm["scale"],
                    norm["bias"],
                )
    return spec


def ctranslate2_decoding(config, src, num_tokens, beam_size):
    import ctranslate2

    spec = ctranslate2_spec(ctranslate2.specs, config)
    spec.config.layer_norm_epsilon = EPSILON
    # Its names of the special tokens. The others are named after their numbers.
    names = ["<unk>", "<s>", "</s>", *map(str, range(3, config.tgt_vocab_size))]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.validate()
    spec.optimize()  # one matrix of embeddings instead of three
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    threads = {"inter_threads": 1, "intra_threads": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        model = ctranslate2.Translator(
            folder, device, compute_type="float32", **threads
        )
    sources = [[names[token] for token in row] for row in src]
    options = {"beam_size": beam_size, "max_batch_size": 0}  # 0: all rows at once
    options |= {"min_decoding_length": num_tokens, "max_decoding_length": num_tokens}

    def run():
        results = model.translate_batch(sources, **options)
        outputs = [result.hypotheses[0] for result in results]
        assert {len(output) for output in outputs} == {num_tokens}
        return outputs

    return run


def decode(sizes, rounds):
    for size, (config, batch_size, length) in sizes.items():
        src = random_tokens(batch_size, length)
        for beam_size, name in ((1, "greedy"), (4, "beam of 4")):
            job = config, src, length, beam_size
            peers = {
                "Marian.generate": functools.partial(marian_decoding, *job),
                "CTranslate2": functools.partial(ctranslate2_decoding, *job),
            }
            compare(f"{name}, {size}", our_decoding(*job), peers, rounds)


# ---- Ours against the machine, and against itself, at the base size ------------------


def num_operations(config, batch_size, length):
    """Multiplications and additions of all matrix products in a training step."""
    width = config.d_model
    attention = 4 * width**2 + 2 * length * width  # query, key, value, output; Eq. 1
    feed_forward = 2 * width * config.d_ff
    blocks = config.num_layers * (3 * attention + 2 * feed_forward)
    multiply_adds = blocks + config.tgt_vocab_size * width  # of a source and a target
    return 2 * multiply_adds * batch_size * length * 3  # the backward pass: 2 for each


def bare_product(rows, width, inner, times, dtype):
    """Returns a `run` that computes x W_1 W_2, `times` over, and its operations."""
    x, w_1, w_2 = (
        jax.random.normal(jax.random.key(0), shape, dtype) / shape[0] ** 0.5
        for shape in ((rows, width), (width, inner), (inner, width))
    )

    @jax.jit
    def chain(x, w_1, w_2):
        return jax.lax.fori_loop(0, times, lambda _, x: x @ w_1 @ w_2, x)

    operations = 2 * 2 * rows * width * inner * times
    return lambda: chain(x, w_1, w_2).block_until_ready(), operations


def rate(sizes, rounds):
    config, *shape = sizes["base"]
    step = jax_training(config, random_batch(*shape)), num_operations(config, *shape)
    chain = bare_product(1024, 512, 2048, 32, config.dtype)  # as large as the model's
    square = bare_product(4096, 4096, 4096, 1, config.dtype)
    jobs = {"step": step, "chain": chain, "square": square}
    times = take_turns({name: run for name, (run, _) in jobs.items()}, rounds)
    rates = {name: jobs[name][1] / times[name] / 1e9 for name in jobs}
    best = max(rates["chain"], rates["square"], key=np.median)
    show = "{:,.0f} G/s".format
    print_row("operations, base", rates["step"], "bare product", best, show, ".0%")


def tokens(sizes, rounds):
    config, *shape = sizes["base"]
    src, lengths = random_tokens(*shape), (32, 64, 128, 256)
    times = take_turns({n: our_decoding(config, src, n) for n in lengths}, rounds)
    each = {n: times[n] / n for n in lengths}
    for n in lengths[1:]:
        print_row(f"one token of {n}, base", each[n], "one token of 32", each[32])


def first_calls(config, *shape):
    """What first calls take more than the next, and the memory that training takes."""

    def peak_memory():
        if stats := jax.local_devices()[0].memory_stats():  # a CPU has none
            return stats["peak_bytes_in_use"] / 1e6
        status = Path("/proc/self/status")  # of Linux; ru_maxrss counts the parent too
        fields = status.read_text().split() if status.exists() else ["VmHWM:", "nan"]
        return float(fields[fields.index("VmHWM:") + 1]) * 1024 / 1e6

    before, run = peak_memory(), jax_training(config, random_batch(*shape))
    result = {"step": timed(run) - timed(run), "memory": peak_memory() - before}
    run = our_decoding(config, random_tokens(*shape), shape[1])
    return {**result, "greedy": timed(run) - timed(run)}


@functools.cache
def in_new_processes(is_bf16, number):
    """{name: array} of `first_calls`, without JAX's cache, and with a filled one."""
    command = [sys.executable, __file__, "--first-calls"] + ["--bf16"] * is_bf16
    env = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as cache:
        envs = [env, {**env, "JAX_COMPILATION_CACHE_DIR": cache}]
        output = [subprocess.check_output(command, env=e) for e in envs * (1 + number)]
    results = [json.loads(text) for text in output[2:]]  # the second filled the cache
    both = results[::2], results[1::2]
    return [{k: np.array([x[k] for x in some]) for k in some[0]} for some in both]


def compilation(sizes, rounds):
    is_bf16 = sizes["base"][0].dtype == "bfloat16"
    without, cached = in_new_processes(is_bf16, min(rounds, 3))
    for name in ("step", "greedy"):
        work = f"compile {name}, base"
        print_row(work, without[name], "from JAX's cache", cached[name], form=".1f")


def memory(sizes, rounds):
    config, *_ = sizes["base"]
    is_bf16 = config.dtype == "bfloat16"
    _, cached = in_new_processes(is_bf16, min(rounds, 3))  # compiling takes memory too
    least = 4 * 4 * num_parameters(config) / 1e6
    show = "{:,.0f} MB".format
    print_row("memory, base", cached["memory"], "4 x parameters", least, show)


# ---- Command line --------------------------------------------------------------------

WORKS = {"train": train, "decode": decode, "rate": rate, "tokens": tokens}
WORKS |= {"compile": compilation, "memory": memory}


def print_machine():
    device = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else f"model name:{platform.machine()}"
        model = text.partition("model name")[2].partition("\n")[0].strip("\t :")
        device = f"{model}, {os.cpu_count()} cores"
    versions = {d.name: d.version for d in importlib.metadata.distributions()}
    names = ("jax", "flax", "optax", "torch", "transformers", "ctranslate2")
    versions = ", ".join(f"{name} {versions.get(name, 'missing')}" for name in names)
    print(f"{device}\n{versions}")


def main():
    parser = argparse.ArgumentParser(description="Times the model against its peers.")
    add = parser.add_argument
    add("--rounds", type=int, default=9, metavar="N", help="turns of each (default 9)")
    add("--only", metavar="WORK[,WORK...]", help=f"of {', '.join(WORKS)}")
    add("--bf16", action="store_true", help="ours in bfloat16, not the peers")
    add("--first-calls", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(WORKS)
    if args.rounds < 1 or set(names) - set(WORKS):
        parser.error(f"N must be at least 1, and WORK one of {', '.join(WORKS)}")
    sizes = dict(SIZES)
    if args.bf16:
        for name, (config, *shape) in SIZES.items():
            sizes[name] = dataclasses.replace(config, dtype="bfloat16"), *shape
    if args.first_calls:
        print(json.dumps(first_calls(*sizes["base"])))
        return
    print_machine()
    for name, (config, batch_size, length) in sizes.items():
        size = f"{config.num_layers} layers, {config.d_model} wide"
        size += f", vocabulary {config.tgt_vocab_size:,}"
        print(f"{name}: {size}, batch {batch_size} x {length} tokens")
    ours = "ours bf16" if args.bf16 else "ours"
    print()
    print_line("work", ours, "against", "theirs", "ours / theirs")
    for name in names:
        WORKS[name](sizes, args.rounds)


if __name__ == "__main__":
    main()
