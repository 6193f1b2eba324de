"""Sections 10 to 13: the demo's words and picture; byte-pair encoding, against a slow
one that recounts and against another library's; sentence pairs and batches; checkpoints.
"""

import collections
import dataclasses
import functools
import inspect
import itertools
import json
import os
import pathlib

import flax.serialization
import jax
import numpy as np
import pytest
from conftest import TINY

import transformer_model as tm

CORPUS = ["low lower lowest", "slow slower", "aaaa aaaaa", "the mill, the miller"]
TOKENIZER = tm.Tokenizer.learn(CORPUS, 300)


# ---- The demo ------------------------------------------------------------------------


def test_demo_can_be_read():
    assert len(inspect.getsource(tm.demo).splitlines()) <= 45


def test_random_words_and_letters():
    words = tm.random_words(20_000, seed=0)  # so many that some are drawn twice
    assert len(set(words)) == len(words) == 20_000
    assert {len(word) for word in words} == {*range(4, 13)}
    assert {token for word in words for token in word} == {*range(3, 29)}
    assert words == tm.random_words(20_000, seed=0) != tm.random_words(20_000, seed=1)
    assert tm.to_letters([tm.BOS_ID, 3, 4, 28, tm.EOS_ID, tm.PAD_ID]) == "abz"
    assert tm.to_letters(np.array([13, 2, 0])) == "k" and tm.to_letters([]) == ""


def test_picture_by_hand():
    """Of the ten shades, 0.1 is the second, 0.29 the third, 0.95 and 1 the last."""
    weights = np.array([[0.1, 0.29, 0.0], [0.95, 1.0, 0.5]])
    picture = tm.draw_attention(weights, ["a", "b", "EOS"], ["xy", "EOS"])
    title, _, table = picture.partition("\n\n")
    assert "source across,\noutput down" in title and " .:-=+*#%@" in title
    rows = "      a   b EOS", " xy ... :::", "EOS @@@ @@@ +++"
    assert table.split("\n") == [*rows]


# ---- The tokenizer --------------------------------------------------------------------


def slow_words(text):
    """Cuts the text into words, each with the space before it, and further spaces; and
    what has no spaces, after 64 characters.
    """
    words = []
    for i, part in enumerate(text.split(" ")):
        start = " " if i else ""
        if start + part:
            words.append(start + part[:64])
        words += [part[j : j + 64] for j in range(64, len(part), 64)]
    return words


def spell(word):
    return [byte + 3 for byte in word.encode()]


def replaced(tokens, pair, new):
    """Replaces the pair wherever it stands, from left to right."""
    result = []
    for token in tokens:
        if result and (result[-1], token) == pair:
            result[-1] = new
        else:
            result.append(token)
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
        ("x" * 64 + "yz", ["x" * 64, "yz"]),
        ("a " + "x" * 128 + " b", ["a", " " + "x" * 64, "x" * 64, " b"]),
        ("\n" * 65, ["\n" * 64, "\n"]),
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
    texts += random_texts(seed, alphabet, number=3, longest=200)
    tokenizer = tm.Tokenizer.learn(texts, 330)
    assert tokenizer.merges == slow_learn(texts, 330) != []
    for text in texts + random_texts(seed + 9, alphabet + "zab ", 30, 25):
        assert tokenizer.encode(text) == slow_encode(tokenizer.merges, text)


def test_line_without_spaces_is_cut():
    """A word of 300,000 characters would be met only once, and kept for ever."""
    line = "".join(np.random.default_rng(0).choice([*"abcdef水"], 300_000))
    tokenizer = tm.Tokenizer.learn([line], 263)
    assert len(tokenizer.merges) == 4
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert max(map(len, tm.WORD.findall(line))) == 64


def test_merged_words_are_kept_but_not_for_ever_nor_for_others():
    other = tm.Tokenizer(TOKENIZER.merges[:1])
    assert other.encode("low") != TOKENIZER.encode("low")
    assert other.encode("low") == other.encode("low")
    cache = other.merge.cache_info()
    assert (cache.hits, cache.misses) == (2, 1) and cache.maxsize is not None


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
    texts += ["🙂👩‍👩‍👧 flags 🇫🇷", "e\u0301 é", "مرحبا שלום", "low  lowest slowest"]
    # Code points of all planes; those from D800 to DFFF are no characters.
    points = [*range(0, 0xD800, 37), *range(0xE000, 0x110000, 997), 0x10FFFF]
    texts += ["".join(map(chr, points)), " ".join(map(chr, points))]
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(3 <= token < tokenizer.vocab_size for token in tokens)


def test_decoding_ends_at_eos_and_skips_what_is_no_text():
    decode = TOKENIZER.decode
    assert decode([100, 101, tm.EOS_ID, 102]) == "ab"
    assert decode([tm.BOS_ID, 100, tm.PAD_ID, 13]) == "a\n"
    assert decode([198, 100, 172]) == "\ufffda\ufffd"
    assert decode(np.array([198, 172, tm.EOS_ID, tm.PAD_ID])) == "é"
    assert decode([]) == decode([tm.EOS_ID]) == ""


