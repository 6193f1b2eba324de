"""What goes wrong outside the program: a kill, a full disk, a broken file, no memory."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time

import flax.serialization
import jax
import numpy as np
import pytest
from conftest import LEARN, ROOT, assert_refused, run

import transformer_model as tm

SCRIPT = str(ROOT / "transformer_model.py")


def content_of(path):
    """(the first line of a checkpoint, its content)."""
    first, _, content = path.read_bytes().split(b"\n", 2)
    return first, flax.serialization.msgpack_restore(content)


def forge(source, path, edit):
    """A checkpoint with another content, and with the digest of that."""
    first, content = content_of(source)
    content = flax.serialization.msgpack_serialize(edit(content) or content)
    digest = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(b"\n".join([first, digest, content]))


def leftovers(path):
    return [file for file in path.parent.iterdir() if file != path]


def make_old(file):
    """As if it had been written two hours ago."""
    os.utime(file, (time.time() - 7200,) * 2)


# ---- Killed while it trains and while it saves

# Of the runs that are ended here, most have these options, so that few are compiled.
TRAIN = [*LEARN, "--dropout", "0.1", "--steps", "60"]

# The third save says that it is under way, and waits to be killed.
HARNESS = """
import os, sys, time
import transformer_model as tm
real, calls = os.fsync, []
def fsync(file):
    calls.append(file)
    if len(calls) == 3:
        print("HERE", file=sys.stderr, flush=True)
        time.sleep(60)
    real(file)
