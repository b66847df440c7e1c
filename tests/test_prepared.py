"""Prepared data against what is made on the fly: the same chunks, found again only when nothing has changed."""

import itertools
import json
import multiprocessing
import os
from collections import Counter
from dataclasses import replace

import matt_kernels
import numpy as np
import pytest
import torch
from tiny import TEXTS, byte_level, new_tokenizer
from tokenizers.processors import TemplateProcessing

from matt_fast.data.chunks import Side, make_chunks
from matt_fast.data.documents import read_documents
from matt_fast.data.positions import Deal
from matt_fast.data.prepared import ShuffledChunks, left_out_of, prepare_once
from matt_fast.data.stream import AlignedBatches

TEACHER = byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>")
STUDENT = new_tokenizer()
SIDES = Side("teacher", TEACHER, 270, 48), Side("student", STUDENT, 330, 48)
READING = {"split": "train", "text_field": "text"}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    write(path, [*TEXTS, "", " \n"])
    return path


def write(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "other": text[::-1]}) + "\n" for text in texts))


def contents(chunks) -> list[tuple]:
    return [tuple(tuple(x.tolist()) for x in chunk.arrays) for chunk in chunks]


def in_order(folder, seed, places=None) -> list[tuple]:
    chunks = ShuffledChunks([folder], seed)
    return contents(chunks.read(np.arange(len(chunks)) if places is None else places))


def test_a_pass_has_the_chunks_of_the_stream_in_an_order_of_its_own(tmp_path, corpus):
    folder = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    on_the_fly = Counter()
    expected = contents(make_chunks(read_documents(corpus), *SIDES, on_the_fly))
    first = in_order(folder, [0, 0])
    assert sorted(first) == sorted(expected)
    assert left_out_of([folder]) == on_the_fly == {"documents without text": 2}
    assert first == in_order(folder, [0, 0])
    assert first != in_order(folder, [0, 1]) != expected
    numbers = np.arange(len(first))
    shares = [in_order(folder, [0, 0], numbers[Deal().mine(numbers, process, 3)]) for process in range(3)]
    assert sorted(itertools.chain(*shares)) == sorted(expected)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("packing", [False, True])
def test_batches_from_prepared_data_are_made_of_the_same_chunks(tmp_path, corpus, packing):
    folder = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    chunks = set(contents(make_chunks(read_documents(corpus), *SIDES, Counter())))
    stream = AlignedBatches(corpus, *SIDES, batch_size=3, seed=1, prepared=[folder], packing=packing)
    count, skipped = 0, Counter()
    for batch in itertools.islice(stream.in_background(), 40):
        skipped += batch.skipped
        for row in range(3):
            for document in range(int(batch.student_documents[row].max()) + 1):
                parts = []
                for side in ("teacher", "student"):
                    inside = getattr(batch, f"{side}_documents")[row] == document
                    ids, segments = (getattr(batch, f"{side}_{x}")[row, inside] for x in ("ids", "segments"))
                    base = segments[segments >= 0].min()
                    parts.append((tuple(ids.tolist()), tuple(int(x - base) if x >= 0 else -100 for x in segments)))
                assert (parts[0][0], parts[1][0], parts[0][1], parts[1][1]) in chunks
                count += 1
    assert count >= 120
    assert skipped["documents without text"] >= 2


def test_batches_arrive_from_the_worker_as_they_were_made(tmp_path, corpus):
    folder = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)

    def plan(batch):
        ids = batch.teacher_segments, batch.student_segments
        return replace(batch, plans={("aim", None): matt_kernels.aim_plan(*ids)})

    stream = AlignedBatches(corpus, *SIDES, batch_size=3, seed=7, prepared=[folder], packing=True, finish=plan)
    for ours, theirs in itertools.islice(zip(stream.in_background(), stream, strict=False), 5):
        for name, expected in vars(theirs).items():
            got = getattr(ours, name)
            if name == "plans":
                got, expected = got["aim", None], expected["aim", None]
                assert (got.variant, got.widths) == (expected.variant, expected.widths)
                got, expected = got.tensors(), expected.tensors()
            if name in ("places", "position"):
                assert type(got) is type(expected)
                got, expected = ([y for y in vars(x).values() if not isinstance(y, Deal)] for x in (got, expected))
            assert type(got) is type(expected)
            if name == "skipped":
                assert got == expected
            else:
                torch.testing.assert_close(got, expected, rtol=0, atol=0)
        ours.student_ids[0, 0] += 1  # can be written to


def other_affixes():
    tokenizer = new_tokenizer()
    special = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=special)
    return tokenizer


def test_whatever_changes_the_chunks_makes_new_ones(tmp_path, corpus):
    cache, (teacher, student) = tmp_path / "cache", SIDES
    before = prepare_once(cache, corpus, *SIDES, **READING)
    made = (before / "dataset_info.json").stat().st_mtime_ns
    assert prepare_once(cache, corpus, *SIDES, **READING) == before
    assert (before / "dataset_info.json").stat().st_mtime_ns == made
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "one.jsonl", TEXTS)
    write(tmp_path / "folder" / "two.jsonl", TEXTS)
    smaller = byte_level(TEXTS, 269, bos_token="<bos>", eos_token="<eos>")
    seen = {before}

    def check(source, teacher, student, reading=READING):
        after = prepare_once(cache, source, teacher, student, **reading)
        assert after not in seen
        seen.add(after)
        documents = read_documents(source, text_field=reading["text_field"])
        assert sorted(in_order(after, [0, 0])) == sorted(contents(make_chunks(documents, teacher, student, Counter())))

    check(tmp_path / "folder", *SIDES)
    check(corpus, *SIDES, READING | {"text_field": "other"})
    check(corpus, teacher, replace(student, max_length=47))
    check(corpus, replace(teacher, rows=300), student)
    check(corpus, replace(teacher, tokenizer=smaller), student)
    check(corpus, teacher, replace(student, tokenizer=other_affixes()))
    write(corpus, [text.replace("a", "b") for text in TEXTS])  # as many bytes as before
    check(corpus, *SIDES)


def test_using_a_tokenizer_does_not_change_the_key(tmp_path, corpus):
    before = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    TEACHER(["some text"], truncation=True, max_length=4)
    assert prepare_once(tmp_path / "cache", corpus, *SIDES, **READING) == before


def killed_while_writing(cache, corpus):
    from datasets import Dataset

    save = Dataset.save_to_disk

    def save_and_die(self, folder, **options):
        save(self, folder, **options)
        os._exit(9)

    Dataset.save_to_disk = save_and_die
    prepare_once(cache, corpus, *SIDES, **READING)


def test_a_writer_that_is_killed_or_fails_leaves_nothing_half_written(tmp_path, corpus):
    cache = tmp_path / "cache"
    writer = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(cache, corpus))
    writer.start()
    writer.join()
    assert writer.exitcode == 9
    assert all(path.name.startswith(".") for path in cache.iterdir())  # nothing under a name that would be found
    folder = prepare_once(cache, corpus, *SIDES, **READING)
    assert len(in_order(folder, [0, 0])) > 5
    write(corpus, ["", " "])
    before = set(cache.iterdir())
    with pytest.raises(ValueError, match="data: wanted text to train on, got none in 2 rows"):
        prepare_once(cache, corpus, *SIDES, **READING)
    write(corpus, TEXTS)
    with pytest.raises(ValueError, match="teacher tokenizer: wanted ids below the 260 embedding rows"):
        prepare_once(cache, corpus, replace(SIDES[0], rows=260), SIDES[1], **READING)
    assert set(cache.iterdir()) == before
