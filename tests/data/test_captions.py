"""Captions in the scripts of the world: which are the same to a reader, where a sample has them, what is no text."""

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sacl_ds.data.captions import BadText, captions_of, normalised
from sacl_ds.data.text import SPECIAL, Tokenizer, train_wordpiece
from sacl_ds.errors import UserError

DIFFERENT = {
    "Latin, French: peach / sin": ("pêche", "péché"),
    "Latin, Vietnamese: dog / to give": ("con chó", "con cho"),
    "Latin, Turkish: girl / nothing": ("kız", "kiz"),
    "Latin, Czech: cat / cats": ("kočka", "kočky"),
    "Greek: law / shoulder": ("νόμος", "νώμος"),
    "Cyrillic: all / everything": ("все", "всё"),
    "Cyrillic: war / howl": ("вой", "вои"),
    "Hebrew: points": ("שׁם", "שׂם"),
    "Arabic: wrote / books": ("كَتَبَ", "كُتُب"),
    "Persian: boy / girl": ("یک پسر می‌دود", "یک دختر می‌دود"),
    "Devanagari: a boy runs / a girl runs": ("लड़का दौड़ रहा है", "लड़की दौड़ रही है"),
    "Devanagari: in / me": ("में", "मे"),
    "Bengali: boy / heap": ("ছেলে", "ছালা"),
    "Tamil: tail / tooth": ("வால்", "வேல்"),
    "Telugu": ("పిల్లి", "పల్లి"),
    "Thai: tiger / shirt": ("เสือ", "เสื้อ"),
    "Thai: near / far": ("ใกล้", "ไกล"),
    "Burmese": ("မြေ", "မြို"),
    "Khmer": ("កា", "កី"),
    "Korean: moon / daughter": ("달", "딸"),
    "Korean: river / bag": ("강", "갱"),
    "Hiragana: key / oyster": ("かぎ", "かき"),
    "Katakana: bread / half": ("パン", "ハン"),
    "Han: girl / boy": ("女孩", "男孩"),
    "Amharic: dog / dogs": ("ውሻ", "ውሾች"),
    "emoji: dog / cat": ("🐶", "🐱"),
    "emoji in words": ("a 🐶", "a 🐱"),
    "emoji, skin": ("👍🏻", "👍🏿"),
    "flags of countries": ("🇫🇷", "🇩🇪"),
    "digits in a box": ("1️⃣", "2️⃣"),
    "programming languages": ("C++ logo", "C# logo"),
    "less / more": ("5 < 3", "5 > 3"),
    "negative": ("-5 degrees", "5 degrees"),
    "decimals": ("1.5 m", "15 m"),
    "per cent": ("50 %", "50"),
    "punctuation alone": ("...", "!?"),
    "faces": ("a face :)", "a face :("),
}
SAME = {
    "Latin": ("A dog, on  grass.", "a DOG on grass!!"),
    "Latin, apostrophes": ("it’s a dog", "It's a dog."),
    "Latin, ligature": ("ﬁsh", "fish"),
    "Latin, German": ("STRASSE", "Straße"),
    "Greek": ("Ένας ΣΚΥΛΟΣ;", "ένας σκυλος"),
    "Cyrillic": ("«Собака»", "собака"),
    "Armenian": ("Շուն։", "շուն"),
    "Arabic, elongated": ("كتـــاب،", "كتاب"),
    "Persian, an invisible joiner": ("می‌دود", "میدود"),
    "Devanagari, danda": ("लड़का।", "लड़का"),
    "Malayalam, chillu": ("അവന്‍", "അവന്"),
    "Thai, am": ("ทํา", "ทำ"),
    "Han": ("一只狗。", "一只狗"),
    "Katakana of half width": ("ﾊﾟﾝ", "パン"),
    "letters of full width": ("Ａ　ｄｏｇ", "a dog"),
    "emoji, its style": ("❤️", "❤"),
    "signs apart": ("5<3", "5 < 3"),
    "soft hyphen": ("mo\u00adtor", "motor"),
    "minus": ("\u22125 degrees", "-5 degrees"),
}  # fmt: skip
KNOWN = Tokenizer(
    train_wordpiece([text for pair in [*DIFFERENT.values(), *SAME.values()] for text in pair] * 2, 3000), 64
)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_captions(name: str) -> None:
    one, other = DIFFERENT[name]
    assert normalised(one) != normalised(other)
    ids = KNOWN.ids([one, other])
    assert ids[0] != ids[1]
    assert not any(KNOWN.fast.unk_token_id in row for row in ids)


