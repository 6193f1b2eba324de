"""Sections 13 to 15: training, going on, translating, and what goes wrong meanwhile.

Nearly all of it runs in this process. Processes of their own are started where a kill, a
terminal, a closed pipe or several devices are what is tested.
"""

import contextlib
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
TINY_MODEL = ["--d-model", 16, "--num-heads", 2, "--num-layers", 1]
TINY_MODEL += ["--vocab-size", 259, "--max-len", 8]
LEARN = [*TINY_MODEL, "--batch-size", 16, "--warmup", 20]

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


def leave_out_evaluation(patch):
    patch.setattr(tm, "evaluate", lambda *_, **__: None)
    patch.setattr(tm, "draw_attention", lambda *_: "")


@pytest.fixture
def without_evaluation(monkeypatch):
    leave_out_evaluation(monkeypatch)


def words(count, seed=0):
    """Different words of 3 to 7 letters, with what they are reversed."""
    letters, found = random.Random(seed), {}
    while len(found) < count:
        found["".join(letters.choices("abcdefgh", k=letters.randint(3, 7)))] = None
    return [(word, word[::-1]) for word in found]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of 200 pairs, of which 20 are held out."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", words(200))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pairs, compiled_once):
    """A model after 5 steps. No test may change this file."""
    path = tmp_path_factory.mktemp("model") / "model"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        args = ["train", pairs, path, *LEARN, "--steps", 5]
        assert tm.main([str(arg) for arg in args]) == 0
    return path


@pytest.fixture
def model(tmp_path, trained):
    """A copy of that model, for one test."""
    path = tmp_path / "model"
    path.write_bytes(trained.read_bytes())
    return path


class Stop(BaseException):
    """Ends a run at once, as a kill would."""


@pytest.fixture
def set_up_only(capsys, monkeypatch):
    """Returns a function that gives the Run and the state with which training begins."""

    def training_loop(run, state):
        raise Stop(run, state)

    monkeypatch.setattr(tm, "training_loop", training_loop)

    def set_up(*args):
        with pytest.raises(Stop) as stop:
            run(capsys, *args)
        return stop.value.args

    return set_up


def before_each_step(monkeypatch, action):
    """Calls action(number of the step) before each step."""
    real = tm.train_step

    def train_step(state, *args, **kwargs):
        action(int(state.step) + 1)
        return real(state, *args, **kwargs)

    monkeypatch.setattr(tm, "train_step", train_step)


def after_each_step(monkeypatch, change):
    """Puts change(number of the step, state, metrics) in the place of what a step
    returns.
    """
    real = tm.train_step

    def train_step(*args, **kwargs):
        state, metrics = real(*args, **kwargs)
        return change(int(state.step), state, metrics)

    monkeypatch.setattr(tm, "train_step", train_step)


def texts_of(run, pairs):
    return [tuple(map(run.tokenizer.decode, pair)) for pair in pairs]


def options_of(parser):
    """The actions of a parser's options."""
    return [
        action
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    ]


