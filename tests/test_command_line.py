"""Section 12, in processes of their own where that matters."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

import transformer_model as tm

SCRIPT = str(ROOT / "transformer_model.py")
TINY = ["--d-model", "16", "--num-heads", "2", "--num-layers", "1"]
TINY += ["--max-len", "8", "--batch-size", "16"]


def command(*args, stdin=b"", env=None, **kwargs):
    """Runs the script in a process of its own."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)],
        check=False,
        input=stdin,
        capture_output=True,
        env={**os.environ, **(env or {})},
        **kwargs,
    )


def run(capsys, *args):
    """Runs `main` in this process: (status, stdout, stderr)."""
    status = tm.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    pairs = tm.reversal_pairs(200, 8, seed=0)
    path.write_bytes(b"".join(b"%s\t%s\n" % pair for pair in pairs))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, pairs_file):
    """A checkpoint of a model that has hardly learnt anything."""
    path = tmp_path_factory.mktemp("model") / "model.msgpack"
    args = ["--pairs", pairs_file, "--checkpoint", path, "--steps", 5, *TINY]
    assert tm.main([str(arg) for arg in args]) == 0
    return path


def params_of(path):
    return jax.tree.leaves(tm.load_checkpoint(path).state["params"])


# ---- The demo and --pairs


def test_demo_shows_everything_in_80_columns():
    done = command("--steps", 20)
    assert done.returncode == 0, done.stderr.decode()
    out, err = done.stdout.decode(), done.stderr.decode()
    assert all(len(line) <= 80 for line in (out + err).splitlines())
    assert "\r" not in out + err and "\x1b" not in out + err
    assert "d_model          64" in out
    assert re.search(r"Parameters: 133,568 .*decoder 66,880.*encoder 50,112", out)
    assert re.search(r"Devices: 1 x ", out)
    assert "#  #  #  .  .   b\n" in out  # the causal mask
    line = r"step 20 of 20  loss \d+\.\d{4}  accuracy +\d+\.\d%  [\d,]+ tokens/s  0:00 left"
    assert re.search(line, err)
    assert re.search(r"unseen pairs: loss \d.*, \d+ of 512 exactly right", out)
    assert len(re.findall(r"^  [a-z]{4,12} -> ", out, re.MULTILINE)) == 6


def test_attention_is_drawn_for_what_was_learnt(capsys):
    """A hand-made decode: the drawing has a row per output token."""
    config = tm.TransformerConfig(259, 259, 16, 2, 1, 32, max_len=9)
    params = tm.create_train_state(config, jax.random.key(0)).params
    tm.show_attention(config, params, b"abcd", b"dcb")
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "a b c d EOS" in line)
    assert [line.split()[0] for line in lines[start + 1 :]] == ["d", "c", "b", "EOS"]


def test_pairs_too_long_are_left_out_and_counted(capsys, tmp_path):
    path = tmp_path / "pairs.tsv"
    lines = [f"{n}\t{n}" for n in range(60)] + ["123456789\t1", "1\t123456789"]
    path.write_text("\n".join(lines))
    status, out, err = run(capsys, "--pairs", path, "--steps", 1, *TINY)
    assert status == 0
    assert "left out 2 of 62 pairs, longer than --max-len 8 bytes" in err
    assert "of 6 exactly right" in out  # a tenth is held out


# ---- Mistakes: one line on stderr, nothing on stdout, status 2


def assert_refused(result, *words):
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert str(word) in err


@pytest.mark.parametrize(
    "args, words",
    [
        (["--steps", "0"], ["--steps", "at least 1", "'0'"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--batch-size", "-1"], ["--batch-size"]),
        (["--learning-rate", "nan"], ["--learning-rate", "above 0", "'nan'"]),
        (["--learning-rate", "inf"], ["--learning-rate"]),
        (["--dropout", "1"], ["--dropout", "below 1"]),
        (["--seed", "-1"], ["--seed"]),
        (["--max-len", "0"], ["--max-len"]),
        (["--max-len", "3"], ["--max-len", "at least 4"]),
        (["--beam-size", "0"], ["--beam-size"]),
        (["--d-model", "63"], ["d_model", "multiple of", "63"]),
        (["--num-heads", "5"], ["d_model", "multiple of", "5"]),
        (["--batch-size", "50000"], ["--batch-size 50000", "39488"]),
        (["--batch"], ["--batch"]),
        (["extra"], ["extra"]),
        (["--pairs"], ["--pairs"]),
        (["--translate", "a"], ["--translate", "--checkpoint"]),
        (["--translate", "a", "--checkpoint", "x", "--steps", "3"], ["--steps"]),
        (["--translate", "a", "--checkpoint", "none.msgpack"], ["none.msgpack"]),
    ],
)
def test_command_line_mistakes(capsys, args, words):
    assert_refused(run(capsys, *args), *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["No such file"]),
        (b"", ["empty"]),
        (b"a\tb\nab\n", ["line 2", "tab"]),
        (b"a\t\xe4\n", ["line 1", "UTF-8"]),
        (b"a\t\n", ["line 1", "empty target"]),
        (b"123456789\t1\n", ["no pair", "--max-len 8"]),
        (b"a\tb\n" * 3, ["--batch-size 16", "0 of 3"]),
    ],
)
def test_mistakes_in_the_pairs(capsys, tmp_path, content, words):
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_bytes(content)
    assert_refused(run(capsys, "--pairs", path, *TINY), path, *words)


def test_mistake_as_a_person_makes_it():
    done = command("--pairs", "no such file.tsv")
    assert done.returncode == 2 and done.stdout == b""
    expected = b"error: no such file.tsv: No such file or directory"
    assert done.stderr.strip() == expected