@pytest.mark.parametrize("name", SAME)
def test_same_captions(name: str) -> None:
    one, other = SAME[name]
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize("text", [text for pair in [*DIFFERENT.values(), *SAME.values()] for text in pair])
def test_the_same_text_spelt_in_another_way(text: str) -> None:
    spelt = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert normalised(spelt[0]) == normalised(spelt[1])
    ids = KNOWN.ids(spelt)
    assert ids[0] == ids[1]


@given(st.text(max_size=40))
def test_any_caption(caption: str) -> None:
    plain = normalised(caption)
    assert normalised(plain) == plain
    assert normalised(unicodedata.normalize("NFD", caption)) == plain
    assert normalised(unicodedata.normalize("NFC", caption)) == plain
    assert normalised(caption.replace(" ", "\t \n")) == plain
    assert json.dumps(plain)
    assume(any(character.isalnum() for character in plain))
    assert normalised(f"  {caption}.") == plain


def test_letters_of_scripts_without_spaces_are_known() -> None:
    """A caption longer than BERT's longest word, and one with a sign that the vocabulary lacks."""
    said = ["เด็กผู้ชายกำลังวิ่งเล่นกับสุนัขสีน้ำตาล" * 4]
    tokenizer = Tokenizer(train_wordpiece(said, 300), 512)
    assert len(said[0]) > 100
    unknown = tokenizer.fast.unk_token_id
    assert unknown not in tokenizer.ids(said)[0]
    assert tokenizer.ids([f"{said[0]}🐶"])[0][1:-2] == tokenizer.ids(said)[0][1:-1]
    many = [chr(0x4E00 + number) for number in range(1500)]
    assert unknown not in {each for row in Tokenizer(train_wordpiece(many, 4000), 8).ids(many) for each in row}


def test_a_kept_vocabulary_goes_on_unchanged(tmp_path: Any) -> None:
    """One that strips accents, as runs have kept it: read, saved and grown, it gives the same ids."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "ハン", "a"]
    backend = RustTokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    old = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL), 16)
    old.save(tmp_path / "tokenizer")
    read = Tokenizer.load(tmp_path / "tokenizer", 16)
    assert read.ids(["A Café", "パン"]) == [[7, 5], [6]]
    assert read.fingerprint == old.fingerprint


def place(**fields: Any) -> dict[str, bytes]:
    return {name: each if isinstance(each, bytes) else json.dumps(each).encode() for name, each in fields.items()}


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        (place(json={"captions": ["one", " two "], "caption": "x"}, txt=b"y"), ["one", "two"]),
        (place(json={"captions": []}, txt=b"a dog"), ["a dog"]),
        (place(json={"captions": [None, " "]}, txt=b"a dog"), ["a dog"]),
        (place(json={"captions": "one"}, txt=b"a dog"), ["one"]),
        (place(json={"caption": "a dog"}, txt=b" \n"), ["a dog"]),
        (place(json={"caption": ["a dog", "a cat"]}), ["a dog", "a cat"]),
        (place(json=b"{", txt=b"a dog"), ["a dog"]),
        (place(json=[1], txt="\ufeffcafé".encode()), ["café"]),
        (place(json="\ufeff{\"caption\": \"é\"}".encode()), ["é"]),
        (place(json={"captions": [{"raw": "a dog"}]}), []),
        ({}, []),
    ],
)  # fmt: skip
def test_where_captions_stand(fields: dict[str, bytes], captions: list[str]) -> None:
    assert captions_of(fields) == captions


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32", "gb18030", "shift-jis", "cp1251"])
def test_text_in_other_encodings_is_none(encoding: str) -> None:
    text = {"gb18030": "一只狗", "shift-jis": "犬が走る", "cp1251": "собака"}.get(encoding, "café au lait")
    described = json.dumps({"caption": text}, ensure_ascii=False)
    for fields in ({"txt": text.encode(encoding)}, {"json": described.encode(encoding)}):
        with pytest.raises(BadText, match=r"^text is not UTF-8$"):
            captions_of(fields)


def test_half_of_a_surrogate_pair() -> None:
    with pytest.raises(BadText, match=r"^text is not valid Unicode$"):
        captions_of({"json": b'{"captions": ["a smile", "a smile \\ud83d"]}'})
    assert captions_of({"json": b'{"captions": ["a smile \\ud83d\\ude00"]}'}) == ["a smile 😀"]
    with pytest.raises(UserError, match=r"'a smile \\ud83d' is not valid Unicode: half of a surrogate pair"):
        KNOWN.ids(["a dog", "a smile \ud83d"])
