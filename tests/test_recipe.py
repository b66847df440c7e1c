"""The whole job on tiny models, through Python and the command line, and what it refuses."""

import json
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny import TEXTS, new_tokenizer, save_tiny_model
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
    pipeline,
)
from typer.testing import CliRunner

from matt_fast import TrainingOptions, sweep_layers, transfer
from matt_fast.alignment.vocabulary import VocabularyPair, match_tokens
from matt_fast.cli.app import app
from matt_fast.cli.display import print_result
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.recipe import sweep
from matt_fast.recipe.export import keep_chat_template
from matt_fast.recipe.preflight import missing_new_tokens
from matt_fast.training.loop import freeze
from matt_fast.training.objectives import Student, losses

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GEMMA = Gemma3TextConfig(
    **SIZES,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=9,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)
NEOX = GPTNeoXConfig(**SIZES, tie_word_embeddings=False)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def held_out(arguments):
    """A file of the same texts, which is not the file that is trained on."""
    path = arguments["data"].with_name("held-out.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::-1]))
    return path


@pytest.fixture
def job(tmp_path, corpus):
    """Arguments of a small transfer."""
    teacher_tokenizer = save_tiny_model(tmp_path / "teacher")
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return {
        "model": tmp_path / "teacher",
        "tokenizer": tmp_path / "tokenizer",
        "data": corpus,
        "output": tmp_path / "output",
        "max_length": 48,
        "batch_size": 2,
        "training": TrainingOptions(steps=4, lr=1e-2),
    }, teacher_tokenizer


def test_the_folder_loads_generates_and_tells_what_was_done(job):
    arguments, teacher_tokenizer = job
    result = transfer(**arguments, eval_data=held_out(arguments), n_layers=2)
    output = arguments["output"]
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    teacher = AutoModelForCausalLM.from_pretrained(arguments["model"])

    assert tokenizer.get_vocab() == new_tokenizer().get_vocab()
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(model.model.layers) == 3
    for name, parameter in teacher.named_parameters():
        if "embed_tokens" not in name:
            assert torch.equal(parameter, model.get_parameter(name)), name
    text = pipeline("text-generation", model=str(output), tokenizer=str(output))("def", max_new_tokens=3)
    assert text[0]["generated_text"].startswith("def")

    matches = match_tokens(tokenizer, teacher_tokenizer)
    provenance = [json.loads(line) for line in (output / "token_provenance.jsonl").read_text().splitlines()]
    assert [record["id"] for record in provenance] == list(range(len(tokenizer)))
    moved = 0
    for record in provenance:
        i = record["id"]
        row = model.get_input_embeddings().weight[i]
        assert record["token"] == tokenizer.convert_ids_to_tokens(i)
        if i in matches:
            assert record["start"] == f"copied ({matches[i].how})"
            assert not record["trained"]
            assert torch.equal(row, teacher.get_input_embeddings().weight[matches[i].teacher_id])
        else:
            spelled_by = record["teacher_ids"] or slice(
                len(teacher_tokenizer)
            )  # <unk> has no spelling: all tokens' mean
            mean = teacher.get_input_embeddings().weight[spelled_by].mean(0)
            assert record["start"] == ("mean" if record["teacher_ids"] else "mean of all rows")
            assert record["trained"]
            assert torch.allclose(row, mean, atol=1e-6) == (record["seen"] == 0)
            moved += record["seen"] > 0
    assert moved == result.seen > 0
    assert sum(record["seen"] for record in provenance) > 0
    assert result.new == len(tokenizer) - len(matches)

    config = model.config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    same_letter = next(i for i, match in matches.items() if match.teacher_id == 65)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, same_letter]
    assert list(result.evaluations) == ["original", "initialised", "trained"]
    card = (output / "README.md").read_text()
    for evaluation in result.evaluations.values():
        assert f"{evaluation.bits_per_byte:.4f}" in card
    assert str(arguments["model"].parent) not in card
    completed = json.loads((output / "run" / "result.json").read_text())["completions"]
    assert completed == result.completions
    assert len(completed) == 3
    for row in completed:  # none twice
        assert any(row["prompt"] in text for text in TEXTS)
    assert len({row["prompt"] for row in completed}) == 3
    most = json.loads((output / "run" / "completions.json").read_text())["bytes"]
    assert all(len(row[name].encode()) <= most for row in completed for name in ("original", "adapted"))


