"""Both sides of every segment have the same text, up to what the tokenizers themselves make alike."""

import itertools
import sys
import unicodedata
from functools import cache, partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import REAL_TOKENIZERS
from tiny import TEXTS, byte_level
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from matt_fast.alignment.offsets import _close_gaps, _encoders, _joins, _widen, tokenize
from matt_fast.alignment.segments import align_segments

VIETNAMESE = "Tiếng Việt được nhiều người nói: Nguyễn, phở, Đà Nẵng"
KOREAN = "한국어 값이 비싸다"
DECOMPOSED = [
    "cafe\u0301s",
    "a\u0301\u0323x a\u0323\u0301x",  # the marks change places when they are composed
    unicodedata.normalize("NFD", VIETNAMESE),
    unicodedata.normalize("NFD", KOREAN) + "x",
    unicodedata.normalize("NFD", "がぎぐ ἄνθρωπος å क़"),
    "ㅋㅏx ｶﾞx ﾡￂx",  # composed by compatibility only
    "กำ ก่ก้ हिन्दी ক\u09c7\u09be",
    "\u0301x",
]


def trained(normalizer=None, trim=False):
    tokenizer = byte_level(TEXTS + [VIETNAMESE, KOREAN] * 4, 420, eos_token="<e>")
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.post_processor = processors.ByteLevel(trim_offsets=trim)
    if trim:  # then tokens can end with the space behind a word
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.train_from_iterator(
            TEXTS,
            trainers.BpeTrainer(
                vocab_size=500,
                special_tokens=["<e>"],
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>")


MADE = {
    "plain": trained,
    "trimming": partial(trained, trim=True),
    "NFC": partial(trained, normalizers.NFC()),
    "NFKC": partial(trained, normalizers.NFKC()),
    "NFD": partial(trained, normalizers.NFD()),
    "NFKD": partial(trained, normalizers.NFKD()),
    "NFC, then lower case": partial(
        trained, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), trim=True
    ),
}
EXACT = {
    name: REAL_TOKENIZERS[name]
    for name in ("byte-bpe", "byte-bpe-nfkc", "sentencepiece-bpe", "tekken", "unigram-byte-fallback")
}
NAMES = [*MADE, *EXACT]
PAIRS = list(itertools.combinations(NAMES, 2))


@cache
def tokenizer_of(name):
    return (MADE | EXACT)[name]()


@cache
def encoder_of(name):
    """What `tokenize` has made of it, which takes longer than all of these tests."""
    tokenize(tokenizer_of(name), ["x"])
    return _encoders[tokenizer_of(name)]


texts = st.lists(
    st.one_of(
        st.sampled_from(["e", "a\u0301", "o\u0323\u0302", "\u0301", "\u0323", "\u0345", "x", "A", "ﬁ", "ß"]),
        st.sampled_from([unicodedata.normalize("NFD", word) for word in (VIETNAMESE + KOREAN).split()]),
        st.sampled_from([" ", "  ", "\n", "\t", ");\n", "_", "7", "日", "👍🏽", "\u200d", "ｶ", "ﾞ", "ㅋ", "ㅏ"]),
        st.integers(0x1100, 0x11FF).map(chr),
        st.integers(0x0300, 0x036F).map(chr),
    ),
    min_size=1,
    max_size=14,
).map("".join)


def folded(text):
    """The text as the strongest of the normalisers above leaves it; one of them drops joiners."""
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).lower()).replace("\u200d", "")


def check(text, pair):
    sides = [tokenize(tokenizer_of(name), [text]) for name in pair]
    ids, segments = [side[0][0] for side in sides], align_segments(*(side[1][0] for side in sides))
    for k in range(segments[0].max(initial=-1) + 1):
        parts = [
            b"".join(encoder_of(name).pieces[i] for i in own[of == k])
            for name, own, of in zip(pair, ids, segments, strict=True)
        ]
        left, right = (folded(part.decode()) for part in parts)  # whole characters, on both sides
        if k == 0:  # SentencePiece puts a space before the text
            left, right = left.lstrip(" "), right.lstrip(" ")
        assert left == right, (pair, text, parts)


