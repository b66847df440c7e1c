"""Tokens as bytes, checked against the texts they come from; matching and spelling against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import REAL_TOKENIZERS
from tiny import TEXTS, byte_level
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matt_fast.alignment.vocabulary import (
    Token,
    VocabularyPair,
    check_constant,
    check_fast,
    check_ids,
    check_round_trip,
    match_tokens,
    special_affixes,
    spell_tokens,
    token_bytes,
)
from matt_fast.show.pieces import find_segments

LOSSLESS = {"byte-bpe": b"", "tekken": b"", "sentencepiece-bpe": b" "}  # what each puts before a text
TOKENS = {}


def tokens_of(name):
    if name not in TOKENS:
        TOKENS[name] = token_bytes(REAL_TOKENIZERS[name]())
    return TOKENS[name]


def word_level(vocab, special=(), **options):
    tokenizer = Tokenizer(models.WordLevel({**vocab, "<unk>": len(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(name, text):
    tokenizer = REAL_TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if any(tokens_of(name)[i].kind == "special" for i in ids):
        return  # a control token written out
    joined = b"".join(tokens_of(name)[i].bytes for i in ids)
    assert joined == (LOSSLESS[name] + text.encode() if text else b"")


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_every_id_has_a_token_and_special_ones_are_told_apart(name):
    tokenizer, tokens = REAL_TOKENIZERS[name](), tokens_of(name)
    assert set(tokens) == set(tokenizer.get_vocab().values())
    for i in special_affixes(tokenizer)[0] + special_affixes(tokenizer)[1]:
        assert tokens[i].kind == "special"


@pytest.mark.parametrize(("student", "teacher"), [("tekken", "byte-bpe"), ("sentencepiece-bpe", "tekken")])
def test_matches_are_all_tokens_with_equal_bytes_and_no_others(student, teacher):
    theirs, ours = tokens_of(teacher), tokens_of(student)
    matches = match_tokens(REAL_TOKENIZERS[student](), REAL_TOKENIZERS[teacher]())
    of_text = {token.bytes for token in theirs.values() if token.kind != "special"}
    specials = {token.bytes for token in theirs.values() if token.kind == "special"}
    for i, token in ours.items():
        known = specials if token.kind == "special" else of_text
        assert (i in matches) == (token.bytes in known), token
        if i in matches:
            assert theirs[matches[i].teacher_id].bytes == token.bytes


def test_byte_fragments_are_not_merged_by_their_replacement_sign():
    tokenizer = REAL_TOKENIZERS["byte-bpe"]()
    matches = match_tokens(tokenizer, tokenizer)
    assert {i: match.teacher_id for i, match in matches.items()} == {i: i for i in matches}
    fragments = [i for i in matches if tokenizer.decode([i]) == "�"]
    assert len(fragments) > 100  # all alike to a reader of strings


def test_a_byte_token_and_its_letter_match_but_not_the_control_token_written_alike():
    teacher = REAL_TOKENIZERS["sentencepiece-bpe"]()  # has <0x41> and A
    ids = teacher.get_vocab()
    assert token_bytes(teacher)[ids["<0x41>"]] == Token("byte", b"A")
    student = word_level({"A": 0, "<s>": 1, "Ġthe": 2})
    matches = match_tokens(student, teacher)
    assert matches[0].teacher_id == ids["A"]
    assert matches[2].teacher_id == ids["▁the"]
    assert 1 not in matches  # text here, control token there


def test_special_tokens_match_by_text_and_else_by_role():
    teacher = word_level({"a": 0}, special=["<s>", "<pad>"], bos_token="<s>", pad_token="<pad>")
    student = word_level({"a": 0}, special=["<bos>", "<pad>"], bos_token="<bos>", pad_token="<pad>")
    matches = match_tokens(student, teacher)
    assert (matches[2].teacher_id, matches[2].how) == (2, "role")
    assert (matches[3].teacher_id, matches[3].how) == (3, "bytes")


@pytest.mark.parametrize("teacher", ["byte-bpe", "sentencepiece-bpe", "unigram-byte-fallback"])
def test_spelled_tokens_have_exactly_the_tokens_bytes(teacher):
    ours = tokens_of("tekken")
    some = {int(i): ours[int(i)] for i in np.random.default_rng(0).choice(sorted(ours), 3000, replace=False)}
    some |= {i: token for i, token in ours.items() if len(token.bytes) == 1}
    spelled = spell_tokens(some, REAL_TOKENIZERS[teacher](), teacher_rows=1 << 30)
    theirs = tokens_of(teacher)
    for i, ids in spelled.items():
        assert b"".join(theirs[t].bytes for t in ids) == some[i].bytes
    # Byte-level and byte-fallback vocabularies spell everything but control tokens and bytes that no text has.
    missing = [token for i, token in some.items() if i not in spelled and token.kind != "special"]
    assert all(token.bytes[0] in b"\xc0\xc1" or token.bytes[0] >= 0xF5 for token in missing)


def test_rows_that_the_model_does_not_have_are_not_used():
    teacher = word_level({"a": 0, "b": 1, "c": 2})
    student = word_level({"c": 0, "b": 1})
    matches = match_tokens(student, teacher)
    assert {i: matches[i].teacher_id for i in (0, 1)} == {0: 2, 1: 1}
    assert spell_tokens({0: Token("text", b"c")}, teacher, teacher_rows=2) == {}


def test_padding_rows_and_missing_rows():
    tokenizer = REAL_TOKENIZERS["byte-bpe-trimmed-offsets"]()
    size = len(tokenizer)
    padded = VocabularyPair(tokenizer, tokenizer, teacher_rows=size + 64)
    assert padded.rows == size
    assert len(padded.matches) == size
    short = VocabularyPair(tokenizer, tokenizer, teacher_rows=size - 10)
    assert len(short.matches) == size - 10
    assert all(max(ids) < size - 10 for ids in short.subtokens.values())
    assert len(short.subtokens) == 10


def test_affixes():
    assert special_affixes(REAL_TOKENIZERS["wordpiece-uncased"]()) == ([101], [102])
    assert special_affixes(REAL_TOKENIZERS["tekken"]()) == ([1], [])
    assert special_affixes(REAL_TOKENIZERS["byte-bpe"]()) == ([], [])


def test_a_tokenizer_that_loses_spaces_is_refused():
    check_round_trip(REAL_TOKENIZERS["sentencepiece-bpe"](), "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer: wanted a tokenizer that keeps spaces.*WordPiece does not tell"):
        check_round_trip(REAL_TOKENIZERS["wordpiece-uncased"](), "tokenizer")
    # A byte-level vocabulary declared as a SentencePiece one, as in transformers issue 45488.
    wrong = Tokenizer.from_str(REAL_TOKENIZERS["byte-bpe"]().backend_tokenizer.to_str())
    wrong.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(ValueError, match="keeps spaces"):
        check_round_trip(PreTrainedTokenizerFast(tokenizer_object=wrong), "tokenizer")


def test_white_space_may_become_one_space(recwarn):
    """As XLM-RoBERTa's and T5's normalizers do; segments are of the same text all the same."""
    sides = REAL_TOKENIZERS["unigram-nfkc"](), REAL_TOKENIZERS["byte-bpe"]()
    check_round_trip(sides[0], "teacher")
    assert not recwarn
    with pytest.warns(UserWarning, match=r"tokenizer: it does not keep line ends and runs of spaces \('a b  c"):
        check_round_trip(sides[0], "tokenizer")
    text = "one  two\n\n\tthree:\n    four"
    found = find_segments(text, *sides).segments
    assert "".join(x.text for x in found) == text
    assert [x.text for x in found][:2] == ["one", "  two"]
    assert all(x.old and x.new for x in found)


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"teacher: wanted a fast tokenizer .* got Slow"):
        check_fast(Slow(), "teacher")


def test_an_unknown_decoder_is_an_error():
    tokenizer = word_level({"a": 0})
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="CTC"):
        token_bytes(tokenizer)


# What strangers' tokenizers do ----------------------------------------------------------------------------------------


def spaces_as_added_tokens(runs=("▁▁", "▁▁▁"), special=False):
    """Like Gemma's: runs of spaces are tokens of the BPE model and listed under added_tokens."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz_1(),x\n"]
    entries = list(dict.fromkeys(["<eos>", *[f"<0x{b:02X}>" for b in range(256)], *letters, *runs]))
    merges = [("▁", "▁"), ("▁▁", "▁")]
    raw = Tokenizer(models.BPE({x: i for i, x in enumerate(entries)}, merges, byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(["<eos>"])
    raw.add_tokens([AddedToken(run, normalized=False, special=special) for run in runs])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def test_added_tokens_stand_for_what_the_decoder_makes_of_them():
    gemma = spaces_as_added_tokens()
    raw, tokens = gemma.backend_tokenizer, token_bytes(gemma)
    for run in (2, 3):
        (token,) = gemma(" " * run, add_special_tokens=False)["input_ids"]
        assert tokens[token] == Token("text", raw.decode([token], skip_special_tokens=False).encode())
    student = byte_level(["a  b   c    d        e\n    f"] * 20, 300, eos_token="<eos>")
    pair = VocabularyPair(gemma, student, len(gemma))
    theirs, ours = gemma.get_vocab(), student.get_vocab()
    for run in (1, 2, 3):
        assert pair.matches[ours["Ġ" * run]].teacher_id == theirs["▁" * run]
    four = gemma("    ", add_special_tokens=False)["input_ids"]
    assert pair.subtokens[ours["ĠĠĠĠ"]] == four == [theirs["▁▁"], theirs["▁▁"]]


@pytest.mark.parametrize("text", ["  ", "\n\n\n", "café", "日本", "the end", "Ġthe", "<think>"])
def test_added_tokens_of_a_byte_level_tokenizer(text):
    tokenizer = word_level({"a": 0})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.backend_tokenizer.decode([token])
    wanted = text if "�" in decoded else decoded  # "é" alone is a byte of the alphabet
    assert token_bytes(tokenizer)[token] == Token("text", wanted.encode())


def test_special_runs_of_spaces_stay_special():
    tokenizer = spaces_as_added_tokens(special=True)
    assert token_bytes(tokenizer)[tokenizer.get_vocab()["▁▁"]].kind == "special"


def test_huge_holes_between_ids_are_refused_and_small_ones_are_not():
    check_ids({0: Token("text", b"a"), 32_000: Token("text", b"b")}, "tokenizer")
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "far": 20_000_000}, unk_token="a"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with pytest.raises(ValueError, match=r"^tokenizer: wanted ids without large holes.* 20,000,000 \('far'\)"):
        check_ids(token_bytes(PreTrainedTokenizerFast(tokenizer_object=raw)), "tokenizer")


def test_dropout_is_refused():
    tokenizer = spaces_as_added_tokens()
    tokenizer.backend_tokenizer.model.dropout = 0.3
    assert len({tuple(tokenizer("      ")["input_ids"]) for _ in range(50)} | {()}) > 1
    other = byte_level(TEXTS, 280, eos_token="<eos>")
    for pair, name in (((tokenizer, other), "teacher"), ((other, tokenizer), "tokenizer")):
        with pytest.raises(ValueError, match=f"^{name}: wanted one that always gives .* a dropout of 0.3"):
            VocabularyPair(*pair, 300)
    tokenizer.backend_tokenizer.model.dropout = 0.0
    check_constant(tokenizer, "tokenizer")