def command(*args, script=SCRIPT, env=None, **kwargs):
    """Starts the script in a process of its own, without most optimisations."""
    env = {**os.environ, **WITHOUT_OPTIMIZATIONS, **(env or {})}
    env.pop("PYTHONUNBUFFERED", None)  # It would hide what is not printed at once.
    return subprocess.Popen(
        [sys.executable, script, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def with_more(folder, text):
    """The script, with some lines more before it runs."""
    path, run_main = folder / "script.py", 'if __name__ == "__main__":'
    path.write_text(SCRIPT.read_text().replace(run_main, f"{text}\n\n{run_main}"))
    return path


NO_EVALUATION = "evaluate = draw_attention = lambda *_, **__: ''"
# Each output is its source.
ECHO = "decode_all = lambda model, params, sources, beam_size: sources"


# ---- The demo ------------------------------------------------------------------------


def test_demo_learns_to_reverse_and_shows_it_in_80_columns():
    """It runs as users run it. How much is printed depends on the machine's speed: a
    report is also due after a minute.
    """
    process = command(env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"})
    out, err = (text.decode() for text in process.communicate(timeout=600))
    assert process.returncode == 0, err
    assert all(len(line) <= 80 for line in (out + err).splitlines())
    assert "\r" not in out + err and "\x1b" not in out + err
    line = r"^step +(\d+) of 1000  loss \d\.\d{4}  accuracy +\d+\.\d%  \d+ s$"
    reports = {int(step) for step in re.findall(line, err, re.MULTILINE)}
    assert reports >= {*range(50, 1001, 50)}
    # Those on the way are followed by an evaluation, with three pairs, three times.
    on_the_way = err.split("unseen pairs: ")[1:]
    assert len(on_the_way) == 3
    for report in on_the_way:
        assert len(re.findall("^  [a-z]+ -> [a-z]*", report, re.MULTILINE)) == 3
    # It is 512 where it was tried. Other machines round in other ways.
    (right,) = re.findall(r"unseen pairs: loss 0\.\d{4}, (\d+) of 512 exactly", out)
    assert int(right) >= 508
    shown = re.findall(r"^  ([a-z]{4,12}) -> ([a-z]{4,12})", out, re.MULTILINE)
    assert len(shown) == 6
    assert sum(source == output[::-1] for source, output in shown) >= 5
    # The picture has a column for each letter of the word, and a row for each one of
    # the reversed word. In most rows, the darkest column is that of the same letter.
    word, picture = shown[0][0], out.split("Cross-attention")[1].splitlines()
    (start,) = [i for i, line in enumerate(picture) if line.split() == [*word, "EOS"]]
    rows = picture[start + 1 :]
    assert [row.split()[0] for row in rows] == [*reversed(word), "EOS"]
    cells = [row[4:].ljust(4 * len(word) + 4)[::4] for row in rows[:-1]]
    darkest = [
        max(range(len(row)), key=lambda i: " .:-=+*#%@".index(row[i])) for row in cells
    ]
    expected = [*reversed(range(len(word)))]
    assert sum(d == e for d, e in zip(darkest, expected)) > len(word) / 2


# ---- The command line ----------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["demo"], ["train"], ["translate"]])
def test_help_fits_80_columns(capsys, monkeypatch, args):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, *args, "--help")
    assert (status, err) == (0, "") and out.startswith("usage: ")
    assert all(len(line) <= 80 for line in out.splitlines())
    # Flags and files have no default that is worth a word.
    assert "None" not in out and "False" not in out


def test_help_shows_the_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = " ".join(run(capsys, "train", "--help")[1].split())
    numbers = [a for a in options_of(tm.make_parser()[1]) if a.metavar == "N"]
    assert len(numbers) == 11 and out.count("(default: ") == 11
    for action in numbers:
        text = out.split(f"{action.option_strings[0]} N ")[-1].split(" --")[0]
        assert text.endswith(f"(default: {action.default})"), text
    assert "(default: 1000)" in run(capsys, "demo", "--help")[1]
    assert "(default: 4)" in run(capsys, "translate", "--help")[1]


def test_without_a_command_it_is_the_demo(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(tm, "train", lambda args, checkpoint: seen.append(args) or 0)
    assert run(capsys) == run(capsys, "demo") == (0, "", "")
    monkeypatch.setattr(sys, "argv", ["transformer_model.py"])
    assert tm.main() == 0
    assert seen[0] == seen[1] == seen[2] and seen[0].steps == 1000
    run(capsys, "demo", "--steps", 500, "--seed", 1)
    expected = {**vars(seen[0]), "steps": 500, "seed": 1}
    assert vars(seen[3]) == expected


@pytest.mark.parametrize(
    "args, words",
    [
        (["--steps", 3], ["invalid choice"]),
        (["learn"], ["'learn'"]),
        (["demo", "--steps", 0], ["--steps", "must be 1 to"]),
        (["demo", "--steps", "many"], ["--steps", "number", "'many'"]),
        (["demo", "--dropout", "nan"], ["--dropout", "must be 0 to 1, not nan"]),
        (["demo", "--label-smoothing", 1.5], ["--label-smoothing", "1.5"]),
        (["demo", "--seed", -1], ["--seed"]),
        (["demo", "--seed", 2**32], ["--seed"]),
        (["demo", "--vocab-size", 300], ["--vocab-size"]),
        (["demo", "pairs"], ["pairs"]),
        (["train", "pairs"], ["MODEL"]),
        (["train", "pairs", "model", "--warmup", 0], ["--warmup"]),
        (["translate"], ["MODEL"]),
        (["translate", "model", "--beam-size", 0], ["--beam-size"]),
        (["translate", "model", "--steps", 1], ["--steps"]),
    ],
)
def test_mistakes_on_the_command_line_have_status_2(capsys, monkeypatch, args, words):
    """`main` returns it, also where argparse ends with a SystemExit."""
    monkeypatch.setattr(tm, "training_loop", lambda *_: pytest.fail("not noticed"))
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "") and "error: " in err
    for word in words:
        assert word in err.splitlines()[-1]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--d-model", 63], ["d_model", "multiple of", "63"]),
        (["--num-heads", 5], ["d_model", "multiple of", "5"]),
        (["--dropout", 1], ["dropout_rate", "below 1"]),
        (["--max-len", 0], ["--max-len 0"]),
        (["--vocab-size", 258], ["vocab_size", "259", "258"]),
    ],
)
def test_options_that_cannot_work_are_one_line(capsys, pairs, tmp_path, args, words):
    result = run(capsys, "train", pairs, tmp_path / "model", *args)
    if "--max-len" in args:  # It is told before that all pairs were left out.
        result = (*result[:2], result[2].splitlines(keepends=True)[-1])
    assert_refused(result, *words)
    assert [*tmp_path.iterdir()] == []


