"""Sections 10 to 12: byte-pair encoding, against a slow one that recounts and against
another library's; sentence pairs and batches; checkpoints.
"""

import collections
import dataclasses
import functools
import itertools
import json
import pathlib

import flax.serialization
import jax
import numpy as np
import optax
import pytest
from conftest import TINY

import transformer_model as tm

CORPUS = ["low lower lowest", "slow slower", "aaaa aaaaa", "the mill, the miller"]
TOKENIZER = tm.Tokenizer.learn(CORPUS, 300)


# ---- A slow tokenizer ----------------------------------------------------------------


def slow_words(text):
    """Cuts the text into words, each with the space before it, and further spaces."""
    first, *others = text.split(" ")
    return [first] * (first != "") + [f" {word}" for word in others]


def spell(word):
    return [byte + 3 for byte in word.encode()]


def replaced(tokens, pair, new):
    """Replaces the pair wherever it stands, from left to right."""
    result, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            result.append(new)
            i += 2
        else:
            result.append(tokens[i])
            i += 1
    return result


def count_pairs(spelled):
    """How often each two tokens follow one another within a word."""
    return collections.Counter(
        pair for tokens in spelled for pair in itertools.pairwise(tokens)
    )


def slow_learn(texts, vocab_size):
    """Recounts all pairs for every merge, and of the most frequent takes the smallest."""
    spelled = [spell(word) for text in texts for word in slow_words(text)]
    merges = []
    while 259 + len(merges) < vocab_size:
        counts = count_pairs(spelled)
        most = max(counts.values(), default=0)
        if most < 2:
            break
        pair = min(pair for pair, count in counts.items() if count == most)
        spelled = [replaced(tokens, pair, 259 + len(merges)) for tokens in spelled]
        merges.append(pair)
    return merges


def slow_encode(merges, text):
    """Applies one merge after another to all of the text's words."""
    spelled = [spell(word) for word in slow_words(text)]
    for new, pair in enumerate(merges, 259):
        spelled = [replaced(tokens, pair, new) for tokens in spelled]
    return [token for tokens in spelled for token in tokens]


def test_words_keep_the_space_before_them():
    for text, words in [
        ("", []),
        ("a", ["a"]),
        ("ab cd\n e", ["ab", " cd\n", " e"]),
        (" a  b ", [" a", " ", " b", " "]),
        ("   ab", [" ", " ", " ab"]),
    ]:
        assert slow_words(text) == words == tm.WORD.findall(text)


def random_texts(seed, alphabet, number, longest):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, number)
    return ["".join(rng.choice(list(alphabet), length)) for length in lengths]


@pytest.mark.parametrize("alphabet", ["a", "aab", "ab ", "aabcde  ", "aä水🙂 \n"])
@pytest.mark.parametrize("seed", range(3))
def test_learning_and_encoding_equal_the_slow_ones(seed, alphabet):
    """Few letters make many runs like "aaaa", and many equally frequent pairs."""
    texts = random_texts(seed, alphabet, number=30, longest=25)
    tokenizer = tm.Tokenizer.learn(texts, 330)
    assert tokenizer.merges == slow_learn(texts, 330) != []
    for text in texts + random_texts(seed + 9, alphabet + "zab ", 30, 25):
        assert tokenizer.encode(text) == slow_encode(tokenizer.merges, text)


def test_encoding_with_merges_in_any_order_equals_the_slow_one():
    rng, merges = np.random.default_rng(0), []
    for token in range(259, 300):
        known = [100, 101, *range(259, token)]
        pair = tuple(rng.choice(known, 2).tolist())
        merges.append(pair if pair not in merges else (100, token - 1))
    tokenizer = tm.Tokenizer(merges)
    for text in random_texts(1, "ab", number=200, longest=30):
        assert tokenizer.encode(text) == slow_encode(merges, text)


# ---- Hugging Face's tokenizers -------------------------------------------------------


