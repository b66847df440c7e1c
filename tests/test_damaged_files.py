"""Files of a run, a model and prepared chunks that were torn or changed by hand: each error names the place."""

import json
import re
import shutil

import pytest
import yaml
from commands import run as command
from test_runs import Stop, files, stop_at  # noqa: F401, a fixture
from tiny import new_tokenizer, save_tiny_model

from matt_fast import HealingOptions, TrainingOptions, doctor, transfer
from matt_fast.data.places import MANIFEST
from matt_fast.data.shards import Shards
from matt_fast.recipe.evaluating import evaluate_models
from matt_fast.recipe.preparing import prepare

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
