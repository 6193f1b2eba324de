"""Sections 14 to 16, and the demo: training, going on, translating, and what goes wrong.

Nearly all of it calls `fit`, `translate` and `main` in this process. Processes of their
own are started where a kill, a terminal, a closed pipe or several devices are tested.
"""

import contextlib
import dataclasses
import functools
import io
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, WITHOUT_OPTIMIZATIONS, assert_refused, run, write_pairs

import transformer_model as tm

SCRIPT = ROOT / "transformer_model.py"
# One layer of width 16, and one width of 8 for all batches, so that little is compiled.
TINY = {"d_model": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 259}
TINY |= {"max_len": 8, "batch_size": 16, "warmup_steps": 20}


def options(**changes):
    return tm.Options(**{**TINY, "steps": 5, **changes})


def flags(**changes):
    """The same for the command line."""
    given = {**TINY, "steps": 5, **changes}.items()
    return [x for name, value in given for x in (f"--{name.replace('_', '-')}", value)]


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def compiled_once(without_optimizations):
    """Makes equal models and optimizers one object: jit would trace train_step and
    eval_step again for another one.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Transformer", "paper_optimizer"):
            patch.setattr(tm, name, functools.cache(getattr(tm, name)))
        yield


@pytest.fixture
def without_score(monkeypatch):
    """Training does not translate at its end, nor measure on the way."""
    monkeypatch.setattr(tm, "log_score", lambda *_: None)
    monkeypatch.setattr(tm, "unseen_loss", lambda *_: 0.5)


def words(count, seed=0):
    """Different words of 3 to 7 letters, with what they are reversed."""
    letters, found = random.Random(seed), {}
    while len(found) < count:
        found["".join(letters.choices("abcdefgh", k=letters.randint(3, 7)))] = None
    return [(word, word[::-1]) for word in found]


PAIRS, UNSEEN = tm.hold_out(words(200))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of these pairs."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", words(200))


@pytest.fixture(scope="module")
def checkpoint(compiled_once):
    """What 5 steps have learnt. No test may change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tm, "log_score", lambda *_: None)
        return tm.fit(PAIRS, UNSEEN, options())


@pytest.fixture
def model(tmp_path, checkpoint):
    """A file of that."""
    tm.save_checkpoint(tmp_path / "model", checkpoint)
    return tmp_path / "model"


class Stop(BaseException):
    """Ends a run at once, as a kill would."""


def before_each_step(monkeypatch, action):
    """Calls action(number of the step) before each step."""
    real = tm.train_step

    def train_step(state, *args):
        action(int(state.step) + 1)
        return real(state, *args)

    monkeypatch.setattr(tm, "train_step", train_step)


def after_each_step(monkeypatch, change):
    """Puts change(number of the step, state, metrics) in the place of what a step
    returns.
    """
    real = tm.train_step

    def train_step(*args):
        state, metrics = real(*args)
        return change(int(state.step), state, metrics)

    monkeypatch.setattr(tm, "train_step", train_step)


