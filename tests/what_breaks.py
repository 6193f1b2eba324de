"""Takes one part of the Transformer away at a time, and runs the demo without it.

    python tests/what_breaks.py                    all rows, about five minutes
    python tests/what_breaks.py causal heads       rows whose name holds a word
    python tests/what_breaks.py -- --seed 1        the demo's own options, after --

Each row is one line of transformer_model.py changed, in a copy; the line's number is
printed, so that the change can be repeated by hand.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = (Path(__file__).resolve().parent.parent / "transformer_model.py").read_text()

# What is taken away, a line that occurs once, and what stands there instead.
CHANGES = [
    ("nothing", "", ""),
    (
        "causal mask",
        "masks = padding_mask(tgt) & causal_mask(tgt.shape[1]), padding_mask(src)",
        "masks = padding_mask(tgt), padding_mask(src)",
    ),
    (
        "padding mask",
        "return (tokens != PAD_ID)[:, None, None, :]",
        "return (tokens == tokens)[:, None, None, :]",
    ),
    (
        "positions",
        "return x + (table[: x.shape[1]] if position is None else table[position])",
        "return x",
    ),
    ("heads but one", '"num_heads": ("size", 4, 4', '"num_heads": ("size", 1, 4'),
    (
        "division by sqrt(K)",
        "scores = scores / np.sqrt(query.shape[-1])",
        "scores = scores",
    ),
    (
        "residuals",
        "x = x + self.dropout(y, deterministic)",
        "x = self.dropout(y, deterministic)",
    ),
    (
        "LayerNorm",
        "return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype)",
        "return lambda x: x",
    ),
    ("pre-norm for post-norm", "norm_first=True,", "norm_first=False,"),
    (
        "warm-up",
        "0.0, args.learning_rate, args.steps // 10, args.steps",
        "0.0, args.learning_rate, 0, args.steps",
    ),
    (
        "label shift",
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, 1:]',
        'inputs, labels = batch["tgt"][:, :-1], batch["tgt"][:, :-1]',
    ),
]


def run_demo(source, options):
    """The demo's score: (exactly right, of how many, loss)."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "transformer_model.py"
        script.write_text(source)
        command = [sys.executable, script, *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(r"loss (\S+), (\d+) of (\d+) exactly right", done.stdout)
    if not found:
        return f"{done.stderr.splitlines()[-1]:.60}"
    loss, right, total = found.groups()
    return f"{right:>4} of {total}  {loss:>8}"


def main():
    words, options = sys.argv[1:], []
    if "--" in words:
        split = words.index("--")
        words, options = words[:split], words[split + 1 :]
    print(f"{'without':<24}{'line':>5}  {'exactly right':>13}  {'loss':>6}")
    for name, old, new in CHANGES:
        if words and not any(word in name for word in words):
            continue
        line = ""
        if old:
            if SOURCE.count(old) != 1:
                sys.exit(f"{name}: not exactly one line has {old!r}")
            line = SOURCE[: SOURCE.index(old)].count("\n") + 1
        score = run_demo(SOURCE.replace(old, new) if old else SOURCE, options)
        print(f"{name:<24}{line:>5}  {score}", flush=True)


if __name__ == "__main__":
    main()
