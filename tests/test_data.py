"""Sections 10 and 11: pairs, tokens, batches, checkpoints."""

import dataclasses

import flax.serialization
import jax
import numpy as np
import optax
import pytest
from conftest import TINY, random_tokens

import transformer_model as tm

# ---- Pairs


def test_reversal_pairs_are_distinct_reversed_and_of_all_lengths():
    pairs = tm.reversal_pairs(500, 12, seed=0)
    assert len({source for source, _ in pairs}) == 500
    assert all(target == source[::-1] for source, target in pairs)
    assert {len(source) for source, _ in pairs} == set(range(4, 13))
    assert pairs == tm.reversal_pairs(500, 12, seed=0) != tm.reversal_pairs(500, 12, 1)


def test_read_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("ein Haus\ta house\r\nähm\t\u2028 um\n".encode())
    expected = [(b"ein Haus", b"a house"), ("ähm".encode(), "\u2028 um".encode())]
    assert tm.read_pairs(path) == expected
    path.write_bytes(b"a\tb")  # no newline at the end
    assert tm.read_pairs(path) == [(b"a", b"b")]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"a\tb\nc d\n", "line 2: need exactly one tab, found 0"),
        (b"a\tb\tc\n", "line 1: need exactly one tab, found 2"),
        (b"a\tb\n\n", "line 2: need exactly one tab, found 0"),
        (b"a\tb\n\tc\n", "line 2: empty source"),
        (b"a\tb\nc\t\r\n", "line 2: empty target"),
        (b"a\tb\nc\t\xff\n", "line 2: not UTF-8 at byte 3"),
    ],
)
def test_read_pairs_names_file_line_and_mistake(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tm.InputError) as error:
        tm.read_pairs(path)
    separator = ", " if message.startswith("line") else ": "
    assert str(error.value) == f"{path}{separator}{message}" or content is None
    assert str(path) in str(error.value) and message in str(error.value)


def test_held_out_sources_are_not_trained_on():
    pairs = [(b"%d" % (i % 40), b"%d" % i) for i in range(100)]
    train, valid = tm.hold_out(pairs, 10, seed=0)
    assert sorted(train + valid) == sorted(pairs)
    assert len({source for source, _ in valid}) == 10
    assert not {source for source, _ in valid} & {source for source, _ in train}
    assert (train, valid) == tm.hold_out(pairs, 10, seed=0)
    assert valid != tm.hold_out(pairs, 10, seed=1)[1]


def test_tokens_and_text():
    tokens = tm.to_tokens([b"ab", "é".encode(), b""], 5, first=[tm.BOS_ID])
    expected = [[1, 100, 101, 2, 0], [1, 198, 172, 2, 0], [1, 2, 0, 0, 0]]
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.dtype == np.int32
    assert tm.to_text([100, 101, 2, 102]) == "ab"
    assert tm.to_text([198, 172]) == "é"
    assert tm.to_text([1, 198, 0, 100, 13]) == "\ufffda "  # one line, whatever comes
    every_byte = bytes(range(256))
    assert tm.to_tokens([every_byte], 257).max() == tm.VOCAB_SIZE - 1


def random_pairs(count, longest=60, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, (count, 2))
    return [(b"s" * source, b"t" * target) for source, target in lengths]


def test_batches_hold_every_pair_once_in_few_shapes():
    pairs = random_pairs(1000)
    for rng in (None, np.random.default_rng(0)):
        batches = tm.batches_by_length(pairs, 61, 32, rng)
        seen = np.concatenate([indices for indices, _ in batches])
        assert len(seen) == len(set(seen))
        sizes = sorted(len(indices) for indices, _ in batches)
        if rng is None:
            assert len(seen) == 1000 and sizes == [1000 % 32] + [32] * 31
        else:
            assert sizes == [32] * 31
        shapes = {tuple(widths) for _, widths in batches}
        assert all(set(shape) <= {16, 24, 32, 48, 61} for shape in shapes)
        for indices, widths in batches:  # to_batch fails for a width that is too small
            batch = tm.to_batch([pairs[i] for i in indices], widths)
            assert (batch["src"] == tm.EOS_ID).sum(axis=1).tolist() == [1] * len(
                indices
            )
            assert (batch["tgt"] == tm.EOS_ID).sum(axis=1).tolist() == [1] * len(
                indices
            )
            assert batch["src"].shape == (len(indices), widths[0])
            assert batch["tgt"].shape == (len(indices), widths[1] + 1)


