"""The public names of `matt_fast.alignment.vocabulary` under their short path."""

from matt_fast.alignment.vocabulary import (
    Match,
    Token,
    VocabularyPair,
    match_tokens,
    spell_tokens,
    token_bytes,
    vocabulary_rows,
)

__all__ = [
    "Match",
    "Token",
    "VocabularyPair",
    "match_tokens",
    "spell_tokens",
    "token_bytes",
    "vocabulary_rows",
]
