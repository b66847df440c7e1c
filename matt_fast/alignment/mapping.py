"""New tokens whose rows start from old tokens that are named, in place of the pieces that spell them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it needs transformers, and `check_map` comes before anything slow
    from transformers import PreTrainedTokenizerBase

    from matt_fast.alignment.vocabulary import VocabularyPair


def check_map(entries: Sequence[str]) -> None:
    """Raise a ValueError that names the argument unless each entry is "NEW=OLD"."""
    for entry in entries:
        if not any(True for _ in _splits(entry)):
            raise ValueError(
                f"map: wanted NEW=OLD, a token of the new tokenizer and text of the old one, got {entry!r}"
            )


def map_tokens(vocabulary: "VocabularyPair", entries: Sequence[str]) -> dict[int, list[int]]:
    """Let the rows of new tokens start as the mean of the rows of old tokens: `vocabulary.mapped`, in place.

    It is meant for special tokens, whose text tells nothing: "<|im_start|>=<start_of_turn>". One that was matched by
    its role alone (end of text, for example) is new from then on.

    Args:
        vocabulary: the two vocabularies.
        entries: "NEW=OLD": a token of the new tokenizer, and text for the old one, special tokens in it included. Of
            several "=" the first counts that has a token of the new tokenizer before it.

    Returns:
        student id -> teacher ids.

    Raises:
        ValueError: no such token, one that both vocabularies have, one that is mapped twice, or text of no token or of
            one that the model has no row for.
    """
    student, teacher = vocabulary.student.get_vocab(), vocabulary.teacher
    for entry in entries:
        found = next(((student[new], old) for new, old in _splits(entry) if new in student), None)
        if found is None:
            raise ValueError(f"map: wanted NEW=OLD, NEW a token of the new tokenizer, got {entry!r}")
        new, old = found
        match = vocabulary.matches.get(new)
        if match is not None and match.how == "bytes":
            raise ValueError(
                f"map: wanted a token that the model lacks before '=', got {entry!r}: both tokenizers have that token, "
                "and it keeps its row"
            )
        ids = teacher(old, add_special_tokens=False)["input_ids"]
        if not ids or max(ids) >= vocabulary.teacher_rows or not vocabulary.teacher_tokens.keys() >= set(ids):
            raise ValueError(f"map: wanted text of tokens that the model has behind '=', got {entry!r} (ids {ids})")
        if new in vocabulary.mapped:
            raise ValueError(f"map: wanted each new token once, got {entry!r} too")
        vocabulary.mapped[new] = ids
        vocabulary.matches.pop(new, None)
        vocabulary.subtokens[new] = ids
    return vocabulary.mapped


def own_rows(vocabulary: "VocabularyPair", other: "PreTrainedTokenizerBase") -> None:
    """Count tokens that the model to learn from lacks as new, with the rows that the model has for them as their start.

    In place, for a model that has all tokens already, as one that a transfer made: it is what trains on.

    Args:
        vocabulary: that of the model and its own, or a part of it.
        other: the tokenizer of the model to learn from.
    """
    from matt_fast.alignment.vocabulary import match_tokens

    for student_id in vocabulary.matches.keys() - match_tokens(vocabulary.student, other).keys():
        own = [vocabulary.matches.pop(student_id).teacher_id]
        vocabulary.mapped[student_id] = vocabulary.subtokens[student_id] = own
        vocabulary.own.add(student_id)


def _splits(entry: str) -> Iterator[tuple[str, str]]:
    """(before, behind) each "=" that has something on both sides."""
    for at, sign in enumerate(entry):
        if sign == "=" and entry[:at] and entry[at + 1 :]:
            yield entry[:at], entry[at + 1 :]