class Writer:
    """A stream with all that `print` needs."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_other_streams_and_threads(trained, monkeypatch):
    """This is how a notebook or a server calls it."""
    args, results = ["translate", str(trained), "abc", "12345678"], []
    out, err = Writer(), Writer()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    thread = threading.Thread(target=lambda: results.append(tm.main(args)))
    thread.start()
    thread.join()
    assert results == [2] and out.text.count("\n") == 2 and err.text.count("\n") == 1


@pytest.mark.usefixtures("without_evaluation")
def test_ctrl_c_has_status_130_and_no_traceback(capsys, pairs, tmp_path, monkeypatch):
    path = tmp_path / "model"

    def interrupt(step):
        if step == 5:
            raise KeyboardInterrupt

    before_each_step(monkeypatch, interrupt)
    status, _, err = run(capsys, "train", pairs, path, *LEARN, "--steps", 20)
    assert status == 130 and "Traceback" not in err
    assert tm.load_checkpoint(path).state["step"] == 4


# ---- The recipe ----------------------------------------------------------------------


@pytest.fixture
def small_demo(monkeypatch):
    """Lets the demo have few pairs."""
    monkeypatch.setattr(tm, "demo_pairs", lambda num_pairs, seed: words(600, seed))


@pytest.fixture
def recipe(capsys, monkeypatch, small_demo):
    """Returns a function that gives the configuration and the optimizer asked for."""

    def create_train_state(config, key, optimizer):
        raise Stop(config, optimizer)

    def recipe(*args):
        with pytest.raises(Stop) as stop:
            run(capsys, *args)
        return stop.value.args

    monkeypatch.setattr(tm, "create_train_state", create_train_state)
    return recipe


@pytest.mark.parametrize(
    "command, d_model, warmup", [("demo", 64, 200), ("train", 128, 1000)]
)
def test_defaults_are_the_papers(command, d_model, warmup, pairs, tmp_path, recipe):
    """While the gradient is 1, each step of Adam is as long as the rate of Eq. 3 says."""
    files = [pairs, tmp_path / "model"] if command == "train" else []
    for args, sizes in [
        ([], (d_model, warmup)),
        (["--warmup", 20, "--d-model", 16], (16, 20)),
    ]:
        config, optimizer = recipe(command, *files, *args)
        assert not config.norm_first and config.dropout_rate == 0.1
        assert config.share_embeddings and config.dtype == "float32"
        assert (config.d_model, config.d_ff) == (sizes[0], 4 * sizes[0])
        x, one = {"x": jnp.zeros(())}, {"x": jnp.ones(())}
        state, update = optimizer.init(x), jax.jit(optimizer.update)
        for step in range(1, 2 * sizes[1]):
            updates, state = update(one, state)
            rate = sizes[0] ** -0.5 * min(step**-0.5, step * sizes[1] ** -1.5)
            assert abs(updates["x"] + rate) < 1e-4 * rate


@pytest.mark.usefixtures("without_evaluation", "small_demo")
@pytest.mark.parametrize(
    "command, args, expected",
    [
        ("demo", [], 0.1),
        ("train", [], 0.1),
        ("demo", ["--label-smoothing", 0.3], 0.3),
        ("train", ["--label-smoothing", 0], 0),
    ],
)
def test_label_smoothing_reaches_every_step(
    capsys, pairs, tmp_path, monkeypatch, command, args, expected
):
    """Otherwise it might be an option that nobody reads."""
    seen = []

    def train_step(state, batch, label_smoothing):
        seen.append(label_smoothing)
        return state, {"loss": np.ones(()), "accuracy": np.ones(())}

    monkeypatch.setattr(tm, "train_step", train_step)
    files = [pairs, tmp_path / "model"] if command == "train" else []
    model = ["--d-model", 16, "--num-heads", 2, "--num-layers", 1, "--steps", 3]
    assert run(capsys, command, *files, *model, *args)[0] == 0
    assert seen == [expected] * 3


def test_options_of_the_model_reach_it(pairs, tmp_path, recipe):
    args = ["train", pairs, tmp_path / "model", *LEARN, "--dropout", 0.2, "--bf16"]
    config, _ = recipe(*args, "--vocab-size", 263)
    expected = {"src_vocab_size": 263, "tgt_vocab_size": 263, "dropout_rate": 0.2}
    expected |= {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 64}
    expected |= {"max_len": 8, "dtype": "bfloat16"}
    assert config == tm.TransformerConfig(**expected)


def test_evaluations_use_the_average_and_the_last_a_beam_of_4(
    capsys, pairs, tmp_path, monkeypatch
):
    """With 40 steps, there is a report at every second one."""
    decoded, drawn, averages = [], [], []

    def decode_all(model, params, sources, beam_size):
        decoded.append((beam_size, params))
        return sources

    def draw_attention(model, params, tokenizer, source, output):
        drawn.append(params)
        return "the picture"

    def change(step, state, metrics):
        averages.append(jax.device_get(state.average))
        return state, metrics

    monkeypatch.setattr(tm, "decode_all", decode_all)
    monkeypatch.setattr(tm, "draw_attention", draw_attention)
    after_each_step(monkeypatch, change)
    args = ["train", pairs, tmp_path / "model", *LEARN, "--steps", 40]
    status, out, err = run(capsys, *args)
    assert status == 0 and out.count("unseen pairs: ") == 1
    assert err.count("unseen pairs: ") == 3 and out.endswith("\nthe picture\n")
    assert [beam_size for beam_size, _ in decoded] == [1, 1, 1, 4]
    used = [params for _, params in decoded] + drawn
    for step, params in zip((10, 20, 30, 40, 40), used, strict=True):
        jax.tree.map(np.testing.assert_array_equal, params, averages[step - 1])


def test_score_is_that_of_all_unseen_pairs(
    pairs, tmp_path, set_up_only, monkeypatch, capsys
):
    """The loss is a mean over labels: the mean of two batches' means would be another.
    So would be the score of `params`, which are NaN here.
    """
    mine = [("ab", "b"), *words(69, seed=1)]
    valid = write_pairs(tmp_path / "valid", mine)
    args = ["train", pairs, tmp_path / "model", "--valid", valid, *LEARN]
    run, state = set_up_only(*args)
    loss = float(tm.eval_step(state, tm.to_batch(run.valid_pairs, 8))["loss"])
    outputs = [
        pair[1] if i % 7 == 0 else [100] for i, pair in enumerate(run.valid_pairs)
    ]
    monkeypatch.setattr(tm, "decode_all", lambda *_: outputs)
    state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    file = io.StringIO()
    tm.evaluate(run, state, beam_size=1, num_shown=9, file=file)
    lines = file.getvalue().splitlines()
    found = re.fullmatch(
        r"unseen pairs: loss (\S+), 10 of 70 exactly right .14.3%.", lines[0]
    )
    np.testing.assert_allclose(float(found[1]), loss, atol=1e-4)
    assert lines[1] == "  ab -> b" and len(lines) == 10
    assert lines[2] == f"  {mine[1][0]} -> a   not {mine[1][1]}"


# ---- Going on ------------------------------------------------------------------------


def test_every_option_that_differs_is_refused_and_named(
    capsys, pairs, model, tmp_path, monkeypatch
):
    """It is every option there is, but for those that may differ. No parameters are
    drawn for that, as it would take a compilation for every option.
    """
    monkeypatch.setattr(tm, "create_train_state", lambda *_: None)
    before, there = model.read_bytes(), tm.load_checkpoint(model).notes["options"]
    other = write_pairs(tmp_path / "valid", words(20, seed=1))
    tried = []
    for action in options_of(tm.make_parser()[1]):
        old = there.get(action.dest)
        if action.dest in ("steps", "distributed"):
            continue
        if action.nargs == 0:
            new, given = True, []
        elif action.dest == "valid":
            new, given = str(other), [other]
        else:
            new = 2 * old or 1
            given = [new]
        args = ["train", pairs, model, "--steps", 9, action.option_strings[0], *given]
        name = f"{action.dest} is {old} there and {new} here"
        assert_refused(run(capsys, *args), f"{model}: cannot continue", name)
        assert model.read_bytes() == before
        tried.append(action.dest)
    assert len(tried) == 12


def test_other_pairs_are_refused_with_the_counts_of_both(
    capsys, pairs, model, tmp_path
):
    before, path = model.read_bytes(), tmp_path / "pairs.tsv"
    changed = words(200)
    changed[7] = (changed[7][0], "x")  # There are as many as before.
    for mine, counts in [
        (changed, "180 to train on, 20"),
        (words(150), "135 to train"),
    ]:
        write_pairs(path, mine)
        result = run(capsys, "train", path, model, "--steps", 9)
        assert_refused(
            result, model, path, "there 180 to train on, 20", f"here {counts}"
        )
        assert model.read_bytes() == before
    # The same pairs in another file go on. 5 steps are done, so nothing is to do.
    write_pairs(path, words(200))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        assert run(capsys, "train", path, model)[0] == 0


def test_same_valid_file_with_other_pairs_is_refused(
    capsys, pairs, tmp_path, monkeypatch
):
    model, valid = tmp_path / "model", write_pairs(tmp_path / "valid", words(9, 1))
    args = ["train", pairs, model, "--valid", valid]

    def stop(step):
        raise Stop

    before_each_step(monkeypatch, stop)  # The model is saved before the first step.
    with pytest.raises(Stop):
        run(capsys, *args, *LEARN, "--steps", 3)
    write_pairs(valid, words(9, 2))
    capsys.readouterr()
    assert_refused(run(capsys, *args), model, "other pairs")


@pytest.mark.usefixtures("without_evaluation")
def test_more_steps_give_what_they_had_given_at_once(capsys, pairs, model, tmp_path):
    """The options that are not given are those of the first run, --steps among them."""
    before = model.read_bytes()
    status, _, err = run(capsys, "train", pairs, model)
    assert status == 0 and f"{model}: goes on after step 5\n" in err
    assert "loss" not in err and model.read_bytes() == before
    assert run(capsys, "train", pairs, model, "--steps", 3)[0] == 0
    assert model.read_bytes() == before

    status, _, err = run(capsys, "train", pairs, model, "--steps", 12)
    assert status == 0 and re.findall("^step +([0-9]+)", err, re.MULTILINE)[0] == "6"
    whole = tmp_path / "whole"
    assert run(capsys, "train", pairs, whole, *LEARN, "--steps", 12)[0] == 0
    assert model.read_bytes() == whole.read_bytes() != before
    assert tm.load_checkpoint(whole).state["step"] == 12


def test_steps_that_are_reached_are_measured_again(capsys, pairs, model):
    before = model.read_bytes()
    status, out, _ = run(capsys, "train", pairs, model, "--steps", 5)
    assert status == 0 and " of 20 exactly right" in out and "Cross-attention" in out
    assert model.read_bytes() == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pairs, compiled_once):
    """The bytes of a run of 60 steps that nothing ended; there were 20 reports."""
    path = tmp_path_factory.mktemp("whole") / "model"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        args = ["train", pairs, path, *LEARN, "--steps", 60]
        assert tm.main([str(arg) for arg in args]) == 0
    return path.read_bytes()


def assert_no_stray_file(path):
    assert {file.name for file in path.parent.iterdir()} <= {
        path.name,
        f"{path.name}.tmp",
    }


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


@pytest.mark.usefixtures("without_evaluation")
@pytest.mark.parametrize("seed", range(2))
def test_runs_that_end_anywhere_end_with_the_same_file(
    capsys, pairs, tmp_path, whole, seed
):
    """A run that begins with the batch of another step, that takes other dropout keys,
    or that forgets a part of its state, learns as well, and something else.
    """
    rng, path = random.Random(seed), tmp_path / "model"
    args = ["train", pairs, path, *LEARN, "--steps", 60]
    places = ["step", "fsync", "replace", "replaced"]
    for place in rng.sample(places, 4):
        # After the save at the start, there is one at every third step.
        countdown = rng.randint(2, 14 if place == "step" else 5)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, place, countdown)
            run(capsys, *args)
        assert_no_stray_file(path)
        assert tm.load_checkpoint(path).state["step"] < 60
    assert run(capsys, *args)[0] == 0
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("without_evaluation")
def test_killed_processes_end_with_the_same_file(capsys, pairs, tmp_path, whole):
    """Three runs are killed at some moment of a run: early on, later, and between."""
    rng, path = random.Random(), tmp_path / "model"
    args = ["train", pairs, path, *LEARN, "--steps", 60]
    for _ in range(3):
        process = command(*args)
        seen = rng.randint(3, 9)  # The third line is the first report.
        for _ in range(seen):
            process.stderr.readline()
        time.sleep(rng.random() / 100)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0)
        assert_no_stray_file(path)
    status, _, err = run(capsys, *args)
    assert status == 0 and "goes on after step" in err
    assert path.read_bytes() == whole


@pytest.mark.usefixtures("without_evaluation")
def test_reports_come_at_least_once_a_minute(capsys, pairs, tmp_path, monkeypatch):
    """A step takes 25 seconds here. By their number alone, 100 would go by."""
    path, now, saved = tmp_path / "model", 0, []

    def take_time(step):
        nonlocal now
        now += 25
        if step == 12:
            raise Stop

    real = tm.save_checkpoint

    def save_checkpoint(path, config, tokenizer, state, **notes):
        saved.append(int(state.step))
        real(path, config, tokenizer, state, **notes)

    before_each_step(monkeypatch, take_time)
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(tm, "time", clock)
    monkeypatch.setattr(tm, "save_checkpoint", save_checkpoint)
    with pytest.raises(Stop):
        run(capsys, "train", pairs, path, *LEARN, "--steps", 2000)
    err = capsys.readouterr().err
    reports = [int(step) for step in re.findall("^step +([0-9]+)", err, re.MULTILINE)]
    assert saved == [0, *reports] == [0, 3, 6, 9]
    assert tm.load_checkpoint(path).state["step"] == 9


@pytest.mark.usefixtures("without_evaluation")
@pytest.mark.parametrize(
    "steps, expected",
    [
        (45, [0, *range(2, 45, 2), 45]),  # the last step is none of the twentieths
        (20_000, [0, 500, 1000]),  # a twentieth would be 1,000
    ],
)
def test_reports_come_at_the_last_step_and_each_500(
    capsys, pairs, tmp_path, monkeypatch, steps, expected
):
    """With steps that do nothing but count, until the last one that is expected."""
    saved = []

    def train_step(state, batch, label_smoothing):
        if saved[-1] == expected[-1]:
            raise Stop
        return state.replace(step=state.step + 1), {"loss": 1.0, "accuracy": 0.0}

    monkeypatch.setattr(tm, "train_step", train_step)
    monkeypatch.setattr(tm, "save", lambda run, state: saved.append(int(state.step)))
    with contextlib.suppress(Stop):
        run(capsys, "train", pairs, tmp_path / "model", *LEARN, "--steps", steps)
    assert saved == expected


# ---- What ends a run -----------------------------------------------------------------


def assert_ended_in_one_line(result, path, broken, saved):
    """The run has ended with status 1 after the step `broken`; the file is that of the
    step `saved`, and good.
    """
    status, out, err = result
    last = err.splitlines()[-1]
    assert (status, out) == (1, "") and err.count("error: ") == 1
    assert last.startswith(f"error: after step {broken} ") and "not finite" in last
    state = tm.load_checkpoint(path).state
    assert state["step"] == saved
    for tree in (state["params"], state["average"]):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@pytest.mark.usefixtures("without_evaluation")
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_loss_that_is_not_finite_ends_the_run(
    capsys, pairs, tmp_path, monkeypatch, number
):
    """There is a report at every third of the 60 steps."""

    def change(step, state, metrics):
        return state, {**metrics, "loss": number} if step >= 8 else metrics

    after_each_step(monkeypatch, change)
    path = tmp_path / "model"
    result = run(capsys, "train", pairs, path, *LEARN, "--steps", 60)
    assert_ended_in_one_line(result, path, broken=8, saved=6)


@pytest.mark.usefixtures("without_evaluation")
@pytest.mark.parametrize("broken", [9, 60])
def test_parameters_that_are_not_finite_are_not_saved(
    capsys, pairs, tmp_path, monkeypatch, broken
):
    """The loss of a step is that of the parameters before it, and so is still good."""

    def change(step, state, metrics):
        if step == broken:
            state = state.replace(
                params=jax.tree.map(lambda x: x * np.nan, state.params)
            )
        return state, metrics

    after_each_step(monkeypatch, change)
    path = tmp_path / "model"
    result = run(capsys, "train", pairs, path, *LEARN, "--steps", 60)
    assert_ended_in_one_line(result, path, broken, saved=broken - 3)


def test_model_that_cannot_be_written_is_told_before_training(
    capsys, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(tm, "train_step", lambda *_: pytest.fail("it trains"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.tmp").mkdir()
    for name in ("nowhere/model", "folder", "model"):
        path = tmp_path / name
        status, out, err = run(capsys, "train", pairs, path, *LEARN)
        reason = "No such file" if name == "nowhere/model" else "Is a directory"
        assert (status, out) == (2, "")
        assert err.splitlines()[-1].startswith(f"error: {path}: {reason}")


@pytest.mark.usefixtures("without_evaluation")
def test_full_disk_later_on_is_an_error_of_python(capsys, pairs, tmp_path, monkeypatch):
    path, real, calls = tmp_path / "model", os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        run(capsys, "train", pairs, path, *LEARN, "--steps", 60)
    assert tm.load_checkpoint(path).state["step"] == 3


def test_files_of_another_kind_are_never_overwritten(capsys, pairs, trained, tmp_path):
    path = tmp_path / "model"
    config, tokenizer, state, _ = tm.load_checkpoint(trained)
    tm.save_checkpoint(path, config, tokenizer, state, mine="mine")
    for content, reason in [
        (b"", "not a checkpoint"),
        (b"a\tb\n", "not a checkpoint"),
        (trained.read_bytes()[:-1], "damaged or cut short"),
        (path.read_bytes(), "not saved by the command train"),
    ]:
        path.write_bytes(content)
        assert_refused(run(capsys, "train", pairs, path), path, reason)
        assert path.read_bytes() == content
        if "command train" not in reason:
            assert_refused(run(capsys, "translate", path, "a"), path, reason)
    path.unlink()
    assert_refused(run(capsys, "translate", path, "a"), path, "No such file")


# ---- Pairs ---------------------------------------------------------------------------


@pytest.mark.parametrize("count, train, valid", [(138, 125, 13), (10, 9, 1), (2, 1, 1)])
def test_few_pairs_make_a_smaller_batch(tmp_path, set_up_only, count, train, valid):
    """The default batch size is 128."""
    path = write_pairs(tmp_path / "pairs", words(count))
    run, _ = set_up_only("train", path, tmp_path / "model", *TINY_MODEL)
    assert run.batch_size == len(run.train_pairs) == train
    assert len(run.valid_pairs) == valid


@pytest.mark.usefixtures("without_evaluation")
def test_ten_pairs_train_with_the_default_batch_size(capsys, tmp_path):
    path = write_pairs(tmp_path / "pairs", words(10))
    args = ["train", path, tmp_path / "model", *TINY_MODEL, "--steps", 3]
    assert run(capsys, *args)[0] == 0
    assert tm.load_checkpoint(tmp_path / "model").state["step"] == 3


@pytest.mark.parametrize("content", ["", "a\tb\n", "a\tb\na\tc\na\td\n"])
def test_too_few_pairs_are_one_line(capsys, tmp_path, content):
    """There is nothing to hold out, or, once a source is held out, nothing is left."""
    path = tmp_path / "pairs"
    path.write_text(content)
    result = run(capsys, "train", path, tmp_path / "model", *LEARN)
    need = "one pair to train on and one, with another source, to measure on"
    assert_refused(result, f"{path}: ", need)
    assert not (tmp_path / "model").exists()


def test_batches_divide_among_the_devices(
    capsys, pairs, tmp_path, set_up_only, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    args = ["train", pairs, tmp_path / "model", *LEARN]
    assert set_up_only(*args)[0].batch_size == 12
    capsys.readouterr()
    few = write_pairs(tmp_path / "few", words(6))  # Five of them are to be trained on.
    result = run(capsys, "train", few, tmp_path / "other", *LEARN)
    assert_refused(result, few, "a pair for each of 6 devices")


@pytest.mark.parametrize("count, expected", [(25, 2), (5600, 500)])
def test_a_tenth_and_at_most_500_pairs_are_held_out(
    tmp_path, set_up_only, count, expected
):
    pairs = words(count)
    path = write_pairs(tmp_path / "pairs", pairs)
    run, _ = set_up_only("train", path, tmp_path / "model", *LEARN)
    train, valid = texts_of(run, run.train_pairs), texts_of(run, run.valid_pairs)
    assert len(valid) == expected and sorted(train + valid) == sorted(pairs)


def test_sources_held_out_are_never_trained_on(tmp_path, set_up_only):
    """Each of 30 sources comes ten times."""
    pairs = [(str(n % 30), str(n)) for n in range(300)]
    path = write_pairs(tmp_path / "pairs", pairs)
    run, _ = set_up_only("train", path, tmp_path / "model", *LEARN)
    train, valid = texts_of(run, run.train_pairs), texts_of(run, run.valid_pairs)
    assert len(valid) == 3 and len(train) == 270
    assert not {source for source, _ in train} & {source for source, _ in valid}


def test_valid_is_a_set_of_its_own_whose_sources_are_never_trained_on(
    capsys, tmp_path, set_up_only
):
    pairs = [(str(n), str(n)) for n in range(40)]
    path = write_pairs(tmp_path / "pairs", pairs)
    mine = [("7", "other"), ("9", "9"), ("new", "wen"), ("12345678", "1")]
    file = write_pairs(tmp_path / "valid", mine)
    run, _ = set_up_only("train", path, tmp_path / "model", *LEARN, "--valid", file)
    assert texts_of(run, run.valid_pairs) == mine[:3]
    expected = [pair for pair in pairs if pair[0] not in ("7", "9")]
    assert texts_of(run, run.train_pairs) == expected
    # The subwords are learnt from what is trained on alone.
    left_out = f"{file}: left out 1 of 4 pairs, longer than --max-len 8 tokens"
    assert capsys.readouterr().err.startswith(left_out)


def test_subwords_are_not_learnt_from_unseen_pairs(tmp_path, set_up_only):
    path = write_pairs(tmp_path / "pairs", [(f"ab{n}", "ab") for n in range(20)])
    valid = write_pairs(tmp_path / "valid", [("xyz", "xyz")] * 50)
    args = ["train", path, tmp_path / "model", "--valid", valid, *LEARN]
    run, _ = set_up_only(*args, "--vocab-size", 260)
    assert run.tokenizer.merges == [(100, 101)]


def test_pairs_too_long_are_left_out_and_counted(capsys, tmp_path, set_up_only):
    """7 bytes and EOS have room in 8 tokens."""
    pairs = [(n, n) for n in range(60)] + [("12345678", "1"), ("1", "12345678")]
    pairs += [("1234567", "7654321")]
    path = write_pairs(tmp_path / "pairs.tsv", pairs)
    run, _ = set_up_only("train", path, tmp_path / "model", *LEARN)
    err = capsys.readouterr().err
    numbers = [
        int(number) for number in re.findall(r"left out (\d) of (?:5\d|6) ", err)
    ]
    assert sum(numbers) == 2 and f"{path}: left out" in err
    assert len(run.train_pairs) + len(run.valid_pairs) == 61


@pytest.mark.parametrize("option", ["PAIRS", "--valid"])
@pytest.mark.parametrize(
    "content, expected",
    [
        (None, ["No such file"]),
        (b"", ["one pair"]),
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
    args = ["train", files[0], tmp_path / "model", *files[1:], *LEARN]
    assert_refused(run(capsys, *args), path, *expected)


# ---- Translating ---------------------------------------------------------------------


def read_from(monkeypatch, content):
    """Lets stdin be these bytes, of which nobody types any."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def echo(monkeypatch):
    """Lets every output be its source."""
    monkeypatch.setattr(tm, "decode_all", lambda model, params, sources, beam: sources)