def test_merges_follow_from_the_texts_and_the_tokens_from_the_merges():
    assert tm.Tokenizer.learn(CORPUS[::-1], 300).merges == TOKENIZER.merges
    assert tm.Tokenizer.learn(iter(CORPUS), 300).merges == TOKENIZER.merges
    again = tm.Tokenizer(np.array(TOKENIZER.merges, np.int32))
    assert again.merges == TOKENIZER.merges
    assert again.vocab_size == TOKENIZER.vocab_size == 259 + len(TOKENIZER.merges)
    for text in CORPUS:
        tokens = TOKENIZER.encode(text)
        assert again.encode(text) == tokens
        assert len(tokens) < len(text.encode())
        assert {type(token) for token in tokens} == {int}


def test_learning_stops_when_no_pair_occurs_twice():
    for texts, merges in [
        ([], []),
        ([""], []),
        (["abcdef"], []),
        (["abc", "bcd"], [(101, 102)]),
        (["aaaaaa"], [(100, 100), (259, 259)]),
    ]:
        assert tm.Tokenizer.learn(texts, 10**6).merges == merges, texts


def test_bytes_alone_are_the_smallest_vocabulary():
    assert tm.Tokenizer().vocab_size == 259
    assert tm.Tokenizer.learn(CORPUS, 259).encode("aé ") == [100, 198, 172, 35]
    for vocab_size in (258, 0, -1):
        with pytest.raises(tm.InputError, match=f"at least 259.* {vocab_size}"):
            tm.Tokenizer.learn(CORPUS, vocab_size)


# ---- Pairs ---------------------------------------------------------------------------


def test_read_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    for content, pairs in [
        (
            "ein Haus\ta house\r\nb\t\u2028\n",
            [("ein Haus", "a house"), ("b", "\u2028")],
        ),
        ("ähm\tb", [("ähm", "b")]),  # The last line may lack its end.
        ("\ufeffa\tb\nc\td\n", [("a", "b"), ("c", "d")]),  # a byte order mark
        ("", []),
    ]:
        path.write_bytes(content.encode())
        assert tm.read_pairs(path) == tm.read_pairs(str(path)) == pairs


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\tb\nc d\n", "line 2: not source<TAB>target: 'c d'"),
        (b"a\tb\tc\n", "line 1: not source<TAB>target (try `cut -f1,2`): 'a\\tb\\tc'"),
        (b"a\t\tc\n", "line 1: not source<TAB>target (try `cut -f1,2`): 'a\\t\\tc'"),
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
    "num_sources, expected", [(400, 40), (5009, 500), (6000, 500), (9, 1), (1, 1)]
)
def test_held_out_are_one_pair_each_of_a_tenth_of_the_sources(num_sources, expected):
    """Each source comes three times or four. A tenth of the pairs would be more."""
    pairs = [(str(i % num_sources), str(i)) for i in range(3 * num_sources + 5)]
    known, unseen = tm.hold_out(pairs)
    held = dict(unseen)
    assert len(unseen) == len(held) == expected
    assert unseen == [(source, dict(pairs)[source]) for source in held]
    assert known == [pair for pair in pairs if pair[0] not in held]
    assert (known, unseen) == tm.hold_out(pairs)
    if num_sources > 9:  # They are drawn at random.
        in_order = itertools.pairwise(sorted(map(int, held)))
        assert len({following - number for number, following in in_order}) > 2


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
        batches = epochs(pairs, 21, 8, count=2, seed=seed)
        return [[b["src"].tobytes() for b in epoch] for epoch in batches]

    first, second = texts(0)
    assert texts(0) == [first, second] and first != texts(1)[0]
    assert sorted(first) != sorted(second)  # Each epoch has an order of its own.


def test_training_batches_hold_whole_pairs():
    """A source with the target of another pair would train just as well."""
    words = tm.random_words(50, seed=0)
    pairs = [(word, word[::-1]) for word in words]
    for batch_size in (50, 10**6):  # A batch has no more pairs than there are.
        batch = next(tm.training_batches(pairs, 13, batch_size, seed=0))
        sources, targets = ([*map(tm.to_letters, batch[x])] for x in ("src", "tgt"))
        assert sorted(sources) == sorted(map(tm.to_letters, words))
        assert targets == [word[::-1] for word in sources]


# ---- Checkpoints ---------------------------------------------------------------------

CONFIG = dataclasses.replace(TINY, num_layers=1, d_model=2, num_heads=1, d_ff=1)


@functools.cache
def checkpoint():
    """One of whose arrays none is like another."""
    create = functools.partial(tm.create_train_state, CONFIG)
    shapes = jax.eval_shape(create, jax.random.key(0))
    draw = functools.partial(np.random.default_rng(0).uniform, 1, 1000)
    state = jax.tree.map(lambda x: np.array(draw(x.shape), x.dtype), shapes)
    notes = {"task": "mine", "seed": 7, "loss": np.inf, "words": ["ä", "b"]}
    notes |= {"nested": {"list": [["a", "b"], []]}, "flag": None, "digest": b"\0\xff"}
    state = flax.serialization.to_state_dict(state)
    return tm.Checkpoint(CONFIG, TOKENIZER, state, notes)