def assert_same(left, right):
    """Two trees of arrays are equal, to the last bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def command(*args, script=SCRIPT, env=None, **kwargs):
    """Starts the script in a process of its own, without most optimisations."""
    env = {**os.environ, **WITHOUT_OPTIMIZATIONS, **(env or {})}
    env.pop("PYTHONUNBUFFERED", None)  # It would hide what is not printed at once.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.Popen([sys.executable, script, *map(str, args)], env=env, **pipes)


def with_more(folder, text):
    """The script, with some lines more before it runs."""
    path, run_main = folder / "script.py", 'if __name__ == "__main__":'
    path.write_text(SCRIPT.read_text().replace(run_main, f"{text}\n\n{run_main}"))
    return path


NO_SCORE = "log_score = lambda *_: None"


# ---- The demo ------------------------------------------------------------------------


def test_demo_learns_to_reverse_and_shows_it_in_80_columns():
    """It runs as users run it."""
    process = command(env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"})
    out, err = (text.decode() for text in process.communicate(timeout=600))
    assert process.returncode == 0, err
    assert all(len(line) <= 80 for line in out.splitlines()) and "\x1b" not in out
    assert out.startswith("117,824 parameters\n")
    steps = re.findall(r"^step +(\d+)   loss \d\.\d{4}$", out, re.MULTILINE)
    assert [int(step) for step in steps] == [*range(100, 1001, 100)]
    # It is 512 where it was tried. Other machines round in other ways.
    (right,) = re.findall(r"^(\d+) of 512 unseen words", out, re.MULTILINE)
    assert int(right) >= 508
    shown = re.findall(r"^  ([a-z]{4,12}) -> ([a-z]{4,12})$", out, re.MULTILINE)
    assert len(shown) == 6
    assert sum(source == output[::-1] for source, output in shown) >= 5
    # The picture has a column for each letter of the word, and a row for each one of
    # the output. In most rows, the darkest column is that of the same letter.
    (word, output), picture = shown[0], out.split("Cross-attention")[1].splitlines()
    (start,) = [i for i, line in enumerate(picture) if line.split() == [*word, "EOS"]]
    rows = picture[start + 1 :]
    assert [row.split()[0] for row in rows] == [*output, "EOS"]
    cells = [row[4:].ljust(4 * len(word) + 4)[::4] for row in rows[:-1]]
    darkest = [
        max(range(len(row)), key=lambda i: " .:-=+*#%@".index(row[i])) for row in cells
    ]
    expected = [*reversed(range(len(word)))]
    assert sum(d == e for d, e in zip(darkest, expected)) > len(word) / 2


# ---- The command line ----------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["demo"], ["train"], ["resume"], ["translate"]])
def test_help_fits_80_columns(capsys, monkeypatch, args):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, *args, "--help")
    assert (status, err) == (0, "") and out.startswith("usage: ")
    assert all(len(line) <= 80 for line in out.splitlines())
    # Flags and files have no default that is worth a word.
    assert not re.search("None|False|==", out)


def test_train_has_an_option_for_each_field_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = " ".join(run(capsys, "train", "--help")[1].split("options:")[1].split())
    fields = dataclasses.fields(tm.Options)
    assert len(fields) == out.count("(default: ") == 12
    for field in fields:
        flag = f" --{field.name.replace('_', '-')} "
        text = out.split(flag)[1].split(" --")[0]
        assert text.endswith(f"(default: {field.default})"), text


@pytest.fixture
def fitted(monkeypatch):
    """What `fit` and `demo` are called with, instead of calling them."""
    calls = []
    for name in ("fit", "demo"):
        monkeypatch.setattr(tm, name, lambda *args: calls.append(args))
    return calls


def test_without_a_command_it_is_the_demo(capsys, monkeypatch, fitted):
    for args in [], ["demo"], ["--steps", 7], ["--seed", 3], ["demo", "--steps", 7]:
        assert run(capsys, *args) == (0, "", "")
    monkeypatch.setattr(sys, "argv", ["transformer_model.py"])
    assert tm.main() == 0
    assert fitted == [(1000, 0), (1000, 0), (7, 0), (1000, 3), (7, 0), (1000, 0)]


def test_options_of_the_command_line_reach_fit(capsys, pairs, tmp_path, fitted):
    path, valid = str(tmp_path / "model"), write_pairs(tmp_path / "valid", words(3, 1))
    assert run(capsys, "train", pairs, path)[0] == 0
    given = {"steps": 1, "batch_size": 2, "warmup_steps": 3, "dropout_rate": 0.4}
    given |= {"label_smoothing": 0.5, "d_model": 12, "num_heads": 6, "num_layers": 7}
    given |= {"max_len": 8, "vocab_size": 300, "dtype": "bfloat16", "seed": 9}
    assert run(capsys, "train", pairs, path, "--valid", valid, *flags(**given))[0] == 0
    short = ["--dropout", 0.2, "--warmup", 7]
    assert run(capsys, "train", pairs, path, *short)[0] == 0
    some = tm.Options(dropout_rate=0.2, warmup_steps=7)
    assert fitted == [
        (PAIRS, UNSEEN, tm.Options(), path, None),
        (words(200), words(3, 1), tm.Options(**given), path, None),
        (PAIRS, UNSEEN, some, path, None),
    ]


@pytest.mark.parametrize(
    "args, words",
    [
        (["learn"], ["'learn'"]),
        (["--steps", 0], ["steps must be at least 1, not 0"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--seed", -1], ["seed must be at least 0, not -1"]),
        (["demo", "--vocab-size", 300], ["--vocab-size"]),
        (["train", "pairs"], ["MODEL"]),
        (
            ["train", "pairs", "model", "--warmup-steps", 0],
            ["warmup_steps", "1, not 0"],
        ),
        (["train", "pairs", "model", "--batch-size", 0], ["batch_size", "1, not 0"]),
        (["train", "pairs", "model", "--dropout", "nan"], ["dropout_rate", "not nan"]),
        (
            ["train", "pairs", "model", "--dropout", 1],
            ["dropout_rate", "below 1, not 1"],
        ),
        (["train", "pairs", "model", "--label-smoothing", 1.5], ["0 to 1, not 1.5"]),
        (
            ["train", "pairs", "model", "--d-model", 63],
            ["d_model", "multiple of", "63"],
        ),
        (["train", "pairs", "model", "--vocab-size", 258], ["at least 259, not 258"]),
        (["train", "pairs", "model", "--max-len", 0], ["max_len", "at least 1, not 0"]),
        (
            ["train", "pairs", "model", "--dtype", "float16"],
            ["'bfloat16'", "'float16'"],
        ),
        (["train", "pairs", ""], ["MODEL is an empty word"]),
        (["train", "pairs", "."], [". exists", "resume"]),
        (["resume", "pairs", "model", "--d-model", 32], ["--d-model"]),
        (["resume", "pairs", "nowhere"], ["nowhere: No such file"]),
        (["translate"], ["MODEL"]),
        (["translate", "nowhere", "a"], ["nowhere: No such file"]),
        (["translate", "model", "--beam-size", 0], ["beam_size", "at least 1, not 0"]),
        (["translate", "model", "--steps", 1], ["--steps"]),
    ],
)
def test_mistakes_on_the_command_line_have_status_2(capsys, fitted, args, words):
    """`main` returns it, also where argparse ends with a SystemExit."""
    status, out, err = run(capsys, *args)
    assert (status, out, fitted) == (2, "", []) and "error: " in err
    assert all(word in err.splitlines()[-1] for word in words), err


def test_an_empty_name_is_never_no_name(capsys, pairs, tmp_path, fitted):
    """As an unset variable of a shell script gives it."""
    args = ["train", pairs, tmp_path / "model", "--valid", ""]
    assert_refused(run(capsys, *args), "No such file")
    assert fitted == []


def test_other_streams_and_threads(model, monkeypatch):
    """This is how a notebook or a server calls it."""
    args, results = ["translate", str(model), "abc", "12345678"], []
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    thread = threading.Thread(target=lambda: results.append(tm.main(args)))
    thread.start()
    thread.join()
    assert results == [2] and out.getvalue().count("\n") == 2
    assert err.getvalue().count("\n") == 1


@pytest.mark.usefixtures("without_score")
def test_ctrl_c_has_status_130_and_no_traceback(capsys, pairs, tmp_path, monkeypatch):
    path = tmp_path / "model"

    def interrupt(step):
        if step == 5:
            raise KeyboardInterrupt

    before_each_step(monkeypatch, interrupt)
    status, _, err = run(capsys, "train", pairs, path, *flags(steps=20))
    assert status == 130 and "Traceback" not in err
    assert tm.load_checkpoint(path).state["step"] == 4


# ---- The recipe ----------------------------------------------------------------------


def test_defaults_are_the_papers(monkeypatch):
    def create_train_state(*args):
        raise Stop(*args)

    monkeypatch.setattr(tm, "create_train_state", create_train_state)
    for given, d_model, warmup in [
        (None, 128, 1000),
        (tm.Options(warmup_steps=20, d_model=16), 16, 20),
    ]:
        with pytest.raises(Stop) as stop:
            tm.fit(PAIRS, UNSEEN, given)
        config, _, optimizer = stop.value.args
        assert not config.norm_first and config.dropout_rate == 0.1
        assert config.share_embeddings and config.dtype == "float32"
        assert (config.d_model, config.d_ff) == (d_model, 4 * d_model)
        assert optimizer is tm.paper_optimizer(d_model, warmup)  # see compiled_once


@pytest.mark.usefixtures("without_score")
def test_options_reach_the_model_and_every_step(monkeypatch):
    """Otherwise one might be an option that nobody reads."""
    smoothings, real = [], tm.train_step

    def train_step(state, batch, label_smoothing):
        smoothings.append(label_smoothing)
        return real(state, batch, label_smoothing)

    monkeypatch.setattr(tm, "train_step", train_step)
    mine = options(dropout_rate=0.2, label_smoothing=0.3, vocab_size=263, steps=2)
    found = tm.fit(PAIRS, UNSEEN, mine)
    expected = {"src_vocab_size": 263, "tgt_vocab_size": 263, "dropout_rate": 0.2}
    expected |= {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 64}
    assert found.config == tm.TransformerConfig(**expected, max_len=8)
    assert smoothings == [0.3] * 2 and found.state["step"] == 2


def test_score_and_loss_are_those_of_the_average_on_all_unseen_pairs(
    checkpoint, capsys, monkeypatch
):
    """The loss is a mean over labels: the mean of two batches' means would be another.
    That of `params`, which are NaN here, would be NaN.
    """
    mine = [("ab", "b"), *words(69, seed=1)]
    encode = checkpoint.tokenizer.encode
    tokens = [tuple(map(encode, pair)) for pair in mine]
    state = tm.create_train_state(checkpoint.config, jax.random.key(3))
    expected = float(tm.eval_step(state, tm.to_batch(tokens, 8))["loss"])
    state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    np.testing.assert_allclose(tm.unseen_loss(state, tokens, 8), expected, rtol=1e-5)

    def translate(found, texts):
        assert found is checkpoint and texts == [source for source, _ in mine]
        return [target if i % 7 == 0 else "a" for i, (_, target) in enumerate(mine)]

    monkeypatch.setattr(tm, "translate", translate)
    tm.log_score(checkpoint, tokens)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (out, lines[0]) == ("", "10 of 70 unseen pairs exactly right (14.3%)")
    assert lines[1] == "  ab -> b" and len(lines) == 7
    assert lines[2] == f"  {mine[1][0]} -> a   not {mine[1][1]}"


def test_fit_prints_to_stderr_and_ends_with_a_score(capsys):
    tm.fit(PAIRS, UNSEEN, options())
    out, err = capsys.readouterr()
    assert out == "" and " of 20 unseen pairs exactly right" in err
    assert all(len(line) <= 80 for line in err.splitlines())
    losses = re.findall(
        r"^step (\d) of 5: loss (\S+), unseen (\S+), \d+ s$", err, re.MULTILINE
    )
    assert [step for step, _, _ in losses] == [*"12345"]
    assert float(losses[-1][2]) < float(losses[0][2])


# ---- Going on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(compiled_once):
    """The checkpoint of a run of 60 steps that nothing ended; there were 20 reports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tm, "log_score", lambda *_: None)
        patch.setattr(tm, "unseen_loss", lambda *_: 0.5)
        return tm.fit(PAIRS, UNSEEN, options(steps=60))


