"""Prepared data that outlives trouble: damage is noticed, killed runs leave nothing for ever, workers end."""

import json
import multiprocessing
import os
import signal
import stat
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset
from test_prepared import READING, SIDES, contents, write
from tiny import TEXTS

from matt_fast.data import prepared
from matt_fast.data.chunks import make_chunks
from matt_fast.data.documents import read_documents
from matt_fast.data.prepared import ShuffledChunks, find_damage, prepare_once
from matt_fast.data.summary import check_readable
from matt_fast.support.temporary import remove_stale, work_folder

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    write(path, TEXTS)
    return path


def chunks_of(folder):
    chunks = ShuffledChunks([folder], [0, 0])
    return sorted(contents(chunks.read(np.arange(len(chunks)))))


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": ("*.arrow", truncate),
    "empty": ("*.arrow", lambda file: os.truncate(file, 0)),
    "gone": ("*.arrow", os.unlink),
    "state gone": ("state.json", os.unlink),
    "one bit": ("*.arrow", flip),
    "counts cut": ("skipped.json", lambda file: os.truncate(file, 1)),
    "list gone": ("files.json", os.unlink),
}


def test_damage_is_noticed_and_mended(tmp_path, corpus):
    said = []
    reading = READING | {"on_message": said.append}
    folder = prepare_once(tmp_path / "cache", corpus, *SIDES, **reading)
    before = chunks_of(folder)
    assert find_damage(folder) == said == []
    for name, (pattern, damage) in DAMAGES.items():
        said.clear()
        file = next(folder.glob(pattern))
        damage(file)
        assert prepare_once(tmp_path / "cache", corpus, *SIDES, **reading) == folder
        assert len(said) == 1, name
        assert f"data_cache: {str(folder)!r} is damaged ({file.name} " in said[0]
        assert find_damage(folder) == [], name
        assert chunks_of(folder) == before, name
        assert os.listdir(tmp_path / "cache") == [folder.name]


def test_other_text_of_the_same_size_and_time_is_noticed(tmp_path, corpus):
    before = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    times = corpus.stat()
    write(corpus, [text.replace("a", "b") for text in TEXTS])
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (corpus.stat().st_size, corpus.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    assert after != before
    assert chunks_of(after) == sorted(contents(make_chunks(read_documents(corpus), *SIDES, Counter())))
    digest = check_readable(corpus).digest
    assert prepare_once(tmp_path / "cache", corpus, *SIDES, **READING, digest=digest) == after
    moved = corpus.rename(tmp_path / "moved.jsonl")
    assert prepare_once(tmp_path / "cache", moved, *SIDES, **READING) == after


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_others_may_read_as_the_umask_says(tmp_path, corpus, mask):
    before = os.umask(mask)
    try:
        folder = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    finally:
        os.umask(before)
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def prepares_for_ever(cache, corpus):
    prepared.make_chunks = lambda rows, *rest: time.sleep(600)
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a command that ends in order has one
    prepare_once(cache, corpus, *SIDES, **READING)


def alive(processes):
    return [x for x in processes if x.is_running() and x.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_preparation_leaves_no_process_and_the_next_one_its_folder(tmp_path, corpus):
    cache = tmp_path / "cache"
    main = FORK.Process(target=prepares_for_ever, args=(cache, corpus))
    main.start()
    children, end = [], time.monotonic() + 60
    while len(children) < 1 + min(os.cpu_count(), len(TEXTS)) and time.monotonic() < end:  # workers and their manager
        children = psutil.Process(main.pid).children(recursive=True)
        time.sleep(0.05)
    (left,) = cache.glob(".matt-fast-*/documents.arrow")
    assert remove_stale(cache) == []  # it lives
    os.kill(main.pid, signal.SIGKILL)
    main.join()
    end = time.monotonic() + 30
    while alive(children) and time.monotonic() < end:
        time.sleep(0.1)
    assert alive(children) == []
    folder = prepare_once(cache, corpus, *SIDES, **READING)
    assert not left.exists()
    assert list(cache.iterdir()) == [folder]


def stopped_in_preparation(cache, corpus, told, leave):
    def handler(number, frame):
        raise leave

    prepared.make_chunks = lambda rows, *rest: time.sleep(600)
    signal.signal(signal.SIGTERM, handler)
    try:
        prepare_once(cache, corpus, *SIDES, **READING)
    except BaseException as error:
        told.put((type(error), psutil.Process().children(recursive=True), list(cache.iterdir())))


@pytest.mark.parametrize("leave", [SystemExit(143), KeyboardInterrupt()])
def test_a_signal_in_preparation_leaves_in_order(tmp_path, corpus, leave):
    told = FORK.SimpleQueue()
    main = FORK.Process(target=stopped_in_preparation, args=(tmp_path / "cache", corpus, told, leave))
    main.start()
    end = time.monotonic() + 60
    workers = 1 + min(os.cpu_count(), len(TEXTS))  # and their manager
    while len(psutil.Process(main.pid).children(recursive=True)) < workers and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(main.pid, signal.SIGTERM)
    assert told.get() == (type(leave), [], [])
    main.join()


def killed(rows, *rest):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_that_says_so(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepared, "make_chunks", killed)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ChildProcessError, match="data: a process that prepared it was killed"):
        prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    assert list((tmp_path / "cache").iterdir()) == []


def test_work_folders_of_live_processes_and_of_others_are_left(tmp_path):
    (tmp_path / ".matt-fast-someone").mkdir()
    ready, done = FORK.Event(), FORK.Event()

    def hold():
        with work_folder(tmp_path) as folder:
            (folder / "data").write_text("x")
            ready.set()
            done.wait(60)

    holder = FORK.Process(target=hold)
    holder.start()
    ready.wait(60)
    with work_folder(tmp_path) as outer, work_folder(tmp_path) as inner:
        assert remove_stale(tmp_path) == []
        assert len({outer, inner, *map(Path.resolve, tmp_path.glob(".matt-fast-*/"))}) == 4
    done.set()
    holder.join()
    assert [path.name for path in tmp_path.iterdir()] == [".matt-fast-someone"]


def test_a_cache_that_cannot_be_written_is_read(tmp_path, corpus, monkeypatch):
    folder = prepare_once(tmp_path / "cache", corpus, *SIDES, **READING)
    monkeypatch.setattr(prepared, "work_folder", None)
    assert prepare_once(tmp_path / "cache", corpus, *SIDES, **READING) == folder
    assert json.loads((folder / "skipped.json").read_text()) == {}


def test_hub_data_is_known_by_the_fingerprint_that_datasets_gives_it(tmp_path, monkeypatch):
    dataset = Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr(prepared, "load_hub_documents", lambda name, split, text_field, streaming: dataset)
    folder = prepare_once(tmp_path / "cache", "some/name", *SIDES, **READING, digest="of the first rows")
    assert chunks_of(folder) == sorted(contents(make_chunks(TEXTS, *SIDES, Counter())))
    assert prepare_once(tmp_path / "cache", "some/name", *SIDES, **READING) == folder
    dataset = Dataset.from_dict({"text": TEXTS[1:]})
    assert prepare_once(tmp_path / "cache", "some/name", *SIDES, **READING, digest="of the first rows") != folder
