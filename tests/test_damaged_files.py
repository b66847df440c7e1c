"""Files of a run, a model and prepared chunks that were torn or changed by hand: each error names the place."""

import copy
import functools
import json
import operator
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from commands import run as command
from safetensors.torch import save_file
from test_runs import Stop, files, stop_at  # noqa: F401, a fixture
from tiny import new_tokenizer, save_tiny_model

from matt_fast import HealingOptions, TrainingOptions, doctor, transfer
from matt_fast.data.places import MANIFEST
from matt_fast.data.shards import Shards
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.recipe import finish, sweep
from matt_fast.recipe.evaluating import evaluate_models
from matt_fast.recipe.preparing import prepare
from matt_fast.recipe.run_files import check_run_files
from matt_fast.recipe.watching import KEPT
from matt_fast.report.page import Shown, report_page
from matt_fast.report.sentences import progress_line
from matt_fast.runs.folder import Run, damaged_files
from matt_fast.runs.record import HELD_OUT, read_record
from matt_fast.support.journal import Journal
from matt_fast.training.checkpoints import Checkpoints
from matt_fast.training.metrics import Metrics
from matt_fast.training.sides import Student
from matt_fast.training.state import Progress, TrainingState

STOPPED = ("run.json", "state.json", "evaluations.json", "rows/report.json", "trained/numbers.json")


@pytest.fixture(scope="module")
def job(files, tmp_path_factory):  # noqa: F811
    """Arguments of a small transfer, of which "done" has all and "stopped" what was there in healing."""
    folder = tmp_path_factory.mktemp("runs")
    healing = HealingOptions("lora", steps=2, rank=2, objective="ntp")
    given = files | {"training": TrainingOptions(steps=1), "healing": healing, "eval_pieces": 1, "completions": 0}
    transfer(**given, output=folder / "done")
    with pytest.raises(Stop):
        transfer(**given, output=folder / "stopped", on_step=stop_at(2))
    return given | {"output": folder}


