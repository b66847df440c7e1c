# ruff: noqa: RUF001 - look-alike characters are what is shown
"""What a tokenizer's tokens are, byte for byte: which bytes each id stands for, and which tokens two tokenizers share.

Tokens are matched by their bytes and never by a decoded string: fragments of multi-byte characters all decode to the
same replacement sign, so that unrelated tokens would seem equal.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from matt_fast.support.printable import visible

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BYTE_LEVEL = bytes_to_unicode()
BYTE_OF = {character: byte for byte, character in BYTE_LEVEL.items()}
PROBE = "a b  c\n    return x_1, (y)"  # which a tokenizer should encode and decode to itself
# Single tokens with a role in the model, matched by the role where their texts differ ("<s>" and "<bos>").
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
HOLES, FEW_TOKENS = 2, 1 << 14  # rows that a tokenizer may ask for: so many times its tokens, and these more


Kind = Literal["text", "byte", "special"]


class Token(NamedTuple):
    """What an id stands for. Two tokens mean the same when both fields are equal.

    `kind` keeps apart what is written alike: the control token "<s>", and the text "<s>"; the byte token "<0x41>" of a
    byte fallback, and the letter "A".
    """

    kind: Kind
    bytes: bytes


@dataclass(frozen=True)
class Match:
    """Where a student token was found in the teacher's vocabulary."""

    teacher_id: int
    how: Literal["bytes", "role"]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, Token]:
    """The bytes of every id of a fast tokenizer, special and added tokens included.

    Args:
        tokenizer: a fast tokenizer, byte-level BPE, SentencePiece style (BPE or Unigram, with or without byte
            fallback), WordPiece, or a plain word list.

    Returns:
        id -> Token. Ids need not be consecutive. An added token that is not special stands for what the decoder makes
        of it, as any other does: "▁▁", of which Gemma lists whole runs, for two spaces.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: its decoder is of a kind whose tokens cannot be turned into bytes, or two tokens have one id.
    """
    check_fast(tokenizer, "tokenizer")
    check_distinct_ids(tokenizer, "tokenizer")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    read = _notation(backend).read
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    tokens = {}
    for text, token_id in tokenizer.get_vocab().items():
        if token_id in added and added[token_id]["special"]:
            tokens[token_id] = Token("special", text.encode())
        else:
            tokens[token_id] = read(text)
            # a byte-level tokenizer finds its added token "é" in texts as it is, and decodes it to half a character
            if token_id in added and tokens[token_id].kind == "text" and not _is_text(tokens[token_id].bytes):
                tokens[token_id] = Token("text", text.encode())
    return tokens


def show_token(token: Token | None) -> str:
    """A token as it is shown to people: `visible`, or "‹E3 81›", its bytes, where they are no whole characters."""
    if token is None:
        return "‹?›"
    if not token.bytes:
        return "‹›"
    try:
        return visible(token.bytes.decode())
    except UnicodeDecodeError:
        return f"‹{token.bytes.hex(' ').upper()}›"


def match_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[int, Match]:
    """Find each student token in the teacher's vocabulary by its bytes.

    A token that only one side writes as a byte of its byte fallback still matches. Special tokens match by their text,
    else by their role (beginning, end, padding, ...), and only with special tokens. Where several teacher ids have the
    same bytes, the lowest one of the same kind is taken: it is the one that the vocabulary was trained with.

    Returns:
        student id -> Match, for the shared tokens only.

    Raises:
        TypeError, ValueError: as `token_bytes`, for either tokenizer.
    """
    return _match(token_bytes(student), token_bytes(teacher), student, teacher)


