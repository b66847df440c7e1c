"""Chunks made as shards: the same as on the fly, made again where one is lost, refused where they are others."""

import itertools
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import dill
import fsspec
import numpy as np
import pytest
from commands import run
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model
from transformers import AutoTokenizer

from matt_fast.data.chunks import Side, make_chunks
from matt_fast.data.documents import read_documents
from matt_fast.data.prepared import open_chunks
from matt_fast.data.shards import MadeOf, Shards
from matt_fast.data.stream import AlignedBatches
from matt_fast.recipe import preparing
from matt_fast.recipe.preparing import prepare
from matt_fast.recipe.stages import check_here
from matt_fast.recipe.transfer import transfer
from matt_fast.training.options import TrainingOptions

LENGTH, SHARDS = 48, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a tokenizer, a text, and its shards in `whole`."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "MODEL")
    new_tokenizer().save_pretrained(folder / "NEW")
    texts = [*(f"{number} {text}" for number, text in enumerate(TEXTS)), "", " \n"]
    (folder / "text.jsonl").write_text(jsonl(texts))
    make(folder, folder / "whole", workers=2)
    return folder


@pytest.fixture(scope="module")
def sides(world):
    student = AutoTokenizer.from_pretrained(world / "NEW")
    return Side("teacher", AutoTokenizer.from_pretrained(world / "MODEL"), 275, LENGTH), Side(
        "student", student, len(student), LENGTH
    )


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "copy")
    return tmp_path / "copy"


def make(world, output, **changed):
    given = {"data": world / "text.jsonl", "max_length": LENGTH, "shards": SHARDS, "workers": 1} | changed
    return prepare(world / "MODEL", world / "NEW", output=output, **given)