@pytest.mark.usefixtures("without_score")
def test_more_steps_give_what_they_had_given_at_once(checkpoint, whole):
    """The caller's checkpoint stays as it is: its arrays are not used up."""
    before = jax.tree.map(np.array, checkpoint.state)
    found = tm.fit(PAIRS, UNSEEN, options(steps=60), checkpoint=checkpoint)
    assert found.notes == whole.notes and found.tokenizer is checkpoint.tokenizer
    assert_same(found.state, whole.state)
    assert_same(checkpoint.state, before)
    # Its own options need not be given. There is nothing left to do here.
    again = tm.fit(PAIRS, UNSEEN, checkpoint=whole)
    assert_same(again.state, whole.state)


@pytest.mark.usefixtures("without_score")
def test_resume_asks_for_no_option(capsys, pairs, model, whole, tmp_path):
    args = ["resume", pairs, model, "--steps", 60]
    status, out, err = run(capsys, *args)
    assert (status, out) == (0, "") and reports_of(err) == [*range(6, 61, 3)]
    tm.save_checkpoint(tmp_path / "whole", whole)
    assert model.read_bytes() == (tmp_path / "whole").read_bytes()
    # The same pairs may be in another file, and have --valid in another way.
    mine = write_pairs(tmp_path / "mine", PAIRS)
    valid = write_pairs(tmp_path / "valid", UNSEEN)
    assert run(capsys, "resume", mine, model, "--valid", valid)[0] == 0
    assert model.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(tm.Options)])
def test_every_option_that_differs_is_refused_and_named(checkpoint, name):
    old = getattr(options(), name)
    new = {"steps": 4, "dtype": "bfloat16"}.get(name, 2 * old or 1)
    with pytest.raises(tm.InputError, match=f"^{name} must .*{old}.*, not .*{new}"):
        tm.fit(PAIRS, UNSEEN, options(**{name: new}), checkpoint=checkpoint)


def test_other_texts_are_refused_whatever_their_tokens(capsys, tmp_path, model):
    """The tokens that are trained on would be the same in the first two cases: of pairs
    too long to be used, one is gone; and what an unseen pair is, another has become.
    """
    before, path = model.read_bytes(), tmp_path / "pairs.tsv"
    checkpoint = tm.load_checkpoint(model)
    long = [("a" * 9, "b")]
    for name, mine, others in [
        ("pairs", PAIRS + long, UNSEEN),
        ("unseen pairs", PAIRS, UNSEEN + long),
        ("unseen pairs", PAIRS, UNSEEN[::-1]),
        ("pairs", PAIRS[:-1], UNSEEN),
        ("pairs", [("x", "y"), *PAIRS[1:]], UNSEEN),
    ]:
        with pytest.raises(tm.InputError, match=f"^the {name} are not those"):
            tm.fit(mine, others, path=model, checkpoint=checkpoint)
        write_pairs(path, mine)
        valid = write_pairs(tmp_path / "valid", others)
        result = run(capsys, "resume", path, model, "--valid", valid, "--steps", 9)
        assert_refused(result, path, valid, model, f"the {name} are not", "--valid")
        assert model.read_bytes() == before


