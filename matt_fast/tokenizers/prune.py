"""A tokenizer without the tokens that a text uses least."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import BYTE_TOKEN
from matt_fast.data.documents import read_documents
from matt_fast.data.tokenizer_arguments import check_tokenizer_arguments
from matt_fast.support.checks import checked
from matt_fast.support.texts import bounded_pieces, groups
from matt_fast.tokenizers.check import check
from matt_fast.tokenizers.extend import check_extensible
from matt_fast.tokenizers.merging import Merging
from matt_fast.tokenizers.result import NewTokenizer, bytes_per_token, texts_of
from matt_fast.tokenizers.source import Sample, Source, keep_tokens, read_source, write_tokenizer

TOGETHER = 64  # texts


@checked
def prune(
    model: str | Path | PreTrainedTokenizerBase,
    output: str | Path,
    *,
    keep: int,
    data: str | Path,
    split: str = "train",
    text_field: str = "text",
    on_stage: Callable[[str], None] = lambda stage: None,
    **options,
) -> NewTokenizer:
    """Remove tokens from a BPE tokenizer, those that a text uses least, until so many are left.

    Only a token that no other is made of can go, then its two parts stand in its place, and count as used there. Added
    and special tokens, single characters and bytes never go. Ids close up, in their order. A text in which no removed
    token occurs keeps its tokens.

    Args:
        model: folder or hub name of a model or tokenizer, or a fast tokenizer.
        output: folder to write; new or empty.
        keep: tokens of the new vocabulary, special ones included.
        data: text to count tokens in, see `read_documents`.
        split, text_field: of the data.
        on_stage: called with the name of each stage of the work.
        **options: for loading the tokenizer.

    Raises:
        TypeError: it is not a fast tokenizer.
        ValueError: it has no merges, has no more than `keep` tokens, or so few cannot be left.
        FileExistsError: the folder has something in it.
    """
    check_tokenizer_arguments(locals())
    on_stage("tokenizer")
    base = read_source(model, **options)
    check_extensible(base)
    if keep >= len(base.entries):
        raise ValueError(f"keep: wanted fewer than the {len(base.entries):,} tokens that there are, got {keep:,}")
    on_stage("data")
    sample = Sample(read_documents(data, split=split, text_field=text_field))
    counts = count_tokens(base, sample)
    on_stage("merges")
    removed = least_used(base, counts, len(base.entries) - keep)
    made = keep_tokens(base, base.entries.keys() - set(removed))
    on_stage("checks")
    write_tokenizer(made, output, lambda loaded: check(loaded, base, sample.texts, removed=removed))
    return NewTokenizer(
        tokens=len(made.entries),
        before=len(base.entries),
        removed=texts_of(base, removed),
        bytes_per_token=bytes_per_token(made, sample.texts),
        bytes_per_token_before=bytes_per_token(base, sample.texts),
    )


def count_tokens(base: Source, texts: Iterable[str]) -> Counter:
    """id -> times."""
    counts = Counter()
    for group in groups(filter(None, bounded_pieces(texts)), TOGETHER):
        for encoding in base.plain.encode_batch_fast(group, add_special_tokens=False):
            ids, times = np.unique(encoding.ids, return_counts=True)
            counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
    return counts


def least_used(base: Source, counts: Counter, many: int) -> list[str]:
    """The entries to remove, in order: at each time the least used of those that no other is made of.

    Raises:
        ValueError: fewer can be removed.
    """
    merging, entries = Merging(base), base.entries
    added = {token["content"] for token in base.backend["added_tokens"]}
    unknown = base.backend["model"].get("unk_token")
    fixed = {x for x in entries if len(x) == 1 or x in added or x == unknown or BYTE_TOKEN.fullmatch(x)}
    parts = {entry: merging.parts(entry) for entry in entries if entry not in fixed}
    uses = {entry: counts[i] for entry, i in entries.items()}
    made_of_it = Counter(part for pair in parts.values() for part in set(pair))
    waiting = [(uses[entry], -entries[entry], entry) for entry in parts if not made_of_it[entry]]
    heapq.heapify(waiting)
    removed = []
    while waiting and len(removed) < many:
        times, place, entry = heapq.heappop(waiting)
        if times < uses[entry]:
            heapq.heappush(waiting, (uses[entry], place, entry))
            continue
        removed.append(entry)
        for part in parts[entry]:
            uses[part] = uses.get(part, 0) + times
        for part in set(parts[entry]):
            made_of_it[part] -= 1
            if not made_of_it[part] and part in parts:
                heapq.heappush(waiting, (uses[part], -entries[part], part))
    if len(removed) < many:
        least = len(entries) - len(removed)
        raise ValueError(f"keep: wanted at least the {least:,} tokens that have to stay, got {len(entries) - many:,}")
    return removed
