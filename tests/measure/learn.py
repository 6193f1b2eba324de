"""Trains transformer_model.py and JoeyNMT on the same sentences for as many minutes.

    pip install sacrebleu
    python3 -m venv joey
    joey/bin/pip install torch joeynmt==2.3.0 sentencepiece==0.2.0 importlib_metadata
    python tests/measure/learn.py --train train.tsv --valid val.tsv \\
        --test test_2016_flickr.tsv --minutes 30 60 --joeynmt joey/bin/python -- \\
        --vocab-size 4000 --max-len 48 --d-model 256 --batch-size 64 --dropout-rate 0.3

The files are as for the program: lines of source<TAB>target, here of text that is
lower-cased and tokenized, such as Multi30k's. After -- come options of the program's
command `train`; what they say of sizes, dropout, batches and the seed holds for both.
JoeyNMT has an environment of its own, as it needs other packages. One trains after the
other; --only trains one alone, so that the two can have a core each:

    taskset -c 0 python tests/measure/learn.py ... --only ours &
    taskset -c 1 python tests/measure/learn.py ... --only joeynmt --joeynmt PYTHON

The minutes begin before the subwords are learnt, and all compilation counts. In neither
is there any validation in between, which takes time. At each of the given minutes the
parameters are kept. At the end the test set is translated with all of them, and
sacrebleu counts BLEU and chrF on the text as it is. With --keep FOLDER our checkpoints
stay there, to translate with or to resume.

Ours is the program's own training. JoeyNMT's recipe is that of its own configurations:

    configs/transformer_small.yaml            Adam with betas 0.9 and 0.98, the paper's
                                              schedule with factor 0.5 and 1,000 steps of
                                              warm-up, Xavier's initialization
    configs/transformer_iwslt14_deen_bpe.yaml smoothing 0.1, the loss per token, one
                                              vocabulary and one matrix for all
                                              embeddings and the softmax, alpha 1.0
    configs/wmt17_ende_sp.yaml                pre-norm; sentencepiece's unigram model with
                                              character_coverage 1.0; no <unk> in outputs

The inner width, 4 times the width, the number of pairs in a batch and the beam of 4 are
those of the program.
"""

import argparse
import dataclasses
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
import sacrebleu

import transformer_model as tm

# ---- Ours ----------------------------------------------------------------------------


def train_ours(train, valid, sources, marks, options, folder):
    """Yields at each mark, in seconds: (a description, {what decodes: its outputs})."""
    start, metrics = time.perf_counter(), None
    state, checkpoint, pairs, unseen = tm.start_run(train, valid, options, None)
    batches = tm.training_batches(
        pairs, options.max_len, options.batch_size, options.seed
    )
    kept = []
    for mark in marks:
        while (elapsed := time.perf_counter() - start) < mark:
            batch, before = next(batches), metrics
            state, metrics = tm.train_step(state, batch, options.label_smoothing)
            jax.block_until_ready(before)  # Meanwhile the devices have this step to do.
        kept.append((elapsed, jax.device_get(state)))
    for elapsed, state in kept:
        checkpoint = checkpoint._replace(state=tm.to_arrays(state))
        if folder:
            tm.save_checkpoint(f"{folder}/ours.{elapsed:.0f}s", checkpoint)
        loss = tm.unseen_loss(state, unseen, options.max_len)
        run = describe(int(state.step), optax.tree.size(state.params), elapsed)
        outputs = {}
        for name, params in (("averaged", "average"), ("last", "params")):
            model = checkpoint._replace(state={"average": checkpoint.state[params]})
            for beam_size, search in ((4, "beam of 4"), (1, "greedy")):
                key = f"{name} parameters, {search}"
                outputs[key] = tm.translate(model, sources, beam_size)
        yield f"{run}, loss on the valid pairs {loss:.3f}", outputs


def describe(steps, num_parameters, seconds):
    return f"{steps:,} steps in {seconds:.0f} s, {num_parameters:,} parameters"


# ---- JoeyNMT -------------------------------------------------------------------------