@pytest.mark.parametrize("config", [GEMMA, NEOX], ids=["gemma3", "gpt_neox"])
def test_other_architectures(job, tmp_path, config):
    arguments, _ = job
    save_tiny_model(tmp_path / "other", config)
    arguments["model"] = tmp_path / "other"
    if config is NEOX:
        with pytest.warns(UserWarning, match="output head is not tied"):
            transfer(**arguments)
    else:
        transfer(**arguments)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    after = AutoModelForCausalLM.from_pretrained(arguments["output"])
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (arguments["output"], tmp_path / "other")]
    shared = {i: match.teacher_id for i, match in match_tokens(*tokenizers).items()}
    for old, new in (
        (before.get_input_embeddings(), after.get_input_embeddings()),
        (before.get_output_embeddings(), after.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[list(shared)], old.weight[list(shared.values())])
    # Text of shared tokens only runs through both as one model: nothing about scaling or ids has changed.
    ids = torch.tensor([list(shared)[:9]])
    theirs = torch.tensor([[shared[int(i)] for i in ids[0]]])
    with torch.no_grad():
        new, old = after(ids).logits, before(theirs).logits
    torch.testing.assert_close(new[..., list(shared)], old[..., list(shared.values())])


@pytest.mark.parametrize("objective", ["aim+boundary-head", "aim+ntp"])
def test_output_rows_that_are_not_tied_are_trained_and_exported(job, tmp_path, objective):
    arguments, _ = job
    tokens = len(save_tiny_model(tmp_path / "other", NEOX))  # the rows behind them are padding
    arguments |= {
        "model": tmp_path / "other",
        "training": TrainingOptions(objective=objective, steps=4, lr=1e-2),
        "eval_data": held_out(arguments),
    }
    transfer(**arguments)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    after = AutoModelForCausalLM.from_pretrained(arguments["output"])
    assert after.get_input_embeddings().weight is not after.get_output_embeddings().weight
    assert not after.config.tie_word_embeddings
    records = [json.loads(line) for line in (arguments["output"] / "token_provenance.jsonl").read_text().splitlines()]
    shared = {record["id"]: record["teacher_ids"][0] for record in records if record["start"].startswith("copied")}
    seen = [record["id"] for record in records if record["trained"] and record["seen"]]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, getter)().weight, getattr(after, getter)().weight
        assert torch.equal(new[list(shared)], old[list(shared.values())])
        for record in records:
            if record["id"] not in shared:
                mean = old[record["teacher_ids"] or slice(tokens)].mean(0)
                assert torch.allclose(new[record["id"]], mean, atol=1e-6) == (record["id"] not in seen)


@pytest.mark.parametrize("objective", ["boundary-head", "token-distillation+boundary-head"])
def test_input_rows_that_no_objective_reaches_are_told(job, tmp_path, objective):
    arguments, _ = job
    for name, config in (("untied", NEOX), ("tied", None)):
        save_tiny_model(tmp_path / name, config)
        given = {"model": tmp_path / name, "output": tmp_path / f"{name}-output"}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            transfer(**arguments | given | {"training": TrainingOptions(objective=objective, steps=1)})
        told = any("new input rows are initialised but not trained" in str(x.message) for x in caught)
        assert told == (name == "untied" and objective == "boundary-head")


def test_the_same_seed_gives_the_same_folder(job):
    arguments, _ = job
    transfer(**arguments, seed=5)
    first = AutoModelForCausalLM.from_pretrained(arguments["output"]).get_input_embeddings().weight
    transfer(**arguments | {"output": arguments["output"].with_name("again")}, seed=5)
    second = AutoModelForCausalLM.from_pretrained(arguments["output"].with_name("again")).get_input_embeddings().weight
    assert torch.equal(first, second)


def test_training_lowers_the_loss_and_reaches_every_row_when_none_is_frozen(job):
    arguments, _ = job
    arguments["training"] = TrainingOptions(steps=40, lr=1e-2, accumulation=2)
    result = transfer(**arguments, freeze_shared=False)
    assert result.trainable == 330
    assert sum(result.progress.losses[-5:]) < 0.7 * sum(result.progress.losses[:5])


