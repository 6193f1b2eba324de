"""Takes one part of the Transformer away at a time, and trains what is left.

    python tests/measure/what_breaks.py                  all rows
    python tests/measure/what_breaks.py causal heads     rows whose name holds a word
    python tests/measure/what_breaks.py --seeds 2        each row with the seeds 0 and 1
    python tests/measure/what_breaks.py -- --d-model 128   the program's options, after --

Each row is one line of transformer_model.py changed, in a copy, or an option of its
command `train`; the place is printed, so that the change can be repeated by hand.

The task is to reverse a word and write every letter three times: "abc" becomes
"cccbbbaaa". The demo would show less: its one layer gets along without residuals, and
where source and target are of one length, a source has as much padding in training as
later on. Here every target is longer than its source, which in training is padded to
the target's width and in decoding is not. There are two thousand pairs, so that each is
seen about twenty times: what keeps a model from learning by heart can show.
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SOURCE = (Path(__file__).resolve().parents[2] / "transformer_model.py").read_text()

# Enough layers for residuals and LayerNorm to matter, and no more steps than the whole
# model needs, so that a part shows that only speeds learning up.
OPTIONS = "--num-layers 3 --d-model 64 --batch-size 64 --steps 700 --warmup 200"
OPTIONS += " --vocab-size 259 --max-len 32"

# What is taken away, a string that occurs once, and what stands there instead; or an
# empty string, and options.
CHANGES = [
    ("nothing", "", ""),
    (
        "causal mask",
        "self_mask = padding_mask(tgt) & causal_mask(tgt.shape[1])",
        "self_mask = padding_mask(tgt)",
    ),
    (
        # Of a source alone, which does not begin with BOS: in decoding, PAD is also
        # what marks the places that have no token yet.
        "padding mask",
        "return (tokens != PAD_ID)[:, None, None, :]",
        "return ((tokens != PAD_ID) | (tokens[:, :1] != BOS_ID))[:, None, None, :]",
    ),
    (
        "positions",
        "x = x + jnp.asarray(positional_encoding(max_len, d_model))[position]",
        "x = x + 0",
    ),
    (
        "division by sqrt(K)",
        "query, key) / np.sqrt(query.shape[-1])",
        "query, key)",
    ),
    ("heads but one", "", "--num-heads 1"),
    ("residuals", "x = x + self.dropout(y, ", "x = self.dropout(y, "),
    (
        "LayerNorm",
        "return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype)",
        "return lambda x: x",
    ),
    (
        "post-norm",  # but pre-norm
        "norm_first: bool = False",
        "norm_first: bool = True",
    ),
    (
        "factor sqrt(D)",
        "x = jnp.take(embedding, tokens, axis=0) * d_model**0.5",
        "x = jnp.take(embedding, tokens, axis=0)",
    ),
    (
        "label shift",
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, 1:]',
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, :-1]',
    ),
    ("warm-up", "", "--warmup 1"),
    ("dropout", "", "--dropout 0"),
    ("label smoothing", "", "--label-smoothing 0"),
    ("averaging", "share = 10 / (9 + state.step)", "share = 1"),
]


def changed_function(old):
    """The function or class that the string is in: "Transformer.embed"."""
    if SOURCE.count(old) != 1:
        sys.exit(f"not exactly one place has {old!r}")
    line = SOURCE[: SOURCE.index(old)].count("\n") + 1
    node, names, kinds = ast.parse(SOURCE), [], (ast.FunctionDef, ast.ClassDef)
    while node:
        inside = [x for x in node.body if isinstance(x, kinds)]
        node = next((x for x in inside if x.lineno <= line <= x.end_lineno), None)
        names += [node.name] if node else []
    return ".".join(names)


def write_pairs(path, number, seed):
    """Writes the task's pairs: different words of 3 to 7 letters, and their targets."""
    rng, words = np.random.default_rng(seed), {}
    while len(words) < number:
        letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(3, 8))
        words["".join(map(chr, letters))] = None
    lines = (f"{word}\t{''.join(3 * c for c in reversed(word))}\n" for word in words)
    path.write_text("".join(lines))


def run(source, options):
    """The score of a training run: exactly right, of how many, loss."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script, pairs, valid = (folder / n for n in ("program.py", "pairs", "valid"))
        script.write_text(source)
        write_pairs(pairs, 2000, seed=0)
        write_pairs(valid, 500, seed=1)
        command = [sys.executable, script, "train", pairs, folder / "model"]
        command += ["--valid", valid, *OPTIONS.split(), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(r"loss (\S+), (\d+) of (\d+) exactly right", done.stdout)
    if not found:
        return f"{(done.stderr.splitlines() or ['no output'])[-1]:.60}"
    loss, right, total = found.groups()
    return f"{right:>4} of {total}  {loss:>8}"


def main():
    mine, options = sys.argv[1:], []
    if "--" in mine:
        split = mine.index("--")
        mine, options = mine[:split], mine[split + 1 :]
    parser = argparse.ArgumentParser(description="Trains without one part at a time.")
    add = parser.add_argument
    add("words", nargs="*", metavar="WORD", help="rows whose name holds it; or all")
    add("--seeds", type=int, default=1, metavar="N", help="runs of each (default 1)")
    args = parser.parse_args(mine)
    print(f"{'without':<23} {'in':<29} {'exactly right':>13}  {'loss':>8}")
    for name, old, new in CHANGES:
        if args.words and not any(word in name for word in args.words):
            continue
        place = changed_function(old) if old else new
        source = SOURCE.replace(old, new) if old else SOURCE
        more = [] if old else new.split()
        for seed in range(args.seeds):
            score = run(source, ["--seed", str(seed), *options, *more])
            print(f"{name:<23} {place:<29} {score:>13}", flush=True)


if __name__ == "__main__":
    main()