def _match(
    student_tokens: Mapping[int, Token],
    teacher_tokens: Mapping[int, Token],
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
) -> dict[int, Match]:
    by_token: dict[Token, int] = {}
    for teacher_id in sorted(teacher_tokens):
        by_token.setdefault(teacher_tokens[teacher_id], teacher_id)
    other: dict[Kind, Kind] = {"text": "byte", "byte": "text", "special": "special"}
    matches: dict[int, Match] = {}
    for student_id, token in student_tokens.items():
        found = by_token.get(token, by_token.get(Token(other[token.kind], token.bytes)))
        if found is not None:
            matches[student_id] = Match(found, "bytes")
    for role in ROLES:
        ours, theirs = getattr(student, f"{role}_id", None), getattr(teacher, f"{role}_id", None)
        if ours is not None and theirs is not None:
            matches.setdefault(ours, Match(theirs, "role"))
    return matches


def spell_tokens(
    student_tokens: Mapping[int, Token], teacher: PreTrainedTokenizerBase, teacher_rows: int
) -> dict[int, list[int]]:
    """The teacher ids that spell each student token, byte for byte.

    A token is encoded as text by the teacher's whole pipeline. Where the result does not have the token's own bytes (a
    space that a SentencePiece tokenizer puts in front, a fragment of a multi-byte character), the teacher's model is
    given the token alone, and last its byte tokens.

    Args:
        student_tokens: from `token_bytes`. Special tokens are not spelled.
        teacher: the teacher's fast tokenizer.
        teacher_rows: rows of the teacher's embedding; ids beyond them do not count.

    Returns:
        student id -> teacher ids, for the tokens that the teacher can spell.
    """
    return _spell(student_tokens, token_bytes(teacher), teacher, teacher_rows)


def _spell(
    student_tokens: Mapping[int, Token],
    teacher_tokens: Mapping[int, Token],
    teacher: PreTrainedTokenizerBase,
    teacher_rows: int,
) -> dict[int, list[int]]:
    teacher_tokens = {i: token for i, token in teacher_tokens.items() if i < teacher_rows}
    by_token = {token: i for i, token in sorted(teacher_tokens.items(), reverse=True)}
    write = _notation(json.loads(teacher.backend_tokenizer.to_str())).write
    wanted = {i: token.bytes for i, token in student_tokens.items() if token.kind != "special" and token.bytes}
    texts = {i: text for i, text in ((i, _write_text(b, str)) for i, b in wanted.items()) if text is not None}
    encoded = teacher(list(texts.values()), add_special_tokens=False)["input_ids"] if texts else []
    pipeline = dict(zip(texts, encoded, strict=True))

    def attempts(student_id: int):
        yield pipeline.get(student_id)
        entry = write(wanted[student_id])
        yield None if entry is None else [piece.id for piece in teacher.backend_tokenizer.model.tokenize(entry)]
        single = (bytes([byte]) for byte in wanted[student_id])
        yield [by_token.get(Token("byte", byte), by_token.get(Token("text", byte))) for byte in single]

    pieces = {}
    for student_id in wanted:
        for ids in attempts(student_id):
            if _spells(ids, wanted[student_id], teacher_tokens):
                pieces[student_id] = list(ids)
                break
    return pieces


def _spells(ids: Sequence[int | None] | None, wanted: bytes, teacher_tokens: Mapping[int, Token]) -> bool:
    tokens = [teacher_tokens.get(i) for i in ids or () if i is not None]
    if not ids or len(tokens) < len(ids):
        return False
    return all(tokens) and b"".join(token.bytes for token in tokens if token) == wanted


def vocabulary_rows(tokens: Mapping[int, Token]) -> int:
    """Embedding rows that a model needs for these ids: the largest id plus one, which can exceed their number."""
    return max(tokens) + 1


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer puts before and after a text: for many decoders ([bos], [])."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    mask = encoded["special_tokens_mask"]
    text = [position for position, special in enumerate(mask) if not special]
    return encoded["input_ids"][: text[0]], encoded["input_ids"][text[-1] + 1 :]


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a model is given before a text: the tokenizer's own prefix, else its bos token, else its eos token."""
    prefix, _ = special_affixes(tokenizer)
    if prefix:
        return prefix
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if start is None else [start]


def check_fast(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise TypeError unless `tokenizer` is a fast one, the only kind that gives character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{name}: wanted a fast tokenizer (tokenizer.json; only these give character offsets), got "
            f"{type(tokenizer).__name__}. Convert it once with transformers' from_slow=True"
        )