def test_loss_that_is_not_finite_stops_with_status_1(capsys, pairs_file, tmp_path):
    path = tmp_path / "model.msgpack"
    args = ["--pairs", pairs_file, "--checkpoint", path, *TINY]
    status, _, err = run(capsys, *args, "--steps", 40, "--learning-rate", 1e30)
    assert status == 1
    assert re.fullmatch(r"error: .*step \d+.*(nan|inf).*", err.splitlines()[-1])
    assert all(np.isfinite(x).all() for x in params_of(path))  # the last good one


# ---- Checkpoints


def test_continuing_is_refused_where_something_differs(capsys, checkpoint, pairs_file):
    before = checkpoint.read_bytes()
    here = ["--checkpoint", checkpoint, "--steps", 9, *TINY]
    for args, words in [
        (["--pairs", pairs_file, *here, "--d-model", 32], ["d_", "there", "here"]),
        (["--pairs", pairs_file, *here, "--num-layers", 2], ["num_layers is 1", "2"]),
        (["--pairs", pairs_file, *here, "--seed", 1], ["seed is 0 there and 1 here"]),
        (here, ["task is pairs there and reversal here"]),
    ]:
        assert_refused(run(capsys, *args), checkpoint, *words)
        assert checkpoint.read_bytes() == before


def test_unusable_checkpoints_are_never_overwritten(capsys, tmp_path, pairs_file):
    path = tmp_path / "model.msgpack"
    for content in (b"", b"a\tb\n"):
        path.write_bytes(content)
        for args in (["--pairs", pairs_file, *TINY], ["--translate", "a"]):
            result = run(capsys, *args, "--checkpoint", path)
            assert_refused(result, path, "not a checkpoint")
            assert path.read_bytes() == content


def test_place_that_cannot_be_written_is_found_out_first(capsys, pairs_file, tmp_path):
    path = tmp_path / "no such folder" / "model.msgpack"
    result = run(capsys, "--pairs", pairs_file, "--checkpoint", path, *TINY)
    assert_refused(result, path, "No such file or directory")


def test_steps_are_the_total(capsys, checkpoint, pairs_file, tmp_path):
    path = tmp_path / "model.msgpack"
    path.write_bytes(checkpoint.read_bytes())
    args = ["--pairs", pairs_file, "--checkpoint", path, *TINY]
    status, out, err = run(capsys, *args, "--steps", 5)
    assert status == 0 and "has 5 steps" in err and "exactly right" in out
    assert [a.tobytes() for a in params_of(path)] == [
        a.tobytes() for a in params_of(checkpoint)
    ]
    status, _, err = run(capsys, *args, "--steps", 7)
    assert status == 0 and "step 7 of 7" in err and "step 5 of 7" not in err
    assert tm.load_checkpoint(path).state["step"] == 7


def start(*args):
    """Starts the script, and yields the process as soon as it has trained a bit."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    for line in process.stderr:
        if line.startswith(b"step"):
            return process
    raise AssertionError(process.wait())


def test_killed_runs_end_with_the_same_parameters(tmp_path, pairs_file):
    path, whole = tmp_path / "killed.msgpack", tmp_path / "whole.msgpack"
    steps = ["--steps", 1200, "--dropout", 0.1, *TINY]
    args = ["--pairs", pairs_file, *steps, "--checkpoint"]
    kills = 0
    with contextlib.suppress(AssertionError):  # the last one may end by itself
        for delay in (0.0, 0.15):
            process = start(*args, path)
            time.sleep(delay)
            process.kill()
            kills += process.wait() == -signal.SIGKILL
            process.stderr.close()
    assert kills
    step = int(tm.load_checkpoint(path).state["step"])
    assert 0 < step < 1200
    assert command(*args, path).returncode == 0
    assert command(*args, whole).returncode == 0
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_and_says_so(tmp_path, pairs_file, number):
    path = tmp_path / "model.msgpack"
    args = ["--pairs", pairs_file, "--steps", 100_000, *TINY, "--checkpoint", path]
    process = start(*args)
    process.send_signal(number)
    last = process.stderr.read().decode().splitlines()[-1]
    assert process.wait() == 128 + number
    step = int(tm.load_checkpoint(path).state["step"])
    assert last == f"interrupted after step {step}, saved to {path}"
    assert step >= 1


# ---- Translation


def test_translation_of_arguments(capsys, checkpoint):
    args = ["--checkpoint", checkpoint, "--translate"]
    status, out, err = run(capsys, *args, "abc", "", "déf")
    assert (status, err) == (0, "")
    lines = out.split("\n")
    assert len(lines) == 4 and lines[1] == "" and lines[3] == ""


def test_translation_of_lines(checkpoint):
    texts = [b"abc", b"", b"123456789", b"caf\xe9", b"xyz\r", b"abc", b"last"]
    args = ["--checkpoint", checkpoint, "--translate"]
    done = command(*args, stdin=b"\n".join(texts))
    assert done.returncode == 2
    lines = done.stdout.decode().split("\n")
    assert len(lines) == len(texts) + 1 and lines[-1] == ""
    assert lines[0] == lines[5] and [lines[i] for i in (1, 2, 3)] == ["", "", ""]
    assert done.stderr.decode().splitlines() == [
        "error: line 3: 9 bytes, the most is 8",
        "error: line 4: not UTF-8 at byte 4",
    ]
    alone = command(*args, "xyz", "last")
    assert alone.stdout.decode().splitlines() == [lines[4], lines[6]]


def test_closed_pipe_ends_quietly(checkpoint):
    shell = (
        f"yes abc | head -5000 | {sys.executable} {SCRIPT} "
        f"--checkpoint {checkpoint} --translate | head -1"
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True, check=False)
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""
