"""A tokenizer extended by tokens that a text or a list of words wants, on top of its own merges."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from matt_fast.data.documents import read_documents
from matt_fast.data.reading import check_plain_text, read_texts
from matt_fast.data.tokenizer_arguments import check_tokenizer_arguments
from matt_fast.support.checks import checked
from matt_fast.tokenizers import marks
from matt_fast.tokenizers.check import check
from matt_fast.tokenizers.merging import UNREACHABLE, Merging
from matt_fast.tokenizers.result import NewTokenizer, bytes_per_token, texts_of
from matt_fast.tokenizers.source import Sample, Source, append_tokens, read_source, write_tokenizer
from matt_fast.tokenizers.spelling import Spelling
from matt_fast.tokenizers.symbols import Symbols, learn

SENTENCEPIECE_LENGTH = 16  # characters: the longest piece that SentencePiece's trainer makes by default


@checked
def extend(
    model: str | Path | PreTrainedTokenizerBase,
    output: str | Path,
    *,
    data: str | Path | None = None,
    add: int = 5000,
    words: str | Path | Sequence[str] | None = None,
    max_token_length: int | None = None,
    join_marks: bool = False,
    split: str = "train",
    text_field: str = "text",
    on_stage: Callable[[str], None] = lambda stage: None,
    **options,
) -> NewTokenizer:
    """Add tokens to a BPE tokenizer by going on with its merges where its trainer stopped, on another text.

    Its ids, merges, pre-tokenizer, normaliser, special and added tokens and chat template stay. New tokens have the
    ids behind all of these; each is made of two tokens by a merge that ranks behind the old ones, or is a character
    that a byte fallback spelled. So a text has the base's tokens, or new ones that stand for several of them each. What
    is learned is whole characters, or a part of one. All this is checked (`check`) before the folder is there.

    Args:
        model: folder or hub name of a model or tokenizer, or a fast tokenizer.
        output: folder to write; new or empty.
        data: text to learn from, see `read_documents`.
        add: new tokens that are learned, at most: no pair of tokens that occurs once is merged.
        words: a text file with a word a line, or words: each becomes a token, before any are learned. One that begins
            with a space is taken as it is, any other with a space in front too, as words stand in texts.
        max_token_length: characters of a learned token, "▁" and each byte of a byte-level vocabulary is one; 16 for a
            SentencePiece vocabulary, as long as may be for others, if None.
        join_marks: let vowel signs and accents (Unicode's marks) stay with their letters, where the pre-tokenizer cuts
            words at them, as GPT-2's does with Hindi, Khmer and Thai. Texts keep the base's tokens, but for those that
            join a mark and a sign behind it: these are in `cut_tokens`, and no word has them any more.
        split, text_field: of the data.
        on_stage: called with the name of each stage of the work.
        **options: for loading the tokenizer.

    Returns:
        what it has; words that could not become a token are in `left_out`.

    Raises:
        TypeError: it is not a fast tokenizer.
        ValueError: it has no merges to go on with, no words and no data were given, or they cannot be read; or marks
            cannot be joined.
        FileExistsError: the folder has something in it.
    """
    check_tokenizer_arguments(locals())
    on_stage("tokenizer")
    base = read_source(model, **options)
    check_extensible(base)
    made = start = marks.join_marks(base) if join_marks else base
    left_out: Mapping[str, str] = {}
    texts: list[str] = []
    if words is not None:
        on_stage("words")
        listed = read_words(words) if isinstance(words, str | Path) else list(words)
        made, left_out = add_words(made, listed)
        texts = listed[: 1 << 12]
    if data is not None:
        on_stage("data")
        sample = Sample(read_documents(data, split=split, text_field=text_field))
        longest = max_token_length or (SENTENCEPIECE_LENGTH if base.sentencepiece else None)
        entries, merges = learn(Symbols(made), sample, add, longest)
        if not entries:
            raise ValueError(f"data: wanted text in which a pair of tokens occurs twice, got none in {str(data)!r}")
        made, texts = append_tokens(made, entries, merges), sample.texts
    on_stage("checks")
    return write_extended(base, start, made, texts, output, left_out)


def write_extended(
    base: Source, start: Source, made: Source, texts: Sequence[str], output: str | Path, left_out: Mapping[str, str]
) -> NewTokenizer:
    """Check and write a tokenizer to which tokens were appended.

    Args:
        base: as it was given.
        start: what tokens were appended to: the base, or that with marks joined.
        made: the tokenizer.
        texts: to look at.
        output: folder to write.
        left_out: what could not be appended, with the reason.
    """
    new = {entry: i for entry, i in made.entries.items() if entry not in base.entries}
    write_tokenizer(made, output, lambda loaded: check(loaded, start, texts, new=new))
    return NewTokenizer(
        tokens=len(made.entries),
        before=len(base.entries),
        added=texts_of(made, new),
        left_out=dict(left_out),
        bytes_per_token=bytes_per_token(made, texts),
        bytes_per_token_before=bytes_per_token(base, texts),
        cut_at_marks=marks.cut_at_marks(made, texts),
        cut_tokens=marks.cut_tokens(base, start),
    )


def check_extensible(base: Source) -> None:
    """Raise a ValueError unless a tokenizer has merges of tokens, which tell how longer ones are reached."""
    model = base.backend["model"]
    if base.kind != "BPE":
        raise ValueError(
            f"{base.argument}: wanted a BPE tokenizer, whose merges can go on, got one of the kind {base.kind}"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(
                f"{base.argument}: wanted BPE whose tokens are written alike everywhere in a word, got one with the "
                f"{name} {model[name]!r}"
            )


def read_words(file: str | Path) -> list[str]:
    """The lines of a text file that are not empty, each once.

    Raises:
        ValueError: there is none, or it is no text file in UTF-8.
        OSError: it cannot be read.
    """
    check_plain_text(file, "words")
    lines = "".join(filter(None, read_texts(Path(file), "text", "words"))).split("\n")
    words = [line for line in dict.fromkeys(lines) if line.strip()]
    if not words:
        raise ValueError(f"words: wanted a word a line in {str(file)!r}, got none")
    return words


def add_words(base: Source, words: Sequence[str]) -> tuple[Source, dict[str, str]]:
    """The tokenizer with a token for each word, and the words that cannot have one, with the reason."""
    merging, spelling, left_out = Merging(base), Spelling(base), {}
    texts = dict.fromkeys(x for word in words for x in ([word] if word[:1].isspace() else [word, " " + word]))
    spelled = {text: spelling.of_text(text) for text in texts}
    wanted = {entry for entry in spelled.values() if entry is not None}
    for text, entry in sorted(spelled.items(), key=lambda item: len(item[0])):
        if entry is None:
            left_out[text] = "is cut or changed before merges apply"
        elif entry not in merging.known and not merging.add(entry, wanted):
            left_out[text] = UNREACHABLE
    return append_tokens(base, merging.added, merging.merges), left_out