def check_constant(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError if a fast tokenizer gives a text other tokens each time: BPE dropout was left on."""
    dropout = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
    if dropout:
        raise ValueError(
            f"{name}: wanted one that always gives a text the same tokens, got BPE with a dropout of {dropout:g}. "
            "Switch it off and save the tokenizer: `tokenizer.backend_tokenizer.model.dropout = None`"
        )


def check_distinct_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError if two tokens have one id, which is one embedding row.

    `tokenizers` gives an added token that its vocabulary lacks the id behind as many as the vocabulary has tokens, also
    while it loads a file that says another one. Where ids are missing in the vocabulary, that one is another token's.
    """
    vocab = tokenizer.get_vocab()
    if len(set(vocab.values())) == len(vocab):
        return
    tokens: dict[int, list[str]] = {}
    for entry, token_id in vocab.items():
        tokens.setdefault(token_id, []).append(entry)
    shared = {token_id: sorted(entries) for token_id, entries in sorted(tokens.items()) if len(entries) > 1}
    token_id, entries = next(iter(shared.items()))
    raise ValueError(
        f"{name}: wanted tokens with ids of their own, got {' and '.join(map(repr, entries))} with the id {token_id}"
        + (f", and {len(shared) - 1:,} more such ids" if len(shared) > 1 else "")
        + ". Added tokens are counted on from the number of tokens, which gives ids that are taken where others are "
        "missing: write them into the vocabulary of tokenizer.json under free ids, or take matt-fast tokenizer extend "
        "--words in place of add_tokens"
    )


def check_ids(tokens: Mapping[int, Token], name: str) -> None:
    """Raise ValueError if most embedding rows for these ids would have no token: ids leave huge holes."""
    rows = vocabulary_rows(tokens)
    if rows > HOLES * (len(tokens) + FEW_TOKENS):
        last = tokens[rows - 1].bytes.decode(errors="replace")
        raise ValueError(
            f"{name}: wanted ids without large holes, since a model has an embedding row for each up to the largest; "
            f"got {len(tokens):,} tokens and the id {rows - 1:,} ({last!r})"
        )


def check_round_trip(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError if encoding and decoding a text joins or parts words, as a wrongly declared tokenizer does.

    One space in front is let pass, which SentencePiece adds by design. White space that becomes one space, as by the
    normalizers of XLM-RoBERTa and T5, is a warning where the result will write so.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    decoded = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    found, wanted = decoded.removeprefix(" ").casefold(), PROBE.casefold()
    if found.split() != wanted.split():
        kind = type(tokenizer.backend_tokenizer.model).__name__
        why = (
            "WordPiece does not tell where spaces were"
            if kind == "WordPiece"
            else "Its pre-tokenizer, decoder or declared class does not fit its vocabulary"
        )
        raise ValueError(f"{name}: wanted a tokenizer that keeps spaces, but {PROBE!r} came back as {decoded!r}. {why}")
    if found != wanted and name == "tokenizer":
        warnings.warn(
            f"{name}: it does not keep line ends and runs of spaces ({PROBE!r} came back as {decoded!r}), so what the "
            "model writes will not have them, and bits per byte leave them out",
            stacklevel=3,
        )


class _Notation(NamedTuple):
    """How a vocabulary writes its tokens: entry -> Token, and bytes -> entry (None where they cannot be written)."""

    read: Callable[[str], Token]
    write: Callable[[bytes], str | None]


def _notation(backend: dict) -> _Notation:
    """The notation of a vocabulary, told by the tokenizer's decoder."""
    decoder, model = backend["decoder"], backend["model"]
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        return _Notation(_read_byte_level, lambda wanted: "".join(BYTE_LEVEL[byte] for byte in wanted))
    if kinds.keys() & {"Metaspace", "Replace", "ByteFallback"}:
        space = kinds.get("Metaspace", {}).get("replacement", "▁")
        fallback = "ByteFallback" in kinds or bool(model.get("byte_fallback"))
        return _Notation(
            lambda entry: _read_sentencepiece(entry, space, fallback),
            lambda wanted: _write_text(wanted, lambda text: text.replace(" ", space)),
        )
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"]["prefix"]
        return _Notation(
            lambda entry: Token(
                "text", (entry.removeprefix(prefix) if entry.startswith(prefix) else " " + entry).encode()
            ),
            lambda wanted: _write_text(wanted, lambda text: text[1:] if text.startswith(" ") else prefix + text),
        )
    if "BPEDecoder" in kinds:
        suffix = kinds["BPEDecoder"]["suffix"]
        return _Notation(
            lambda entry: Token(
                "text", (entry.removesuffix(suffix) + " " if entry.endswith(suffix) else entry).encode()
            ),
            lambda wanted: _write_text(wanted, lambda text: text[:-1] + suffix if text.endswith(" ") else text),
        )
    if kinds.keys() <= {"Fuse", "Strip"}:
        return _Notation(lambda entry: Token("text", entry.encode()), lambda wanted: _write_text(wanted, str))
    raise ValueError(f"tokenizer: its decoder {sorted(kinds)} is of a kind whose tokens cannot be read as bytes")


def _read_byte_level(entry: str) -> Token:
    try:
        return Token("text", bytes([BYTE_OF[character] for character in entry]))
    except KeyError:  # a whole word that was put into the vocabulary as it is
        return Token("text", entry.encode())


def _read_sentencepiece(entry: str, space: str, byte_fallback: bool) -> Token:
    if byte_fallback and (byte := BYTE_TOKEN.fullmatch(entry)):
        return Token("byte", bytes([int(byte[1], 16)]))
    return Token("text", entry.replace(space, " ").encode())


def _is_text(wanted: bytes) -> bool:
    return _write_text(wanted, str) is not None


def _write_text(wanted: bytes, to_entry: Callable[[str], str]) -> str | None:
    try:
        return to_entry(wanted.decode())
    except UnicodeDecodeError:
        return None


class VocabularyPair:
    """The two vocabularies of a transfer and what they share.

    Args:
        teacher, student: fast tokenizers.
        teacher_rows: rows of the teacher's embedding. Tokens with ids beyond them do not exist for the model; rows
            beyond the tokens (padding) are not used.

    Attributes:
        tokens, teacher_tokens: student id -> Token, teacher id -> Token.
        rows: embedding rows that the student needs.
        matches: student id -> Match, the shared tokens.
        subtokens: student id -> teacher ids that spell it, for the new tokens that the teacher can spell.
        mapped: student id -> teacher ids that its row starts from, for new tokens of which someone says so
            (`map_tokens`).
        own: those whose row is the model's own, which trains on (`own_rows`).

    Raises:
        TypeError: a tokenizer is not a fast one.
        ValueError: a tokenizer loses spaces or draws its tokens at random, its tokens cannot be read as bytes, or the
            student's ids leave huge holes.
    """

    def __init__(self, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_rows: int):
        for name, tokenizer in (("teacher", teacher), ("tokenizer", student)):
            check_fast(tokenizer, name)
            check_constant(tokenizer, name)
            check_distinct_ids(tokenizer, name)
            check_round_trip(tokenizer, name)
        self.teacher, self.student, self.teacher_rows = teacher, student, teacher_rows
        self.tokens, self.teacher_tokens = token_bytes(student), token_bytes(teacher)
        check_ids(self.tokens, "tokenizer")
        self.rows = vocabulary_rows(self.tokens)
        matches = _match(self.tokens, self.teacher_tokens, student, teacher)
        self.matches = {i: match for i, match in matches.items() if match.teacher_id < teacher_rows}
        self.mapped: dict[int, list[int]] = {}
        self.own: set[int] = set()
        self.subtokens = _spell({i: self.tokens[i] for i in self.new}, self.teacher_tokens, teacher, teacher_rows)

    @property
    def new(self) -> list[int]:
        """Student ids of the tokens that the teacher does not have."""
        return [i for i in self.tokens if i not in self.matches]