def test_translation_of_arguments(capsys, trained):
    """The model is hardly trained, but says the same whatever stands beside a text."""
    status, out, err = run(capsys, "translate", trained, "abc", "", "déf")
    assert (status, err) == (0, "")
    lines = out.split("\n")
    assert len(lines) == 4 and lines[1] == "" and lines[3] == ""
    assert run(capsys, "translate", trained, "déf")[1] == lines[2] + "\n"


def test_texts_reach_the_model_as_they_are(capsys, trained, monkeypatch):
    echo(monkeypatch)
    for args, expected in [
        (["a b", " c ", "\ta", "ü"], ["a b", " c ", "\ta", "ü"]),
        (["--", "-foo", "-5", "-"], ["-foo", "-5", "-"]),
        (["\ufeffa"], ["a"]),  # A byte order mark is no text.
    ]:
        status, out, err = run(capsys, "translate", trained, *args)
        assert (status, out.split("\n"), err) == (0, [*expected, ""], "")


def test_options_come_first_or_last(capsys, trained, monkeypatch):
    seen = []

    def decode_all(model, params, sources, beam_size):
        seen.append((len(sources), beam_size))
        return sources

    monkeypatch.setattr(tm, "decode_all", decode_all)
    for args in (
        ["--beam-size", 3, trained, "a", "b"],
        [trained, "a", "b", "--beam-size", 3],
        [trained, "a", "b"],
    ):
        assert run(capsys, "translate", *args)[0] == 0
    assert seen == [(2, 3), (2, 3), (2, 4)]