@pytest.mark.usefixtures("without_score")
def test_no_model_is_trained_over(capsys, pairs, model):
    before = model.read_bytes()
    args = ["train", pairs, model, *flags()]
    assert_refused(run(capsys, *args), model, "exists", "resume")
    assert model.read_bytes() == before
    checkpoint = tm.load_checkpoint(model)
    tm.save_checkpoint(model, checkpoint._replace(notes={"mine": "mine"}))
    before = model.read_bytes()
    assert_refused(run(capsys, "resume", pairs, model), "not one of `fit`")
    assert model.read_bytes() == before


def stop_at(patch, place, countdown):
    """Ends the run when it comes to a place for so many times: before a step, in the
    middle of saving, or before or after a saved file gets its name.
    """
    fsync, replace = os.fsync, os.replace

    def pass_by(name):
        nonlocal countdown
        countdown -= name == place
        if countdown == 0:
            raise Stop

    def stop_in_fsync(file):
        pass_by("fsync")
        fsync(file)

    def stop_around_replace(source, target):
        pass_by("replace")
        replace(source, target)
        pass_by("replaced")

    before_each_step(patch, lambda step: pass_by("step"))
    patch.setattr(os, "fsync", stop_in_fsync)
    patch.setattr(os, "replace", stop_around_replace)


@pytest.mark.usefixtures("without_score")
@pytest.mark.parametrize("seed", range(2))
def test_runs_that_end_anywhere_end_with_the_same_file(tmp_path, whole, seed):
    """A run that begins with the batch of another step, that takes other dropout keys,
    or that forgets a part of its state, learns as well, and something else.
    """
    rng, path, found = random.Random(seed), tmp_path / "model", None
    for place in rng.sample(["step", "fsync", "replace", "replaced"], 4):
        # After the save at the start, there is one at every third step.
        countdown = rng.randint(2, 14 if place == "step" else 5)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, place, countdown)
            tm.fit(PAIRS, UNSEEN, options(steps=60), path, found)
        found = tm.load_checkpoint(path)
        assert files_in(tmp_path) == ["model"] and found.state["step"] < 60
    tm.fit(PAIRS, UNSEEN, path=path, checkpoint=found)
    tm.save_checkpoint(tmp_path / "whole", whole)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.usefixtures("without_score")
def test_killed_processes_end_with_the_same_file(capsys, pairs, tmp_path, whole):
    """Two runs are killed, at some moment."""
    rng, path = random.Random(), tmp_path / "model"
    script = with_more(tmp_path, NO_SCORE)
    args = ["train", pairs, path, *flags(steps=60)]
    for _ in range(2):
        process = command(*args, script=script)
        seen = rng.randint(3, 9)  # The third line is the first report.
        for _ in range(seen):
            process.stderr.readline()
        time.sleep(rng.random() / 100)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0)
        args = ["resume", pairs, path]
    status, _, err = run(capsys, *args)
    assert status == 0, err
    tm.save_checkpoint(tmp_path / "whole", whole)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


# ---- Reports -------------------------------------------------------------------------


def reports_of(err):
    return [int(step) for step in re.findall("^step ([0-9]+) of", err, re.MULTILINE)]


def set_clock(monkeypatch, seconds):
    """Each step takes these seconds."""
    now = [0]
    before_each_step(monkeypatch, lambda step: now.append(now[-1] + seconds))
    clock = types.SimpleNamespace(monotonic=lambda: now[-1])
    monkeypatch.setattr(tm, "time", clock)


@pytest.mark.usefixtures("without_score")
def test_reports_come_at_least_once_a_minute(capsys, tmp_path, monkeypatch):
    """By their number alone, 100 steps of 25 seconds would go by."""
    path, saved = tmp_path / "model", []
    set_clock(monkeypatch, 25)
    real = tm.save_checkpoint

    def save_checkpoint(path, checkpoint):
        saved.append(int(checkpoint.state["step"]))
        real(path, checkpoint)
        if saved[-1] == 9:
            raise Stop

    monkeypatch.setattr(tm, "save_checkpoint", save_checkpoint)
    with pytest.raises(Stop):
        tm.fit(PAIRS, UNSEEN, options(steps=2000), path)
    assert saved == [0, 3, 6, 9] and tm.load_checkpoint(path).state["step"] == 9
    assert reports_of(capsys.readouterr().err) == [3, 6]


@pytest.mark.usefixtures("without_score")
@pytest.mark.parametrize(
    "steps, expected",
    [
        (45, [*range(2, 45, 2), 45]),  # the last step is none of the twentieths
        (20_000, [500, 1000]),  # a twentieth would be 1,000
    ],
)
def test_reports_come_at_the_last_step_and_each_500(
    capsys, monkeypatch, steps, expected
):
    """With steps that do nothing but count, until the last one that is expected."""

    def train_step(state, batch, label_smoothing):
        if state.step == expected[-1]:
            raise Stop
        return state.replace(step=state.step + 1), {"loss": 1.0, "accuracy": 0.0}

    monkeypatch.setattr(tm, "train_step", train_step)
    with contextlib.suppress(Stop):
        tm.fit(PAIRS, UNSEEN, options(steps=steps))
    assert reports_of(capsys.readouterr().err) == expected


class Unread:
    """A loss that is not yet there, and fails whoever reads it."""

    def block_until_ready(self):
        self.is_waited_for = True

    def __array__(self, *_, **__):
        pytest.fail("the loop reads every loss")


