"""Bits per byte against a model whose probabilities are known, and pieces that lose nothing."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXTS, byte_level, new_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from matt_fast.evaluation.bits_per_byte import cut_pieces, evaluate


class BigramModel:
    """Gives token b after token a the probability of a table, as logits with an arbitrary level."""

    device = torch.device("cpu")

    def __init__(self, size):
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).softmax(-1)

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.table)

    def __call__(self, input_ids):
        return SimpleNamespace(logits=self.table[input_ids].log() + 3.0)


@pytest.mark.parametrize("bos", [True, False])
def test_bits_per_byte_is_the_sum_over_all_tokens_of_the_text(bos):
    tokenizer = new_tokenizer() if bos else byte_level(TEXTS, 300, eos_token="<eos>")
    start = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    model = BigramModel(len(tokenizer))
    nats = n_tokens = 0
    for piece in cut_pieces(TEXTS, 64):
        ids = [start, *tokenizer(piece, add_special_tokens=False)["input_ids"]]
        n_tokens += len(ids) - 1
        nats -= sum(math.log(model.table[a, b]) for a, b in itertools.pairwise(ids))
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    result = evaluate(model, tokenizer, TEXTS, piece_bytes=64)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert (result.n_bytes, result.n_tokens) == (n_bytes, n_tokens)
    assert result.bytes_per_token == pytest.approx(n_bytes / n_tokens)


@given(st.lists(st.text(), max_size=4), st.integers(4, 20))
def test_pieces_join_to_the_document(documents, piece_bytes):
    pieces = list(cut_pieces(documents, piece_bytes))
    assert all(len(piece.encode()) <= piece_bytes for piece in pieces)
    kept = "".join("".join(pieces).split())
    assert kept == "".join("".join(documents).split())  # only pieces of white space are left out


def test_pieces_end_with_a_line_where_they_can():
    assert list(cut_pieces(["ab\ncd\nefghijk"], 7)) == ["ab\ncd\n", "efghijk"]


def test_the_number_of_pieces_can_be_bounded():
    tokenizer = new_tokenizer()
    result = evaluate(BigramModel(len(tokenizer)), tokenizer, ["abc\n" * 10], piece_bytes=4, max_pieces=3)
    assert result.n_bytes == 12


def test_documents_without_text_are_passed_over_and_counted():
    tokenizer = new_tokenizer()
    model = BigramModel(len(tokenizer))
    found = evaluate(model, tokenizer, [None, TEXTS[0], "", TEXTS[1], " \n", None])
    assert found == replace(evaluate(model, tokenizer, TEXTS[:2]), without_text=4)


@pytest.mark.parametrize("masked", [False, True])
def test_more_tokens_than_positions_are_named(tmp_path, masked):
    """Not an index out of range, nor a figure that no model of these positions would give."""
    tokenizer = byte_level(TEXTS, 280, bos_token="<s>", mask_token="<mask>")
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=48, vocab_size=len(tokenizer))
    model = GPT2LMHeadModel(config).eval()
    fits = "日" * 15  # 45 bytes, as many tokens, and <s>
    lengths = [len(tokenizer(text)["input_ids"]) for text in (fits, fits + "日")]
    assert lengths[0] <= 48 < lengths[1]
    assert evaluate(model, tokenizer, [fits], masked=masked).n_tokens == lengths[0] - 1
    with pytest.raises(ValueError, match=f"piece_bytes: .* within the model's 48 positions.* has {lengths[1]} tokens"):
        evaluate(model, tokenizer, [fits + "日"], masked=masked)
    assert evaluate(model, tokenizer, [fits + "日"], masked=masked, piece_bytes=24).n_bytes == 48


@pytest.mark.parametrize(("name", "value"), [("max_pieces", 0), ("max_pieces", -3), ("piece_bytes", -1)])
def test_numbers_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: wanted at least"):
        evaluate(BigramModel(330), new_tokenizer(), TEXTS, **{name: value})


def test_bad_input_is_named():
    tokenizer = new_tokenizer()
    model = BigramModel(len(tokenizer))
    with pytest.raises(ValueError, match="documents: wanted text to score, got none"):
        evaluate(model, tokenizer, ["  "])
    with pytest.raises(ValueError, match="piece_bytes: wanted at least 4, got 3"):
        evaluate(model, tokenizer, TEXTS, piece_bytes=3)
    with pytest.raises(ValueError, match="tokenizer: wanted a bos or eos token"):
        evaluate(model, byte_level(TEXTS, 300), TEXTS)
    with pytest.raises(ValueError, match="tokenizer: wanted ids below the 100 rows of the embedding"):
        evaluate(BigramModel(100), tokenizer, TEXTS)
