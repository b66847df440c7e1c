"""A run that goes on with another number of processes reads what is left: no chunk is lost, none comes twice."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TEXTS, byte_level, new_tokenizer

from matt_fast.data import chunks
from matt_fast.data.chunks import Side
from matt_fast.data.packing import Packer
from matt_fast.data.positions import Deal, Position, deal_anew
from matt_fast.data.prepared import prepare_once
from matt_fast.data.stream import AlignedBatches
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.recipe.job import changes
from matt_fast.training import checkpoints
from matt_fast.training.checkpoints import Checkpoints
from matt_fast.training.options import TrainingOptions
from matt_fast.training.sides import Student
from matt_fast.training.state import TrainingState

TEACHER = byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>")
STUDENT = new_tokenizer()
SIDES = Side("teacher", TEACHER, 270, 48), Side("student", STUDENT, 330, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four files of a size; every text is another one."""
    folder = tmp_path_factory.mktemp("folder")
    for number in range(4):
        texts = [f"{number} {place} {text}" for place, text in enumerate(TEXTS)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""]))
    return folder


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(chunks, "TOKENISE_TOGETHER", 3)


def run(source, positions, steps, **options):
    """The batches of so many steps, and the positions behind them, where these processes go on from."""
    found, ends = [], []
    for process, start in enumerate(positions):
        given = {"process": process, "processes": len(positions), "start": start, "seed": 5} | options
        batches = list(itertools.islice(AlignedBatches(source, *SIDES, **given), steps))
        found += batches
        ends.append(batches[-1].position if batches else start)
    return found, ends


def key(position):
    return position.item, position.group, position.chunk