def test_little_of_the_batches_is_padding():
    pairs = [
        (b"s" * n, b"t" * n) for n in np.random.default_rng(0).integers(1, 60, 2000)
    ]
    batches = tm.batches_by_length(pairs, 61, 32, np.random.default_rng(0))
    cells = sum(len(indices) * widths[1] for indices, widths in batches)
    real = sum(len(pairs[i][1]) + 1 for indices, _ in batches for i in indices)
    assert real / cells > 0.7  # it would be 0.5 in batches taken as they come


def test_training_batches_continue_where_they_were_left():
    pairs = random_pairs(100, longest=20)

    def take(count, start=0, seed=0):
        batches = tm.training_batches(pairs, 21, 8, seed, start)
        return [next(batches) for _ in range(count)]

    whole = take(30)  # 12 batches an epoch
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


def trained_state(seed=0):
    optimizer = optax.adam(1e-2)
    config = dataclasses.replace(TINY, num_layers=1)
    state = tm.create_train_state(config, jax.random.key(seed), optimizer)
    tokens = random_tokens(4, 6)
    state, _ = tm.train_step(state, {"src": tokens, "tgt": tokens})
    return config, optimizer, state


def test_checkpoint_keeps_everything(tmp_path):
    path = tmp_path / "model.msgpack"
    config, optimizer, state = trained_state()
    config = dataclasses.replace(config, dtype=tm.jnp.bfloat16)
    tm.save_checkpoint(path, config, state, task="mine", seed=7)
    assert [p.name for p in tmp_path.iterdir()] == ["model.msgpack"]
    checkpoint = tm.load_checkpoint(path)
    assert checkpoint.config == config and hash(checkpoint.config) == hash(config)
    assert checkpoint.notes == {"task": "mine", "seed": 7}
    other = tm.create_train_state(TINY, jax.random.key(1), optimizer)
    other = other.replace(params=None, opt_state=optimizer.init(state.params))
    other = other.replace(params=state.params)
    restored = flax.serialization.from_state_dict(other, checkpoint.state)
    assert int(restored.step) == 1
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored)):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.msgpack"
    config, _, state = trained_state()
    tm.save_checkpoint(path, config, state, number=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tm.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tm.save_checkpoint(path, config, state, number=2)
    assert tm.load_checkpoint(path).notes == {"number": 1}


def test_damaged_checkpoints_are_told_apart(tmp_path):
    path, other = tmp_path / "model.msgpack", tmp_path / "other.msgpack"
    config, _, state = trained_state()
    tm.save_checkpoint(path, config, state)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    later = good.replace(b"checkpoint 1\n", b"checkpoint 2\n", 1)
    for content, message in [
        (b"", "not a checkpoint"),
        (b"a\tb\n", "not a checkpoint"),
        (bytes(range(256)) * 9, "not a checkpoint"),
        (good[:10], "not a checkpoint"),
        (good[:50], "damaged"),
        (good[:-1], "damaged"),
        (good + b"\0", "damaged"),
        (bytes(flipped), "damaged"),
        (later, "later program"),
    ]:
        other.write_bytes(content)
        with pytest.raises(tm.InputError, match=message) as error:
            tm.load_checkpoint(other)
        assert str(error.value).startswith(f"{other}: ")
    with pytest.raises(tm.InputError, match="No such file"):
        tm.load_checkpoint(tmp_path / "none")
    with pytest.raises(tm.InputError, match="Is a directory"):
        tm.load_checkpoint(tmp_path)