# What its own command lines do, `build_vocab` and `train`, but that an alarm at each mark
# keeps the model as it is then, not the best one validated, and that the last alarm ends
# the training as Ctrl-C does.
JOEYNMT = """
import copy, json, os, signal, sys, time
from pathlib import Path
import sentencepiece, torch
from joeynmt.config import parse_global_args
from joeynmt.prediction import prepare, test
from joeynmt.training import TrainManager

config, marks, size = map(json.loads, sys.argv[1:])
start, folder = time.time(), Path(config["model_dir"]).parent
torch.set_num_threads(len(os.sched_getaffinity(0)))
kept = []

def keep(number, frame):
    seconds, steps = time.time() - start, trainer.stats.steps
    kept.append((steps, seconds, copy.deepcopy(model.state_dict())))
    if len(kept) == len(marks):
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, marks[len(kept)] - seconds)

signal.signal(signal.SIGALRM, keep)
signal.setitimer(signal.ITIMER_REAL, marks[0])
sentencepiece.SentencePieceTrainer.Train(
    input=[f"{folder}/train.src", f"{folder}/train.trg"], model_prefix=f"{folder}/sp",
    model_type="unigram", vocab_size=size, character_coverage=1.0,
    normalization_rule_name="identity", minloglevel=1,
    unk_id=0, pad_id=1, bos_id=2, eos_id=3,
    unk_piece="<unk>", pad_piece="<pad>", bos_piece="<s>", eos_piece="</s>",
)
lines = (folder / "sp.vocab").read_text(encoding="utf-8").splitlines()
pieces = "".join(line.partition("\\t")[0] + "\\n" for line in lines)
(folder / "vocab").write_text(pieces, encoding="utf-8")

args = parse_global_args(config, rank=0, mode="train")
model, train_data, dev_data, test_data = prepare(args, rank=0, mode="train")
trainer = TrainManager(
    rank=0, model=model, model_dir=args.model_dir, device=args.device, seed=args.seed,
    n_gpu=args.n_gpu, num_workers=args.num_workers, autocast=args.autocast,
    train_args=args.train, dev_args=args.test,
)
trainer.train_and_validate(train_data=train_data, valid_data=dev_data)
num_parameters = sum(p.numel() for p in model.parameters())
runs = [(steps, num_parameters, seconds) for steps, seconds, _ in kept]
(folder / "runs.json").write_text(json.dumps(runs))
prepared = {"dev": None, "test": test_data, "model": model}
for i, (_, _, parameters) in enumerate(kept):
    model.load_state_dict(parameters)
    for beam_size in (4, 1):
        config["testing"]["beam_size"] = beam_size
        test(config, output_path=f"{folder}/{i}.{beam_size}", prepared=prepared)
"""


def joeynmt_config(folder, options):
    """JoeyNMT's configuration, as its YAML files have it."""
    width, rate, never = options.d_model, options.dropout_rate, 10**9
    tokenizer = {"model_file": f"{folder}/sp.model", "model_type": "unigram"}
    text = {"level": "bpe", "lowercase": False, "max_length": options.max_len - 1}
    text |= {"voc_file": f"{folder}/vocab", "tokenizer_type": "sentencepiece"}
    text |= {"tokenizer_cfg": tokenizer}

    def stack():
        embeddings = {"embedding_dim": width, "scale": True, "dropout": rate}
        sizes = {"num_layers": options.num_layers, "num_heads": options.num_heads}
        sizes |= {"hidden_size": width, "ff_size": 4 * width}
        parts = {"dropout": rate, "layer_norm": "pre", "activation": "relu"}
        return {"type": "transformer", "embeddings": embeddings} | sizes | parts

    return {
        "name": "learn",
        "model_dir": f"{folder}/model",
        "use_cuda": jax.default_backend() == "gpu",
        "random_seed": options.seed,
        "data": {
            "train": f"{folder}/train",
            "dev": f"{folder}/dev",
            "test": f"{folder}/test",
            "dataset_type": "plain",
            "src": {"lang": "src", **text},
            "trg": {"lang": "trg", **text},
        },
        "training": {
            "optimizer": "adam",
            "adam_betas": [0.9, 0.98],
            "scheduling": "noam",
            "learning_rate": 1e-3,
            "learning_rate_min": 1e-12,
            "learning_rate_factor": 0.5,
            "learning_rate_warmup": 1000,
            "label_smoothing": 0.1,
            "normalization": "tokens",
            "batch_size": options.batch_size,
            "batch_type": "sentence",
            "epochs": never,
            "validation_freq": never,
            "logging_freq": 1000,
        },
        "testing": {
            "beam_alpha": 1.0,
            "batch_size": 64,
            "max_output_length": options.max_len,
            "generate_unk": False,
        },
        "model": {
            "initializer": "xavier_uniform",
            "init_gain": 1.0,
            "bias_initializer": "zeros",
            "embed_initializer": "xavier_uniform",
            "embed_init_gain": 1.0,
            "tied_embeddings": True,
            "tied_softmax": True,
            "encoder": stack(),
            "decoder": stack(),
        },
    }