@pytest.mark.parametrize("size", ["300", "350", "500"])
def test_learnt_like_hugging_faces_tokenizers(size):
    """Theirs differ only in which of several equally frequent pairs they merge first."""
    path = pathlib.Path(__file__).with_name("golden_tokens.json")
    golden = json.loads(path.read_text(encoding="utf-8"))
    texts, theirs = golden["texts"], golden["learnt"][size]
    ours = tm.Tokenizer.learn(texts, int(size))
    assert ours.merges == slow_learn(texts, int(size))
    assert len(ours.merges) == len(theirs["merges"])  # 500 are more than there can be
    num_tokens = sum(len(ours.encode(text)) for text in texts)
    assert num_tokens * 0.99 <= theirs["num_tokens"] <= num_tokens * 1.01

    token_of = dict(zip(tm.Tokenizer().bytes_of.values(), range(259)))
    spelled = [spell(word) for text in texts for word in slow_words(text)]
    for new, merge in enumerate(theirs["merges"], 259):
        left, right = (bytes.fromhex(part) for part in merge.split())
        pair, counts = (token_of[left], token_of[right]), count_pairs(spelled)
        assert counts[pair] == max(counts.values()), (new, left, right)
        spelled = [replaced(tokens, pair, new) for tokens in spelled]
        token_of[left + right] = new
    assert sum(map(len, spelled)) == theirs["num_tokens"]


# ---- Any text ------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [tm.Tokenizer(), TOKENIZER], ids=["bytes", "bpe"])
def test_any_text_comes_back(tokenizer):
    texts = [
        "",
        " ",
        "  ",
        " a",
        "a ",
        "\n",
        "\r\n",
        "\t \u2028\u0085",
        "\0",
        "\ufeffa",
    ]
    texts += [
        "🙂👩‍👩‍👧 flags 🇫🇷",
        "e\u0301 é",
        "مرحبا שלום",
        "low  lowest slowest aaaaaaa",
    ]
    # Code points of all planes; those from D800 to DFFF are no characters.
    points = [*range(0, 0xD800, 37), *range(0xE000, 0x110000, 997), 0x10FFFF]
    texts += ["".join(map(chr, points)), " ".join(map(chr, points))]
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(3 <= token < tokenizer.vocab_size for token in tokens)


def test_bytes_alone():
    tokenizer = tm.Tokenizer()
    assert tokenizer.merges == [] and tokenizer.vocab_size == 259
    assert tm.Tokenizer.learn(CORPUS, 259).merges == []
    assert tokenizer.encode("aé ") == [100, 198, 172, 35]
    assert tokenizer.decode([258]) == "\ufffd"


def test_decoding_ends_at_eos_and_skips_what_is_no_text():
    decode = TOKENIZER.decode
    assert decode([100, 101, tm.EOS_ID, 102]) == "ab"
    assert decode([tm.BOS_ID, 100, tm.PAD_ID, 13]) == "a\n"
    assert decode([198, 100, 172]) == "\ufffda\ufffd"
    assert decode(np.array([198, 172, tm.EOS_ID, tm.PAD_ID])) == "é"
    assert decode([]) == decode([tm.EOS_ID]) == ""


# ---- What is learnt ------------------------------------------------------------------


def test_merges_do_not_cross_words():
    tokenizer = tm.Tokenizer.learn(["a b c d"] * 50, 300)
    words = [tokenizer.bytes_of[token] for token in range(259, tokenizer.vocab_size)]
    assert words == [b" b", b" c", b" d"]
    for token in range(259, TOKENIZER.vocab_size):
        assert b" " not in TOKENIZER.bytes_of[token][1:]
    # And in the text to encode, a further space parts what would be merged.
    assert len(tokenizer.encode(" b")) == 1 and len(tokenizer.encode("  b")) == 2


def test_of_equally_frequent_pairs_the_smaller_comes_first():
    merges = tm.Tokenizer.learn(["xy", "ab", "ba", "xy", "ab", "ba"], 261).merges
    assert merges == [(100, 101), (101, 100)]  # "ab", "ba", and not "xy"


