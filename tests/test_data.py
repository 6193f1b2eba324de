"""Sections 11 and 12: pairs, batches, checkpoints."""

import dataclasses
import functools
import hashlib
import os
import time

import flax.serialization
import jax
import numpy as np
import optax
import pytest
from conftest import TINY

import transformer_model as tm

# ---- Pairs


def test_demo_pairs_are_distinct_reversed_and_of_all_lengths():
    pairs = tm.demo_pairs(500, 12, seed=0)
    assert len({source for source, _ in pairs}) == 500
    assert all(target == source[::-1] for source, target in pairs)
    assert {len(source) for source, _ in pairs} == set(range(4, 13))
    assert pairs == tm.demo_pairs(500, 12, seed=0) != tm.demo_pairs(500, 12, 1)


def test_read_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("ein Haus\ta house\r\nähm\t\u2028 um\n".encode())
    expected = [("ein Haus", "a house"), ("ähm", "\u2028 um")]
    assert tm.read_pairs(path) == tm.read_pairs(str(path)) == expected
    path.write_bytes(b"a\tb")  # no newline at the end
    assert tm.read_pairs(path) == [("a", "b")]
    path.write_bytes("\ufeffa\tb\nc\td\n".encode())  # a byte order mark
    assert tm.read_pairs(path) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"a\tb\nc d\n", "line 2: need exactly one tab, found 0"),
        (
            b"a\tb\tc\n",
            "line 1: need exactly one tab, found 2 (cut -f 1,2 keeps two columns)",
        ),
        (b"a\tb\n\n", "line 2: need exactly one tab, found 0"),
        (b"a\tb\n\tc\n", "line 2: empty source"),
        (b"a\tb\nc\t\r\n", "line 2: empty target"),
        (b"a\tb\nc\t\xff\n", "line 2: not UTF-8 at byte 3"),
    ],
)
def test_read_pairs_names_file_line_and_mistake(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(tm.InputError) as error:
        tm.read_pairs(path)
    separator = ", " if message.startswith("line") else ": "
    assert str(error.value) == f"{path}{separator}{message}"


@pytest.mark.parametrize(
    "num_sources, limit, expected", [(400, 10, 10), (400, 99, 40), (9, 10, 1)]
)
def test_held_out_are_one_pair_each_of_a_tenth_of_the_sources(
    num_sources, limit, expected
):
    pairs = [(str(i % num_sources), str(i)) for i in range(1000)]
    valid = tm.hold_out(pairs, limit, seed=0)
    assert len(valid) == len(dict(valid)) == expected and set(valid) <= set(pairs)
    assert valid == tm.hold_out(pairs, limit, seed=0)
    assert len({tuple(tm.hold_out(pairs, limit, seed)) for seed in range(9)}) > 1


def test_pad_and_to_batch_by_hand():
    padded = tm.pad([[3, 4], [], [5, 6, 7]], 3)
    np.testing.assert_array_equal(padded, [[3, 4, 0], [0, 0, 0], [5, 6, 7]])
    assert padded.dtype == np.int32
    batch = tm.to_batch([([7, 8], [9, 9, 9]), ((5,), ())], 4)
    np.testing.assert_array_equal(batch["src"], [[7, 8, 2, 0], [5, 2, 0, 0]])
    np.testing.assert_array_equal(batch["tgt"], [[1, 9, 9, 9, 2], [1, 2, 0, 0, 0]])
    assert batch["src"].dtype == batch["tgt"].dtype == np.int32
    for too_long in ([5] * 4, [9]), ([5], [9] * 4):
        with pytest.raises(ValueError):
            tm.to_batch([too_long], 4)


def random_pairs(count, longest=60, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, (count, 2))
    return [([3] * source, [4] * target) for source, target in lengths]


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_hold_every_row_once_in_few_shapes(shuffled):
    pairs, rng = random_pairs(1000), np.random.default_rng(0)
    widths = [tm.width_of(pair, 61) for pair in pairs]
    batches = tm.batches_by_width(widths, 32, rng if shuffled else None)
    seen = np.concatenate([numbers for numbers, _ in batches])
    assert len(seen) == len(set(seen)) == (992 if shuffled else 1000)
    sizes = sorted(len(numbers) for numbers, _ in batches)
    assert sizes == ([32] * 31 if shuffled else [1000 % 32] + [32] * 31)
    assert {width for _, width in batches} <= {15, 30, 61}
    for numbers, width in batches:  # to_batch fails for a width that is too small
        rows = [pairs[i] for i in numbers]
        batch = tm.to_batch(rows, width)
        for x in batch.values():
            assert (x == tm.EOS_ID).sum(axis=1).tolist() == [1] * len(numbers)
        longest = max(max(map(len, pair)) + 1 for pair in rows)
        assert width == next(width for width in (15, 30, 61) if width >= longest)
    widths = [width for _, width in batches]
    assert (widths == sorted(widths)) != shuffled


def test_little_of_the_batches_is_padding():
    lengths = np.random.default_rng(0).integers(1, 60, 2000)
    pairs = [([3] * n, [4] * n) for n in lengths]
    widths = [tm.width_of(pair, 64) for pair in pairs]
    batches = tm.batches_by_width(widths, 32, np.random.default_rng(0))
    cells = sum(len(numbers) * width for numbers, width in batches)
    real = sum(len(pairs[i][1]) + 1 for numbers, _ in batches for i in numbers)
    assert real / cells > 0.65  # it would be 0.5 in batches taken as they come


def test_training_batches_continue_where_they_were_left():
    pairs = random_pairs(100, longest=20)
    pairs = [
        ([3 + i] * len(source), target) for i, (source, target) in enumerate(pairs)
    ]

    def take(count, start=0, seed=0):
        batches = tm.training_batches(pairs, 21, 8, seed, start)
        return [next(batches) for _ in range(count)]

    whole = take(30)  # 12 batches an epoch, in which no pair comes twice
    for epoch in (whole[:12], whole[12:24]):
        assert len({row[0] for batch in epoch for row in batch["src"]}) == 96
    for start in (0, 1, 11, 12, 25):
        for expected, batch in zip(whole[start:], take(30 - start, start)):
            np.testing.assert_array_equal(batch["src"], expected["src"])
            np.testing.assert_array_equal(batch["tgt"], expected["tgt"])
    first, second = (
        [batch["tgt"].tobytes() for batch in epoch]
        for epoch in (whole[:12], whole[12:24])
    )
    assert first != second  # another order in each epoch
    assert take(1, seed=1)[0]["tgt"].tobytes() != first[0]


# ---- Checkpoints

CONFIG = dataclasses.replace(TINY, num_layers=1)
OPTIMIZER = optax.adam(1e-2)


@functools.cache
def trained_state():
    state = tm.create_train_state(CONFIG, jax.random.key(0), OPTIMIZER)
    return jax.jit(lambda state: state.apply_gradients(grads=state.params))(state)


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def write_checkpoint(path, content, version=2):
    """Writes what `save_checkpoint` would, but with any content and version."""
    content = flax.serialization.msgpack_serialize(content)
    digest = hashlib.sha256(content).hexdigest()
    first = f"transformer_model checkpoint {version}\n{digest}\n"
    path.write_bytes(first.encode() + content)


def saved_content(path):
    """What `write_checkpoint` takes."""
    return flax.serialization.msgpack_restore(path.read_bytes().split(b"\n", 2)[2])


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_checkpoint_keeps_everything(tmp_path):
    path, state = tmp_path / "model.msgpack", trained_state()
    config = dataclasses.replace(CONFIG, dtype="bfloat16", dropout_rate=0.3)
    notes = {"task": "mine", "seed": 7, "loss": np.inf, "words": ["ä", "b"]}
    notes |= {"nested": {"list": [["a", "b"], []]}, "flag": None}
    merges = np.array([[100, 101], [259, 100]], np.int32)
    tm.save_checkpoint(path, config, state, merges=merges, **notes)
    assert files_in(tmp_path) == ["model.msgpack"]
    checkpoint = tm.load_checkpoint(path)
    assert checkpoint.config == config and hash(checkpoint.config) == hash(config)
    np.testing.assert_array_equal(checkpoint.notes.pop("merges"), merges)
    assert checkpoint.notes == notes
    other = jax.tree.map(np.zeros_like, state)
    restored = tm.restore(path, other, checkpoint.state)
    assert int(restored.step) == 1
    assert_equal_trees(restored, state)


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, state = tmp_path / "model.msgpack", trained_state()
    tm.save_checkpoint(path, CONFIG, state, number=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tm.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tm.save_checkpoint(path, CONFIG, state, number=2)
    assert tm.load_checkpoint(path).notes == {"number": 1}
    assert files_in(tmp_path) == ["model.msgpack"]


def test_link_stays_a_link_and_the_mode_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "model", tmp_path / "link"
    link.symlink_to(path)
    tm.save_checkpoint(link, CONFIG, trained_state(), number=1)
    assert link.is_symlink() and not path.is_symlink()
    for number, mode in enumerate((0o640, 0o604)):
        path.chmod(mode)
        tm.save_checkpoint(link, CONFIG, trained_state(), number=number)
        assert path.stat().st_mode & 0o777 == mode and link.is_symlink()
        assert tm.load_checkpoint(path).notes == {"number": number}
    assert files_in(path.parent) == ["model"]


def test_only_old_leftovers_are_removed(tmp_path):
    path, number = tmp_path / "model[1].x", "0123456789abcdef"
    old, new = time.time() - 3700, time.time() - 3500
    times = {
        f"{path.name}.saving-{number}": old,  # the only leftover
        f"{path.name}.saving-{number[::-1]}": new,  # perhaps being written
        f"{path.name}.saving-my notes": old,
        f"{path.name}.tmp": old,
        f"model1.x.saving-{number}": old,
        f"other.saving-{number}": old,
    }
    for name, written in times.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (written, written))
    tm.save_checkpoint(path, CONFIG, trained_state())
    expected = sorted([*times, path.name])
    expected.remove(f"{path.name}.saving-{number}")
    assert files_in(tmp_path) == expected


def test_a_file_of_the_users_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(tm.secrets, "token_hex", lambda size: "0" * 2 * size)
    path, mine = tmp_path / "model", tmp_path / f"model.saving-{'0' * 16}"
    mine.write_bytes(b"my notes")
    with pytest.raises(FileExistsError):
        tm.save_checkpoint(path, CONFIG, trained_state())
    assert mine.read_bytes() == b"my notes" and files_in(tmp_path) == [mine.name]


def test_damaged_checkpoints_are_told_apart(tmp_path):
    path, other = tmp_path / "model.msgpack", tmp_path / "other.msgpack"
    tm.save_checkpoint(path, CONFIG, trained_state())
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1

    def edition(number):
        return good.replace(b"checkpoint 2\n", b"checkpoint %s\n" % number, 1)

    for content, message in [
        (b"", "not a checkpoint"),
        (b"a\tb\n", "not a checkpoint"),
        (bytes(range(256)) * 9, "not a checkpoint"),
        (good[:10], "not a checkpoint"),
        (good[:50], "damaged"),
        (good[:-1], "damaged"),
        (good + b"\0", "damaged"),
        (bytes(flipped), "damaged"),
        (edition(b"1"), "another edition"),
        (edition(b"3"), "another edition"),
    ]:
        other.write_bytes(content)
        with pytest.raises(tm.InputError, match=message) as error:
            tm.load_checkpoint(other)
        assert str(error.value).startswith(f"{other}: ")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        tm.load_checkpoint(tmp_path / "none")


def test_fields_that_are_missing_get_the_default(tmp_path):
    path = tmp_path / "model"
    config = dataclasses.replace(CONFIG, dropout_rate=0.3, dtype="bfloat16")
    tm.save_checkpoint(path, config, trained_state())
    content = saved_content(path)
    del content["config"]["dropout_rate"], content["config"]["dtype"]
    write_checkpoint(path, content)
    assert tm.load_checkpoint(path).config == CONFIG


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["config"].update(gelu=True), "gelu"),
        (lambda c: c["config"].update(d_model=32), "does not fit its configuration"),
        (lambda c: c["config"].update(num_layers=2), "does not fit its configuration"),
        (lambda c: c["config"].update(norm_first=True), "not fit its configuration"),
        (lambda c: c["config"].update(num_heads=3), "d_model must be a multiple"),
        (lambda c: c["config"].update(d_model="16"), "d_model must be of type int"),
        (lambda c: c["config"].clear(), "does not fit its configuration"),
        (lambda c: c.update(config=[1]), "not what a checkpoint holds"),
        (lambda c: c.update(state=7), "not what a checkpoint holds"),
        (lambda c: c.update(notes="x"), "not what a checkpoint holds"),
        (lambda c: c.pop("config"), "not what a checkpoint holds.*config"),
        (lambda c: c.pop("state"), "not what a checkpoint holds.*state"),
        (lambda c: c.pop("notes"), "not what a checkpoint holds.*notes"),
        (lambda c: c["state"].pop("params"), "does not fit its configuration"),
        (lambda c: c["state"].update(params=[1]), "does not fit its configuration"),
        (lambda c: c["state"]["params"].pop("output"), "not fit its configuration"),
        (lambda c: c["state"]["params"].update(more=1), "not fit its configuration"),
    ],
)
def test_content_of_another_kind_is_refused(tmp_path, change, message):
    path, state = tmp_path / "model", trained_state()
    params = flax.serialization.to_state_dict(jax.device_get(state.params))
    content = {"config": dataclasses.asdict(CONFIG), "state": {"params": params}}
    content["notes"] = {}
    write_checkpoint(path, content)
    assert tm.load_checkpoint(path).config == CONFIG
    change(content)
    write_checkpoint(path, content)
    with pytest.raises(tm.InputError, match=message) as error:
        tm.load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_restore_refuses_a_state_of_another_kind(tmp_path):
    path, state = tmp_path / "model", trained_state()
    tm.save_checkpoint(path, CONFIG, state)
    content = tm.load_checkpoint(path).state
    params, key = state.params, state.dropout_key
    more = {"norm": params["output"]}
    for template in (
        state.replace(params={**params, "output": params["output"][:, :8]}),
        state.replace(params={**params, **more}),
        state.replace(opt_state=optax.sgd(0.1).init(params)),
        state.replace(opt_state=optax.sgd(0.1, momentum=0.9).init(params)),
        state.replace(dropout_key=key.astype(np.int32)),
        state.replace(dropout_key=key[:1]),
    ):
        with pytest.raises(tm.InputError, match=f"^{path}: its content does not fit"):
            tm.restore(path, template, content)
    for other in ({}, {"params": content["params"]}, None, 7):
        with pytest.raises(tm.InputError, match=f"^{path}: its content does not fit"):
            tm.restore(path, state, other)
