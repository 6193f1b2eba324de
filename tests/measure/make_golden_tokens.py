"""Makes tests/golden_tokens.json for test_text_and_data.py: what Hugging Face's tokenizers do.

They need a package that the tests do not. To make the file again:

    pip install tokenizers==0.23.3
    python tests/measure/make_golden_tokens.py

golden_tokens.json then holds a text of some lines, and for each size of the vocabulary
the merges that byte-pair encoding learns from it, as pairs of byte strings in hex, and the
number of tokens that the text then has. Sizes count our three special tokens.
"""

import json
import pathlib

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

TEXT = """\
The miller of the lower mill had a slow mule, and the mule had a slower foal.
Every morning the miller loaded the mule, and every evening he unloaded the mule.
"Slower, slower," said the miller, "the hill is steep and the mill is still there."
The foal followed the mule, the mule followed the miller, and the miller the road.
Under the hill the river ran over the old stones and turned the wheel of the mill.
The wheel turned the stone, the stone ground the grain, and the grain became flour.
  Two spaces begin this line,   three stand in it, and the end has one more.\x20
The numbers 1, 10, 100, 1000 and 10000 grow longer: 11111111, 111111111111, aaaaaaaaaa.
Der Müller mahlt, die Mühle läuft, das Mühlrad dreht sich über dem Mühlbach.
Le meunier était là où l'été dernier le blé avait été moulu; là, rien n'était gâté.
Μύλος, μυλωνάς, μύλοι. Мельница мелет муку, мельник мелет мак. 水車 水車小屋 水車
A mill 🙂 and a mule 🙂🙂 make the miller 🙂🙂🙂.
"""
SIZES = [300, 350, 500]


def learn(texts, vocab_size):
    """Returns a tokenizer of Hugging Face's that cuts text into words as ours does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[^ ]+| "), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_of_character():
    """The byte for which each character stands in the merges of Hugging Face's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


def main():
    texts, byte_of = TEXT.splitlines(), byte_of_character()
    golden = {"texts": texts, "learnt": {}}
    for vocab_size in SIZES:
        tokenizer = learn(texts, vocab_size)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        golden["learnt"][str(vocab_size)] = {
            "merges": [
                " ".join(bytes(map(byte_of.get, part)).hex() for part in pair)
                for pair in merges
            ],
            "num_tokens": sum(len(tokenizer.encode(text).ids) for text in texts),
        }
    path = pathlib.Path(__file__).parents[1] / "golden_tokens.json"
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
