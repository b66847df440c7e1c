"""The whole job on tiny models: what is written, and that it is what it says."""

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small_jobs import held_out
from tiny import TEXTS, new_tokenizer, save_tiny_model
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from matt_fast import TrainingOptions, transfer
from matt_fast.alignment.vocabulary import VocabularyPair, match_tokens
from matt_fast.cli.display import print_result
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.recipe.export import keep_chat_template, lost_chat_template
from matt_fast.recipe.preflight import missing_new_tokens
from matt_fast.training.loop import freeze
from matt_fast.training.objectives import losses
from matt_fast.training.sides import Student

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


GEMMA = Gemma3TextConfig(
    **SIZES,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=9,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)


NEOX = GPTNeoXConfig(**SIZES, tie_word_embeddings=False)


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
    options |= {"checkpoint_every": 20, "epochs": 3.0}  # each pass passes over the same rows
    output = arguments["output"].with_name("other")
    found = transfer(**arguments | {"output": output}, init="contextual", **options)
    passed = "passed over 3 documents without text; the first without text is document 1 of"
    places = {"data": arguments["data"], "eval_data": held_out(arguments)}
    assert [x for x in said if "data" in x] == [f"{name}: {passed} {str(x)!r}" for name, x in places.items()]
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


def test_a_chat_template_is_kept_only_if_its_tokens_exist(job):
    arguments, teacher_tokenizer = job
    other = new_tokenizer()
    keep_chat_template(other, teacher_tokenizer)
    assert other.chat_template is None  # it has no <bos>
    same = AutoTokenizer.from_pretrained(arguments["model"])
    same.chat_template = None
    keep_chat_template(same, teacher_tokenizer)
    assert same.chat_template == teacher_tokenizer.chat_template
    teacher_tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken(" %", special=False)])  # of no role
    teacher_tokenizer.chat_template += "<turn>"
    same.chat_template = None
    keep_chat_template(same, teacher_tokenizer)
    assert same.chat_template is None
    plain = {"default": "{{ messages[0].content }}", "tools": "<bos>{{ tools }}"}
    teacher_tokenizer.chat_template = plain
    keep_chat_template(same, teacher_tokenizer)
    assert same.chat_template == plain
    teacher_tokenizer.chat_template, same.chat_template = plain | {"tools": "<turn>{{ tools }}"}, None
    assert "lacks '<turn>'" in lost_chat_template(same, teacher_tokenizer)
    said, texts = [], arguments["data"].with_name("texts")
    texts.mkdir()
    arguments["data"].rename(texts / "corpus.jsonl")
    (texts / "README.md").write_text("About this dataset.")
    result = transfer(**arguments | {"training": TrainingOptions(steps=0), "data": texts}, on_message=said.append)
    assert "data: files of several formats are read: 1 .md, 1 .jsonl" in said
    assert "tokenizer: the model's chat template is lost, since the new tokenizer lacks '<bos>', '<eos>'" in said
    lost = {f"- `{x}`" for x in said if "is lost" in x or "dropped" in x}
    assert len(lost) > 1
    assert lost < {*(result.output / "README.md").read_text().splitlines()}