@pytest.mark.usefixtures("without_score")
def test_loop_waits_for_the_step_before_and_not_for_the_last(monkeypatch):
    given = []

    def train_step(state, batch, label_smoothing):
        if len(given) == 99:  # The next step is the first that is due.
            raise Stop
        assert all(hasattr(loss, "is_waited_for") for loss in given[:-1])
        given.append(Unread())
        return state, {"loss": given[-1]}

    monkeypatch.setattr(tm, "train_step", train_step)
    with pytest.raises(Stop):
        tm.fit(PAIRS, UNSEEN, options(steps=2000))
    assert not hasattr(given[-1], "is_waited_for")


# ---- What ends a run -----------------------------------------------------------------


def assert_not_finite(capsys, pairs, path, step, saved):
    """The run ends with status 1 at that step; the file is that of the step `saved`, and
    good.
    """
    status, out, err = run(capsys, "train", pairs, path, *flags(steps=60))
    last = err.splitlines()[-1]
    assert (status, out) == (1, "") and err.count("error: ") == 1
    assert last.startswith("error: ") and f"after step {step}" in last
    assert "not finite" in last and "Traceback" not in err
    state = tm.load_checkpoint(path).state
    assert state["step"] == saved
    for tree in (state["params"], state["average"]):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@pytest.mark.usefixtures("without_score")
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_loss_that_is_not_finite_ends_the_run_at_its_next_twentieth(
    capsys, pairs, tmp_path, monkeypatch, number
):
    def change(step, state, metrics):
        return state, {**metrics, "loss": jnp.float32(number)} if step > 7 else metrics

    after_each_step(monkeypatch, change)
    assert_not_finite(capsys, pairs, tmp_path / "model", step=9, saved=6)


@pytest.mark.usefixtures("without_score")
@pytest.mark.parametrize("broken", [9, 60])
def test_parameters_that_are_not_finite_are_not_saved(
    capsys, pairs, tmp_path, monkeypatch, broken
):
    """The loss of a step is that of the parameters before it, and so is still good."""

    def change(step, state, metrics):
        if step == broken:
            params = jax.tree.map(lambda x: x * np.nan, state.params)
            state = state.replace(params=params)
        return state, metrics

    after_each_step(monkeypatch, change)
    assert_not_finite(capsys, pairs, tmp_path / "model", broken, saved=broken - 3)


@pytest.mark.usefixtures("without_score")
def test_the_clock_saves_nothing_that_is_not_finite(
    capsys, pairs, tmp_path, monkeypatch
):
    """A step takes a minute and a bit. The next twentieth after step 4 is step 6."""
    set_clock(monkeypatch, 61)

    def change(step, state, metrics):
        return state, {**metrics, "loss": jnp.nan} if step > 4 else metrics

    after_each_step(monkeypatch, change)
    assert_not_finite(capsys, pairs, tmp_path / "model", step=6, saved=4)


def test_model_that_cannot_be_written_is_told_before_training(
    capsys, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(tm, "train_step", lambda *_: pytest.fail("it trains"))
    path = tmp_path / "nowhere" / "model"
    status, out, err = run(capsys, "train", pairs, path, *flags())
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"error: {path}: No such file or directory"


@pytest.mark.usefixtures("without_score")
def test_full_disk_later_on_is_one_line(capsys, pairs, tmp_path, monkeypatch):
    path, real, calls = tmp_path / "model", os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    status, _, err = run(capsys, "train", pairs, path, *flags(steps=60))
    last = err.splitlines()[-1]
    assert (status, last) == (2, f"error: {path}: No space left on device")
    assert tm.load_checkpoint(path).state["step"] == 3
    assert files_in(tmp_path) == ["model"]


def test_files_of_another_kind_are_refused_and_stay(capsys, pairs, model):
    good = model.read_bytes()
    for content, reason in [
        (b"", "not a checkpoint"),
        (b"a\tb\n", "not a checkpoint"),
        (good[:-1], "damaged or cut short"),
    ]:
        model.write_bytes(content)
        assert_refused(run(capsys, "resume", pairs, model), model, reason)
        assert_refused(run(capsys, "translate", model, "a"), model, reason)
        assert_refused(run(capsys, "train", pairs, model), model, "exists")
        assert model.read_bytes() == content


# ---- Pairs ---------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch):
    """Returns a function that gives what `fit` begins with, drawing no parameters."""
    blank = types.SimpleNamespace(step=0)
    monkeypatch.setattr(tm, "create_train_state", lambda *_: blank)
    monkeypatch.setattr(tm, "to_arrays", lambda state: {})
    return lambda pairs, unseen, **changes: tm.start_run(
        pairs, unseen, options(**changes), None
    )


def texts_of(checkpoint, pairs):
    return [tuple(map(checkpoint.tokenizer.decode, pair)) for pair in pairs]


@pytest.mark.parametrize("content", ["", "a\tb\n", "a\tb\na\tc\na\td\n"])
def test_too_few_pairs_are_one_line(capsys, tmp_path, content):
    """There is nothing to hold out, or, once a source is held out, nothing is left."""
    path = tmp_path / "pairs"
    path.write_text(content)
    status, out, err = run(capsys, "train", path, tmp_path / "model", *flags())
    last = err.splitlines()[-1]
    assert (status, out) == (2, "") and last.startswith(f"error: {path}, ")
    assert "a run needs a pair, and an unseen pair with another source" in last
    assert files_in(tmp_path) == ["pairs"]


def test_pairs_with_the_source_of_an_unseen_one_are_not_trained_on(start):
    """Nor are subwords learnt from these, or from unseen pairs."""
    mine = [(str(n), "ab") for n in range(40)] + [("xyz", "xyz")] * 50
    unseen = [("7", "other"), ("9", "9"), ("new", "wen"), ("xyz", "uvw")]
    _, checkpoint, pairs, measured = start(mine, unseen, vocab_size=260)
    assert texts_of(checkpoint, measured) == unseen
    expected = [pair for pair in mine if pair[0] not in ("7", "9", "xyz")]
    assert texts_of(checkpoint, pairs) == expected
    assert checkpoint.tokenizer.merges == [(100, 101)]


def test_pairs_too_long_are_left_out_and_counted(capsys, start):
    """7 bytes and EOS have room in 8 tokens."""
    mine = [*PAIRS, ("12345678", "1"), ("1", "12345678"), ("1234567", "7654321")]
    _, checkpoint, pairs, _ = start(mine, UNSEEN)
    assert texts_of(checkpoint, pairs) == [*PAIRS, mine[-1]]
    err = capsys.readouterr().err
    assert "pairs: 181 of 183 are within max_len, 8 tokens" in err


@pytest.mark.parametrize("option", ["PAIRS", "--valid"])
@pytest.mark.parametrize(
    "content, expected",
    [
        (None, ["No such file"]),
        (b"", ["a run needs"]),
        (b"a\tb\nab\n", ["line 2", "source<TAB>target"]),
        (b"a\t\xe4\n", ["line 1", "UTF-8 at byte 3"]),
    ],
)
def test_mistakes_in_pairs_name_their_file(
    capsys, tmp_path, pairs, option, content, expected
):
    path = tmp_path / "mine.tsv"
    if content is not None:
        path.write_bytes(content)
    files = [path] if option == "PAIRS" else [pairs, "--valid", path]
    args = ["train", files[0], tmp_path / "model", *files[1:], *flags()]
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "") and "Traceback" not in err
    assert all(word in err.splitlines()[-1] for word in [str(path), *expected])


