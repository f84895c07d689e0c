"""Vocabularies and token ids."""

import random
import unicodedata

from transformers import BertTokenizerFast

from sacl_ds.data.text import train_wordpiece


def captions(seed: int) -> list[str]:
    """Made-up words, most as frequent as others: ties everywhere."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopé", k=draw.randint(1, 7))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=6)) + draw.choice([".", "!", ""]) for _ in range(400)]


def test_the_same_captions_make_the_same_vocabulary() -> None:
    """In any order, and although the library's own trainer numbers letters differently each time."""
    said = captions(0)
    first = train_wordpiece(said, 250).get_vocab()
    assert 200 < len(first) <= 250
    for seed in range(4):
        random.Random(seed).shuffle(said)
        assert train_wordpiece(said, 250).get_vocab() == first
    assert train_wordpiece(captions(1), 250).get_vocab() != first


def test_tokens_are_those_of_bert(tmp_path) -> None:
    said = captions(2)
    trained = train_wordpiece(said, 200)
    assert [trained.get_vocab()[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    order = sorted(trained.get_vocab().items(), key=lambda pair: pair[1])
    (tmp_path / "vocab.txt").write_text("\n".join(token for token, _ in order))
    bert = BertTokenizerFast.from_pretrained(str(tmp_path), strip_accents=False)
    for text in [*said[:50], "Unheard-of WORDS, 字 and naïve ones"]:
        assert trained(text)["input_ids"] == bert(unicodedata.normalize("NFD", text))["input_ids"]
    assert trained.decode(trained("abc fed")["input_ids"], skip_special_tokens=True) == "abc fed"