def test_outputs_keep_their_order_and_have_at_most_50_tokens_more(monkeypatch):
    """Sources of all widths become batches of one width each. The outputs are the
    sources here, and a beam's second best is another.
    """
    searches, sizes = [], {"src_vocab_size": 300, "tgt_vocab_size": 300}
    model = tm.Transformer(tm.TransformerConfig(**sizes, max_len=128))

    def search(name, model, params, src, max_len, *beam_size):
        searches.append((name, src.shape, max_len, *beam_size))
        return src

    def beam_search(*args):
        src = search("beam", *args)
        return np.stack([src, src[::-1]], axis=1), None

    monkeypatch.setattr(tm, "greedy_decode", functools.partial(search, "greedy"))
    monkeypatch.setattr(tm, "beam_search", beam_search)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 128, 200)
    sources = [rng.integers(3, 300, length).tolist() for length in lengths]
    for beam_size in (1, 5):
        searches.clear()
        assert tm.decode_all(model, None, sources, beam_size) == sources
        for name, (rows, width), max_len, *beam in searches:
            assert rows <= 64 and max_len == min(width + 50, 128)
            assert (name, beam) == (("greedy", []) if beam_size == 1 else ("beam", [5]))
        assert {width for _, (_, width), *_ in searches} == {64, 128}


