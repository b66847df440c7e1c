"""Chunks against the documents they come from; reading of every format."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import REAL_TOKENIZERS
from tiny import TEXTS, byte_level, new_tokenizer

from matt_fast.alignment.segments import align_segments
from matt_fast.data.batches import collate
from matt_fast.data.chunks import Side, make_chunks
from matt_fast.data.documents import read_documents
from matt_fast.data.packing import Chunk
from matt_fast.data.stream import AlignedBatches

TEACHER = byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>")
STUDENT = new_tokenizer()


def sides(max_length, teacher=TEACHER, student=STUDENT):
    return Side("teacher", teacher, len(teacher), max_length), Side("student", student, len(student), max_length)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(TEXTS) | st.text(max_size=60), min_size=1, max_size=4), st.integers(8, 40))
def test_chunks_cut_documents_at_segment_boundaries_and_lose_nothing(documents, max_length):
    skipped = Counter()
    chunks = list(make_chunks(documents, *sides(max_length), skipped))
    expected = [document for document in documents if document and not document.isspace()]
    assert skipped["documents without text"] == len(documents) - len(expected)
    for field, tokenizer in (("teacher", TEACHER), ("student", STUDENT)):
        kept = []
        for chunk in chunks:
            ids, segments = getattr(chunk, f"{field}_ids"), getattr(chunk, f"{field}_segments")
            assert len(ids) == len(segments) <= max_length
            assert (ids[0], segments[0]) == (tokenizer.bos_token_id, -100)
            assert segments[1] == 0
            assert (segments[1:] >= 0).all()
            assert set(np.diff(segments[1:])) <= {0, 1}
            kept += ids[1:].tolist()
        if not skipped["segments longer than a chunk"]:
            whole = [i for text in expected for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert kept == whole
    for chunk in chunks:
        assert chunk.teacher_segments.max() == chunk.student_segments.max()


def test_a_chunks_segments_are_those_of_the_whole_document():
    text = TEXTS[2]
    encoded = [t(text, add_special_tokens=False, return_offsets_mapping=True) for t in (TEACHER, STUDENT)]
    whole, _ = align_segments(*(e["offset_mapping"] for e in encoded))
    chunks = list(make_chunks([text], *sides(20), Counter()))
    assert len(chunks) > 5
    joined, base = [], 0
    for chunk in chunks:
        joined += (chunk.teacher_segments[1:] + base).tolist()
        base += int(chunk.teacher_segments.max()) + 1
    assert joined == whole.tolist()


def test_a_text_that_begins_with_its_special_tokens_gets_no_others():
    """As a chat does that a template rendered: the beginning of text comes once, whichever side has it in the text."""
    student = byte_level(TEXTS, 300, bos_token="<bos>", eos_token="</s>")
    for text, side, other in (("<bos>def f<eos>", student, 1), ("<bos>def f<eos>", STUDENT, 2)):
        (chunk,) = make_chunks([text], *sides(32, student=side), Counter())
        whole = [x(text, add_special_tokens=False)["input_ids"] for x in (TEACHER, side)]
        assert chunk.teacher_ids.tolist() == whole[0]
        assert chunk.student_ids.tolist() == ([] if other == 1 else [side.bos_token_id]) + whole[1]
        assert chunk.teacher_segments[0] == 0
        assert chunk.teacher_segments.max() == chunk.student_segments.max()


def test_chunks_are_as_long_as_they_can_be():
    chunks = list(make_chunks([TEXTS[2] * 5], *sides(64), Counter()))
    for chunk, following in itertools.pairwise(chunks):
        first = int((following.teacher_segments == 0).sum()), int((following.student_segments == 0).sum())
        assert len(chunk.teacher_ids) + first[0] > 64 or len(chunk.student_ids) + first[1] > 64


def test_what_cannot_be_used_is_counted():
    skipped = Counter()
    wordpiece = REAL_TOKENIZERS["wordpiece-uncased"]()  # drops control characters: no token, no boundary
    chunks = list(make_chunks(["", " \n", "\x00\x01"], *sides(32, student=wordpiece), skipped))
    assert chunks == []
    assert skipped == {"documents without text": 2, "documents without a common boundary": 1}
    skipped = Counter()
    list(make_chunks(["déjà 日本"], *sides(4), skipped))
    assert skipped["segments longer than a chunk"] > 0


def test_an_id_beyond_the_embedding_is_an_error():
    teacher = Side("teacher", TEACHER, 260, 32)
    with pytest.raises(ValueError, match=r"teacher tokenizer: wanted ids below the 260 embedding rows, got \d+"):
        list(make_chunks(TEXTS, teacher, sides(32)[1], Counter()))
    with pytest.raises(ValueError, match="max_length: wanted room for text beside 1 special tokens"):
        list(make_chunks(TEXTS, *sides(1), Counter()))


def write(path):
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


def test_a_seed_decides_on_the_order(tmp_path):
    path = write(tmp_path / "file.jsonl")
    in_order, *shuffled = (list(read_documents(path, text_field="body", seed=seed)) for seed in (None, 1, 1))
    assert in_order == TEXTS
    assert shuffled[0] == shuffled[1] != TEXTS
    assert Counter(shuffled[0]) == Counter(TEXTS)


def test_a_name_that_nothing_has(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="data: 'no/such-dataset' is no file or folder here"):
        read_documents("no/such-dataset")


def test_batches_are_padded_on_the_right_endless_and_shared_between_processes(tmp_path):
    path = write(tmp_path / "file.jsonl")

    def batches(process, processes):
        return iter(
            AlignedBatches(
                path, *sides(48), batch_size=3, seed=7, text_field="body", process=process, processes=processes
            )
        )

    for batch in itertools.islice(batches(0, 1), 30):
        assert batch.teacher_ids.shape == batch.teacher_segments.shape
        lengths = []
        for ids, segments in zip(batch.student_ids, batch.student_segments, strict=True):
            length = int((segments >= 0).nonzero().max()) + 1
            lengths.append(length)
            assert (segments[length:] == -100).all()
            assert set(ids[length:].tolist()) <= {int(batch.student_ids[0, 0])}
        assert batch.tokens == sum(lengths)
    ours = next(batches(0, 2)).student_ids.tolist()
    assert ours != next(batches(1, 2)).student_ids.tolist()
    assert ours == next(batches(0, 2)).student_ids.tolist()


def test_an_empty_corpus_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    stream = AlignedBatches(tmp_path / "empty.jsonl", *sides(48), batch_size=3, seed=0)
    with pytest.raises(ValueError, match=r"data: wanted text to train on .* got none \(2 documents without text\)"):
        next(iter(stream))


@pytest.mark.parametrize(
    ("rows", "bad"),
    [
        ([([0, 0, 1], [0, 1, 1]), ([0, 1, 2], [0, 1, 1])], "row 1, got 3 on the teacher's and 2 on the student's"),
        ([([0, 1, 2], [0, 1, 1]), ([0, 1, 1], [0, 1, 2])], "row 0, got 3 on the teacher's and 2 on the student's"),
        ([([-100, 0, 1], [-100, 1, 0])], "row 0"),
        ([([0, 1, 0], [0, 1, 1])], "row 0"),
    ],
    ids=["one row", "counts that cancel", "another order", "a segment in two places"],
)
def test_segments_that_differ_between_the_sides_are_an_error(rows, bad):
    ids = np.arange(3)
    chunks = [[Chunk(ids, ids, np.array(teacher), np.array(student))] for teacher, student in rows]
    with pytest.raises(ValueError, match=f"chunks: wanted the same segments in the same order on both sides of {bad}"):
        collate(chunks, Counter())
