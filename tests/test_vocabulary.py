"""Tokens as bytes, checked against the texts they come from; matching and spelling against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import REAL_TOKENIZERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matt_fast.alignment.vocabulary import (
    Token,
    VocabularyPair,
    check_fast,
    check_round_trip,
    match_tokens,
    special_affixes,
    spell_tokens,
    token_bytes,
)

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
    with pytest.raises(ValueError, match="tokenizer: wanted a tokenizer that keeps spaces"):
        check_round_trip(REAL_TOKENIZERS["wordpiece-uncased"](), "tokenizer")
    # A byte-level vocabulary declared as a SentencePiece one, as in transformers issue 45488.
    wrong = Tokenizer.from_str(REAL_TOKENIZERS["byte-bpe"]().backend_tokenizer.to_str())
    wrong.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(ValueError, match="keeps spaces"):
        check_round_trip(PreTrainedTokenizerFast(tokenizer_object=wrong), "tokenizer")


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