def test_translation_of_lines(capsys, trained, monkeypatch):
    """What cannot be translated does not hinder the rest, nor move it."""
    echo(monkeypatch)
    lines = [
        b"\xef\xbb\xbfabc",
        b"",
        b"12345678",
        b"xyz\r",
        "ä\u2028".encode(),
        b"last",
    ]
    read_from(monkeypatch, b"\n".join(lines))
    status, out, err = run(capsys, "translate", trained)
    assert (status, out) == (2, "abc\n\n\nxyz\nä\nlast\n")
    assert err == "error: line 3: 8 tokens, the most is 7\n"
    read_from(monkeypatch, b"")
    assert run(capsys, "translate", trained) == (0, "", "")


def test_line_that_is_not_utf8_ends_a_translation(capsys, trained, monkeypatch):
    """The lines before it are printed, except for those that are read with it."""
    echo(monkeypatch)
    for count, printed in ((2, 0), (1500, 1024)):
        read_from(monkeypatch, b"abc\n" * count + b"caf\xe9\nlast\n")
        status, out, err = run(capsys, "translate", trained)
        assert (status, out) == (2, "abc\n" * printed)
        assert err == f"error: line {count + 1}: not UTF-8 at byte 4\n"
    text = os.fsdecode(b"caf\xe9")
    assert_refused(run(capsys, "translate", trained, text), "line 1", "byte 4")