def train_joeynmt(python, data, marks, options, folder):
    """Yields at each mark, in seconds: (a description, {what decodes: its outputs})."""
    for name, pairs in data.items():
        for suffix, texts in zip(("src", "trg"), zip(*pairs)):
            lines = "".join(f"{text}\n" for text in texts)
            (folder / f"{name}.{suffix}").write_text(lines, encoding="utf-8")
    (folder / "model").mkdir()
    config = json.dumps(joeynmt_config(folder, options))
    arguments = config, json.dumps(marks), str(options.vocab_size)
    command = [python, "-c", JOEYNMT, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"JoeyNMT failed:\n{done.stderr[-2000:]}")
    for i, run in enumerate(json.loads((folder / "runs.json").read_text())):
        outputs = {}
        for beam_size, search in ((4, "beam of 4"), (1, "greedy")):
            text = (folder / f"{i}.{beam_size}.test").read_text(encoding="utf-8")
            outputs[f"last parameters, {search}"] = text.splitlines()
        yield describe(*run), outputs


# ---- Command line --------------------------------------------------------------------


def print_scores(name, run, outputs, test):
    """Prints BLEU and chrF of all outputs, and a few of the first ones."""
    print(f"{name}: {run}")
    bleu, chrf = sacrebleu.BLEU(tokenize="none", force=True), sacrebleu.CHRF()
    targets = [[target for _, target in test]]
    for way, texts in outputs.items():
        assert len(texts) == len(test)
        scores = [metric.corpus_score(texts, targets).score for metric in (bleu, chrf)]
        print("  {:<31} BLEU {:5.2f}   chrF {:5.2f}".format(way, *scores))
    for (source, target), text in zip(test[:3], next(iter(outputs.values()))):
        print(f"  {source}\n    {text}\n    reference: {target}")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description="Trains ours and JoeyNMT alike.")
    add = parser.add_argument
    for name in ("train", "valid", "test"):
        add(f"--{name}", required=True, metavar="FILE", help="lines source<TAB>target")
    minutes = {"type": float, "nargs": "+", "default": [30], "metavar": "N"}
    add("--minutes", **minutes, help="when to measure, the last ends it (default 30)")
    add("--keep", metavar="FOLDER", help="save our checkpoints there")
    add("--joeynmt", metavar="PYTHON", help="that has JoeyNMT; without it, ours alone")
    add("--only", choices=("ours", "joeynmt"), help="train one of them")
    add("options", nargs="*", help="of the program's command train, after --")
    args = parser.parse_args()
    if args.only == "joeynmt" and not args.joeynmt:
        parser.error("--only joeynmt needs --joeynmt PYTHON")
    given = tm.make_parser().parse_args(["train", args.train, "-", *args.options])
    names = [field.name for field in dataclasses.fields(tm.Options)]
    options = tm.Options(**{name: getattr(given, name) for name in names})
    train, valid, test = map(tm.read_pairs, (args.train, args.valid, args.test))
    train = tm.without_sources(train, test)
    cores, marks = len(os.sched_getaffinity(0)), [60 * n for n in sorted(args.minutes)]
    print(f"{len(train):,} pairs, {cores} cores; {options}", flush=True)
    if args.only != "joeynmt":
        sources = [source for source, _ in test]
        job = train, valid, sources, marks, options, args.keep
        for run, outputs in train_ours(*job):
            print_scores("ours", run, outputs, test)
    if args.joeynmt and args.only != "ours":
        data = {"train": tm.without_sources(train, valid), "dev": valid, "test": test}
        with tempfile.TemporaryDirectory() as name:
            job = args.joeynmt, data, marks, options, Path(name)
            for run, outputs in train_joeynmt(*job):
                print_scores("JoeyNMT", run, outputs, test)


if __name__ == "__main__":
    main()
