"""Extension of a tokenizer's vocabulary by words that it cannot spell."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from sacl_ds.data.text import SPECIAL, Tokenizer


def with_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer that also knows the words of `texts` which come out as unknown so far.

    Digits may be such words, where no caption had one: all of them would be the same answer. New ids follow the others,
    which stay what they are. The result is the same for the same texts in any order; `tokenizer` itself is returned
    where nothing is unknown, or where its vocabulary is no WordPiece one. A model grows with it (`sacl_ds.model.vqa`).
    """
    backend = tokenizer.fast.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "WordPiece":
        return tokenizer
    unknown = backend.token_to_id(str(tokenizer.fast.unk_token))
    words: set[str] = set()
    for text in texts:
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)))
    # one by one: a word is added whole where any of it cannot be spelt
    backend.no_truncation()
    new = [word for word in sorted(words) if unknown in backend.encode(word, add_special_tokens=False).ids]
    if not new:
        return tokenizer
    vocabulary = state["model"]["vocab"]
    vocabulary |= {word: number for number, word in enumerate(new, tokenizer.size)}
    state["truncation"] = state["padding"] = None  # of the last call, not of the vocabulary
    names = {name: getattr(tokenizer.fast, name) for name in SPECIAL}
    grown = PreTrainedTokenizerFast(tokenizer_object=RustTokenizer.from_str(json.dumps(state)), **names)
    return Tokenizer(grown, tokenizer.max_tokens)