# ---- Translating ---------------------------------------------------------------------


def read_from(monkeypatch, content):
    """Lets stdin be these bytes, of which nobody types any."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def echo(monkeypatch):
    """Lets every output be its source, which ends with EOS."""

    def find_best(model, params, beam_size, with_weights, src, max_len):
        weights = np.broadcast_to(np.eye(len(src[0])), (len(src), *2 * src.shape[1:]))
        return (src, weights)[: 1 + with_weights]

    monkeypatch.setattr(tm, "find_best", find_best)


def test_translate_from_python(checkpoint, monkeypatch):
    """The model is hardly trained, but says the same whatever stands beside a text."""
    texts = ["abc", "", "déf", "h", "gfedcb"]
    found = tm.translate(checkpoint, texts)
    assert len(found) == 5 and found[1] == "" and "" not in (found[0], found[2])
    assert [tm.translate(checkpoint, [text])[0] for text in texts] == found
    assert tm.translate(checkpoint, []) == []
    with pytest.raises(tm.InputError, match="^text 2: .* below 8, not 8"):
        tm.translate(checkpoint, ["abc", "12345678", "123456789"])
    sizes, real = [], tm.beam_search
    monkeypatch.setattr(
        tm, "beam_search", lambda *args: sizes.append(args[-1]) or real(*args)
    )
    tm.translate(checkpoint, texts)
    greedy = tm.translate(checkpoint, texts, beam_size=1)
    assert sizes == [4] and len(greedy) == 5
    model, params = tm.Transformer(checkpoint.config), checkpoint.state["average"]
    src = tm.pad([[*checkpoint.tokenizer.encode("abc"), tm.EOS_ID]], 8)
    tokens = tm.greedy_decode(model, params, src, 8)
    assert greedy[0] == checkpoint.tokenizer.decode(tokens[0].tolist())


def test_translation_uses_the_average(capsys, checkpoint, model):
    args = ["translate", model, "abc", "hgfedcb", "--attention"]
    expected = run(capsys, *args)
    state = dict(checkpoint.state)
    state["params"] = jax.tree.map(lambda x: x * np.nan, state["params"])
    tm.save_checkpoint(model, checkpoint._replace(state=state))
    assert run(capsys, *args) == expected
    # The average is not just anything: with other numbers there, something else comes.
    state["average"] = jax.tree.map(lambda x: -3 * x, state["average"])
    tm.save_checkpoint(model, checkpoint._replace(state=state))
    assert run(capsys, *args) != expected


def test_command_and_function_translate_alike(capsys, checkpoint, model):
    texts = [source for source, _ in UNSEEN]
    for beam_size in (1, 4):
        expected = tm.translate(checkpoint, texts, beam_size)
        args = ["--beam-size", beam_size, model, *texts]
        out = "".join(tm.one_line(text) + "\n" for text in expected)
        assert run(capsys, "translate", *args) == (0, out, "")


def test_texts_reach_the_model_as_they_are(capsys, model, monkeypatch):
    echo(monkeypatch)
    for args, expected in [
        (["a b", "", " c ", "\ta", "ü"], ["a b", "", " c ", "\ta", "ü"]),
        (["--", "-foo", "-5", "-"], ["-foo", "-5", "-"]),
        (["\ufeffa"], ["a"]),  # A byte order mark is no text.
    ]:
        status, out, err = run(capsys, "translate", model, *args)
        assert (status, out.split("\n"), err) == (0, [*expected, ""], "")


def test_bad_lines_hinder_no_other(capsys, model, monkeypatch):
    """What cannot be translated is named, and leaves an empty line where it was."""
    echo(monkeypatch)
    lines = [b"\xef\xbb\xbfabc", b"", b"12345678", b"xyz\r", b"caf\xe9"]
    lines += ["ä\u2028".encode(), b"last"]
    read_from(monkeypatch, b"\n".join(lines))
    status, out, err = run(capsys, "translate", model)
    assert (status, out) == (2, "abc\n\n\nxyz\n\nä\nlast\n")
    assert err.splitlines() == [
        "error: line 3: the number of tokens must be below 8, not 8",
        "error: line 5: not UTF-8 at byte 4",
    ]
    text = os.fsdecode(b"caf\xe9")
    status, out, err = run(capsys, "translate", model, "abc", text)
    assert (status, out, err) == (2, "abc\n\n", "error: line 2: not UTF-8 at byte 4\n")
    read_from(monkeypatch, b"")
    assert run(capsys, "translate", model) == (0, "", "")


@pytest.mark.parametrize("end", ["\n", "", "\nü"])
def test_blocks_of_a_file_cut_no_line(capsys, model, monkeypatch, end):
    """Blocks end anywhere, within a character too; lines keep their number."""
    echo(monkeypatch)
    content = "abc\n" + "äöü\n" * 20_000 + "12345678" + end
    read_from(monkeypatch, content.encode())
    status, out, err = run(capsys, "translate", model)
    last = "ü\n" if end.endswith("ü") else ""
    assert status == 2 and out == "abc\n" + "äöü\n" * 20_000 + "\n" + last
    assert err.startswith("error: line 20002: ") and err.count("\n") == 1


@pytest.mark.parametrize("end", [*"\r\n\x0b\u0085\x1c\u2028", "\r\n"])
def test_translation_is_one_line_whatever_the_model_writes(
    capsys, model, monkeypatch, end
):
    outputs = [tm.Tokenizer().encode(f"a{end}b"), [258, 100], [2], [tm.BOS_ID, 13, 13]]
    monkeypatch.setattr(tm, "search_all", lambda *_: [[row] for row in outputs])
    status, out, _ = run(capsys, "translate", model, *"abcd")
    assert status == 0 and out.splitlines() == out.split("\n")[:-1]
    assert out.split("\n")[:3] == ["a b", "\ufffda", ""] and out.count("\n") == 4


# ---- Pictures ------------------------------------------------------------------------


def test_attention_is_drawn_for_each_translation(capsys, model, monkeypatch):
    echo(monkeypatch)
    args = ["translate", "--attention", model, "abc", "", "de f"]
    status, out, err = run(capsys, *args)
    assert (status, err) == (0, "")
    assert out.startswith("abc\nCross-attention") and "\n\nde f\nCross-attention" in out
    blocks = out.split("Cross-attention")[1:]
    for block, tokens in zip(blocks, ["a b c EOS", "d e _ f EOS"], strict=True):
        lines = [line.split() for line in block.splitlines() if line]
        start = lines.index(tokens.split())
        rows = lines[start + 1 :][: len(tokens.split())]
        assert rows == [[token, "@@@"] for token in tokens.split()]


def test_picture_of_an_output_without_eos():
    """An output that has not ended after max_len tokens has no row for EOS."""
    tokenizer, weights = tm.Tokenizer(), np.eye(3)
    source, output = tokenizer.encode("ab"), tokenizer.encode("xyz")
    picture = tm.draw_translation(tokenizer, source, output, weights)
    assert [row.split()[0] for row in picture.split("\n")[-3:]] == [*"xyz"]
    picture = tm.draw_translation(tokenizer, source, output[:2], weights)
    assert [row.split()[0] for row in picture.split("\n")[-3:]] == ["x", "y", "EOS"]


@pytest.mark.parametrize("text", ["\t", "\n", "\r", "\u2028", "\x1b", "水", "🙂", "é"])
def test_no_character_tears_the_picture(text):
    """All rows are as wide as the first says, in columns of a terminal."""
    tokenizer = tm.Tokenizer.learn([text] * 2, 300)  # into a single token
    tokens = tokenizer.encode(text)
    assert len(tokens) == 1
    source = [100, *tokens, 101]
    weights = np.ones((len(source) + 1, len(source) + 1))
    picture = tm.draw_translation(tokenizer, source, source, weights)
    lines = picture.split("\n\n")[1].split("\n")
    assert len(lines) == len(source) + 2 and picture.isascii() != (text == "é")
    assert len({len(line) for line in lines}) == 1
    assert all(line.isprintable() for line in lines)


def test_pictures_compile_for_widths_and_not_for_lengths(capsys, model, monkeypatch):
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice([*"abc"], n)) for n in [*range(1, 8)] * 10]
    read_from(monkeypatch, "".join(f"{line}\n" for line in lines).encode())
    tm.attention_weights.clear_cache()
    status, out, _ = run(capsys, "translate", model, "--attention", "--beam-size", 1)
    assert status == 0 and out.count("Cross-attention") == 70
    assert tm.attention_weights._cache_size() == 1


# ---- Terminals and pipes -------------------------------------------------------------


def test_translation_at_a_terminal(model):
    """The prompt goes to stderr, and every line is answered before the next is asked."""
    ours, theirs = pty.openpty()
    process = command("translate", model, stdin=theirs)
    os.close(theirs)
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    answers = []
    for typed in (b"abc\n", b"\n", b"abc\n"):
        assert process.stderr.read(2) == b"> "
        os.write(ours, typed)
        answers.append(process.stdout.readline())
    assert process.stderr.read(2) == b"> "
    os.write(ours, b"\x04")
    out, err = process.communicate()
    too_late.cancel()
    os.close(ours)
    assert (process.returncode, out.strip(), err.strip()) == (0, b"", b"")
    assert answers[0] == answers[2] != b"\n" and answers[1] == b"\n"


def test_writer_that_waits_for_each_answer_gets_it(model):
    process = command("translate", model, stdin=subprocess.PIPE)
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    for _ in range(3):
        process.stdin.write(b"abc\n")
        process.stdin.flush()
        assert process.stdout.readline().strip()
    process.stdin.close()
    assert process.wait() == 0 and process.stderr.read() == b""
    too_late.cancel()


def test_closed_pipes_end_any_command_quietly(pairs, model, tmp_path):
    """Of stdout, also within a picture; of stderr, also where an error is told."""
    train = ["train", pairs, tmp_path / "new", *flags(steps=1)]
    for closed, args in [
        ("stdout", ["translate", "--attention", model, "abc"]),
        ("stderr", ["translate", model, "12345678"]),
        ("stderr", train),
    ]:
        read, write = os.pipe()
        os.close(read)
        process = command(*args, **{closed: write})
        os.close(write)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out or b"", err or b"") == (1, b"", b""), args


@pytest.mark.parametrize(
    "name, args", [("stdin", ["translate"]), ("stdout", ["demo", "--steps", "1"])]
)
def test_stream_that_was_closed_and_is_needed(capsys, model, monkeypatch, name, args):
    """`<&-` and `>&-`. Python has None for such a stream."""
    monkeypatch.setattr(sys, name, None)
    assert tm.main([*args, str(model)] if name == "stdin" else args) == 2
    assert capsys.readouterr().err.startswith(f"error: {name} is closed")


def test_training_needs_no_stream(pairs, tmp_path):
    """A file that is opened must not get the number of one, and what is printed."""
    script, path = with_more(tmp_path, NO_SCORE), tmp_path / "new"
    args = [sys.executable, script, "train", pairs, path, *flags(steps=1)]
    line = 'exec "$0" "$@" <&- >&- 2>&-'
    env = {**os.environ, **WITHOUT_OPTIMIZATIONS}
    done = subprocess.run(["sh", "-c", line, *map(str, args)], check=False, env=env)
    assert done.returncode == 0
    assert tm.load_checkpoint(path).state["step"] == 1


def test_text_is_utf8_wherever_it_comes_out(model, tmp_path):
    """A system that prefers ASCII is no reason to fail. The output is the source here."""
    text, env = "ä水", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    script = with_more(tmp_path, "find_best = lambda a, b, c, d, src, _: (src,)")
    process = command("translate", model, text, script=script, env=env)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err) == (0, text + "\n", b"")


# ---- Devices and processes -----------------------------------------------------------


def start_on(devices, *args, folders=(None, None), env=None, **kwargs):
    """Starts the script on "1", "3", "4" or "2 x 2" devices; returns its processes. They
    run in these folders; None is the present one.
    """
    environments = [{}]
    if devices == "2 x 2":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        environments = [{**job, "JAX_PROCESS_ID": str(i)} for i in (0, 1)]
        args = [*args, "--distributed"]
    count = f"--xla_force_host_platform_device_count={devices[-1]}"
    env = {"XLA_FLAGS": count, "JAX_PLATFORMS": "cpu", **(env or {})}
    return [
        command(*args, env={**env, **more}, cwd=folder, **kwargs)
        for more, folder in zip(environments, folders)
    ]


def ended(processes, timeout=60):
    """Waits for the processes: (status, stdout, stderr) of each."""
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            # The library that connects the processes announces itself, in pieces, of
            # which one can be the end of a line alone.
            lines = out.decode().splitlines(keepends=True)
            lines = [x for x in lines if not re.search(r"\[Gloo\]|peer ranks|^\n", x)]
            results.append((process.returncode, "".join(lines), err.decode()))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.fixture(scope="session")
def unequal(tmp_path_factory):
    """Pairs of very unequal length, so that devices have unequal numbers of labels: the
    mean of the devices' means is another than the mean over all labels.
    """
    rng = random.Random(0)
    pairs = [(s[: rng.choice([1, 7])], t[: rng.choice([1, 7])]) for s, t in words(300)]
    return write_pairs(tmp_path_factory.mktemp("unequal") / "pairs.tsv", pairs)


@pytest.mark.usefixtures("without_score")
def test_any_number_of_devices_and_processes_learns_the_same(unequal, tmp_path):
    """Two processes of two devices each do three steps, and one with three devices the
    rest, though three do not divide the batch of 16. The second process has a folder of
    its own, and nothing gets into that.
    """
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    script, path = with_more(tmp_path, NO_SCORE), folders[0] / "model"
    expected = tm.fit(*tm.hold_out(tm.read_pairs(unequal)), options(steps=5))

    train = ["train", unequal, "model", *flags(steps=3)]
    job = start_on("2 x 2", *train, folders=folders, script=script)
    (status, out, err), other = ended(job)
    assert (status, out, reports_of(err)) == (0, "", [1, 2, 3]), err
    assert other == (0, "", "") and files_in(folders[1]) == []
    resume = ["resume", unequal, path, "--steps", 5]
    ((status, out, err),) = ended(start_on("3", *resume, script=script))
    assert (status, out, reports_of(err)) == (0, "", [4, 5]), err

    found = tm.load_checkpoint(path)
    assert found.notes == expected.notes and found.state["step"] == 5
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    for name in ("params", "average"):
        jax.tree.map(close, found.state[name], expected.state[name])


def test_process_that_fails_does_not_wait_for_the_others(unequal, tmp_path):
    """The first alone finds that nothing can be saved. The second waits for it in the
    first step, and JAX ends it then.
    """
    path = tmp_path / "nowhere" / "model"
    job = start_on("2 x 2", "train", unequal, path, *flags(steps=9999))
    first, second = ended(job, timeout=30)
    assert first[:2] == (2, "")
    last = first[2].splitlines()[-1]
    assert last == f"error: {path}: No such file or directory"
    assert second[0] != 0 and second[1] == ""


def test_loss_that_is_not_finite_ends_all_processes(unequal, tmp_path):
    """At the next twentieth, though the first process alone reports."""
    broken = f"""{NO_SCORE}