def save_with(path, number):
    tm.save_checkpoint(path, checkpoint()._replace(notes={"number": number}))


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_checkpoint_keeps_everything(tmp_path):
    path, again = tmp_path / "model", tmp_path / "again"
    tm.save_checkpoint(path, checkpoint())
    assert files_in(tmp_path) == ["model"]
    loaded = tm.load_checkpoint(str(path))
    assert loaded.config == CONFIG and hash(loaded.config) == hash(CONFIG)
    assert loaded.tokenizer.merges == TOKENIZER.merges
    assert loaded.tokenizer.encode("slowest") == TOKENIZER.encode("slowest")
    assert loaded.notes == checkpoint().notes
    kept, expected = loaded.state, checkpoint().state
    assert_same = functools.partial(np.testing.assert_array_equal, strict=True)
    jax.tree.map(assert_same, kept, expected)  # dtypes as well
    tm.save_checkpoint(again, loaded)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, function):
    """A file that is written where the old one was is lost here, and so is one that gets
    its name before the disk has it. A file of the user's may have any other name.
    """
    path, users = tmp_path / "model", tmp_path / "model.tmp"
    save_with(path, 1)
    before = path.read_bytes()
    users.write_text("the user's")

    def full(*_):
        assert path.read_bytes() == before
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        module = tm if function == "open" else tm.os
        patch.setattr(module, function, full, raising=False)
        with pytest.raises(OSError, match="No space left") as error:
            save_with(path, 2)
    assert error.value.filename == str(path) and error.value.errno == 28
    assert path.read_bytes() == before and files_in(tmp_path) == ["model", "model.tmp"]
    save_with(path, 3)
    assert tm.load_checkpoint(path).notes == {"number": 3}
    assert files_in(tmp_path) == ["model", "model.tmp"]
    assert users.read_text() == "the user's"


def test_link_to_a_checkpoint_stays_one(tmp_path):
    link, folder = tmp_path / "link", tmp_path / "elsewhere"
    folder.mkdir()
    link.symlink_to(folder / "model")
    for number in range(2):  # At first, the link leads nowhere.
        save_with(link, number)
        assert link.is_symlink() and files_in(folder) == ["model"]
        assert tm.load_checkpoint(folder / "model").notes == {"number": number}
    assert files_in(tmp_path) == ["elsewhere", "link"]


def test_checkpoint_is_as_readable_as_other_files(tmp_path):
    """Temporary files are often for their owner alone."""
    umask = os.umask(0o027)
    try:
        tm.save_checkpoint(tmp_path / "model", checkpoint())
    finally:
        os.umask(umask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o640


def assert_not_loaded(path, message):
    with pytest.raises(tm.InputError, match=message) as error:
        tm.load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["params", "average"])
@pytest.mark.parametrize("change", ["one less", "one transposed", "one more"])
def test_parameters_of_another_model_are_refused(tmp_path, name, change):
    state = jax.tree.map(np.copy, checkpoint().state)
    inner = state[name]["encoder"]["blocks_0"]["feed_forward"]["inner"]
    if change == "one less":
        del inner["bias"]
    elif change == "one transposed":
        inner["kernel"] = inner["kernel"].T
    else:
        inner["scale"] = inner["bias"]
    path = tmp_path / "model"
    tm.save_checkpoint(path, checkpoint()._replace(state=state))
    assert_not_loaded(path, "parameters are not those of this file's model")


def test_configuration_of_another_model_is_refused(tmp_path, monkeypatch):
    """It has a field that is gone since, or a value that is not allowed."""
    path = tmp_path / "model"
    for name, value in (("gone", 1), ("d_model", 3)):
        config = {**dataclasses.asdict(checkpoint().config), name: value}
        with monkeypatch.context() as patch:
            patch.setattr(tm, "asdict", lambda _, config=config: config)
            tm.save_checkpoint(path, checkpoint())
        assert_not_loaded(path, f"its configuration does not fit: .*{name}")


def test_checkpoint_cut_anywhere_or_with_any_bit_flipped_is_refused(tmp_path):
    path = tmp_path / "model"
    tm.save_checkpoint(path, checkpoint())
    good = path.read_bytes()
    # The first line and the digest, and then some of the content.
    for position in [*range(90), *range(90, len(good), 29), len(good) - 1]:
        path.write_bytes(good[:position])
        assert_not_loaded(path, "not a checkpoint|damaged or cut short")
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        in_first_line = position < len(tm.FORMAT)
        assert_not_loaded(path, "not a checkpoint" if in_first_line else "damaged")
    path.write_bytes(good + b"\0")
    assert_not_loaded(path, "damaged")
    path.write_bytes(good)
    assert tm.load_checkpoint(path).config == CONFIG


def test_other_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "other"
    for content in (b"", b"a\tb\n", bytes(range(256)) * 9):
        path.write_bytes(content)
        assert_not_loaded(path, "not a checkpoint")
    with pytest.raises(FileNotFoundError):
        tm.load_checkpoint(tmp_path / "none")
