"""Takes one part of the Transformer away at a time, and trains what is left.

    python tests/measure/what_breaks.py                  all rows
    python tests/measure/what_breaks.py causal heads     rows whose name holds a word
    python tests/measure/what_breaks.py --task deep      the rows of a task
    python tests/measure/what_breaks.py --seeds 5        each row with the seeds 0 to 4
    python tests/measure/what_breaks.py -- --d-model 128   the program's options, after --

Each row is one line of transformer_model.py changed, in a copy, or options of its
command `train`; the place is printed, so that the change can be repeated by hand. Then
comes how many of 500 unseen words are exactly right: with the whole model, and without
the part; and the loss without it. Of several seeds, it is the median and, in brackets,
the lowest and the highest. A run whose loss is not finite has none right.

A part shows only where it is needed, so there are several tasks. All have words for
sources. Their lengths differ, so that a source has padding, of which there is more in
training, where it gets the width of its target, than in decoding. No more steps are
taken than the whole model needs, so that a part shows that only speeds learning up.

    reverse  "abc" becomes "cccbbbaaa", by three layers. With one layer, as in the demo,
             residuals would not be missed.
    deep     the same by six layers, which is where a norm, its place and a warm-up count
    triples  a letter of the target stands for three of the source, by one layer: it has
             to look at three places at once
    few      the same as "reverse" by two layers, from 300 pairs, each seen 200 times
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

SOURCE = (Path(__file__).resolve().parents[2] / "transformer_model.py").read_text()

# ---- The tasks -----------------------------------------------------------------------


class Task(NamedTuple):
    target: Callable  # of a word
    letters: int  # in the alphabet
    lengths: tuple  # of the shortest and of the longest word
    num_pairs: int  # to train on
    options: str  # of the program


def triple_reversed(word):
    """
    >>> triple_reversed("abc")
    'cccbbbaaa'
    """
    return "".join(3 * letter for letter in reversed(word))


def from_three(word):
    """Letter i of the target is one of 27, A to [, for three letters of the source: the
    one at i, the one as far from the end, and the one half a word further on.

    >>> from_three("abc")
    'PWC'
    """
    letters, length = ["abc".index(letter) for letter in word], len(word)
    numbers = (
        letters[i]
        + 3 * letters[length - 1 - i]
        + 9 * letters[(i + length // 2) % length]
        for i in range(length)
    )
    return "".join(chr(ord("A") + number) for number in numbers)


SIZES = "--vocab-size 259 --max-len 32 --batch-size 64 "
SIZES += "--num-layers {} --d-model {} --steps {} --warmup-steps {}"
TASKS = {
    "reverse": Task(triple_reversed, 26, (3, 7), 2000, SIZES.format(3, 64, 700, 200)),
    "deep": Task(triple_reversed, 26, (3, 7), 2000, SIZES.format(6, 32, 700, 200)),
    "triples": Task(from_three, 3, (7, 11), 5000, SIZES.format(1, 64, 500, 200)),
    "few": Task(triple_reversed, 26, (3, 7), 300, SIZES.format(2, 64, 1000, 200)),
}


def write_pairs(path, task, number, seed):
    """Writes pairs of different random words and their targets."""
    rng, words = np.random.default_rng(seed), {}
    shortest, longest = task.lengths
    while len(words) < number:
        length, first = rng.integers(shortest, longest + 1), ord("a")
        word = rng.integers(first, first + task.letters, length)
        words["".join(map(chr, word))] = None
    path.write_text("".join(f"{word}\t{task.target(word)}\n" for word in words))


# ---- What is taken away --------------------------------------------------------------


class Change(NamedTuple):
    name: str
    old: str  # a string that occurs once, or an empty one
    new: str  # what stands there instead; or options
    task: str
    options: str = ""  # more of them


PRE_NORM = "norm_first: bool = False", "norm_first: bool = True"
CHANGES = [
    Change(
        "causal mask",
        "self_mask = padding_mask(tgt) & causal_mask(tgt.shape[1])",
        "self_mask = padding_mask(tgt)",
        "reverse",
    ),
    Change(
        # Of a source alone, which does not begin with BOS: in decoding, PAD is also
        # what marks the places that have no token yet.
        "padding mask",
        "return (tokens != PAD_ID)[:, None, None, :]",
        "return ((tokens != PAD_ID) | (tokens[:, :1] != BOS_ID))[:, None, None, :]",
        "reverse",
    ),
    Change(
        "positions",
        "x = x + jnp.asarray(positional_encoding(max_len, d_model))[position]",
        "x = x + 0",
        "reverse",
    ),
    Change(
        "division by sqrt(K)",
        "query, key) / query.shape[-1] ** 0.5",
        "query, key)",
        "reverse",
    ),
    Change("residuals", "x = x + self.dropout(y, ", "x = self.dropout(y, ", "reverse"),
    Change(
        "factor sqrt(D)",
        "x = jnp.take(embedding, tokens, axis=0) * d_model**0.5",
        "x = jnp.take(embedding, tokens, axis=0)",
        "reverse",
    ),
    Change(
        "label shift",
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, 1:]',
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, :-1]',
        "reverse",
    ),
    Change("several heads", "", "--num-heads 1", "triples"),
    Change("averaging", "state.average, 1 / m)", "state.average, 1)", "triples"),
    Change(
        "LayerNorm",
        "return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype)",
        "return lambda x: x",
        "deep",
    ),
    Change("warm-up", "", "--warmup-steps 20", "deep"),
    Change("post-norm", *PRE_NORM, "deep"),
    Change("both of these", *PRE_NORM, "deep", "--warmup-steps 20"),
    Change("dropout", "", "--dropout-rate 0", "few"),
    Change("label smoothing", "", "--label-smoothing 0", "few"),
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


# ---- Running -------------------------------------------------------------------------


def run(source, task, options):
    """Trains -> how many are right, and the loss."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script, pairs, valid = (folder / n for n in ("program.py", "pairs", "valid"))
        script.write_text(source)
        write_pairs(pairs, task, task.num_pairs, seed=0)
        write_pairs(valid, task, 500, seed=1)
        command = [sys.executable, script, "train", pairs, folder / "model"]
        command += ["--valid", valid, *task.options.split(), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if "not finite" in done.stderr:
        return 0, np.nan
    if done.returncode:
        sys.exit(done.stderr)
    right = re.findall(r"(\d+) of \d+ unseen pairs exactly right", done.stderr)
    losses = re.findall(r"^step .* unseen (\d\S*),", done.stderr, re.MULTILINE)
    return int(right[-1]), float(losses[-1])


def run_all(source, task, options, num_seeds):
    """Trains with each seed -> summaries of how many are right, and of the loss."""
    seeds = [["--seed", str(seed)] for seed in range(num_seeds)]
    rights, losses = zip(*(run(source, task, [*seed, *options]) for seed in seeds))
    return summary(rights, ".0f"), summary(losses, ".2f")


def summary(numbers, form):
    """
    >>> summary([3, 9, 5], ".0f"), summary([3], ".1f")
    ('5 (3-9)', '3.0')
    """
    lowest, median, highest = (format(f(numbers), form) for f in (min, np.median, max))
    return median if len(numbers) == 1 else f"{median} ({lowest}-{highest})"


def main():
    mine, options = sys.argv[1:], []
    if "--" in mine:
        split = mine.index("--")
        mine, options = mine[:split], mine[split + 1 :]
    parser = argparse.ArgumentParser(description="Trains without one part at a time.")
    add = parser.add_argument
    add("words", nargs="*", metavar="WORD", help="rows whose name holds it; or all")
    add("--seeds", type=int, default=1, metavar="N", help="runs of each (default 1)")
    add("--task", action="append", choices=TASKS, help="its rows; or of all tasks")
    args = parser.parse_args(mine)
    rows = [change for change in CHANGES if change.task in (args.task or TASKS)]
    if args.words:
        rows = [row for row in rows if any(word in row.name for word in args.words)]
    width = 7 if args.seeds == 1 else 13
    form = f"{{:<20}} {{:<29}} {{:<8}} {{:>{width}}} {{:>{width}}}   {{}}"
    print(form.format("without", "in", "task", "whole", "without", "loss"), flush=True)
    wholes = {}  # a summary for each task
    for name, old, new, task, more in rows:
        if task not in wholes:
            wholes[task], _ = run_all(SOURCE, TASKS[task], options, args.seeds)
        place = changed_function(old) if old else new
        source = SOURCE.replace(old, new) if old else SOURCE
        given = [*options, *more.split(), *([] if old else new.split())]
        right, loss = run_all(source, TASKS[task], given, args.seeds)
        print(form.format(name, place, task, wholes[task], right, loss), flush=True)


if __name__ == "__main__":
    main()