real = train_step
def train_step(state, *args):
    state, metrics = real(state, *args)
    return state, {{**metrics, "loss": metrics["loss"] / (state.step < 3)}}
"""
    script = with_more(tmp_path, broken)
    args = ["train", unequal, tmp_path / "model", *flags(steps=100)]
    for status, out, err in ended(start_on("2 x 2", *args, script=script), timeout=30):
        assert (status, out) == (1, "") and "Traceback" not in err
        assert "error: after step 5 " in err and "not finite" in err
    assert tm.load_checkpoint(tmp_path / "model").state["step"] == 0


def test_processes_with_other_pairs_do_not_train_together(tmp_path):
    """Each would take its own part of its own batch, and nothing would look wrong."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_pairs(folder / "pairs", words(100, seed))
    args = ["train", "pairs", "model", *flags(steps=1)]
    results = ended(start_on("2 x 2", *args, folders=folders))
    for status, out, err in results:
        assert status != 0 and out == "" and "loss" not in err
    # With older versions of JAX, one process notices it, and the other's end follows.
    last = [err.splitlines()[-1] for status, _, err in results if status == 2]
    assert last and all(x.endswith("have different pairs or options") for x in last)


@pytest.mark.parametrize(
    "env, word",
    [({}, "coordinator"), ({"JAX_NUM_PROCESSES": "two"}, "'two'")],
)
def test_job_without_its_variables_is_one_line(unequal, tmp_path, env, word):
    args = ["train", unequal, tmp_path / "model", "--distributed"]
    ((status, out, err),) = ended(start_on("1", *args, env=env))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: --distributed needs JAX_COORDINATOR_ADDRESS, ")
    assert word in err