def test_identical_tokenizers_are_refused(job):
    arguments, _ = job
    with pytest.raises(ValueError, match="tokenizer: wanted another than the model's own"):
        transfer(**arguments | {"tokenizer": arguments["model"]})
    assert not arguments["output"].exists()


def test_a_tokenizer_without_new_tokens_takes_its_rows_over_and_says_so(job):
    """A part of the model's own vocabulary, so that the tokenizers differ."""
    arguments, teacher_tokenizer = job
    whole = json.loads(teacher_tokenizer.backend_tokenizer.to_str())
    del whole["model"]["vocab"]["".join(whole["model"]["merges"].pop())]
    roles = {name: getattr(teacher_tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    part = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), **roles)
    said, options = [], {"init": "contextual", "epochs": 1.0, "eval_data": held_out(arguments)}
    result = transfer(**arguments | {"tokenizer": part}, on_message=said.append, **options)
    assert any(line.startswith("tokenizer: the model has all 269 tokens: their rows are taken over") for line in said)
    assert (result.new, result.progress.step, result.seen, result.worse_than_start) == (0, 0, 0, None)
    assert result.evaluations["trained"] == result.evaluations["initialised"]
    card = (result.output / "README.md").read_text()
    assert "- none: rows are as they started." in card
    assert "were trained" not in card
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (arguments["model"], result.output))
    tokens, ids = zip(*part.get_vocab().items(), strict=True)
    rows = before.get_input_embeddings().weight[teacher_tokenizer.convert_tokens_to_ids(list(tokens))]
    assert torch.equal(after.get_input_embeddings().weight[list(ids)], rows)
    other = arguments | {"tokenizer": part, "output": arguments["output"].with_name("trained")}
    assert transfer(**other, freeze_shared=False).seen > 0


def test_rows_without_text_are_passed_over_by_the_same_rule_everywhere(job):
    arguments, _ = job
    plain = transfer(**arguments, eval_data=held_out(arguments))
    for path in (arguments["data"], held_out(arguments)):
        path.write_text('{"text": null}\n' + path.read_text() + '{"text": " "}\n{"text": ""}\n')
    said = []
    options = {"eval_data": arguments["data"].with_name("held-out.jsonl"), "on_message": said.append}
    options |= {"checkpoint_every": 20, "epochs": 1.0}
    output = arguments["output"].with_name("other")
    found = transfer(**arguments | {"output": output}, init="contextual", **options)
    passed = "passed over 3 documents without text"
    assert [line for line in said if "data" in line] == [f"{name}: {passed}" for name in ("data", "eval_data")]
    assert found.progress.skipped == {"documents without text": 3}
    assert "- Skipped: 3 documents without text." in (output / "README.md").read_text()
    assert json.loads((output / "run" / "result.json").read_text())["progress"]["skipped"] == found.progress.skipped
    assert found.evaluations["original"] == replace(plain.evaluations["original"], without_text=3)


def test_new_tokens_are_looked_for_only_until_one_is_found(job):
    vocabulary = VocabularyPair(job[1], new_tokenizer(), 275)

    def documents():
        yield ""
        yield TEXTS[0]
        raise AssertionError("one has been found")

    assert missing_new_tokens(documents(), vocabulary) is None


def test_steps_without_new_tokens_are_counted_and_lose_nothing(job):
    """All but one of the tokens are shared, and the data does not have it."""
    arguments, teacher_tokenizer = job
    teacher_tokenizer.add_tokens(["§§"])
    said = []
    result = transfer(**arguments | {"tokenizer": teacher_tokenizer}, on_message=said.append)
    characters = sum(map(len, TEXTS))
    assert said == [
        f"data: none of the 1 new tokens occurs in its first {characters:,} characters; steps without one train nothing"
    ]
    assert result.new == 1
    assert result.progress.losses == [0.0] * 4
    assert result.progress.steps_without_new_tokens == 4
    assert "- Skipped: 4 steps without new tokens." in (arguments["output"] / "README.md").read_text()
    console = Console(record=True)
    print_result(console, result)
    assert re.search(r"skipped +4 steps without new tokens", console.export_text())


