"""A tokenizer that gets what another one has and it lacks: how the paper's tokenizers were made."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import token_bytes
from matt_fast.data.tokenizer_arguments import check_tokenizer_arguments
from matt_fast.support.checks import checked
from matt_fast.tokenizers import marks
from matt_fast.tokenizers.extend import check_extensible, write_extended
from matt_fast.tokenizers.merging import UNREACHABLE, Merging
from matt_fast.tokenizers.result import NewTokenizer
from matt_fast.tokenizers.source import append_tokens, read_source
from matt_fast.tokenizers.spelling import Spelling

Place = str | Path | PreTrainedTokenizerBase


@checked
def merge(
    model: Place,
    other: Place,
    output: str | Path,
    *,
    join_marks: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    **options,
) -> NewTokenizer:
    """Append the tokens that another tokenizer has to a BPE tokenizer that lacks them, as the paper does.

    What the base has stays, as in `extend`. Tokens are compared by their bytes; special tokens of the other are not
    taken. Each that is appended is one token for the base too: it gets merges of the base's tokens, behind the base's
    own, and where these need parts that neither has, the parts are appended too.

    Args:
        model: folder or hub name of a model or tokenizer, or a fast tokenizer: the base.
        other: the one whose tokens are taken, of any kind.
        output: folder to write; new or empty.
        join_marks: as in `extend`.
        on_stage: called with the name of each stage of the work.
        **options: for loading both.

    Returns:
        what it has; tokens that the base's pre-tokenizer cuts, for example, are in `left_out`.

    Raises:
        TypeError: one is not a fast tokenizer.
        ValueError: the base has no merges, the other has nothing that it lacks, or marks cannot be joined.
        FileExistsError: the folder has something in it.
    """
    check_tokenizer_arguments(locals())
    on_stage("tokenizers")
    base, theirs = read_source(model, **options), read_source(other, "other", **options)
    check_extensible(base)
    start = marks.join_marks(base) if join_marks else base
    have = {token.bytes for token in token_bytes(base.tokenizer).values() if token.kind != "special"}
    in_order = (token for _, token in sorted(token_bytes(theirs.tokenizer).items()))  # that of merges
    lacking = dict.fromkeys(token.bytes for token in in_order if token.kind == "text" and token.bytes not in have)
    spelling, merging, left_out = Spelling(start), Merging(start), {}
    spelled = {content: spelling.of_bytes(content) for content in lacking if content}
    wanted = {entry for entry in spelled.values() if entry is not None}
    for content, entry in spelled.items():
        shown = content.decode(errors="replace")
        if entry is None:
            left_out[shown] = "is cut or changed before merges apply"
        elif entry not in merging.known and not merging.add(entry, wanted):
            left_out[shown] = UNREACHABLE
    if not merging.added:
        raise ValueError(f"other: wanted a tokenizer with tokens that {str(model)!r} lacks, got none in {str(other)!r}")
    on_stage("checks")
    made = append_tokens(start, merging.added, merging.merges)
    return write_extended(base, start, made, [], output, left_out)
