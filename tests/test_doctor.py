"""What doctor finds: nothing in a sound transfer, all that is wrong in an unsound one, in the words of transfer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from commands import run
from safetensors.torch import load_file, save_file
from tiny import TEXTS, byte_level, jsonl, new_tokenizer, save_tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from matt_fast import HealingOptions, TrainingOptions, doctor, transfer
from matt_fast.alignment.reachable import unreachable
from matt_fast.recipe.doctor import FAIL, LOOK, OK
from matt_fast.recipe.doctor import data as of_data
from matt_fast.recipe.doctor import tokenizers as of_tokenizers
from matt_fast.recipe.doctor.data import STRIDE, WINDOW, find_copies
from matt_fast.recipe.doctor.finding import share
from matt_fast.recipe.export import lost_chat_template


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    save_tiny_model(folder / "model")
    roles = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"}
    byte_level(TEXTS, 330, **roles).save_pretrained(folder / "tokenizer")
    (folder / "data.jsonl").write_text(jsonl(TEXTS))
    (folder / "held-out.txt").write_text("Something else altogether, of which nothing is trained on. " * 3)
    return folder


@pytest.fixture
def job(sound, tmp_path):
    return {
        "model": sound / "model",
        "tokenizer": sound / "tokenizer",
        "data": sound / "data.jsonl",
        "eval_data": sound / "held-out.txt",
        "output": tmp_path / "output",
        "max_length": 48,
        "batch_size": 2,
        "training": TrainingOptions(steps=10),
        "device": "cpu",
    }


def by_name(findings):
    found = {}
    for x in findings:
        found.setdefault(x.name, []).append(x)
    return found


def test_a_sound_transfer_has_nothing_that_will_fail(job):
    checks = []
    found = doctor(**job, on_check=checks.append)
    assert [x for x in found if x.verdict != OK] == []
    names = by_name(found)
    assert names["class"][0].found.startswith("LlamaForCausalLM, 3 layers, 32,064 parameters, float32, 2,048 positions")
    assert names["shared"][0].found == "270 of 330 tokens are shared, 60 are new"
    assert names["chat template"][0].found.startswith("kept from the model; ")
    assert names["text"][0].found == f"{len(TEXTS)} documents, {len(''.join(TEXTS).encode()):,} bytes of text"
    assert "5 of them without a token" in names["rows"][0].found
    assert names["values"][0].found.startswith("all 29 tensors are finite")
    assert {"segments", "chunks", "offsets", "round trip", "memory", "work", "disk", "output"} <= names.keys()
    assert not job["output"].exists()
    assert len(checks) == len(set(checks))
    without = by_name(doctor(**job | {"output": None, "eval_data": None}))
    assert not {"disk", "output"} & without.keys()
    assert without["held-out text"][0].verdict == LOOK


def test_a_template_that_the_model_does_not_know_is_told(sound):
    teacher, student = (AutoTokenizer.from_pretrained(sound / "model") for _ in range(2))
    student.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    told, tried = of_tokenizers.chat(SimpleNamespace(vocabulary=SimpleNamespace(teacher=teacher, student=student)))
    assert (told.verdict, tried.verdict) == (LOOK, OK)
    assert told.found == "the model's chat template is lost, since the new tokenizer has another"
    teacher.chat_template = None  # one that had none loses none
    assert lost_chat_template(student, teacher) is None


def test_the_default_one_of_several_templates_is_tried(sound):
    teacher, student = (AutoTokenizer.from_pretrained(sound / "model") for _ in range(2))
    subject = SimpleNamespace(vocabulary=SimpleNamespace(teacher=teacher, student=student))
    several = {"default": "{{ messages[0].content }}", "tools": "{{ 1 / 0 }}"}
    for own, start in ((None, "kept from the model; "), (several, "the new one is used; ")):
        teacher.chat_template, student.chat_template = several, own
        (said,) = of_tokenizers.chat(subject)
        assert said.verdict == OK
        assert said.found.startswith(f"{start}a question and an answer are ")


def test_all_faults_are_found_in_the_words_of_a_transfer(job, sound, tmp_path):
    save_tiny_model(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    stages = []
    byte_level(TEXTS, 330).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="wanted a bos or eos token to score the first token of a text, got neither"):
        transfer(**job | {"tokenizer": tmp_path / "bare"}, on_stage=stages.append)
    assert stages == ["vocabulary", "checks"]
    wrong = {
        "weights": {"model": tmp_path / "model"},
        "positions": {"max_length": 4096},
        "text": {"eval_data": sound / "data.jsonl"},
        "layer": {"n_layers": 4},
        "packages": {"training": TrainingOptions(steps=1, offload="cpu", checkpointing=True)},
    }
    found = doctor(**job | {key: value for part in wrong.values() for key, value in part.items()})
    fails = {x.name: x.found for x in found if x.verdict == FAIL}
    assert fails.keys() >= wrong.keys()
    for name, part in wrong.items():
        with pytest.raises(ValueError, match=r"\w") as error:
            transfer(**job | part)
        assert " ".join(str(error.value).split()) == fails[name]
    assert not job["output"].exists()


def test_an_objective_that_trains_nothing_is_not_named(job):
    """As in the recipe `quick`, which trains no rows alone."""
    without = job | {"training": TrainingOptions(steps=0, objective="aim")}
    healed = by_name(doctor(**without, healing=HealingOptions("outer", steps=3, outer_layers=1, objective="ntp")))
    assert [x.found for x in healed["layer"]] == ["rows and layers together (outer), objective ntp"]
    assert healed["work"][0].found.startswith("3 steps of ")
    start = by_name(doctor(**without))
    assert [x.found for x in start["layer"]] == ["nothing is trained: rows are as they start"]
    assert "work" not in start
    passes = by_name(doctor(**without, epochs=1))
    assert [x.found for x in passes["layer"]] == ["layer 1 of 3, objective aim"]


def test_what_cannot_be_looked_at_is_said_once(job, tmp_path):
    (tmp_path / "config.json").write_text("3")
    found = doctor(**job | {"model": tmp_path})
    assert [x.name for x in found if x.verdict == FAIL] == ["class"]
    (left,) = by_name(found)["left out"]
    assert left.verdict == LOOK
    assert {"weights", "segments", "memory"} < set(left.found.split(": ")[1].split(", "))
    with pytest.raises(TypeError, match="colour: wanted arguments of transfer"):
        doctor(**job, colour=1)
    with pytest.raises(ValueError, match="batch_size: wanted at least 1, got 0"):
        doctor(**job | {"batch_size": 0})


def test_what_a_person_should_look_at(job, tmp_path, monkeypatch):
    """A tokenizer without pad, template and some merges; offsets that point elsewhere; text that is held out twice."""
    poor = json.loads(new_tokenizer().backend_tokenizer.to_str())
    del poor["model"]["merges"][-3:]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(poor)), eos_token="</s>")
    (tmp_path / "held-out.txt").write_text(TEXTS[2].replace("\n", "\n\n"))
    plain = of_tokenizers.tokenize

    def moved(tokenizer, texts):
        ids, spans = plain(tokenizer, texts)
        return ids, [x + 3 for x in spans]

    monkeypatch.setattr(of_tokenizers, "tokenize", moved)
    options = {"tokenizer": tokenizer, "eval_data": tmp_path / "held-out.txt", "training": TrainingOptions(steps=5000)}
    names = by_name(doctor(**job | options))
    assert not [x for found in names.values() for x in found if x.verdict == FAIL]
    expected = {
        "special tokens": "the new tokenizer has no bos, pad token",
        "chat template": "the model's chat template is lost, since the new tokenizer lacks '<bos>', '<eos>'",
        "use": "0.91% of 330 new tokenizer's tokens are in no text",
        "offsets": "tokens have offsets of other text",
        "held-out text": "100% of 1 held-out pieces are in the training text",
        "chunks": "passes over the data",
    }
    for name, line in expected.items():
        assert any(x.verdict == LOOK and line in x.found and (x.advice or name == "offsets") for x in names[name]), name


def test_words_that_the_tokenizer_has_lost(job, sound, tmp_path):
    """Counted where tokenizers do: words that are one of the model's tokens and have none in a tokenizer of bytes."""
    (tmp_path / "data.txt").write_text(" value" * 30 + " x" * 10)
    letters = byte_level(["x"], 256 + 3, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    old = AutoTokenizer.from_pretrained(sound / "model")
    counts = [len(side.tokenize(word)) for side in (old, letters) for word in (" value", " x")]
    assert counts == [1, 2, 6, 2]  # 30 segments of one token become longer, and 20 stay one on both sides
    lines = {}
    for name, more in (("without", {}), ("healed", {"healing": HealingOptions(steps=5)})):
        found = by_name(doctor(**job | {"tokenizer": letters, "data": tmp_path / "data.txt"} | more))
        lines[name] = [x.found for x in found["segments"] if x.verdict == LOOK]
    assert "60% of 50 segments have more tokens than before: words that are no token now" in lines["without"]
    assert not any("no token now" in x for x in lines["healed"])


def test_tokens_that_no_text_gives():
    tokenizer = byte_level(TEXTS, 330)
    assert unreachable(tokenizer) == []
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    first, second = whole["model"]["merges"].pop(10)
    lost = {first + second}
    for left, right in whole["model"]["merges"]:  # and those that are made of it, unless it is two other halves
        if {left, right} & lost:
            lost.add(left + right)
    cut = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))
    made = {tuple(pair) for pair in whole["model"]["merges"]}
    expected = {token for token in lost if token not in {a + b for a, b in made if not {a, b} & lost}}
    assert set(cut.convert_ids_to_tokens(unreachable(cut))) == expected
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -3.0), ("ba", -1.5)], unk_id=0))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    assert unreachable(PreTrainedTokenizerFast(tokenizer_object=pieces)) == [3]  # two letters score better


