"""Section 10: byte-pair encoding, against a slow one that recounts, and another's."""

import collections
import itertools
import json
import pathlib

import numpy as np
import pytest

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


def test_sizes_and_merges_that_cannot_be_are_refused():
    for vocab_size in (258, 3, 0, -1):
        with pytest.raises(tm.InputError, match=f"at least 259.* {vocab_size}"):
            tm.Tokenizer.learn(CORPUS, vocab_size)
    for merge in [(2, 100), (100, 0), (-1, 100), (100, 260), (259, 100), (260, 260)]:
        with pytest.raises(tm.InputError, match="cannot merge into token 259"):
            tm.Tokenizer([merge])
    assert tm.Tokenizer([(100, 101), (259, 100)]).vocab_size == 261