def test_accumulated_gradients_equal_those_of_one_batch(job):
    """Two micro-batches through one set of rows give the mean of their gradients."""
    from collections import Counter

    from matt_fast.data.chunks import Side
    from matt_fast.data.stream import AlignedBatches
    from matt_fast.model.teacher import Teacher

    arguments, teacher_tokenizer = job
    trunk = Teacher(arguments["model"]).load(torch.float32, 2).get_decoder()
    freeze(trunk)
    student = new_tokenizer()
    rows_total = len(student)
    table = Student(
        EmbeddingTable(trunk.get_input_embeddings().weight, torch.full((rows_total,), -1), torch.randn(rows_total, 32))
    )
    sides = Side("teacher", teacher_tokenizer, 275, 48), Side("student", student, rows_total, 48)
    stream = iter(AlignedBatches(arguments["data"], *sides, batch_size=2, seed=0))
    batches = [next(stream) for _ in range(2)]
    options = TrainingOptions(objective="aim", reduction="documents")

    def backward(rows, batch, share=1.0):
        (losses(trunk, trunk, table, rows, batch, 2, options)["aim"] * share).backward()

    together = table.rows(torch.cat([batch.student_ids.flatten() for batch in batches]))
    for batch in batches:
        backward(together, batch, 0.5)
    apart = torch.zeros(rows_total, 32)
    for batch in batches:
        rows = table.rows(batch.student_ids)
        backward(rows, batch)
        apart[rows.input.slots] += rows.input.trainable.grad / 2
    torch.testing.assert_close(together.input.trainable.grad, apart[together.input.slots])
    assert isinstance(batches[0].skipped, Counter)


def test_bad_input_is_refused_before_any_work_and_leaves_nothing(job, tmp_path):
    arguments, _ = job
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="output: wanted a new or empty folder"):
        transfer(**arguments | {"output": tmp_path / "full"})
    with pytest.raises(ValueError, match="n_layers: wanted 1 to 3 for this model, got 9"):
        transfer(**arguments, n_layers=9)
    with pytest.raises(ValueError, match="precision: wanted one of auto, no, bf16, got 'fp16'"):
        transfer(**arguments, precision="fp16")
    with pytest.raises(ValueError, match=r"model: .*full' could not be loaded as a model: wanted config\.json in it"):
        transfer(**arguments | {"model": tmp_path / "full"})
    (tmp_path / "empty.jsonl").write_text('{"text": " \\n"}')
    with pytest.raises(ValueError, match=r"^data: wanted text to train on .*1 documents without text\)$"):
        transfer(**arguments | {"data": tmp_path / "empty.jsonl"})
    (tmp_path / "empty.jsonl").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "full", "teacher", "tokenizer"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("objective", "aim2", "objective: wanted one or more of aim, aim_star, .* got 'aim2'"),
        ("objective", "aim+ntp+aim", r"objective: wanted each name once, got 'aim\+ntp\+aim'"),
        ("moments", "none", "moments: wanted 'lazy' or 'dense', got 'none'"),
        ("warmup_steps", -1, "warmup_steps: wanted 0 or more, got -1"),
        ("decay_steps", 1001, "warmup_steps and decay_steps: wanted at most the 1000 steps together, got 0 and 1001"),
        ("warmup_steps", 1001, "wanted at most the 1000 steps together, got 1001 and 0"),
        ("steps", -1, "steps: wanted at least 0, got -1"),
        ("accumulation", 0, "accumulation: wanted at least 1, got 0"),
        ("lr", -1.0, "lr: wanted a number above 0, got -1.0"),
        ("max_grad_norm", 0, "max_grad_norm: wanted a number above 0, got 0"),
    ],
)
def test_training_options_are_checked_at_once(option, value, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**{option: value})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", "10", r"steps: wanted int, got '10' \(str\)"),
        ("steps", 10.5, "steps: wanted int, got 10.5"),
        ("decay_steps", 1.5, "decay_steps: wanted int or None, got 1.5"),
        ("objective", None, "objective: wanted str, got None"),
        ("lr", None, "lr: wanted float, got None"),
        ("max_grad_norm", "1", "max_grad_norm: wanted float or None, got '1'"),
        ("packing", "no", "packing: wanted bool, got 'no'"),
    ],
)
def test_training_options_have_types(option, value, message):
    with pytest.raises(TypeError, match=message):
        TrainingOptions(**{option: value})
    assert TrainingOptions(lr=1, steps=np.int64(3)).steps == 3