@pytest.mark.parametrize("way", ["texts", "shards", "prepared"])
def test_another_number_of_processes_goes_on_with_what_is_left(folder, tmp_path, small_groups, way):
    options = {"batch_size": 1}
    if way == "prepared":
        options["prepared"] = [prepare_once(tmp_path, folder, *SIDES, split="train", text_field="text")]
    sharded = way == "shards"
    everything = AlignedBatches(folder, *SIDES, seed=5, start=Position(sharded=sharded), **options)
    expected, passes = {}, set()
    for batch in everything:
        if batch.position.epoch == 3:
            break
        passes.add(batch.position.epoch)
        expected[key(batch.position)] = batch.student_ids.tolist()
    assert passes == {0, 1, 2}
    pass_length = len(expected) // 3

    seen = []
    positions = [Position(sharded=sharded)] * 2
    plan = [(2, 17), (3, 40), (3, 9), (1, 33), (2, 1), (4, pass_length * 2 // 5)]
    for processes, steps in plan:
        if processes != len(positions):
            positions = deal_anew(positions, processes)
        batches, positions = run(folder, positions, steps, **options)
        seen += [(key(batch.position), batch.student_ids.tolist()) for batch in batches]
    assert len(seen) > pass_length
    assert max(Counter(place for place, _ in seen).values()) == 1
    assert all(expected[place] == ids for place, ids in seen)
    done = min(position.item for position in positions)
    assert done >= 4
    assert {place for place, _ in seen if place[0] < done} == {place for place in expected if place[0] < done}


def test_rows_that_were_being_filled_go_on_too(folder, small_groups):
    options, file = {"batch_size": 2, "packing": True}, folder / "0.jsonl"
    batches, positions = run(file, [Position()] * 3, 12, **options)
    one_pass = itertools.takewhile(lambda x: x.position.epoch == 0, AlignedBatches(file, *SIDES, batch_size=1, seed=5))
    whole = Counter(map(str, rows_of(one_pass)))  # a text that repeats itself has some chunks twice
    for processes in (1, 2, 5):
        anew = deal_anew(positions, processes)
        old, new = (Counter(map(str, contents(x))) for x in (positions, anew))
        assert old == new
        assert sum(old.values()) > 40
        rows = [len(position.open_rows()) for position in anew]
        assert max(rows) - min(rows) <= 1
        more, ends = run(file, anew, 60 // processes, **options)
        counts = Counter(map(str, itertools.chain(rows_of([*batches, *more]), contents(ends))))
        epochs = [position.epoch for position in ends]
        assert min(epochs) >= 1
        assert set(counts) == set(whole)
        assert all(min(epochs) * n <= counts[x] <= (max(epochs) + 1) * n for x, n in whole.items())


def contents(positions):
    for position in positions:
        for row in position.open_rows():
            for chunk in row:
                yield chunk.student_ids.tolist()


def rows_of(batches):
    for batch in batches:
        for ids, documents in zip(batch.student_ids, batch.student_documents, strict=True):
            for number in range(int(documents.max()) + 1):
                yield ids[documents == number].tolist()


def test_a_packer_with_too_many_rows_gives_them_out(folder):
    _, positions = run(folder, [Position()] * 3, 4, batch_size=2, packing=True)
    (alone,) = deal_anew(positions, 1)
    packer = Packer((48, 48), rows=alone.open_rows())
    assert len(packer.rows) > 40
    small = min((chunk for row in packer.rows for chunk in row), key=lambda chunk: max(chunk.lengths))
    given = [packer.add(small) for _ in range(200)]
    assert None not in given[:20]
    assert len(packer.rows) == 16


def test_a_checkpoint_of_two_processes_is_read_by_three(folder, small_groups, tmp_path, monkeypatch):
    first = deal_anew(run(folder, [Position()] * 3, 7, batch_size=1)[1], 2)
    _, positions = run(folder, first, 5, batch_size=2, packing=True)
    counts = {"tokens": 7, "skipped": {"a": 1}}, {"tokens": 5, "skipped": {"a": 2, "b": 3}}
    monkeypatch.setattr(checkpoints, "gather_object", lambda _: [*zip(positions, counts, strict=True)])
    table = EmbeddingTable(torch.randn(10, 4), torch.full((12,), -1), torch.randn(12, 4))
    state = TrainingState.begin(Student(table), TrainingOptions())

    def accelerator(process, processes):
        numbers = {"process_index": process, "num_processes": processes, "is_main_process": process == 0}
        return SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor, **numbers)

    Checkpoints(tmp_path).write(state, accelerator(0, 2))
    for processes in (2, 3):
        for process, expected in enumerate(positions if processes == 2 else deal_anew(positions, 3)):
            Checkpoints(tmp_path).read(state, accelerator(process, processes))
            assert repr(state.position) == repr(expected)
            assert state.progress.counts == (counts[process] if process < 2 else {"tokens": 0, "skipped": {}})
    Checkpoints(tmp_path).read(state, accelerator(0, 1))
    assert state.progress.counts == {"tokens": 12, "skipped": {"a": 3, "b": 3}}
    assert len(positions[0].deal.begun) or len(positions[0].deal.behind)


def test_what_may_change_with_the_processes():
    before = {"processes": 2, "accumulation": 2, "epochs": None}
    assert not changes(before, before | {"processes": 3}, False)
    assert not changes(before, before | {"processes": 1, "accumulation": 4}, False)
    (line,) = changes(before, before | {"processes": 3, "accumulation": 4}, False)
    assert line == "accumulation: was 2, now 4, which makes updates of 12 rows that had 4"
    with_epochs = before | {"epochs": 1.5}
    assert not changes(with_epochs, with_epochs | {"processes": 4, "accumulation": 1}, False)
    (line,) = changes(with_epochs, with_epochs | {"processes": 3}, False)
    assert line.startswith("rows of an update: was 4, now 6")


def test_the_rows_of_an_update_may_be_divided_anew():
    before = {"processes": 2, "batch_size": 4, "accumulation": 1, "epochs": 1.5}
    for now in ({"batch_size": 2, "accumulation": 2}, {"processes": 1, "accumulation": 2}, {"processes": 8}):
        now = now if len(now) == 2 else now | {"batch_size": 1}
        assert not changes(before, before | now, False)
    (line,) = changes(before | {"epochs": None}, before | {"epochs": None, "batch_size": 2}, False)
    assert line == "batch_size: was 4, now 2, which makes updates of 4 rows that had 8"
    found = changes(before, before | {"batch_size": 2, "accumulation": 3}, False)
    assert [x.partition(":")[0] for x in found] == ["rows of an update", "accumulation", "batch_size"]


@pytest.mark.parametrize("way", ["texts", "packed texts", "shards", "prepared", "packed prepared", "own"])
def test_batches_of_another_size_go_on_with_the_same_rows(folder, tmp_path, small_groups, way):
    """In each of several processes: the rows of so many steps, in their order, and the place behind them."""
    options = {"packing": True} if "packed" in way else {}
    if "texts" not in way and way != "shards":
        options["prepared"] = [prepare_once(tmp_path, folder, *SIDES, split="train", text_field="text")]
    if way == "own":
        options["own"] = prepare_once(tmp_path, folder / "0.jsonl", *SIDES, split="train", text_field="text")
    _, begun = run(folder, [Position(sharded=way == "shards")] * 2, 5, batch_size=6, **options)
    found = {}
    for size, count in ((6, 9), (3, 18), (2, 27), (1, 54), (9, 6)):
        batches, ends = run(folder, begun, count, batch_size=size, **options)
        rows = [
            ids[documents >= 0].tolist()
            for batch in batches
            for ids, documents in zip(batch.student_ids, batch.student_documents, strict=True)
        ]
        found[size] = rows, repr(ends)
    assert len(found[6][0]) == 2 * 54
    assert all(x == found[6] for x in found.values())


def test_items_go_round():
    deal = Deal(10, np.array([12, 13, 17]))
    owners = {item: [p for p in range(2) if deal.mine(np.array([item]), p, 2)[0]] for item in range(8, 20)}
    assert owners == {8: [], 9: [], 10: [0], 11: [1], 12: [], 13: [], 14: [0], 15: [1], 16: [0], 17: []} | {
        18: [1],
        19: [0],
    }
