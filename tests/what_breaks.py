"""Takes one part of the Transformer away at a time, and trains what is left.

    python tests/what_breaks.py                    all rows
    python tests/what_breaks.py causal heads       rows whose name holds a word
    python tests/what_breaks.py --seeds 2          each row with the seeds 0 and 1
    python tests/what_breaks.py -- --d-model 128   the program's own options, after --

Each row is one line of transformer_model.py changed, in a copy; the function that the
line is in is printed, so that the change can be repeated by hand.

The task is to reverse a word and write every letter three times: "abc" becomes
"cccbbbaaa". The demo would show less: its one layer gets along without residuals, and
where source and target are of one length, a source has as much padding in training as
later on. Here every target is longer than its source, which in training is padded to
the target's width and in decoding is not.
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SOURCE = (Path(__file__).resolve().parent.parent / "transformer_model.py").read_text()

# Enough layers for residuals and LayerNorm to matter, and no more steps than the whole
# model needs, so that a part shows that only speeds learning up.
OPTIONS = "--num-layers 4 --d-model 64 --num-heads 4 --batch-size 64 --steps 600"
OPTIONS += " --learning-rate 3e-3 --label-smoothing 0 --vocab-size 259 --max-len 31"

# What is taken away, a string that occurs once, and what stands there instead.
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
    ("heads but one", "num_heads=args.num_heads,", "num_heads=1,"),
    (
        "division by sqrt(K)",
        "query, key) / np.sqrt(query.shape[-1])",
        "query, key)",
    ),
    ("residuals", "x = x + self.dropout(y, ", "x = self.dropout(y, "),
    (
        "LayerNorm",
        "return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype)",
        "return lambda x: x",
    ),
    ("pre-norm", "", "--post-norm"),  # an option, and no change
    (
        "warm-up",
        "warmup_steps=args.steps // 10,",
        "warmup_steps=0,",
    ),
    (
        "label shift",
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, 1:]',
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, :-1]',
    ),
]


def changed_function(old):
    """The function that the string is in, with its class: "Transformer.embed"."""
    if SOURCE.count(old) != 1:
        sys.exit(f"not exactly one place has {old!r}")
    line = SOURCE[: SOURCE.index(old)].count("\n") + 1
    node, names, kinds = ast.parse(SOURCE), [], (ast.FunctionDef, ast.ClassDef)
    while node:
        inside = [x for x in node.body if isinstance(x, kinds)]
        node = next((x for x in inside if x.lineno <= line <= x.end_lineno), None)
        names += [node.name] if node else []
    return ".".join(names)


def write_pairs(path):
    """Writes the task's pairs: different words of 3 to 7 letters, and their targets."""
    rng, words = np.random.default_rng(0), {}
    while len(words) < 20_000:
        letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(3, 8))
        words["".join(map(chr, letters))] = None
    lines = (f"{word}\t{''.join(3 * c for c in reversed(word))}\n" for word in words)
    path.write_text("".join(lines))


def run(source, options):
    """The score of a training run: exactly right, of how many, loss."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "transformer_model.py"
        script.write_text(source)
        command = [sys.executable, script, *options]
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
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.tsv"
        write_pairs(pairs)
        task = ["--pairs", str(pairs), *OPTIONS.split()]
        for name, old, new in CHANGES:
            if args.words and not any(word in name for word in args.words):
                continue
            place = changed_function(old) if old else new
            source = SOURCE.replace(old, new) if old else SOURCE
            more = [new] if new and not old else []
            for seed in range(args.seeds):
                score = run(source, [*task, "--seed", str(seed), *options, *more])
                print(f"{name:<23} {place:<29} {score:>13}", flush=True)


if __name__ == "__main__":
    main()