@pytest.mark.parametrize(
    "end", ["\r", "\u2028", "\n", "\x0b", "\u0085", "\x1c", "\r\n"]
)
def test_translation_is_one_line_whatever_the_model_writes(
    capsys, trained, monkeypatch, end
):
    outputs = [tm.Tokenizer().encode(f"a{end}b"), [258, 100], [], [tm.BOS_ID, 13, 13]]
    monkeypatch.setattr(tm, "decode_all", lambda *_: outputs)
    status, out, _ = run(capsys, "translate", trained, *"abcd")
    assert status == 0 and out.splitlines() == out.split("\n")[:-1]
    assert out.split("\n")[:3] == ["a b", "\ufffda", ""] and out.count("\n") == 4


def test_translation_uses_the_average(capsys, trained, tmp_path):
    config, tokenizer, state, notes = tm.load_checkpoint(trained)
    args = ["abc", "hgfedcb", "--attention"]
    expected = run(capsys, "translate", trained, *args)
    state["params"] = jax.tree.map(lambda x: x * np.nan, state["params"])
    path = tmp_path / "model"
    tm.save_checkpoint(path, config, tokenizer, state, **notes)
    assert run(capsys, "translate", path, *args) == expected
    # The average is not just anything: with other numbers there, something else comes.
    state["average"] = jax.tree.map(lambda x: -3 * x, state["average"])
    tm.save_checkpoint(path, config, tokenizer, state, **notes)
    assert run(capsys, "translate", path, *args) != expected


def test_attention_is_drawn_for_each_translation(capsys, trained, monkeypatch):
    echo(monkeypatch)
    args = ["translate", "--attention", trained, "abc", "", "de f"]
    status, out, err = run(capsys, *args)
    assert (status, err) == (0, "")
    assert out.startswith("abc\nCross-attention") and "\n\nde f\nCross-attention" in out
    blocks = out.split("Cross-attention")[1:]
    assert len(blocks) == 2
    for block, header in zip(blocks, ["a b c EOS", "d e _ f EOS"]):
        assert header.split() in [line.split() for line in block.splitlines()]
        assert all(len(line) <= 80 for line in block.splitlines())


def test_picture_shows_the_weights_of_the_last_block_by_label():
    """Two heads of the last block look at columns 0 and 1, and 0 and 2. Rows that were
    named after the decoder's inputs, not after its labels, would begin with BOS.
    """
    tokenizer = tm.Tokenizer.learn(["low lower"] * 2, vocab_size=262)
    source, output = map(tokenizer.encode, ("low é", "b low"))
    calls, one = [], np.eye(len(source) + 1)
    weights = np.stack([one[[0, 1, 2]], one[[0, 2, 2]]])[None]

    def apply(variables, src, tgt, mutable):
        calls.append((src.shape, tgt.shape))
        last = {"cross_attention": {"weights": (weights[:, :, : tgt.shape[1]],)}}
        first = {"cross_attention": {"weights": (weights[..., ::-1],)}}
        blocks = {"blocks_0": first, "blocks_1": last}
        return None, {"intermediates": {"decoder": blocks}}

    config = types.SimpleNamespace(num_layers=2, max_len=9)
    model = types.SimpleNamespace(config=config, apply=apply)
    picture = tm.draw_attention(model, {}, tokenizer, source, output).split("\n")
    assert picture[-4:] == [
        "      low    _    \ufffd    \ufffd  EOS",
        "   b @@@@",
        "_low      ++++ ++++",
        " EOS           @@@@",
    ]
    assert calls == [((1, 5), (1, 3))]
    # An output that has not ended after max_len tokens has no row for EOS.
    config.max_len, output = 3, tokenizer.encode("b low low")
    picture = tm.draw_attention(model, {}, tokenizer, source, output).split("\n")
    assert [row.split()[0] for row in picture[-3:]] == ["b", "_low", "_low"]


# ---- Terminals and pipes -------------------------------------------------------------


def test_translation_at_a_terminal(trained):
    """The prompt goes to stderr, and every line is answered before the next is asked."""
    ours, theirs = pty.openpty()
    process = command("translate", trained, stdin=theirs)
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


def test_closed_pipe_ends_a_translation_quietly(trained):
    process = command("translate", trained, stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"abc\n" * 9)
    process.stdin.close()
    with process.stderr:
        err = process.stderr.read()
    assert (process.wait(timeout=60), err) == (0, b"")


def test_closed_pipe_within_a_picture_is_quiet_too(trained):
    process = command("translate", "--attention", trained, "abc")
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert (process.wait(timeout=60), err) == (0, b"")


def test_closed_pipe_ends_training_with_another_status(pairs, tmp_path):
    """What it printed last is lost, so that it must not look as if all were done."""
    args = ["train", pairs, tmp_path / "model", *LEARN, "--steps", 1]
    process = command(*args)
    process.stdout.close()
    with process.stderr:
        process.stderr.read()
    assert process.wait(timeout=60) != 0
    assert tm.load_checkpoint(tmp_path / "model").state["step"] == 1