def flip(path):
    """Another bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def contents(chunks) -> Counter:
    return Counter(tuple(tuple(x.tolist()) for x in chunk.arrays) for chunk in chunks)


def test_shards_have_the_chunks_of_the_text_and_the_manifest_counts_them(world, sides):
    skipped = Counter()
    chunks = list(make_chunks(read_documents(world / "text.jsonl"), *sides, skipped))
    shards = Shards(world / "whole")
    shards.check(MadeOf.of(*sides))
    found = open_chunks([world / "whole"]).with_format("numpy")[:]
    assert Counter(map(str, zip(*(map(np.ndarray.tolist, x) for x in found.values()), strict=True))) == Counter(
        str(tuple(x.tolist() for x in chunk.arrays)) for chunk in chunks
    )
    streamed = [chunk for number in range(SHARDS) for _, group in shards.stream(number, [1]) for chunk in group]
    assert contents(streamed) == contents(chunks)
    manifest = shards.manifest
    assert manifest.skipped == skipped == {"documents without text": 2}
    assert manifest.counts["texts"] == 22
    assert manifest.counts["chunks"] == len(chunks) == sum(shard.chunks for shard in manifest.shards)
    assert manifest.counts["teacher_tokens"] == sum(len(chunk.teacher_ids) for chunk in chunks)
    assert manifest.counts["student_tokens"] == sum(len(chunk.student_ids) for chunk in chunks)
    assert min(shard.chunks for shard in manifest.shards) > 0
    assert json.loads((world / "whole" / "manifest.json").read_text())["digest"] == manifest.digest


def test_what_is_lost_is_made_again_and_other_arguments_are_refused(world, copy):
    before = Shards(copy).manifest.digest
    (copy / "shards/00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"max_length: was 48, now 47; .*piece_characters") as refused:
        make(world, copy, max_length=47)
    assert "was begun with" in str(refused.value)
    with pytest.raises(ValueError, match="shards: was 3, now 4"):
        make(world, copy, shards=4)
    assert (copy / "manifest.json").exists()
    again = make(world, copy)
    assert (again.made, again.manifest.digest) == (1, before)
    assert make(world, copy).made == 0
    flip(copy / "shards/00002-of-00003.arrow")
    assert make(world, copy).made == 1
    Shards(copy).check(Shards(world / "whole").manifest.made_of)
    (copy / "manifest.json").unlink()
    assert make(world, copy).manifest.digest == before
    (copy / "prepare.json").unlink()
    with pytest.raises(FileExistsError, match="output: wanted a new or empty folder"):
        make(world, copy)


def test_a_worker_that_is_killed_ends_the_work_and_what_is_done_stays(world, tmp_path, monkeypatch):
    write = preparing.write_shard

    def killed(folder, name, *rest):
        if name.startswith("shards/00002"):
            (folder / "shards/.part-00002-of-00003.arrow").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, name, *rest)

    monkeypatch.setattr(preparing, "write_shard", killed)
    with pytest.raises(ChildProcessError, match="ended with exit code -9"):
        make(world, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    monkeypatch.undo()
    done = make(world, tmp_path / "out")
    assert (done.made, done.manifest.digest) == (1, Shards(world / "whole").manifest.digest)
    assert not list((tmp_path / "out/shards").glob(".part*"))
    monkeypatch.setattr(preparing, "write_shard", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        make(world, tmp_path / "full")


def test_another_machine_must_have_the_same_files_and_versions(world, tmp_path):
    given = {"model": str(world / "MODEL"), "tokenizer": str(world / "NEW"), "teacher": None, "text_field": "text"}
    given |= {"data": str(world / "text.jsonl"), "split": "train", "max_length": LENGTH, "trust_remote_code": False}
    step = preparing.MakeShard.of(given, tmp_path, SHARDS)
    with pytest.raises(ValueError, match=r"versions: wanted what the work began with on every machine, .*'0\.1'"):
        replace(step, versions={**step.versions, "tokenizers": "0.1"})(None, 0, SHARDS)
    with pytest.raises(ValueError, match="data: wanted what the work began with"):
        replace(step, data={**step.data, "listing": "other"})(None, 0, SHARDS)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("cut", r"shards/00001-of-00003\.arrow: wanted [\d,]+ bytes, got 100"),
        ("lost", r"shards/00001-of-00003\.arrow is gone"),
        ("changed", r"shards/00001-of-00003\.arrow has changed"),
        ("version", r"was made for something else \(version wanted 1, got 0\)"),
        ("rows", r"something else \(teacher_rows wanted 275, got 276\)"),
        ("length", r"teacher_max_length wanted 47, got 48; student_max_length wanted 47, got 48"),
        ("tokenizer", r"student_tokenizer wanted \w{12}…, got \w{12}…"),
        ("manifest", r"wanted a whole manifest\.json"),
        ("no manifest", r"has no manifest\.json: is it there, and all of it made\?"),
    ],
)
def test_what_does_not_fit_is_named(copy, sides, harm, words):
    shard, manifest, wanted = copy / "shards/00001-of-00003.arrow", copy / "manifest.json", MadeOf.of(*sides)
    values = json.loads(manifest.read_text())
    if harm == "cut":
        os.truncate(shard, 100)
    elif harm == "lost":
        shard.unlink()
    elif harm == "changed":
        flip(shard)
    elif harm == "version":
        values["made_of"]["version"] = 0
    elif harm == "rows":
        values["made_of"]["teacher_rows"] += 1
    elif harm == "length":
        wanted = MadeOf.of(*(replace(side, max_length=47) for side in sides))
    elif harm == "tokenizer":
        wanted = MadeOf.of(sides[0], replace(sides[0], rows=330))
    if harm in ("version", "rows"):
        manifest.write_text(json.dumps(values))
    elif harm == "manifest":
        manifest.write_text("{}")
    elif harm == "no manifest":
        manifest.unlink()
    with pytest.raises(ValueError, match=words):
        Shards(copy).check(wanted)


def test_a_folder_is_streamed_from_a_url_by_any_number_of_processes(world, sides):
    memory = fsspec.filesystem("memory")
    memory.put(str(world / "whole"), "/box", recursive=True)
    url = "memory://box"
    Shards(url).check(MadeOf.of(*sides))
    batches = lambda **given: AlignedBatches(  # noqa: E731
        None, *sides, batch_size=1, seed=3, prepared=[url], **given
    )
    one = list(itertools.takewhile(lambda batch: batch.position.epoch < 2, batches()))
    rows = lambda batches: Counter(str(batch.student_ids.tolist()) for batch in batches)  # noqa: E731
    chunks = Shards(url).manifest.counts["chunks"]
    assert len(one) == 2 * chunks
    assert rows(one[:chunks]) == rows(one[chunks:])
    assert [x.student_ids.tolist() for x in one[:chunks]] != [x.student_ids.tolist() for x in one[chunks:]]
    assert sum(batch.skipped["documents without text"] for batch in one) == 2  # in two passes, told once
    shares = []
    for process in range(2):  # three shards go round two processes: in two passes each shard comes twice
        own = batches(process=process, processes=2)
        found = list(itertools.takewhile(lambda batch: batch.position.item < 6, own))
        assert {batch.position.item % 2 for batch in found} == {process}
        shares += found
        after = found[7].position
        again = [x.student_ids.tolist() for x in itertools.islice(own.behind(after), 5)]
        assert again == [x.student_ids.tolist() for x in found[8:13]]
    assert rows(shares) == rows(one)

    path = f"/box/{Shards(url).manifest.shards[2].name}"
    content = memory.cat(path)
    memory.pipe(path, content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"shards/00002-of-00003\.arrow: wanted [\d,]+ bytes, got"):
        Shards(url).check(MadeOf.of(*sides))
    with pytest.raises(ValueError, match=r"prepared: (wanted .*|)shards?.*00002-of-00003\.arrow of 'memory://box'"):
        list(itertools.islice(batches(), chunks))
    memory.rm(path)
    with pytest.raises(ValueError, match=r"00002-of-00003\.arrow is gone"):
        Shards(url).check(MadeOf.of(*sides))


def test_more_processes_than_shards_of_a_stream_are_refused(world, sides):
    def work(place, processes):
        shards = Shards(place)
        accelerator = SimpleNamespace(is_local_main_process=True, num_processes=processes)
        known = {"fingerprints": {"prepared": {"content": shards.manifest.digest}}}
        run = SimpleNamespace(read=lambda _: known)
        job = SimpleNamespace(prepared=place)
        return SimpleNamespace(job=job, run=run, accelerator=accelerator, is_main=False)

    url = (world / "whole").as_uri()
    assert check_here(work(url, 3), sides) == url
    with pytest.raises(
        ValueError, match=r"a shard for each of the 4 processes .* got 3: prepare it with more --shards"
    ):
        check_here(work(url, 4), sides)
    check_here(work(str(world / "whole"), 4), sides)  # chunks of a local folder go round any number


def test_a_transfer_reads_prepared_chunks_without_the_text(world, copy, tmp_path):
    given = {"max_length": LENGTH, "training": TrainingOptions(steps=3), "precision": "no", "device": "cpu"}
    given |= {"completions": 0, "on_message": lambda _: None}
    model = world / "MODEL", world / "NEW", None
    result = transfer(*model, tmp_path / "out", prepared=copy, **given, epochs=1.0, data_workers=0)
    counts = Shards(copy).manifest.counts
    assert result.progress.step == round(counts["chunks"] / 4)
    assert result.progress.tokens >= counts["student_tokens"] - 4 * LENGTH
    known = json.loads((tmp_path / "out/run/run.json").read_text())["fingerprints"]
    assert known["prepared"] == {"content": Shards(copy).manifest.digest}
    with pytest.raises(ValueError, match=r"prepared: .* was made for something else"):
        transfer(*model, tmp_path / "other", prepared=copy, **given | {"max_length": 40})
    with pytest.raises(ValueError, match="epochs: wanted prepared chunks in a local folder"):
        transfer(*model, tmp_path / "other", prepared=copy.as_uri(), **given, epochs=1.0)
    with pytest.raises(ValueError, match="data: wanted text for init 'focus', got none"):
        transfer(*model, tmp_path / "other", prepared=copy, **given, init="focus")
    with pytest.raises(FileNotFoundError, match=r"prepared: wanted a folder .* has no manifest\.json"):
        transfer(*model, tmp_path / "other", prepared=world, **given)
    assert not (tmp_path / "other").exists()


SLURM = ["--executor=slurm", "--executor-option=partition=cpu", "--executor-option=time=1:00:00"]


def test_a_slurm_cluster_gets_a_job_for_the_shards_and_one_for_the_manifest(world, tmp_path, monkeypatch):
    tools, jobs = tmp_path / "bin", tmp_path / "jobs"
    jobs.mkdir()
    tools.mkdir()
    submit = f'#!/bin/sh\nfor last; do :; done\nn=$(ls {jobs} | wc -l)\necho "$@" | cat "$last" - > {jobs}/$n\n'
    (tools / "sbatch").write_text(f"{submit}echo Submitted batch job 7$n\n")
    (tools / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    paths = [f"--model={world / 'MODEL'}", f"--tokenizer={world / 'NEW'}", f"--data={world / 'text.jsonl'}"]
    paths += [f"--output={tmp_path / 'out'}", "--max-length=48", "--shards=3", "--workers=2"]
    refused = run("prepare", *paths, *SLURM[:2])
    assert "executor_options: wanted time for SlurmPipelineExecutor, got none" in refused.output
    refused = run("prepare", *paths, *SLURM, "--executor-option=tasks=4")
    assert "executor_options: wanted options of SlurmPipelineExecutor (time, partition, cpus_per_task" in refused.output
    assert not (tmp_path / "out").exists()
    more = ['--executor-option=sbatch_args={"account": "me"}', "--executor-option=mem_per_cpu_gb=4", "--json"]
    done = run("prepare", *paths, *SLURM, *more)
    assert json.loads(done.stdout) == {"output": str(tmp_path / "out"), "shards": 3, "submitted": True}
    shards, _, last, _ = (path.read_text() for path in sorted(jobs.iterdir()))
    for line in ("partition=cpu", "time=1:00:00", "account=me", "mem-per-cpu=4G", "array=0-2%2"):
        assert f"#SBATCH --{line}\n" in shards
    assert f"launch_pickled_pipeline {tmp_path / 'out/logs/executor.pik'}" in shards
    assert "--dependency=afterok:70" in last

    monkeypatch.setenv("SLURM_NODELIST", "localhost")  # what the jobs then do
    for number in (2, 0, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        run_pickled(tmp_path / "out/logs/executor.pik")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    run_pickled(tmp_path / "out/logs/finish/executor.pik")
    assert Shards(tmp_path / "out").manifest.digest == Shards(world / "whole").manifest.digest


def run_pickled(path):
    with path.open("rb") as file:
        dill.load(file).run()


def test_files_of_a_folder_go_to_shards_whole_where_there_are_enough(world, tmp_path):
    for number in range(4):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{number}.txt").write_text(f"file {number}\n" * 30)
    with pytest.raises(ValueError, match="output: wanted a folder outside of data"):
        make(world, tmp_path / "data" / "out", data=tmp_path / "data")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"data: wanted text to train on .* got none \(1 documents without text\)"):
        make(world, tmp_path / "none", data=tmp_path / "empty.jsonl", shards=1)
    done = make(world, tmp_path / "out", data=tmp_path / "data", shards=2)
    tokenizer = AutoTokenizer.from_pretrained(world / "NEW")
    for number in range(2):
        chunks = [chunk for _, group in Shards(tmp_path / "out").stream(number, [0]) for chunk in group]
        text = "".join(tokenizer.decode(chunk.student_ids) for chunk in chunks)
        assert {x for x in "0123" if f"file {x}" in text} == {str(number), str(number + 2)}
    assert done.manifest.counts["texts"] == 4


def test_texts_at_a_url_are_read_as_those_of_a_hub_dataset(sides):
    memory = fsspec.filesystem("memory")
    for number in range(4):
        rows = "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for text in TEXTS[:6])
        memory.pipe(f"/texts/{number}.jsonl", rows.encode())
    source = "memory://texts/*.jsonl"
    texts = read_documents(source, seed=1)
    assert Counter(texts) == Counter(f"{number} {text}" for number in range(4) for text in TEXTS[:6])
    found = set()
    for process in range(2):
        stream = AlignedBatches(source, *sides, batch_size=1, seed=0, process=process, processes=2)
        parts = itertools.takewhile(lambda part: not part.ends, stream._texts())
        own = {text[0] for part in parts for text in part.texts}
        assert len(own) == 2
        found |= own
    assert found == set("0123")
    with pytest.raises(
        ValueError, match=r"data: wanted \.jsonl, \.json, \.csv or \.parquet files at a URL, got 'memory://"
    ):
        read_documents("memory://texts/x.txt")
