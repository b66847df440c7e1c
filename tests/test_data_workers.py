"""Batches do not depend on who makes them: any number of workers, killed or gone on with; and who gets which text."""

import itertools
import json
import re
import signal
import statistics
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from tiny import TEXTS, byte_level, jsonl, new_tokenizer

from matt_fast.data import chunks, documents
from matt_fast.data.background import default_workers
from matt_fast.data.batches import Batch
from matt_fast.data.chunks import Side
from matt_fast.data.prepared import prepare_once
from matt_fast.data.stream import AlignedBatches

TEACHER = byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>")
STUDENT = new_tokenizer()
SIDES = Side("teacher", TEACHER, 270, 48), Side("student", STUDENT, 330, 48)
COUNT = 45  # batches, of more than one pass


def plain(value):
    """A batch, or a part of one, as what can be compared."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return dict(value)
    return {name: plain(x) for name, x in vars(value).items()} if hasattr(value, "__dict__") else value


def take(batches, count=COUNT) -> list:
    found = [plain(batch) for batch in itertools.islice(batches, count)]
    if hasattr(batches, "close"):
        batches.close()
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [*TEXTS, "", " \n", "once", *(text[::-1] for text in TEXTS)]
    path.write_text(jsonl(texts))
    return path


def stream(source, **options):
    return AlignedBatches(source, *SIDES, **{"batch_size": 6, "seed": 5, **options})


@pytest.mark.parametrize("way", ["packed", "one by one", "prepared"])
def test_batches_do_not_depend_on_the_workers_nor_on_where_a_run_stopped(corpus, tmp_path, way):
    options = {"packing": way != "one by one"}
    if way == "prepared":
        options["prepared"] = [prepare_once(tmp_path, corpus, *SIDES, split="train", text_field="text")]
    here = stream(corpus, **options)
    expected = take(iter(here))
    assert {batch["position"]["epoch"] for batch in expected} >= {0, 1}
    assert sum((Counter(batch["skipped"]) for batch in expected), Counter())["documents without text"] >= 2
    for workers in (0, 1, 2, 3):
        assert take(here.in_background(workers)) == expected
    given = itertools.islice(here, COUNT)
    for number, (batch, workers) in enumerate(zip(given, itertools.cycle([0] * 17 + [2]), strict=False), 1):
        if number % 9 == 0 and number < COUNT - 2:
            assert take(here.behind(batch.position).in_background(workers), 2) == expected[number : number + 2]


def test_workers_that_are_killed_are_started_again_and_end_with_the_batches(corpus):
    ours, expected = stream(corpus, packing=True), take(iter(stream(corpus, packing=True)), 12)
    batches, found, seen = ours.in_background(2), [], []
    for victim in ("worker", "order"):
        found += [plain(batch) for batch in itertools.islice(batches, 4)]
        (order,) = psutil.Process().children()
        workers = order.children()
        assert len(workers) == 2
        seen += [order, *workers]
        (workers[0] if victim == "worker" else order).send_signal(signal.SIGKILL)
        with warnings.catch_warnings(record=True) as said:
            while not said and len(found) < 500:
                found.append(plain(next(batches)))
        assert "was killed and is started again" in str(said[0].message)
    found += [plain(batch) for batch in itertools.islice(batches, max(0, 12 - len(found)))]
    seen += psutil.Process().children(recursive=True)
    batches.close()
    assert found == take(iter(stream(corpus, packing=True)), len(found))
    assert found[:12] == expected
    assert not psutil.wait_procs(seen, timeout=20)[1]


def test_an_error_arrives_as_it_is_behind_the_batches_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SHUFFLED_PIECES", 256)
    monkeypatch.setattr(chunks, "TOKENISE_TOGETHER", 16)
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS * 15]  # more than are shuffled together
    path.write_text("\n".join([*lines[:270], "{broken", *lines[270:]]))
    counts = set()
    for workers in (0, 1, 2):
        batches, count = stream(path, batch_size=20).in_background(workers), 0
        with pytest.raises(ValueError, match="wanted JSON in line 271"):
            for count, _ in enumerate(batches, 1):  # noqa: B007
                pass
        counts.add(count)
    assert len(counts) == 1
    assert counts.pop() > 2
    small = stream(path)
    small.teacher = replace(SIDES[0], rows=260)
    with pytest.raises(ValueError, match="teacher tokenizer: wanted ids below the 260 embedding rows"):
        next(small.in_background(2))


@pytest.mark.parametrize("processes", [2, 3])
def test_a_short_file_of_plain_text_is_shared_by_several_processes(tmp_path, processes):
    """Pieces go round through all passes: a file of one piece trains every process in its turn."""
    path = tmp_path / "corpus.txt"
    path.write_text("".join(TEXTS)[:1000])
    alone = take(iter(stream(path, batch_size=1)), 100)
    for process in range(processes):
        share = stream(path, batch_size=1, process=process, processes=processes)
        batches = list(itertools.islice(share, 100))
        assert {batch.position.epoch % processes for batch in batches} == {process}
        assert {str(batch.student_ids.tolist()) for batch in batches} == {str(x["student_ids"][1]) for x in alone}
        again = take(iter(share.behind(batches[25].position)), 10)
        assert again == [plain(batch) for batch in batches[26:36]]


def test_a_long_document_does_not_fill_a_batch(tmp_path):
    """Pieces of long documents are shuffled like documents, and their chunks too; nothing is lost or comes twice."""
    path = tmp_path / "corpus.jsonl"
    texts = [f"{sign} word {number}\n" * 700 for number, sign in enumerate("abcdefgh")]
    path.write_text(jsonl(texts))
    given = stream(path, batch_size=4)
    batches = list(itertools.takewhile(lambda batch: batch.position.epoch == 0, given))
    rows = [STUDENT.decode(row.tolist()) for batch in batches for row in batch.student_ids]
    signs = [re.search("([a-h]) word", row)[1] for row in rows]
    assert statistics.mean(len(set(signs[start : start + 4])) for start in range(0, len(signs) - 3, 4)) > 2.5
    counts = Counter(re.findall("[a-h](?= word)", "".join(rows)))
    assert len(counts) == 8
    assert max(counts.values()) <= 700  # a token boundary inside a line may part a sign from its word


def test_documents_go_round_the_processes(corpus, monkeypatch):
    """In each pass each text goes to one process, and the next pass goes on with the next process."""
    monkeypatch.setattr(chunks, "TOKENISE_TOGETHER", 5)
    shares = [stream(corpus, process=process, processes=3, batch_size=1) for process in range(3)]
    passes = [[[] for _ in range(3)] for _ in shares]
    items = [[] for _ in shares]
    for share, by_pass, own in zip(shares, passes, items, strict=True):
        for part in itertools.takewhile(lambda part: part.place.epoch < 3, share._texts()):
            by_pass[part.place.epoch] += part.texts
            own += [] if part.ends else [part.place.item]
    texts = Counter(x if x.strip() else "" for x in (json.loads(line)["text"] for line in corpus.open()))
    for epoch in range(3):
        assert Counter(itertools.chain(*(by_pass[epoch] for by_pass in passes))) == texts
    assert items == [list(range(process, 27, 3)) for process in range(3)]


@pytest.mark.parametrize("shards", [4, 3])
def test_each_process_reads_its_own_shards_of_a_hub_dataset(monkeypatch, shards):
    """Four shards go round two processes, and each opens none but its own; the texts of three go round in turn."""
    rows = Dataset.from_dict({"text": [f"{number} {TEXTS[0]}" for number in range(24)]})
    opened = []

    def read(row):
        opened.append(int(row["text"].split()[0]))
        return row

    data = rows.to_iterable_dataset(num_shards=shards).map(read)
    monkeypatch.setattr(documents, "load_hub_documents", lambda *_, **__: data)
    monkeypatch.setattr(chunks, "TOKENISE_TOGETHER", 5)
    shares, read_by = [], []
    for process in range(2):
        opened.clear()
        given = stream("some/name", process=process, processes=2)._texts()
        parts = list(itertools.takewhile(lambda part: not part.ends, given))
        shares.append({int(text.split()[0]) for part in parts for text in part.texts})
        read_by.append(set(opened))
    assert shares[0] | shares[1] == set(range(24))
    assert not shares[0] & shares[1]
    assert (read_by == shares) == (shards == 4)


def test_files_of_a_size_are_the_shards_of_a_folder(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": f"{number} {x}"}) + "\n" for x in TEXTS))
    texts = lambda process, count: {  # noqa: E731
        text[0]
        for part in itertools.takewhile(
            lambda part: not part.ends, stream(tmp_path, process=process, processes=count)._texts()
        )
        for text in part.texts
    }
    assert [len(texts(process, 2)) for process in range(2)] == [2, 2]
    assert texts(0, 2) | texts(1, 2) == set("0123")
    assert len(texts(0, 3)) == 4  # three do not go into four
    (tmp_path / "4.jsonl").write_text("{}")
    (tmp_path / "5.jsonl").write_text(json.dumps({"text": "5"}))
    assert not documents.read_documents(tmp_path).are_for(2)  # one is far smaller


def test_what_goes_to_the_device_is_pinned(corpus, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor.clone())
    batch = next(stream(corpus).in_background(0, pin_memory=True))
    assert isinstance(batch, Batch)
    assert sorted(pinned) == sorted(
        x.shape for x in (batch.teacher_ids, batch.student_ids, batch.distinct_ids, *vars(batch.places).values())
    )
    assert plain(batch) == plain(next(iter(stream(corpus))))


def test_workers_by_default(monkeypatch):
    import os

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers(torch.device("cpu")) == 1
    assert default_workers(torch.device("cuda")) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers(torch.device("cuda")) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(torch.device("cuda")) == 1
