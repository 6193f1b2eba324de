"""Trains transformer_model.py and JoeyNMT on the same pairs for as many minutes.

    python3 -m venv joey
    joey/bin/pip install torch joeynmt==2.3.0 importlib_metadata
    python tests/measure/learn.py --pairs cmudict.tsv --joeynmt joey/bin/python

JoeyNMT has an environment of its own, as it needs other packages. `--pairs` is a file
as for the program, such as the README's of words and phonemes. Both models have two
layers, width 128, four heads and an inner width of 512; both get batches of 128 pairs
and all processor cores, one after the other. At the end each decodes, greedily, the
same words, none of which has been in its training.

Ours is the program's own training with its defaults; the averaged parameters decode. The
minutes begin before the tokenizer is learnt, and all compilation counts.

JoeyNMT is given the characters of the source, and the target as words, for which it is
made: one token is one phoneme. It has no recipe for this task. Its recipe here is that
of its configs/transformer_small.yaml: Adam with betas 0.9 and 0.98, the schedule of the
paper with factor 0.5 and 1,000 steps of warm-up, dropout 0.1, no label smoothing, and
Xavier's initialization; beyond that pre-norm and the loss per token, as in its
configurations for larger data. There is no validation in between, which takes time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import optax

import transformer_model as tm

BATCH_SIZE = 128

# ---- Ours ----------------------------------------------------------------------------


def train_ours(pairs, held_out, seconds, seed):
    """Returns the outputs for the sources held out, and a description of the run."""
    start = time.perf_counter()
    options = "train", pairs, "no model is saved", "--valid", held_out, "--seed", seed
    parser, _ = tm.make_parser()
    run, state = tm.set_up(parser.parse_args([str(option) for option in options]))
    args = run.args
    batches = tm.training_batches(
        run.train_pairs, args.max_len, run.batch_size, args.seed
    )
    while (elapsed := time.perf_counter() - start) < seconds:
        state, metrics = tm.train_step(state, next(batches), args.label_smoothing)
        jax.block_until_ready(metrics)
    sources = [source for source, _ in run.valid_pairs]
    tokens = tm.decode_all(run.model, state.average, sources, beam_size=1)
    outputs = [run.tokenizer.decode(row) for row in tokens]
    return outputs, describe(int(state.step), optax.tree.size(state.params), elapsed)


def describe(steps, num_parameters, seconds):
    return f"{steps:,} steps in {seconds:.0f} s, {num_parameters:,} parameters"


# ---- JoeyNMT -------------------------------------------------------------------------

# What its own command line does, but that an alarm ends the training as Ctrl-C does, and
# that it goes on with the model as it is then, and not with the best one validated.
JOEYNMT = """
import json, signal, sys, time
from pathlib import Path
from joeynmt.config import parse_global_args
from joeynmt.prediction import prepare, test
from joeynmt.training import TrainManager

