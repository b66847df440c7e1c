"""A tokenizer trained from scratch on a text: of a kind, or built like another one."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from matt_fast.alignment.vocabulary import BYTE_TOKEN
from matt_fast.data.documents import read_documents
from matt_fast.data.tokenizer_arguments import check_tokenizer_arguments
from matt_fast.support.checks import checked
from matt_fast.support.texts import bounded_pieces
from matt_fast.tokenizers import marks
from matt_fast.tokenizers.check import check
from matt_fast.tokenizers.extend import SENTENCEPIECE_LENGTH, check_extensible
from matt_fast.tokenizers.result import NewTokenizer, bytes_per_token
from matt_fast.tokenizers.source import Sample, Source, append_tokens, keep_tokens, read_source, write_tokenizer
from matt_fast.tokenizers.symbols import Symbols, keeps_digits_alone, learn

# Contractions, words with the sign or space before them, digits one by one, signs with line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same for a text whose spaces are written "▁".
WORDS = r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^▁\s\p{L}\p{M}\p{N}]+|▁+(?=▁)|▁|\s+"
LOW = 10.0  # how far the log-probability of a piece that is not in the text lies below the lowest of those that are
# The order, and so the ids, of RoBERTa and its kin, whose positions are counted from the padding token's id.
ROLES = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


@checked
def train(
    output: str | Path,
    *,
    data: str | Path,
    size: int,
    kind: str = "byte-bpe",
    like: str | Path | PreTrainedTokenizerBase | None = None,
    max_token_length: int | None = None,
    join_marks: bool = False,
    split: str = "train",
    text_field: str = "text",
    on_stage: Callable[[str], None] = lambda stage: None,
    **options,
) -> NewTokenizer:
    """Train a tokenizer on a text, by the trainers of `tokenizers`.

    Args:
        output: folder to write; new or empty.
        data: text to learn from, see `read_documents`.
        size: tokens of the vocabulary, at most, special ones included.
        kind: "byte-bpe", BPE over bytes, as GPT and Llama 3 have it; "sentencepiece-bpe", BPE over characters with a
            byte fallback, as Gemma; or "unigram", as T5 and XLM-R, with a byte fallback too.
        like: folder or hub name of a model or tokenizer, or a fast tokenizer, that the new one is built like instead:
            BPE with its normaliser, pre-tokenizer, special and added tokens and chat template.
        max_token_length: as in `extend`.
        join_marks: as in `extend`, for the pre-tokenizer of `like`; the kinds have marks joined.
        split, text_field: of the data.
        on_stage: called with the name of each stage of the work.
        **options: for loading `like`.

    Raises:
        TypeError: `like` is not a fast tokenizer.
        ValueError: an unknown kind, a size with no room for bytes and special tokens, `like` without merges or
            with marks that cannot be joined, or data that cannot be read.
        FileExistsError: the folder has something in it.
    """
    check_tokenizer_arguments(locals())
    on_stage("tokenizer")
    digits_alone = True
    if like is None:
        start = _new(kind)
    else:
        base = read_source(like, "like", **options)
        base = marks.join_marks(base) if join_marks else base
        start, digits_alone = _emptied(base), keeps_digits_alone(base)
    room = size - len(start.entries)
    if room < 1:
        raise ValueError(f"size: wanted more than the {len(start.entries):,} of bytes and special tokens, got {size:,}")
    on_stage("data")
    sample = Sample(read_documents(data, split=split, text_field=text_field))
    if start.kind == "Unigram":
        made = _unigram(start, sample, size)
    else:
        longest = max_token_length or (SENTENCEPIECE_LENGTH if start.sentencepiece else None)
        made = append_tokens(start, *learn(Symbols(start, digits_alone), sample, room, longest))
    on_stage("checks")
    write_tokenizer(made, output, lambda loaded: check(loaded, start, sample.texts))
    return NewTokenizer(
        tokens=len(made.entries),
        bytes_per_token=bytes_per_token(made, sample.texts),
        cut_at_marks=marks.cut_at_marks(made, sample.texts),
    )


def _emptied(like: Source) -> Source:
    """The tokenizer with its added tokens, bytes and, of characters, those of ASCII and the sign for a space."""
    check_extensible(like)
    added = {token["content"] for token in like.backend["added_tokens"]}
    unknown = like.backend["model"].get("unk_token")

    def stays(entry: str) -> bool:
        if entry in added or entry == unknown or BYTE_TOKEN.fullmatch(entry):
            return True
        return len(entry) == 1 and (not like.sentencepiece or entry == "▁" or entry.isascii())

    return keep_tokens(like, {entry for entry in like.entries if stays(entry)})


def _new(kind: str) -> Source:
    """A tokenizer of a kind that knows special tokens, bytes and ASCII."""
    special = list(ROLES.values())
    if kind == "byte-bpe":
        special.remove(ROLES["unk_token"])
        vocab = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(vocab)}, []))
        split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        ascii_ = [chr(i) for i in range(0x21, 0x7F)]
        vocab = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *ascii_]
        unk = ROLES["unk_token"]
        if kind == "unigram":
            model = models.Unigram([(entry, 0.0) for entry in vocab], vocab.index(unk), byte_fallback=True)
            tokenizer = Tokenizer(model)
        else:
            ids = {entry: i for i, entry in enumerate(vocab)}
            tokenizer = Tokenizer(models.BPE(ids, [], unk_token=unk, fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in special])
    bos = ROLES["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    roles = {role: token for role, token in ROLES.items() if token in special}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    return Source(wrapped, json.loads(tokenizer.to_str()), "kind")


def _unigram(start: Source, texts: Iterable[str], size: int) -> Source:
    """The tokenizer with pieces and their log-probabilities; bytes and special tokens are the least likely."""
    fixed, unk = start.entries, ROLES["unk_token"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=[unk],
        unk_token=unk,
        max_piece_length=SENTENCEPIECE_LENGTH,
        show_progress=False,
    )
    tokenizer = start.plain
    tokenizer.model = models.Unigram()
    tokenizer.train_from_iterator(bounded_pieces(texts), trainer)
    learned = {entry: score for entry, score in json.loads(tokenizer.to_str())["model"]["vocab"] if entry != unk}
    low = min(learned.values()) - LOW
    pieces = [(entry, learned.pop(entry, low)) for entry in fixed]
    pieces += sorted(learned.items(), key=lambda item: (-item[1], item[0]))[: size - len(fixed)]
    backend = start.backend | {"model": start.backend["model"] | {"vocab": pieces}}
    return Source(start.tokenizer, backend, start.argument)