def test_text_is_utf8_wherever_it_comes_out(trained, tmp_path):
    """A system that prefers ASCII is no reason to fail. The output is the source here."""
    text, env = "ä水", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    script = with_more(tmp_path, ECHO)
    process = command("translate", trained, text, script=script, env=env)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err) == (0, text + "\n", b"")


# ---- Devices and processes -----------------------------------------------------------


def start_on(devices, *args, folders=(None, None), **kwargs):
    """Starts the script on "1", "4" or "2 x 2" devices; returns its processes. They run
    in these folders; None is the present one.
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
    flags = {"XLA_FLAGS": count, "JAX_PLATFORMS": "cpu"}
    return [
        command(*args, env={**flags, **env}, cwd=folder, **kwargs)
        for env, folder in zip(environments, folders)
    ]


def ended(processes, timeout=60):
    """Waits for the processes: (status, stdout, stderr) of each."""
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            # The library that connects the processes announces itself, in pieces.
            lines = out.decode().splitlines(keepends=True)
            lines = [x for x in lines if not re.search(r"\[Gloo\]|peer ranks", x)]
            results.append((process.returncode, "".join(lines), err.decode()))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.fixture(scope="session")
def unequal_pairs(tmp_path_factory):
    """Pairs of very unequal length, so that devices have unequal numbers of labels: the
    mean of the devices' means is another than the mean over all labels.
    """
    rng = random.Random(0)
    pairs = [(s[: rng.choice([1, 7])], t[: rng.choice([1, 7])]) for s, t in words(300)]
    return write_pairs(tmp_path_factory.mktemp("unequal") / "pairs.tsv", pairs)


# The gradient of a key's bias is zero but for rounding, as it adds the same to all
# scores of a query. Adam makes steps of any size of it, and no output depends on it.
def without_key_biases(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    return {name: leaf for name, leaf in names if "['key']['bias']" not in name}


@pytest.mark.usefixtures("without_evaluation")
def test_any_number_of_devices_and_processes_learns_the_same(
    capsys, unequal_pairs, tmp_path
):
    """The second process has a folder of its own, and nothing gets into that."""
    args = ["train", unequal_pairs, "model", *LEARN, "--steps", 5]

    def folder_for(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    alone, four, first, second = map(folder_for, ("alone", "four", "first", "second"))
    results = [run(capsys, *args[:2], alone / "model", *args[3:])]
    script = with_more(tmp_path, ECHO + "; draw_attention = lambda *_: 'a picture'")
    results += ended(start_on("4", *args, folders=[four], script=script))
    job = start_on("2 x 2", *args, folders=[first, second], script=script)
    result, other = ended(job)
    results.append(result)
    assert other == (0, "", "") and [*second.iterdir()] == []
    losses, checkpoints = [], []
    for (status, _, err), folder in zip(results, (alone, four, first), strict=True):
        assert status == 0, err
        assert f" parameters, on {1 if folder == alone else 4} x " in err
        reports = re.findall(r"^step .* loss (\S+)", err, re.MULTILINE)
        losses.append([float(loss) for loss in reports])
        assert [file.name for file in folder.iterdir()] == ["model"]
        checkpoints.append(tm.load_checkpoint(folder / "model"))
    assert "exactly right" in result[1] and result[1].endswith("\na picture\n")
    expected = checkpoints[0]
    assert len(losses[0]) == 5 and losses[0][-1] < losses[0][0] - 0.5
    for some, checkpoint in zip(losses[1:], checkpoints[1:]):
        np.testing.assert_allclose(some, losses[0], atol=2e-4)
        assert checkpoint.notes == expected.notes
        for name in ("params", "average"):
            ours = without_key_biases(checkpoint.state[name])
            theirs = without_key_biases(expected.state[name])
            assert ours.keys() == theirs.keys()
            for key, leaf in ours.items():
                np.testing.assert_allclose(leaf, theirs[key], atol=1e-5, err_msg=key)


def test_process_that_fails_does_not_wait_for_the_others(unequal_pairs, tmp_path):
    """The first alone finds that nothing can be saved. The second waits for it in the
    first step, and JAX ends it then.
    """
    path = tmp_path / "nowhere" / "model"
    job = start_on("2 x 2", "train", unequal_pairs, path, *LEARN)
    first, second = ended(job, timeout=30)
    assert first[:2] == (2, "")
    last = first[2].splitlines()[-1]
    assert last == f"error: {path}: No such file or directory"
    assert second[0] != 0 and second[1] == ""


def test_loss_that_is_not_finite_ends_all_processes(unequal_pairs, tmp_path):
    """It is no step at which the first process reports."""
    broken = f"""{NO_EVALUATION}
real = train_step
def train_step(state, *args):
    state, metrics = real(state, *args)
    return state, {{**metrics, "loss": metrics["loss"] / (state.step != 3)}}
"""
    script = with_more(tmp_path, broken)
    args = ["train", unequal_pairs, tmp_path / "model", *LEARN, "--steps", 10000]
    first, second = ended(start_on("2 x 2", *args, script=script), timeout=30)
    assert first[:2] == (1, "") and second[0] != 0
    assert "error: after step 3 " in first[2] and "Traceback" not in first[2]
    assert tm.load_checkpoint(tmp_path / "model").state["step"] == 0


def test_processes_with_other_pairs_do_not_train_together(tmp_path):
    """Each would take its own part of its own batch, and nothing would look wrong."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_pairs(folder / "pairs", words(100, seed))
    script = with_more(tmp_path, NO_EVALUATION)
    args = ["train", "pairs", "model", *LEARN, "--steps", 1]
    for status, out, err in ended(
        start_on("2 x 2", *args, folders=folders, script=script)
    ):
        assert status != 0 and out == "" and "loss" not in err


@pytest.mark.usefixtures("without_evaluation")
def test_no_step_gives_its_batch_to_device_put(capsys, pairs, tmp_path, monkeypatch):
    """JAX gathers what several processes give to it from all, to compare it."""
    calls, real = [], jax.device_put

    def device_put(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(jax, "device_put", device_put)
    counts = []
    for steps in (1, 19):
        calls.clear()
        args = ["train", pairs, tmp_path / str(steps), *LEARN, "--steps", steps]
        assert run(capsys, *args)[0] == 0
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