def test_merges_follow_from_the_texts_and_the_tokens_from_the_merges():
    assert tm.Tokenizer.learn(CORPUS, 300).merges == TOKENIZER.merges
    assert tm.Tokenizer.learn(CORPUS[::-1], 300).merges == TOKENIZER.merges
    assert tm.Tokenizer.learn(iter(CORPUS), 300).merges == TOKENIZER.merges
    again = tm.Tokenizer(np.array(TOKENIZER.merges, np.int32))
    assert again.merges == TOKENIZER.merges
    assert again.vocab_size == TOKENIZER.vocab_size == 259 + len(TOKENIZER.merges)
    for text in CORPUS:
        tokens = TOKENIZER.encode(text)
        assert again.encode(text) == tokens == TOKENIZER.encode(text)
        assert len(tokens) < len(text.encode())
        assert {type(token) for token in tokens} == {int}
    fewer = tm.Tokenizer.learn(CORPUS, 265).merges
    assert fewer == TOKENIZER.merges[: len(fewer)]


def test_learning_stops_when_no_pair_occurs_twice():
    for texts, merges in [
        ([], []),
        ([""], []),
        (["abcdef"], []),
        (["abc", "bcd"], [(101, 102)]),
        (["aaaa"], [(100, 100)]),
        (["aaaaaa"], [(100, 100), (259, 259)]),
    ]:
        assert tm.Tokenizer.learn(texts, 10**6).merges == merges, texts


def test_vocabularies_smaller_than_the_bytes_are_refused():
    for vocab_size in (258, 3, 0, -1):
        with pytest.raises(tm.InputError, match=f"at least 259.* {vocab_size}"):
            tm.Tokenizer.learn(CORPUS, vocab_size)


# ---- Pairs ---------------------------------------------------------------------------


def test_demo_pairs_are_distinct_reversed_and_of_all_lengths():
    pairs = tm.demo_pairs(500, seed=0)
    assert len({source for source, _ in pairs}) == len(pairs) == 500
    assert all(target == source[::-1] for source, target in pairs)
    assert {len(source) for source, _ in pairs} == set(range(4, 13))
    assert set("".join(source for source, _ in pairs)) == set(map(chr, range(97, 123)))
    assert pairs == tm.demo_pairs(500, seed=0) != tm.demo_pairs(500, seed=1)


def test_read_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("ein Haus\ta house\r\nähm\t\u2028 um\n".encode())
    expected = [("ein Haus", "a house"), ("ähm", "\u2028 um")]
    assert tm.read_pairs(path) == tm.read_pairs(str(path)) == expected
    path.write_bytes(b"a\tb")  # The last line may lack its end.
    assert tm.read_pairs(path) == [("a", "b")]
    path.write_bytes("\ufeffa\tb\nc\td\n".encode())  # It begins with a byte order mark.
    assert tm.read_pairs(path) == [("a", "b"), ("c", "d")]
    path.write_bytes(b"")
    assert tm.read_pairs(path) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\tb\nc d\n", "line 2: not source<TAB>target: 'c d'"),
        (b"a\tb\tc\n", "line 1: not source<TAB>target: 'a\\tb\\tc'"),
        (b"a\tb\n\n", "line 2: not source<TAB>target: ''"),
        (b"a\tb\n\tc\n", "line 2: not source<TAB>target: '\\tc'"),
        (b"a\tb\nc\t\r\n", "line 2: not source<TAB>target: 'c\\t'"),
        (b"a" * 50, f"line 1: not source<TAB>target: '{'a' * 40}'"),
        (b"a\tb\nc\t\xff\n", "line 2: not UTF-8 at byte 3"),
        # The byte order mark counts: it is three of the line's bytes.
        (b"\xef\xbb\xbfa\t\xe4\n", "line 1: not UTF-8 at byte 6"),
    ],
)
def test_read_pairs_names_file_line_and_mistake(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(tm.InputError) as error:
        tm.read_pairs(path)
    assert str(error.value) == f"{path}, {message}"


@pytest.mark.parametrize(
    "num_sources, limit, expected", [(400, 10, 10), (400, 99, 40), (9, 10, 1)]
)
def test_held_out_are_one_pair_each_of_a_tenth_of_the_sources(
    num_sources, limit, expected
):
    """Each source comes several times. A tenth of the pairs would be more."""
    pairs = [(str(i % num_sources), str(i)) for i in range(1000)]
    valid = tm.hold_out(pairs, limit, seed=0)
    assert len(valid) == len(dict(valid)) == expected and set(valid) <= set(pairs)
    assert valid == tm.hold_out(pairs, limit, seed=0)
    assert len({tuple(tm.hold_out(pairs, limit, seed)) for seed in range(9)}) > 1


# ---- Batches -------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "max_width, widths",
    [(128, [8, 16, 32, 64, 128]), (61, [15, 30, 61]), (13, [13]), (8, [8]), (5, [5])],
)
def test_width_is_the_smallest_with_room_for_both_and_eos(max_width, widths):
    for source, target in itertools.product(range(max_width), repeat=2):
        expected = next(w for w in widths if w > max(source, target))
        assert tm.width_of(([3] * source, [4] * target), max_width) == expected


