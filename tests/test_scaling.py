"""One device, several, and several processes: real ones, with the same numbers."""

import os
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, write_pairs

import transformer_model as tm

SCRIPT = str(ROOT / "transformer_model.py")
OPTIONS = ["--d-model", "16", "--num-heads", "2", "--num-layers", "1", "--max-len"]
OPTIONS += ["7", "--batch-size", "16", "--dropout", "0.1", "--learning-rate", "0.01"]


def devices(number):
    flags = f"--xla_force_host_platform_device_count={number}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def start(kind, *args, folders=(None, None)):
    """Starts the script on "1", "4" or "2 x 2" devices; returns its processes. They run
    in these folders; None is the present one."""
    command = [sys.executable, SCRIPT, *OPTIONS, *map(str, args)]
    if kind == "2 x 2":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        environments = [
            {**devices(2), **job, "JAX_PROCESS_ID": str(process)} for process in (0, 1)
        ]
        command.append("--distributed")
    else:
        environments = [devices(int(kind))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env=env, cwd=folder, **pipes)
        for env, folder in zip(environments, folders)
    ]


def finish(processes):
    """Waits for the script; returns what process 0 printed."""
    results = [process.communicate(timeout=240) for process in processes]
    for process, (_, err) in zip(processes, results):
        assert process.returncode == 0, err
    for out, err in results[1:]:  # the first process alone prints
        assert "Transformer" not in out and "step" not in err
    return results[0]


def losses(err):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  accuracy", err)]


def final_loss(path, pairs):
    checkpoint = tm.load_checkpoint(path)
    config = checkpoint.config
    state = tm.create_train_state(config, jax.random.key(0))
    state = state.replace(params=checkpoint.state["params"])
    encode = tm.Tokenizer().encode
    tokens = [(encode(source), encode(target)) for source, target in pairs[:64]]
    batch = tm.to_batch(tokens, config.max_len)
    return float(tm.eval_step(state, batch)["loss"])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Pairs of very unequal length, so that devices have unequal numbers of labels. The
    mean of their means would be off by 0.003 to 0.1 in each of the first steps."""
    path = tmp_path_factory.mktemp("scaling") / "pairs.tsv"
    rng = np.random.default_rng(0)
    words = tm.demo_pairs(300, 7, seed=0)
    pairs = [(s[: 1 if rng.random() < 0.5 else 7], t) for s, t in words]
    pairs = [(s, t[: 1 if rng.random() < 0.5 else 7]) for s, t in pairs]
    return write_pairs(path, pairs), pairs


def read_until(stream, awaited):
    """Reads lines until one has the awaited text in it; returns all of them."""
    seen = ""
    while awaited not in seen:
        line = stream.readline()
        assert line, seen
        seen += line
    return seen


def test_same_losses_everywhere_and_checkpoints_go_from_one_to_another(data, tmp_path):
    """One device does all 20 steps. They are also done by four devices, which are killed
    on the way, two processes of two devices each, killed too, and one device."""
    path, pairs = data
    whole, file = tmp_path / "whole.msgpack", tmp_path / "killed.msgpack"

    def go(kind, file):
        args = ["--pairs", path, "--vocab-size", 259, "--label-smoothing", 0]
        return start(kind, *args, "--checkpoint", file, "--steps", 20)

    # Older versions of JAX catch SIGTERM in a job, whether the program wants it or not.
    is_free = hasattr(jax.config, "jax_enable_preemption_service")
    number = signal.SIGTERM if is_free else signal.SIGKILL
    reference, parts, done = go("1", whole), [], 0
    for kind, until in (("4", 6), ("2 x 2", 12)):
        processes = go(kind, file)
        printed = losses(read_until(processes[0].stderr, f"step {until:>2} of"))
        for process in processes:
            process.send_signal(number)
        for process in processes:
            rest = process.communicate(timeout=60)[1]
            assert process.returncode == -number, rest
        parts.append((done, printed))
        done = int(tm.load_checkpoint(file).state["step"])
        assert until - 1 <= done < 20
    out, err = finish(go("1", file))
    parts.append((done, losses(err)))
    expected = losses(finish(reference)[1])
    assert len(expected) == 20 and expected[-1] < expected[0] - 0.5
    assert "Devices: 1 x " in out and "exactly right" in out
    for done, printed in parts:
        np.testing.assert_allclose(
            printed, expected[done : done + len(printed)], atol=1.1e-4
        )
    assert done + len(printed) == 20
    np.testing.assert_allclose(
        final_loss(file, pairs), final_loss(whole, pairs), atol=1e-5
    )


def test_process_that_fails_does_not_wait_for_the_others(data, tmp_path):
    """The first alone finds that nothing can be saved. The second waits for it in the
    first step, and JAX ends it then."""
    args = ["--pairs", data[0], "--vocab-size", 259, "--checkpoint"]
    first, second = start("2 x 2", *args, tmp_path / "no such folder" / "model")
    _, err = first.communicate(timeout=60)
    assert first.returncode == 2 and err.endswith(": No such file or directory\n")
    assert err.startswith("error: ") and err.count("\n") == 1
    second.communicate(timeout=60)
    assert second.returncode not in (0, None)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="of older JAX's processes only one notices, and ends the other by a signal",
)
def test_processes_with_other_pairs_do_not_train_on_them(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_pairs(folder / "pairs.tsv", tm.demo_pairs(100, 7, seed=seed))
    args = ["--pairs", "pairs.tsv", "--vocab-size", 259, "--steps", 1]
    for process in start("2 x 2", *args, folders=folders):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2
        assert err == "error: the processes do not have the same pairs\n"


def test_batch_that_does_not_divide_is_refused():
    command = [sys.executable, SCRIPT, "--batch-size", "6"]
    done = subprocess.run(command, env=devices(4), capture_output=True, check=False)
    assert done.returncode == 2 and done.stdout == b""
    message = b"error: --batch-size 6 cannot be shared out evenly among 4 devices\n"
    assert done.stderr == message


def test_distributed_without_a_job_is_one_line():
    command = [sys.executable, SCRIPT, "--distributed"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI"))}
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"--distributed" in done.stderr