config, seconds, start = json.loads(sys.argv[1]), float(sys.argv[2]), time.time()
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, seconds)
args = parse_global_args(config, rank=0, mode="train")
model, train_data, dev_data, _ = prepare(args, rank=0, mode="train")
trainer = TrainManager(
    rank=0, model=model, model_dir=args.model_dir, device=args.device, seed=args.seed,
    n_gpu=args.n_gpu, num_workers=args.num_workers, autocast=args.autocast,
    train_args=args.train, dev_args=args.test,
)
trainer.train_and_validate(train_data=train_data, valid_data=dev_data)
result = {
    "steps": trainer.stats.steps,
    "num_parameters": sum(p.numel() for p in model.parameters()),
    "seconds": time.time() - start,
}
Path(config["model_dir"], "result.json").write_text(json.dumps(result))
prepared = {"dev": dev_data, "test": None, "model": model}
test(config, output_path=config["model_dir"] + "/output", prepared=prepared)
"""


def joeynmt_config(folder, seed):
    """JoeyNMT's configuration, as its YAML files have it."""

    def text(lang, level):
        return {"lang": lang, "level": level, "lowercase": False}

    def stack():
        embeddings = {"embedding_dim": 128, "scale": True, "dropout": 0.1}
        sizes = {"num_layers": 2, "num_heads": 4, "hidden_size": 128, "ff_size": 512}
        options = {"dropout": 0.1, "layer_norm": "pre"}
        return {"type": "transformer", "embeddings": embeddings} | sizes | options

    never = 10**9
    return {
        "name": "learn",
        "model_dir": f"{folder}/model",
        "use_cuda": jax.default_backend() == "gpu",
        "random_seed": seed,
        "data": {
            "train": f"{folder}/train",
            "dev": f"{folder}/dev",
            "dataset_type": "plain",
            "src": text("src", "char"),
            "trg": text("trg", "word"),
        },
        "training": {
            "optimizer": "adam",
            "adam_betas": [0.9, 0.98],
            "scheduling": "noam",
            "learning_rate": 1e-3,
            "learning_rate_min": 1e-12,
            "learning_rate_factor": 0.5,
            "learning_rate_warmup": 1000,
            "label_smoothing": 0.0,
            "normalization": "tokens",
            "batch_size": BATCH_SIZE,
            "batch_type": "sentence",
            "epochs": never,
            "validation_freq": never,
            "logging_freq": 1000,
        },
        "testing": {"beam_size": 1, "batch_size": 64, "max_output_length": 64},
        "model": {
            "initializer": "xavier_uniform",
            "init_gain": 1.0,
            "bias_initializer": "zeros",
            "embed_initializer": "xavier_uniform",
            "embed_init_gain": 1.0,
            "tied_embeddings": False,
            "tied_softmax": True,
            "encoder": stack(),
            "decoder": stack(),
        },
    }


def train_joeynmt(python, train, held_out, seconds, seed, folder):
    """Returns the outputs for the sources held out, and a description of the run."""
    for name, pairs in {"train": train, "dev": held_out}.items():
        for suffix, texts in zip(("src", "trg"), zip(*pairs)):
            lines = "".join(f"{text}\n" for text in texts)
            (folder / f"{name}.{suffix}").write_text(lines, encoding="utf-8")
    config, model_dir = joeynmt_config(folder, seed), folder / "model"
    model_dir.mkdir()
    command = [python, "-c", JOEYNMT, json.dumps(config), str(seconds)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"JoeyNMT failed:\n{done.stderr[-2000:]}")
    result = json.loads((model_dir / "result.json").read_text())
    outputs = (model_dir / "output.dev").read_text(encoding="utf-8").splitlines()
    return outputs, describe(**result)


# ---- Command line --------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Trains ours and JoeyNMT alike.")
    add = parser.add_argument
    add("--pairs", required=True, metavar="FILE", help="lines of source<TAB>target")
    add("--joeynmt", metavar="PYTHON", help="that has JoeyNMT; without it, ours alone")
    add("--minutes", type=float, default=3, metavar="N", help="of each (default 3)")
    add("--held-out", type=int, default=2000, metavar="N", help="pairs (default 2000)")
    add("--seed", type=int, default=0, metavar="N", help="of all (default 0)")
    args = parser.parse_args()
    longest = 127  # tokens, without EOS; a byte needs no more than one
    pairs = tm.read_pairs(args.pairs)
    short = [p for p in pairs if max(len(text.encode()) for text in p) <= longest]
    held_out = tm.hold_out(short, args.held_out, args.seed)
    sources, targets = zip(*held_out)
    train = [pair for pair in short if pair[0] not in set(sources)]
    seconds, scores = 60 * args.minutes, {}
    print(
        f"{len(train):,} pairs, {args.minutes:g} minutes, {len(os.sched_getaffinity(0))} cores"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = folder / "pairs.tsv", folder / "held_out.tsv"
        for file, some in zip(files, (train, held_out)):
            file.write_text("".join(f"{a}\t{b}\n" for a, b in some), encoding="utf-8")
        scores["ours"] = train_ours(*files, seconds, args.seed)
        if args.joeynmt:
            job = train, held_out, seconds, args.seed, folder
            scores["JoeyNMT"] = train_joeynmt(args.joeynmt, *job)
    for name, (outputs, run) in scores.items():
        assert len(outputs) == len(targets)
        right = sum(map(str.__eq__, outputs, targets))
        share = (
            f"{right:,} of {len(targets):,} exactly right ({right / len(targets):.1%})"
        )
        print(f"{name:<8} {share}; {run}")


if __name__ == "__main__":
    main()