@pytest.mark.parametrize(("option", "value"), [("metric", "cosine"), ("reduction", "documents")])
def test_options_of_the_aim_loss_are_refused_where_there_is_none(job, option, value):
    for objective in ("token-distillation", "ntp+boundary-head"):
        with pytest.raises(ValueError, match=f"{option}: wanted .* with an objective that has no AIM loss"):
            TrainingOptions(objective=objective, **{option: value})
    TrainingOptions(objective="ntp+aim_star", **{option: value})
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data", "output")]
    failed = run("transfer", *paths, f"--{option}={value}")
    assert failed.exit_code == 1
    assert f"{option}: wanted" in failed.output


def test_a_loss_that_is_not_finite_ends_with_an_error_and_no_model(job, tmp_path):
    arguments, _ = job
    broken = AutoModelForCausalLM.from_pretrained(arguments["model"])
    broken.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)  # finite, but not what it gives
    broken.save_pretrained(arguments["model"])
    with pytest.raises(FloatingPointError, match=r"not finite at step 1.*segments that differ between the two sides"):
        transfer(**arguments, n_layers=2)
    assert [path.name for path in arguments["output"].iterdir()] == ["run"]
    with pytest.raises(FileExistsError, match="a run that is not finished; go on with it: matt-fast transfer --resume"):
        transfer(**arguments, n_layers=2)


