"""Tokenization of captions: a WordPiece vocabulary (trained here or pre-trained), padding, and masking for MLM."""

from __future__ import annotations

import hashlib
import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sacl_ds.data.draws import words
from sacl_ds.errors import CannotLoad, UserError
from sacl_ds.files import require_unchanged

# loader workers are the parallelism; threads inside a forked one would only warn
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ALWAYS = set(string.ascii_lowercase + string.digits)  # any English text of a later task can be spelled
_LETTERS = 1000  # so many different ones are kept, or half of the vocabulary: the most frequent
_LONGEST_WORD = 1000  # characters; scripts without spaces write a whole caption as one
IGNORED = -100  # label of a token that MLM does not predict, as in torch's cross_entropy


def train_wordpiece(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer as BERT's, but that accents, vowel signs and other marks stay; the vocabulary
    comes from `captions`, always the same from the same."""
    backend = _bert({"[UNK]": 0})
    found: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption)):
            found[word] += times
    # the trainer goes through words in an order that differs from one run to the next, and numbers letters, which
    # decide between merges that are equally frequent, as it meets them; so they are numbered beforehand
    letters: Counter[str] = Counter()
    for word, count in found.items():
        letters.update({letter: times * count for letter, times in Counter(word).items()})
    most = max(_LETTERS, vocab_size // 2)
    kept = {letter for letter, _ in sorted(letters.items(), key=lambda pair: (-pair[1], pair[0]))[:most]}
    kept |= _ALWAYS
    inside = sorted(
        {f"##{letter}" for word in found for letter in word[1:] if letter in kept} | {f"##{each}" for each in _ALWAYS}
    )
    special = list(SPECIAL.values())
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=special + inside,
        initial_alphabet=sorted(kept),
        limit_alphabet=len(kept),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator((f"{word} " * count for word, count in sorted(found.items())), trainer)
    vocabulary = [*special, *sorted(backend.get_vocab().keys() - set(special))]
    ids = {token: number for number, token in enumerate(vocabulary)}
    backend = _bert(ids)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def _bert(ids: dict[str, int]) -> RustTokenizer:
    backend = RustTokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    # marks as letters of their own (NFD) make alphabets of a thousand syllables small
    backend.normalizer = normalizers.Sequence(
        [normalizers.BertNormalizer(lowercase=True, strip_accents=False), normalizers.NFD()]
    )
    # one sign that the vocabulary lacks must not take the word beside it along
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(r"\p{S}"), "isolated")]
    )
    backend.decoder = decoders.WordPiece()
    return backend


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer with a maximum length; wraps a fast tokenizer of transformers."""

    fast: PreTrainedTokenizerFast
    max_tokens: int

    @classmethod
    def load(cls, name_or_folder: str | Path, max_tokens: int, setting: str = "tokenizer") -> Tokenizer:
        """Load a folder written by `save`, any tokenizer folder of transformers, or a hub name.

        setting: the name that error lines use. Raises UserError.
        """
        folder = Path(name_or_folder)
        require_unchanged(folder.parent, f"{setting}={name_or_folder}", folder.name)
        try:
            fast = AutoTokenizer.from_pretrained(str(name_or_folder), use_fast=True, trust_remote_code=False)
        except Exception as error:  # the library's own, of which some are plain Exceptions
            raise CannotLoad(setting, str(name_or_folder), error) from None
        missing = [name for name in SPECIAL if getattr(fast, name, None) is None]
        if missing:
            raise UserError(
                f"the tokenizer {str(name_or_folder)!r} lacks {', '.join(missing)}; a BERT tokenizer has them"
            )
        return cls(fast, max_tokens)

    def save(self, folder: Path) -> None:
        self.fast.save_pretrained(str(folder))

    @cached_property
    def size(self) -> int:
        """Number of entries of the vocabulary."""
        return len(self.fast)

    @cached_property
    def pad_id(self) -> int:
        return int(self.fast.pad_token_id)

    @cached_property
    def mask_id(self) -> int:
        return int(self.fast.mask_token_id)

    @cached_property
    def never_masked(self) -> frozenset[int]:
        return frozenset({self.pad_id, int(self.fast.cls_token_id), int(self.fast.sep_token_id)})

    @cached_property
    def fingerprint(self) -> str:
        """Digest that is equal for two tokenizers that give every caption the same ids."""
        state = f"{self.max_tokens}\n{self.fast.backend_tokenizer.to_str()}"
        # truncation and padding are state of the last call, not of the vocabulary
        state = re.sub(r'"(truncation|padding)":\s*(null|\{[^{}]*\})', "", state)
        return hashlib.sha256(state.encode()).hexdigest()

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids with [CLS] and [SEP], cut to max_tokens, not padded. Raises UserError for half a surrogate pair."""
        backend = self.fast.backend_tokenizer  # the wrapper's own bookkeeping costs more than the encoding
        backend.no_padding()
        backend.enable_truncation(self.max_tokens)
        try:
            return [encoding.ids for encoding in backend.encode_batch(list(captions))]
        except TypeError:
            for caption in captions:
                if any("\ud800" <= character <= "\udfff" for character in caption):
                    raise UserError(
                        f"{caption!r:.200} is not valid Unicode: half of a surrogate pair; correct it"
                    ) from None
            raise


def pad(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Pad rows to (n, longest) int64."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def attention_mask(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return (n, longest) int64: 1 at tokens, 0 at padding."""
    return pad([[1] * len(row) for row in rows], 0)


def mask_tokens(
    row: Sequence[int], tokenizer: Tokenizer, probability: float, entropy: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Mask tokens as BERT does: of those drawn, 80 % become [MASK], 10 % another token, 10 % stay.

    Returns (ids, labels), labels IGNORED where nothing is predicted. The draw depends on `entropy` alone, so it is the
    same on any rank and worker.
    """
    drawn = words(len(row), *entropy)
    ids, labels = list(row), [IGNORED] * len(row)
    for i, (token, word) in enumerate(zip(row, drawn, strict=True)):
        if token in tokenizer.never_masked or (word & 0xFFFFFF) >= probability * 2**24:
            continue
        labels[i] = token
        kind = (word >> 24) & 0xFF
        if kind < 205:  # 80 % of 256
            ids[i] = tokenizer.mask_id
        elif kind < 230:  # 10 %
            ids[i] = (word >> 32) % tokenizer.size
    return ids, labels