@pytest.mark.parametrize(
    ("teacher", "student", "told"), [(250, 60, True), (250, 200, False), (100, 20, False), (250, 125, False)]
)
def test_rows_that_the_old_tokenizer_keeps_short(teacher, student, told):
    """As with a language that it spells in bytes; not where documents are short, or both are alike."""
    sample = SimpleNamespace(segments=SimpleNamespace(lengths=np.array([[teacher, student]] * 8)), share=None)
    job = SimpleNamespace(batch_size=4, max_length=256, epochs=None, training=TrainingOptions())
    (said,) = of_data.rows(SimpleNamespace(job=job, once=lambda name, read: sample))
    assert f"chunks have {student} of 256 tokens" in said.found
    assert ("since the model's tokenizer has 250 there" in said.found) == told


def test_copies_are_found_in_stretches_however_lines_are_broken():
    text = " ".join(f"word{i * 7919 % 1000}" for i in range(400))
    piece = text[137 : 137 + 2 * (WINDOW + STRIDE)]
    half = "x" * 400 + text[500 : 500 + WINDOW + STRIDE]
    documents = [text.replace(" word5", "\nword5"), "one line\nand another"]
    assert find_copies([piece, half, "and another", "quite another", piece.upper()], documents) == ([0, 2], None)
    assert share(1, 3) == "33% of 3"
    assert (share(0, 0), share(999_999, 1_000_000), share(1, 1000)) == (
        "0% of 0",
        "99.9% of 1,000,000",
        "0.1% of 1,000",
    )


def test_the_command_tells_by_its_status(job, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in job.items() if name != "training"]
    done = run("doctor", *options, "--json", "--steps=10")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["will_fail"] is False
    assert set(result["findings"][0]) == {"area", "name", "verdict", "found", "advice"}
    done = run("doctor", *options, "--max-length=4096")
    assert done.exit_code == 1
    assert "will fail" in done.stdout
    assert run("doctor", *options, "--batch-size=0").exit_code == 1