def test_pickled_weights_are_off_unless_asked_for(job, tmp_path):
    arguments, _ = job
    model = AutoModelForCausalLM.from_pretrained(arguments["model"])
    (arguments["model"] / "model.safetensors").unlink()
    torch.save(model.state_dict(), arguments["model"] / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        transfer(**arguments)
    transfer(**arguments, allow_pickle=True)


def test_a_chat_template_is_kept_only_if_its_tokens_exist(job):
    arguments, teacher_tokenizer = job
    other = new_tokenizer()
    keep_chat_template(other, teacher_tokenizer)
    assert other.chat_template is None  # it has no <bos>
    same = AutoTokenizer.from_pretrained(arguments["model"])
    same.chat_template = None
    keep_chat_template(same, teacher_tokenizer)
    assert same.chat_template == teacher_tokenizer.chat_template


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_transfers_and_evaluates(job):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data", "output")]
    training = ("--steps=40", "--max-length=48", "--objective=ntp", "--lr=1e-2")
    done = run("transfer", *paths, *training, f"--eval-data={held_out(arguments)}")
    assert done.exit_code == 0, done.output
    assert "after training" in done.output
    assert (arguments["output"] / "model.safetensors").exists()
    measured = run("evaluate", f"--model={arguments['output']}", f"--data={arguments['data']}", "--pieces=40")
    assert measured.exit_code == 0, measured.output
    figure = re.search(r"(\d+\.\d{4}) \(", measured.output)[1]
    assert figure in (arguments["output"] / "README.md").read_text()


def test_packing_fills_the_rows_and_says_so(job):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    shares = {}
    for packing in ("--packing", "--no-packing"):
        done = run(
            "transfer", *paths, f"--output={arguments['output']}{packing}", "--steps=3", "--max-length=200", packing
        )
        assert done.exit_code == 0, done.output
        shares[packing] = float(re.search(r"data\s+(\d+\.\d)% of the rows is padding", done.output)[1])
    assert shares["--packing"] < shares["--no-packing"] / 2


def test_the_command_line_names_what_is_wrong(job):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    failed = run("transfer", *paths, f"--output={arguments['model']}")
    assert failed.exit_code == 1
    assert "output: wanted a new or empty folder" in " ".join(failed.output.split())
    assert "Traceback" not in failed.output


def test_a_sweep_measures_each_depth_as_a_transfer_of_its_own(job, monkeypatch):
    arguments, _ = job
    alive = []  # a process that is killed leaves its semaphores behind
    monkeypatch.setattr("subprocess.Popen.kill", lambda process: alive.append(process.poll() is None))
    arguments |= {"eval_data": held_out(arguments), "training": TrainingOptions(steps=3, lr=1e-2)}
    seen = []
    outcome = sweep_layers(**arguments, depths=[1, 3], on_step=lambda progress: seen.append(progress.step))
    assert seen == [1, 2, 3] * 2
    assert alive == [False] * 3
    output = arguments.pop("output")
    assert sorted(path.name for path in output.iterdir()) == ["depths.json", "depths.png"]
    written = json.loads((output / "depths.json").read_text())
    assert [depth["n_layers"] for depth in written["depths"]] == [1, 3]
    for depth in outcome.depths:
        alone = transfer(**arguments, output=output.with_name(f"layer-{depth.n_layers}"), n_layers=depth.n_layers)
        assert depth.bits_per_byte == pytest.approx(alone.evaluations["trained"].bits_per_byte, rel=1e-6)
        assert outcome.initialised == pytest.approx(alone.evaluations["initialised"].bits_per_byte, rel=1e-6)
        assert depth.memory > 0
    with pytest.raises(ValueError, match="depths: wanted layers from 1 to 3 for this model, got 4"):
        sweep_layers(**arguments, output=output.with_name("other"), depths=[4])
    with pytest.raises(ValueError, match=r"max_length: wanted room for text"):  # from the other process, as it is
        sweep_layers(**arguments | {"max_length": 1}, output=output.with_name("other"), depths=[1])
    assert not output.with_name("other").exists()


def measured_without_work(calls, fails_at=None):
    """In place of `transfer_apart`: figures that follow from the depth."""

    def measured(arguments, callbacks):
        calls.append(arguments["n_layers"])
        if arguments["n_layers"] == fails_at:
            raise FloatingPointError("not finite")
        evaluations = {name: SimpleNamespace(bits_per_byte=1.5) for name in ("original", "initialised", "trained")}
        return SimpleNamespace(
            evaluations=evaluations,
            progress=SimpleNamespace(seconds=100.0 + arguments["n_layers"] / 1000),
            training_memory=1 << 30,
        )

    return measured


def test_a_sweep_keeps_what_it_measured_and_draws_all_of_it(job, monkeypatch):
    arguments, _ = job
    monkeypatch.setattr(sweep, "transfer_apart", measured_without_work([], fails_at=3))
    figures = []

    def figure(**options):
        figures.append(Figure(**options))
        return figures[-1]

    monkeypatch.setattr(sweep, "figure_class", lambda: figure)
    with pytest.raises(FloatingPointError):
        sweep_layers(**arguments, eval_data=held_out(arguments), depths=[1, 2, 3])
    written = json.loads((arguments["output"] / "depths.json").read_text())
    assert [depth["n_layers"] for depth in written["depths"]] == [1, 2]
    assert sorted(path.name for path in arguments["output"].iterdir()) == ["depths.json", "depths.png"]
    for axis in figures[-1].axes[1:]:
        highest = max(axis.lines[0].get_ydata())
        assert axis.get_ylim()[0] == 0
        assert axis.get_ylim()[1] > 1.05 * highest  # the marker is not cut


def test_a_second_sweep_measures_only_what_is_missing(job, monkeypatch):
    arguments, _ = job
    arguments |= {"eval_data": held_out(arguments), "init": rows_of_ones}
    calls, told = [], []
    monkeypatch.setattr(sweep, "transfer_apart", measured_without_work(calls, fails_at=3))
    with pytest.raises(FloatingPointError):
        sweep_layers(**arguments, depths=[2, 3])
    monkeypatch.setattr(sweep, "transfer_apart", measured_without_work(calls))
    (arguments["output"] / ".part-model" / "run").mkdir(parents=True)  # as one that was killed leaves it
    outcome = sweep_layers(**arguments, depths=[3, 1, 2], on_depth=lambda depth: told.append(depth.n_layers))
    assert calls == [2, 2, 3, 3, 1]  # the first is the start before training
    assert told == [3, 1, 2]
    assert [depth.n_layers for depth in outcome.depths] == [1, 2, 3]
    assert sorted(path.name for path in arguments["output"].iterdir()) == ["depths.json", "depths.png"]
    other = arguments | {"training": TrainingOptions(steps=5, lr=1e-2), "seed": 3}
    with pytest.raises(ValueError, match=r"other settings: seed 0 there, 3 here; training.steps 4 there, 5 here$"):
        sweep_layers(**other)
    with pytest.raises(ValueError, match=r"other settings: init 'test_recipe.rows_of_ones' there, 'mean' here$"):
        sweep_layers(**arguments | {"init": "mean"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'iint'"):
        sweep_layers(**arguments, iint="mean")
    assert len(calls) == 5


def rows_of_ones(embeddings, rows, matches, subtokens):
    return torch.ones(rows, embeddings.shape[1])


def test_the_command_line_sweeps_and_names_what_is_missing(job, monkeypatch):
    arguments, _ = job
    monkeypatch.setattr(sweep, "transfer_apart", lambda arguments, callbacks: transfer(**arguments, **callbacks))
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data", "output")]
    without = run("transfer", *paths, "--layer=sweep")
    assert "eval_data: wanted held-out text to compare depths on, got none" in " ".join(without.output.split())
    wrong = run("transfer", *paths, "--layer=half")
    assert "layer: wanted a number, 'third' or 'sweep', got 'half'" in " ".join(wrong.output.split())
    done = run(
        "transfer", *paths, "--layer=sweep", "--steps=1", "--max-length=48", f"--eval-data={held_out(arguments)}"
    )
    assert done.exit_code == 0, done.output
    assert "before training" in done.output
    assert (arguments["output"] / "depths.png").exists()


def test_initialisers_side_by_side(job):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer")]
    inits = ["--init=mean", "--init=zero", f"--init={arguments['model']}"]
    failed = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", *inits)
    assert "init: wanted input_embeddings with at least 330 rows" in " ".join(failed.output.split())
    done = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", *inits[:2])
    assert done.exit_code == 0, done.output
    result = transfer(**arguments, eval_data=held_out(arguments))
    for name in ("original", "initialised"):
        assert f"{result.evaluations[name].bits_per_byte:.4f}" in done.output


def test_rows_from_the_teachers_states_from_the_command_line(job, tmp_path):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    scored = f"--eval-data={held_out(arguments)}"
    contextual = run("compare-inits", *paths, scored, "--init=contextual")
    boundary = run("compare-inits", *paths, scored, "--init=mean", "--init-head=boundary")
    assert contextual.exit_code == boundary.exit_code == 0, contextual.output + boundary.output
    for objective in ("aim", "ntp"):  # the teacher's lower layers are loaded, or all of it
        given = {**arguments, "output": tmp_path / objective, "eval_data": held_out(arguments)}
        given["training"] = TrainingOptions(steps=1, objective=objective)
        result = transfer(**given, init="contextual")
        assert f"{result.evaluations['initialised'].bits_per_byte:.4f}" in contextual.output
    result = transfer(**{**arguments, "output": tmp_path / "head"}, eval_data=held_out(arguments), init_head="boundary")
    assert f"{result.evaluations['initialised'].bits_per_byte:.4f}" in boundary.output
    wrong = run("transfer", *paths, f"--output={tmp_path / 'x'}", "--init-head=mean")
    assert "init_head: wanted same or boundary for a model whose output head is tied" in " ".join(wrong.output.split())
    apart = run("compare-inits", *paths, scored, "--init=last-piece", "--init-head=first-piece", "--untie")
    assert apart.exit_code == 0, apart.output


def test_parallel_text_from_the_command_line(job, tmp_path):
    arguments, _ = job
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"def {text.splitlines()[0]}\t{text.splitlines()[0]}\n" for text in TEXTS))
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    inits = [f"--init={name}" for name in ("mean", "transtokenizers", "wechsel", "tokalign")]
    failed = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", *inits)
    assert "parallel: wanted pairs of texts and translations for init 'transtokenizers'" in " ".join(
        failed.output.split()
    )
    done = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", f"--parallel={pairs}", *inits)
    assert done.exit_code == 0, done.output
    result = transfer(**arguments, eval_data=held_out(arguments), init="transtokenizers", parallel=pairs)
    assert f"{result.evaluations['initialised'].bits_per_byte:.4f}" in done.output
    trained = run(
        "transfer", *paths, f"--output={tmp_path / 'x'}", "--init=transtokenizers", f"--parallel={tmp_path}/no"
    )
    assert "parallel: wanted a .tsv or .jsonl file of pairs" in " ".join(trained.output.split())
    assert not (tmp_path / "x").exists()


def test_prepared_data_is_found_again(job, tmp_path):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    folders = []
    for output in ("one", "two"):
        options = [f"--output={tmp_path / output}", f"--data-cache={tmp_path / 'cache'}", "--packing"]
        done = run("transfer", *paths, *options, "--steps=2", "--max-length=48")
        assert done.exit_code == 0, done.output
        folders.append(sorted(tmp_path.joinpath("cache").iterdir()))
    assert len(folders[0]) == 1
    assert folders[0] == folders[1]