def test_segments_of_decomposed_text():
    for pair, text in itertools.product(PAIRS, DECOMPOSED):
        check(text, pair)


@settings(max_examples=300, deadline=None)
@given(text=texts, pair=st.sampled_from(PAIRS))
def test_segments_of_any_marks_and_jamo(text, pair):
    check(text, pair)


def test_a_space_that_is_trimmed_off_the_end_of_its_token_stays_with_it():
    raw = Tokenizer(models.BPE({"x": 0, "Ġ": 1, "y": 2, "xĠ": 3}, [("x", "Ġ")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder, raw.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert tokenizer("x y", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (2, 3)]
    before = tokenizer.backend_tokenizer.to_str()
    (ids,), (offsets,) = tokenize(tokenizer, ["x y"])
    assert (ids.tolist(), offsets.tolist()) == ([3, 2], [[0, 2], [2, 3]])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_segments_stay_as_fine_as_they_were_where_nothing_is_composed():
    """Marks of Thai and points of Hebrew have no composed form that NFC would take: tokens may end between them."""
    text = "ก่ก้ שָׁלוֹם"
    plain, composing = (tokenize(tokenizer_of(name), [text])[1][0] for name in ("plain", "NFC"))
    assert composing.tolist() == plain.tolist()
    assert len(np.unique(composing[:, 0])) == len(text)


def test_every_character_that_composing_takes_into_the_one_before_is_known():
    for code in range(sys.maxunicode + 1):
        parts = unicodedata.normalize("NFD", chr(code))
        if len(parts) > 1 and unicodedata.normalize("NFC", parts) == chr(code):
            assert all(map(_joins, parts[1:])), hex(code)


def test_characters_that_a_tokenizer_drops_belong_to_the_token_behind_them():
    bert = REAL_TOKENIZERS["wordpiece-uncased"]()
    _, (offsets,) = tokenize(bert, ["  cafe\u0301\u200b bar\n\nx "])
    assert offsets.tolist() == [[0, 7], [7, 12], [12, 15]]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*TEXTS, *DECOMPOSED, "", "<e>", "x<e> ", "\u00a0\x00"]) | texts, min_size=1, max_size=6)
)
def test_offsets_counted_in_bytes_are_those_that_the_tokenizer_tracks(documents):
    for name in NAMES:
        encoder = encoder_of(name)
        tracked = encoder.backend.encode_batch(documents, add_special_tokens=False)
        for text, counted, expected in zip(documents, encoder.by_bytes(documents), tracked, strict=True):
            if counted is not None:
                ids, spans = counted
                wanted = np.array(expected.offsets, np.int64).reshape(-1, 2)
                if encoder.backend.normalizer is not None:
                    spans, wanted = (_widen(x, text, encoder.backend.normalizer) for x in (spans, wanted))
                assert ids.tolist() == expected.ids
                assert _close_gaps(spans).tolist() == _close_gaps(wanted).tolist(), (name, text)


def test_which_tokenizers_need_not_track_characters():
    assert {name for name in NAMES if encoder_of(name).by_bytes(TEXTS)[0] is not None} >= {"plain", "NFC"}
    sentencepiece = encoder_of("sentencepiece-bpe")  # puts a space before the text
    assert sentencepiece.by_bytes(["a b"]) == [None]
    assert encoder_of("NFC").by_bytes(["cafe\u0301"]) == [None]


def test_a_tokenizer_that_gets_tokens_is_read_anew():
    tokenizer = byte_level(TEXTS, 300, eos_token="<e>")
    assert len(tokenize(tokenizer, ["a<new>b"])[0][0]) > 3
    tokenizer.add_tokens(["<new>"])
    (ids,), (offsets,) = tokenize(tokenizer, ["a<new>b"])
    assert (len(ids), offsets.tolist()) == (3, [[0, 1], [1, 6], [6, 7]])