def without_each(path):
    """The texts of a file of JSON or YAML without one of its keys, or with another thing there, and cut off."""
    text = path.read_text()
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    whole = load(text)
    for number, key in enumerate(whole):
        yield dump({name: value for name, value in whole.items() if name != key} | ({key: "x"} if number % 2 else {}))
    yield text[: len(text) // 2]


def tried(place, name, use) -> list[str]:
    """What `use` of each damaged copy of a folder raises, but where it takes it."""
    found = []
    for number, text in enumerate(without_each(place / "run" / name)):
        copy = shutil.copytree(place, place.with_name(f"copy-{number}"))
        (copy / "run" / name).write_text(text)
        try:
            use(copy)
        except (OSError, TypeError, ValueError) as error:
            found.append(str(error))
        except Stop:
            pass
        finally:
            shutil.rmtree(copy)
    return found


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_goes_on_names_the_file_that_is_damaged(job, name):
    def go_on(copy):
        transfer(**job | {"output": copy}, resume=True, on_step=stop_at(2), on_message=lambda text: None)

    found = tried(job["output"] / "stopped", name, go_on)
    assert len(found) > 1
    assert all(re.match(r"(output|resume): wanted .*run", x, re.DOTALL) or "not the files that" in x for x in found)


def test_a_finished_run_names_its_damaged_result(job):
    found = tried(job["output"] / "done", "result.json", lambda copy: transfer(**job | {"output": copy}, resume=True))
    assert len(found) > 10
    assert all(re.match(r"output: wanted .*result\.json", x) for x in found)


def test_a_report_names_the_run_whose_files_are_damaged(job):
    def report(copy):
        done = command("report", copy, "--no-influence")
        if done.exit_code:
            raise ValueError(done.stderr)

    for name in ("result.json", "run.yaml"):
        found = tried(job["output"] / "done", name, report)
        assert len(found) > 3
        assert all(re.match(r"Error: runs: wanted ", x) for x in found)


def test_files_of_a_model_and_of_chunks_with_something_else_in_them(files, tmp_path):  # noqa: F811
    save_tiny_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": [1]}))
    (first, *_) = (x.found for x in doctor(tmp_path / "model", files["tokenizer"], files["data"], device="cpu"))
    assert first == "model: wanted a list of names as architectures in its configuration, got [1]"
    save_tiny_model(tmp_path / "model")
    new_tokenizer().save_pretrained(tmp_path / "new")
    content = json.loads((tmp_path / "new" / "tokenizer.json").read_text())
    del content["pre_tokenizer"]
    (tmp_path / "new" / "tokenizer.json").write_text(json.dumps(content))
    found = doctor(tmp_path / "model", tmp_path / "new", files["data"], device="cpu", training=TrainingOptions(steps=1))
    assert not [x.found for x in found if "KeyError" in x.found]
    prepare(files["model"], files["tokenizer"], files["data"], tmp_path / "chunks", max_length=48, shards=1)
    manifest = json.loads((tmp_path / "chunks" / MANIFEST).read_text())
    (tmp_path / "chunks" / MANIFEST).write_text(json.dumps(manifest | {"made_of": None}))
    with pytest.raises(ValueError, match=r"prepared: wanted a whole manifest\.json in"):
        len(Shards(tmp_path / "chunks"))


def test_a_precision_that_is_none_is_named(files):  # noqa: F811
    with pytest.raises(ValueError, match="precision: wanted one of auto, no, bf16, got 'fp8'"):
        evaluate_models({"a": files["model"]}, {"text": files["eval_data"]}, precision="fp8")


def places(value, path=()):
    """The paths of all that is in an object, of lists of their first thing."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


def said_of(path, use, errors=ValueError):
    """Place -> what `use` says where something else stands at it in a file of JSON; nothing where it takes that."""
    whole, found = json.loads(path.read_text()), {}
    for place in places(whole):
        changed = copy.deepcopy(whole)
        *above, last = place
        functools.reduce(operator.getitem, above, changed)[last] = {"something": ["else"]}
        path.write_text(json.dumps(changed))
        try:
            use()
            found[place] = ""
        except errors as error:
            found[place] = str(error)
    path.write_text(json.dumps(whole))
    assert len(found) > 2
    return found


@pytest.mark.parametrize("name", [*STOPPED[1:], "completions.json"])
def test_something_else_at_any_place_of_a_runs_files_is_named(job, tmp_path, name):
    run = Run(shutil.copytree(job["output"] / "stopped", tmp_path / "run"))
    if name == "completions.json":
        run.write(name, {"prompts": [["text", "def"]], "bytes": 9, "original": ["x"], "adapted": ["y"]})
    check_run_files(run)
    for place, said in said_of(run.path(name), lambda: check_run_files(run)).items():
        taken = place[0] == "options"  # which are written down, and read by nothing
        assert said.startswith(f"output: wanted what a transfer wrote in '{run.path(name)}', got") is not taken, place


def test_something_else_at_any_place_of_a_result_is_named(job, tmp_path):
    run = Run(shutil.copytree(job["output"] / "done", tmp_path / "run"))
    work = SimpleNamespace(run=run, job=SimpleNamespace(held_out={HELD_OUT: job["eval_data"]}))
    path = run.path("result.json")

    def result():
        with damaged_files(path, "output"):
            return finish._read_result(work)

    for place, said in said_of(path, result).items():
        taken = place == ("output",)  # it may have been moved
        assert said.startswith(f"output: wanted what a transfer wrote in '{path}', got") is not taken, place
    for said in said_of(path, lambda: report_page([Shown(read_record(run.output))])).values():
        assert not said or said.startswith(f"runs: wanted what a transfer wrote in '{path}', got")


@pytest.fixture
def training():
    """A function that gives the state of training at its beginning."""
    table = EmbeddingTable(torch.zeros(4, 3), torch.tensor([0, 1, -1, -1]), torch.zeros(4, 3))
    return lambda: TrainingState.begin(Student(table), TrainingOptions(moments="dense"))


def test_something_else_at_any_place_of_a_checkpoint_is_named(tmp_path, training):
    checkpoints, accelerator, state = Checkpoints(tmp_path), Accelerator(cpu=True), training()
    counts = {"losses": [2.0], "parts": {"aim": 1.0}, "skipped": {"empty": 1}, "first_loss": 2.0}
    state.progress = Progress(step=1, loss=1.0, **counts)
    more = {"curve": [[1, 2.0]], "best_step": 1, "pending": False}
    checkpoints.write(state, accelerator, more)
    first, second = (tmp_path / f"step-00000000{step}" for step in (1, 2))
    for place, said in said_of(first / "state.json", lambda: checkpoints.read(training(), accelerator, KEPT)).items():
        taken = place[:2] in (("progress", "tokens"), ("progress", "skipped"))  # which "counts" has of each process
        begins = f"no checkpoint can be read; delete them to begin training anew: {first}: "
        assert said.startswith(begins) is not taken, place
        assert taken or "wanted" in said or "unexpected keyword" in said
    state.progress.step = 2
    checkpoints.write(state, accelerator, more)
    (second / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"2: state.json.progress: wanted dict, got None .* from step-000000001"):
        assert checkpoints.read(training(), accelerator, KEPT) == more
    shutil.copy(first / "state.json", second)
    save_file({"seen": torch.zeros(3)}, second / "state.safetensors")
    with pytest.warns(UserWarning, match=r"step-000000002: .*; the run goes on from step-000000001"):
        assert checkpoints.read(training(), accelerator, KEPT) == more


def test_a_process_that_sees_another_checkpoint_reads_the_main_ones(tmp_path, training, monkeypatch):
    """A network file system may show late what another machine wrote: all go on from one, or none does."""
    state, checkpoints, accelerator = training(), Checkpoints(tmp_path), Accelerator(cpu=True)
    for step in (1, 2):
        state.progress.step = step
        checkpoints.write(state, accelerator, {"at": step})
    monkeypatch.setattr("matt_fast.training.checkpoints.broadcast_object_list", lambda given: ["step-000000001"])
    assert checkpoints.read(state, accelerator) == {"at": 1}
    assert state.progress.step == 1
    (tmp_path / "step-000000001" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoints: wanted step-000000001 in .* but process 0 cannot read it"):
        checkpoints.read(state, accelerator)


def test_something_else_at_any_place_of_a_sweep_or_a_preparation_is_named(files, tmp_path):  # noqa: F811
    path = tmp_path / "depths.json"
    sweep._write(sweep.Sweep(1.0, 2.0, [sweep.Depth(1, 1.5, 3.0, 4)], {"seed": 0}), tmp_path)
    for place, said in said_of(path, lambda: sweep._measured(tmp_path, {"seed": 0})).items():
        wanted = "was measured with other settings" if place[0] == "settings" else "wanted what a sweep wrote in"
        assert wanted in said, place
    arguments = files["model"], files["tokenizer"], files["data"], tmp_path / "chunks"
    prepare(*arguments, max_length=48, shards=1)
    (tmp_path / "chunks" / MANIFEST).unlink()
    again = functools.partial(prepare, *arguments, max_length=48, shards=1)
    (tmp_path / "chunks" / "prepare.json").write_text('{"made_of": []}')
    with pytest.raises(ValueError, match=r"output: wanted what `matt-fast prepare` wrote in '.*prepare\.json'"):
        again()


def test_lines_of_a_run_that_are_none_are_named(job, tmp_path):
    output = shutil.copytree(job["output"] / "stopped", tmp_path / "run")
    metrics, drawn = (output / "run" / name for name in ("healing.jsonl", "drawn.jsonl"))
    metrics.write_text('{"step": 1, "loss": "x", "tokens": 3, "seconds": 1.0}\n')
    with pytest.raises(ValueError, match=r"runs: wanted what a transfer wrote in '.*healing\.jsonl'.*loss: wanted"):
        progress_line(read_record(output))
    metrics.write_text('{"step": 1, "loss": 2.0, "tokens": null}\n')
    with pytest.raises(ValueError, match=r"healing\.jsonl: wanted lines of metrics, got"):
        Metrics(metrics, Accelerator(cpu=True), step=1)
    drawn.write_text("[1\n")
    with pytest.raises(ValueError, match=r"drawn\.jsonl: wanted JSON objects, one a line, got b'\[1"):
        Journal(drawn)
    (output / "run" / "trained" / "rows.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"output: wanted what a transfer wrote in '.*rows\.safetensors'"):
        check_run_files(Run(output))