def random_pairs(count, longest=60, seed=0):
    """Pairs of lists of tokens; the tokens of a source are all its number, from 3 on."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, (count, 2))
    return [([3 + i] * s, [4] * t) for i, (s, t) in enumerate(lengths)]


def test_batches_hold_every_row_once_and_are_no_wider_than_need_be():
    widths = [tm.width_of(pair, 61) for pair in random_pairs(1000)]
    batches = list(tm.batches_by_width(widths, 32))
    assert sorted(i for rows, _ in batches for i in rows) == [*range(1000)]
    assert [len(rows) for rows, _ in batches] == [32] * 31 + [8]
    in_order = [width for _, width in batches]
    assert in_order == sorted(in_order) and {*in_order} == {15, 30, 61}
    for rows, width in batches:
        assert width == max(widths[i] for i in rows)
    assert len(next(tm.batches_by_width(widths))[0]) == 64
    assert list(tm.batches_by_width([])) == []


def epochs(pairs, max_width, batch_size, count, seed=0):
    """The first epochs of training, as lists of batches."""
    batches = tm.training_batches(pairs, max_width, batch_size, seed)
    length = len(pairs) // batch_size
    return [[next(batches) for _ in range(length)] for _ in range(count)]


def numbers_of(batch):
    """Which of `random_pairs` are in a batch."""
    return (batch["src"][:, 0] - 3).tolist()


def test_epoch_has_every_pair_once_in_full_batches_of_like_width():
    pairs = random_pairs(1000)
    widths = [tm.width_of(pair, 61) for pair in pairs]
    for epoch in epochs(pairs, 61, 32, count=2):
        seen = [i for batch in epoch for i in numbers_of(batch)]
        assert len(seen) == len(set(seen)) == 31 * 32
        mixed, in_order = 0, []
        for batch in epoch:
            expected = {widths[i] for i in numbers_of(batch)}
            assert batch["src"].shape == (32, max(expected))
            assert batch["tgt"].shape == (32, max(expected) + 1)
            mixed += len(expected) > 1
            in_order.append(max(expected))
        # Rows of different widths share at most one batch at each of the two borders.
        assert mixed <= 2 and in_order != sorted(in_order)


def test_pairs_left_out_are_not_always_the_same():
    """Those of the last width would be, if rows were cut into batches and then drawn."""
    pairs = [([3 + i] * (3 if i < 30 else 9), [4]) for i in range(37)]
    left_out = set()
    for epoch in epochs(pairs, 16, 4, count=20):
        (number,) = {*range(37)} - {i for batch in epoch for i in numbers_of(batch)}
        left_out.add(number)
    assert len(left_out) > 10 and min(left_out) < 30 <= max(left_out)


def test_pairs_of_one_width_are_shuffled_too():
    """Otherwise the same pairs would meet in every epoch."""
    pairs = [([3 + i], [4]) for i in range(64)]
    first, second = epochs(pairs, 8, 32, count=2)
    assert {*numbers_of(first[0])} not in [{*numbers_of(batch)} for batch in second]


def test_training_batches_follow_from_their_arguments():
    pairs = random_pairs(100, longest=20)

    def texts(seed):
        first, second = epochs(pairs, 21, 8, count=2, seed=seed)
        return [[b["src"].tobytes() for b in epoch] for epoch in (first, second)]

    assert texts(0) == texts(0)
    assert texts(0)[0] != texts(0)[1]  # Each epoch has an order of its own.
    assert texts(0)[0] != texts(1)[0]


def test_training_batches_hold_whole_pairs():
    """A source with the target of another pair would train just as well."""
    words = [source for source, _ in tm.demo_pairs(50, seed=0)]
    encode, decode = tm.Tokenizer().encode, tm.Tokenizer().decode
    pairs = [(encode(word), encode(word[::-1])) for word in words]
    batches = tm.training_batches(pairs, 13, 50, seed=0)
    batch = next(batches)
    sources, targets = (list(map(decode, batch[name])) for name in ("src", "tgt"))
    assert sorted(sources) == sorted(words)
    assert targets == [word[::-1] for word in sources]


# ---- Checkpoints ---------------------------------------------------------------------

CONFIG = dataclasses.replace(TINY, num_layers=1, dropout_rate=0.3, dtype="bfloat16")


@functools.cache
def trained_state():
    """A state none of whose parts equals another, or what it was at the start."""
    state = tm.create_train_state(CONFIG, jax.random.key(0), optax.adam(1e-2))
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params))
    state = step(step(state))
    return state.replace(average=jax.tree.map(lambda x: 1 + np.array(x), state.params))


def small_save(path, number=0):
    """Saves a file of less than a kilobyte."""
    params = {"params": np.arange(9, dtype=np.float32) + number}
    tm.save_checkpoint(path, CONFIG, TOKENIZER, params, number=number)


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_checkpoint_keeps_everything(tmp_path):
    path, state = tmp_path / "model", trained_state()
    notes = {"task": "mine", "seed": 7, "loss": np.inf, "words": ["ä", "b"]}
    notes |= {"nested": {"list": [["a", "b"], []]}, "flag": None, "digest": b"\0\xff"}
    tm.save_checkpoint(path, CONFIG, TOKENIZER, state, **notes)
    assert files_in(tmp_path) == ["model"]
    config, tokenizer, saved, kept = tm.load_checkpoint(str(path))
    assert config == CONFIG and hash(config) == hash(CONFIG) and kept == notes
    assert tokenizer.merges == TOKENIZER.merges
    assert tokenizer.encode("slowest") == TOKENIZER.encode("slowest")
    other = jax.tree.map(np.zeros_like, state)
    restored = flax.serialization.from_state_dict(other, saved)
    assert int(restored.step) == 2
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_equal_states_make_equal_files(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tm.save_checkpoint(first, CONFIG, TOKENIZER, trained_state(), b=1, a=2)
    again = flax.serialization.from_state_dict(
        trained_state(), tm.load_checkpoint(first).state
    )
    tm.save_checkpoint(second, CONFIG, TOKENIZER, again, b=1, a=2)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, function):
    """A file that is written where the old one was is lost here, and so is one that gets
    its name before the disk has it.
    """
    path, real = tmp_path / "model", getattr(tm.os, function)
    small_save(path, 1)
    before = path.read_bytes()

    def full(*_):
        assert path.read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tm.os, function, full)
    with pytest.raises(OSError, match="No space left"):
        small_save(path, 2)
    assert path.read_bytes() == before
    assert files_in(tmp_path) == ["model", "model.tmp"]
    # The next save replaces what was left there, even if that was longer.
    (tmp_path / "model.tmp").write_bytes(b"x" * 10**5)
    monkeypatch.setattr(tm.os, function, real)
    small_save(path, 3)
    assert tm.load_checkpoint(path).notes == {"number": 3}
    assert files_in(tmp_path) == ["model"]


def assert_not_loaded(path, message):
    with pytest.raises(tm.InputError, match=message) as error:
        tm.load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_checkpoint_cut_anywhere_or_with_any_bit_flipped_is_refused(tmp_path):
    path = tmp_path / "model"
    small_save(path)
    good = path.read_bytes()
    assert len(good) < 2000
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert_not_loaded(path, "not a checkpoint|damaged or cut short")
    path.write_bytes(good + b"\0")
    assert_not_loaded(path, "damaged")
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        in_first_line = position < len(tm.FORMAT)
        assert_not_loaded(path, "not a checkpoint" if in_first_line else "damaged")
    path.write_bytes(good)
    assert tm.load_checkpoint(path).notes == {"number": 0}


def test_other_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "other"
    for content in (b"", b"a\tb\n", bytes(range(256)) * 9):
        path.write_bytes(content)
        assert_not_loaded(path, "not a checkpoint")
    with pytest.raises(FileNotFoundError):
        tm.load_checkpoint(tmp_path / "none")