os.fsync = fsync
sys.exit(tm.main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("without_evaluation")
def test_kill_while_saving_leaves_a_whole_checkpoint(capsys, tmp_path, pairs_file):
    path = tmp_path / "model.msgpack"
    args = ["--pairs", pairs_file, "--checkpoint", path, *TRAIN]
    call = [sys.executable, "-c", HARNESS, *map(str, args)]
    process = subprocess.Popen(
        call,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert any(line.startswith(b"HERE") for line in process.stderr)
    process.kill()
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == -signal.SIGKILL and "error" not in err
    assert tm.load_checkpoint(path).state["step"] == 3
    (file,) = leftovers(path)
    make_old(file)
    status, _, err = run(capsys, *args)
    assert status == 0 and "step  6 of 60" in err and "step  3 of 60" not in err
    assert leftovers(path) == []


class Killed(BaseException):
    """Ends a run at once, as a kill would."""


@pytest.mark.usefixtures("without_evaluation")
def test_killed_runs_end_with_the_same_parameters(
    capsys, tmp_path, pairs_file, monkeypatch
):
    path, whole = tmp_path / "killed.msgpack", tmp_path / "whole.msgpack"
    args = ["--pairs", pairs_file, *TRAIN]
    real, num_saves = tm.save_checkpoint, 0

    def save_checkpoint(*args, **notes):
        nonlocal num_saves
        num_saves += 1
        if num_saves in (5, 10):
            raise Killed
        real(*args, **notes)

    monkeypatch.setattr(tm, "save_checkpoint", save_checkpoint)
    for reached in (9, 21):
        with pytest.raises(Killed):
            run(capsys, *args, "--checkpoint", path)
        assert tm.load_checkpoint(path).state["step"] == reached
    for file in (path, whole):
        status, _, err = run(capsys, *args, "--checkpoint", file)
        assert status == 0 and "the learning rate goes on" not in err
    assert path.read_bytes() == whole.read_bytes()
    assert tm.load_checkpoint(path).notes["beats_guessing"]


def test_ctrl_c_while_saving_says_which_step_is_saved(
    capsys, tmp_path, pairs_file, monkeypatch
):
    path, real, calls = tmp_path / "model.msgpack", os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    status, _, err = run(capsys, "--pairs", pairs_file, "--checkpoint", path, *TRAIN)
    assert status == 130
    assert err.splitlines()[-1] == f"error: interrupted; {path} holds step 3"
    assert tm.load_checkpoint(path).state["step"] == 3 and leftovers(path) == []


@pytest.mark.parametrize("importing", [True, False])
def test_ctrl_c_before_training_is_quiet(importing, tmp_path):
    """While it imports, and while it reads the pairs: from a pipe that gives none."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--pairs", pipe],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if importing:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        expected = -signal.SIGINT, b"", b""
    else:
        with pipe.open("wb"):  # It waits until the other side is open.
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        expected = 130, b"", b"error: interrupted, and nothing is saved\n"
    assert (process.wait(timeout=60), *process.communicate()) == expected


def test_report_and_save_at_least_once_a_minute(
    capsys, tmp_path, pairs_file, monkeypatch
):
    """With a clock that is 40 seconds further at every look: at step 2, a minute is over,
    at step 3 a report is due anyway, and at step 5 another minute is over."""
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(tm.time, "perf_counter", lambda: next(clock))
    path = tmp_path / "model.msgpack"
    args = ["--pairs", pairs_file, "--checkpoint", path, *TRAIN]
    real, saved = tm.save_checkpoint, []

    def save_checkpoint(path, config, state, **notes):
        saved.append(int(state.step))
        if len(saved) == 4:
            raise Killed
        real(path, config, state, **notes)

    monkeypatch.setattr(tm, "save_checkpoint", save_checkpoint)
    with pytest.raises(Killed):
        run(capsys, *args)
    assert saved == [0, 2, 3, 5]


# ---- Files


def test_save_that_fails_ends_the_run(capsys, pairs_file, tmp_path, monkeypatch):
    path = tmp_path / "no such folder" / "model.msgpack"
    args = ["--pairs", pairs_file, *TRAIN, "--checkpoint"]
    result = run(capsys, *args, path)
    assert_refused(result, path, "No such file or directory")  # before it trains
    path, real, calls = tmp_path / "model.msgpack", os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    status, _, err = run(capsys, *args, path)
    last = err.splitlines()[-1]
    assert status == 1 and "Traceback" not in err
    assert last.startswith("error: ") and "No space left" in last and str(path) in last
    assert tm.load_checkpoint(path).state["step"] == 3 and leftovers(path) == []


def small_save(path, value=0):
    config = tm.TransformerConfig(src_vocab_size=9, tgt_vocab_size=9, d_model=8)
    tm.save_checkpoint(path, config, {"params": np.full(999, value)})


def test_ctrl_c_just_after_renaming_stays_one(tmp_path, monkeypatch):
    path, real = tmp_path / "model", os.replace

    def replace(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        small_save(path)
    assert content_of(path) and leftovers(path) == []


def test_nothing_that_is_left_there_hinders_saving(tmp_path):
    path = tmp_path / "model"
    folder = tmp_path / f"model.saving-{'0' * 16}"
    folder.mkdir()
    make_old(folder)
    small_save(path)
    assert leftovers(path) == [folder]


def test_two_processes_may_save_to_one_checkpoint(tmp_path):
    path = tmp_path / "model"
    program = f"""
import test_faults, sys
print("HERE", flush=True)
for i in range(300): test_faults.small_save({str(path)!r}, i)
"""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": folders},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"HERE\n"
        while other.poll() is None:
            small_save(path)
    finally:
        err = other.communicate()[1].decode()
    assert other.returncode == 0, err
    assert content_of(path) and leftovers(path) == []


def test_unusable_checkpoints_are_never_overwritten(capsys, tmp_path, pairs_file):
    path = tmp_path / "model.msgpack"
    for content in (b"", b"a\tb\n"):
        path.write_bytes(content)
        for args in (["--pairs", pairs_file, *LEARN], ["--translate", "a"]):
            result = run(capsys, *args, "--checkpoint", path)
            assert_refused(result, path, "not a checkpoint")
            assert path.read_bytes() == content


def put(*names, value):
    """An edit: puts a value at a place of the content."""

    def edit(content):
        *folders, last = names
        for name in folders:
            content = content[name]
        content[last] = value

    return edit


def without(name):
    return lambda content: {k: v for k, v in content.items() if k != name}


def without_note(name):
    def edit(content):
        del content["notes"][name]

    return edit


WRONG = {
    "a list": lambda content: [1],
    "no configuration": without("config"),
    "no state": without("state"),
    "no notes": without("notes"),
    "a number for the notes": put("notes", value=5),
    "unknown field": put("config", "fancy", value=1),
    "text for a number": put("config", "d_model", value="16"),
    "another width": put("config", "d_model", value=32),
    "a model without logits": put("config", "head", value="none"),
    "no parameters": put("state", "params", value=None),
    "text for parameters": put("state", "params", "encoder", value="x"),
    "merges of nothing": put("notes", "merges", value=np.array([[7, 900]], np.int32)),
    "merges that are no pairs": put("notes", "merges", value=[1, 2]),
    "a number for the merges": put("notes", "merges", value=5),
    "more tokens than the model": put("notes", "merges", value=[[5, 6]]),
}
WRONG_TO_CONTINUE = {
    "no notes at all": put("notes", value={}),
    "no options": without_note("options"),
    "a number for the options": put("notes", "options", value=5),
    "no validation pairs": without_note("valid_texts"),
    "no word on guessing": without_note("beats_guessing"),
    "text for a truth value": put("notes", "beats_guessing", value="x"),
    "no digest": without_note("digest"),
    "text for the step": put("state", "step", value="x"),
    "no optimizer": put("state", "opt_state", value=5),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_TO_CONTINUE])
def test_checkpoint_with_wrong_content(capsys, checkpoint, pairs_file, tmp_path, name):
    path = tmp_path / "model.msgpack"
    forge(checkpoint, path, {**WRONG, **WRONG_TO_CONTINUE}[name])
    before = path.read_bytes()
    uses = []
    if name in WRONG:
        uses.append(["--translate", "a"])
    if name != "a model without logits":  # A run that goes on makes its own.
        uses.append(["--pairs", pairs_file, "--steps", 6, *LEARN])
    for args in uses:
        assert_refused(run(capsys, *args, "--checkpoint", path), path)
        assert path.read_bytes() == before


# ---- A model that is of no use


@pytest.mark.usefixtures("without_evaluation")
def test_loss_that_is_not_finite_stops_with_status_1(capsys, pairs_file, tmp_path):
    path = tmp_path / "model.msgpack"
    args = ["--pairs", pairs_file, "--checkpoint", path, *LEARN]
    status, _, err = run(capsys, *args, "--steps", 40, "--learning-rate", 1e30)
    assert status == 1
    kept = tm.load_checkpoint(path).state
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept["params"]))
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and ("nan" in last or "inf" in last)
    # It names the step where it happened, and the last good one, which the file holds.
    assert f"step {int(kept['step'])}" in last.partition("not finite at step")[2]


def test_translation_with_nan_is_one_line(capsys, checkpoint, tmp_path):
    path = tmp_path / "nan.msgpack"
    config, state, notes, _ = tm.load_checkpoint(checkpoint)
    state["params"] = jax.tree.map(lambda x: np.full_like(x, np.nan), state["params"])
    tm.save_checkpoint(path, config, state, **notes)
    args = ["--checkpoint", path, "--translate", "abc"]
    assert_refused(run(capsys, *args), "NaN", status=1)


@pytest.mark.usefixtures("without_evaluation")
def test_diverged_model_does_not_replace_a_better_one(
    capsys, checkpoint, pairs_file, tmp_path
):
    path = tmp_path / "model.msgpack"
    args = ["--pairs", pairs_file, "--checkpoint", path, *LEARN, "--steps", 7]
    args += ["--learning-rate", 100]
    for is_better, expected in [(True, 5), (False, 7)]:
        forge(checkpoint, path, put("notes", "beats_guessing", value=is_better))
        status, _, err = run(capsys, *args)
        assert status == 0 and ("not saved" in err) == (expected == 5)
        assert tm.load_checkpoint(path).state["step"] == expected


# ---- Memory, devices, streams


def test_out_of_memory_is_one_line(
    capsys, checkpoint, pairs_file, tmp_path, monkeypatch
):
    args = ["--checkpoint", checkpoint, "--translate", "abc", "--beam-size"]
    result = run(capsys, *args, 10**8)
    assert_refused(result, "--beam-size", "from 1 to 1000")

    for error in (
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9"),
    ):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(tm, "create_train_state", fail)
        result = run(capsys, "--pairs", pairs_file, *LEARN)
        assert_refused(result, "memory", "--batch-size", status=1)


def shell(line, *args, **kwargs):
    """Runs a line of bash, in which `$@` is the script with these options."""
    call = ["bash", "-c", line, "bash", sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, check=False, **kwargs)


def test_platform_that_is_not_there():
    env = {**os.environ, "JAX_PLATFORMS": "nosuch"}
    done = shell('"$@"', "--steps", 1, env=env)
    assert_refused((done.returncode, done.stdout, done.stderr), "nosuch")


def test_closed_pipe_ends_translation_quietly_and_training_with_a_line(
    checkpoint, pairs_file
):
    line = 'yes abc | head -5000 | "$@" | head -1; exit ${PIPESTATUS[2]}'
    done = shell(line, "--checkpoint", checkpoint, "--translate")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    line = '"$@" | head -1; exit ${PIPESTATUS[0]}'
    done = shell(line, "--pairs", pairs_file, *LEARN, "--steps", 1)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("line", ['"$@" > /dev/full', '"$@" >&-', '"$@" 2>&-'])
def test_output_that_cannot_be_written(checkpoint, line):
    """The line to translate is too long, so that there is something to say as well."""
    done = shell(line, "--checkpoint", checkpoint, "--translate", "12345678")
    if "2>" in line:
        assert (done.returncode, done.stderr) == (1, "")
    else:
        # Not the translation's: the output's line.
        last = done.stderr.splitlines()[-1:]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert last and last[0].startswith("error: ") and "line 1" not in last[0]


def test_error_output_that_cannot_be_written(checkpoint):
    line = '"$@" 2> /dev/full'
    done = shell(line, "--checkpoint", checkpoint, "--translate", "12345678")
    assert done.returncode == 1


def test_closed_input_is_one_line(checkpoint):
    done = shell('"$@" <&-', "--checkpoint", checkpoint, "--translate")
    assert done.returncode in (1, 2) and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


class Writer:
    """All that `print` needs of a stream."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_other_streams_and_threads(checkpoint, monkeypatch):
    """As in a notebook or in a server."""
    args = ["--checkpoint", str(checkpoint), "--translate", "abc", "12345678"]
    results = []
    for stream in (Writer, io.StringIO):
        streams = stream(), stream()
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        thread = threading.Thread(target=lambda: results.append(tm.main(args)))
        thread.start()
        thread.join()
        out, err = (s.text if stream is Writer else s.getvalue() for s in streams)
        assert out.count("\n") == 2 and err.count("\n") == 1
    assert results == [2, 2]


@pytest.mark.usefixtures("without_evaluation")
def test_file_name_that_is_not_utf8(capsys, pairs_file, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/no\xff")
    os.link(pairs_file, name)
    args = ["--pairs", name, "--checkpoint", name + "2", *LEARN, "--steps", 1]
    assert run(capsys, *args)[0] == 0
    status, out, err = run(capsys, *args, "--batch-size", 32)
    assert (status, out, err.count("\n")) == (2, "", 1)
