"""The rows of a transfer in a fine-tuned sibling."""

import json
import shutil

import pytest
import torch
from commands import run as run_command
from huggingface_hub import ModelCard
from test_runs import files  # noqa: F401, a fixture
from tiny import TEXTS, byte_level, jsonl, new_tokenizer, save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PhiConfig,
)

from matt_fast import HealingOptions, TrainingOptions, apply, transfer
from matt_fast.recipe.apply import STAY
from matt_fast.tokenizers import extend


@pytest.fixture(scope="module")
def family(files, tmp_path_factory):  # noqa: F811
    """(a transferred model, a sibling of the original: all its weights moved a little)."""
    folder = tmp_path_factory.mktemp("family")
    given = {name: value for name, value in files.items() if "eval" not in name}
    transfer(**given, output=folder / "transferred", training=TrainingOptions(objective="ntp", steps=3, lr=1e-2))
    sibling = AutoModelForCausalLM.from_pretrained(files["model"])
    torch.manual_seed(1)
    for parameter in sibling.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    sibling.save_pretrained(folder / "sibling")
    AutoTokenizer.from_pretrained(files["model"]).save_pretrained(folder / "sibling")
    return folder / "transferred", folder / "sibling"


def test_new_tokens_get_the_transferred_rows_and_all_else_is_the_siblings(files, family, tmp_path):  # noqa: F811
    transferred, sibling = family
    found = apply(transferred, sibling, tmp_path / "out", eval_data=files["eval_data"], eval_pieces=2)
    made, rows, own = (AutoModelForCausalLM.from_pretrained(x) for x in (tmp_path / "out", transferred, sibling))
    old, new = (AutoTokenizer.from_pretrained(x) for x in (sibling, tmp_path / "out"))
    given_vocab = AutoTokenizer.from_pretrained(transferred).get_vocab()
    assert new.get_vocab() == given_vocab | {"<pad>": len(given_vocab)}  # which the sibling alone has
    kept = {i: old.get_vocab()[token] for token, i in new.get_vocab().items() if token in old.get_vocab()}
    assert 0 < len(kept) <= found.shared
    table, given, before = (x.get_input_embeddings().weight for x in (made, rows, own))
    for i in range(len(new)):
        if i in kept:
            assert torch.equal(table[i], before[kept[i]])
    fresh = [i for token, i in new.get_vocab().items() if len(token) > 1 and token not in old.get_vocab()]
    assert sum(torch.equal(table[i], given[i]) for i in fresh) >= found.new - 3  # those matched by role are shared
    ours, theirs = made.state_dict(), own.state_dict()
    assert all(torch.equal(ours[x], theirs[x]) for x in theirs if "embed_tokens" not in x and "lm_head" not in x)
    assert 0.9 < found.similarity < 1
    assert set(found.evaluations) == {"original", "applied"}
    assert found.evaluations["applied"].bytes_per_token > found.evaluations["original"].bytes_per_token
    assert made.config.pad_token_id == new.pad_token_id == new.get_vocab()["<pad>"]
    assert any(
        "the model's chat template is lost, since the new tokenizer lacks '<bos>'" in line for line in found.lost
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- `{line}`" in card for line in found.lost)
    assert all(f"| {name} | {x.bits_per_byte:.4f} |" in card for name, x in found.evaluations.items())


@pytest.mark.parametrize("extended", [True, False])
def test_a_chat_sibling_keeps_how_it_is_talked_to(extended, tmp_path):
    """Special tokens that the original lacks, with their rows; roles, template, end of text, padding side; licence."""
    base = save_tiny_model(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text(jsonl(TEXTS))
    if extended:
        extend(tmp_path / "base", tmp_path / "new", data=tmp_path / "data.jsonl", add=12)
    else:  # its end of text is called otherwise, and it has no padding
        new_tokenizer().save_pretrained(tmp_path / "new")
    given = {"data": tmp_path / "data.jsonl", "training": TrainingOptions(steps=1)}
    transfer(tmp_path / "base", tmp_path / "new", output=tmp_path / "transferred", **given)
    chat, sibling = base, AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    chat.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|user|>"]})
    chat.chat_template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    chat.padding_side = chat.init_kwargs["padding_side"] = "left"
    chat.model_max_length = 96
    sibling.resize_token_embeddings(len(chat), mean_resizing=False)
    sibling.generation_config.eos_token_id = chat.eos_token_id
    sibling.save_pretrained(tmp_path / "chat")
    chat.save_pretrained(tmp_path / "chat")
    (tmp_path / "chat" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/base\n---\n")
    (tmp_path / "chat" / "NOTICE").write_text("of the sibling")
    found = run_command(
        "apply", f"--from={tmp_path / 'transferred'}", f"--to={tmp_path / 'chat'}", f"--output={tmp_path / 'out'}"
    )
    assert found.exit_code == 0, found.output
    carried = "2 special tokens that the sibling alone has: '<|end|>'"
    carried = carried if extended else "3 special tokens that the sibling alone has: '<pad>', '<|end|>'"
    assert f"{carried}, '<|user|>'" in " ".join(found.output.split())
    old, new = (AutoTokenizer.from_pretrained(tmp_path / x) for x in ("chat", "out"))
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "self"}]
    assert new.apply_chat_template(talk, tokenize=False) == "<|user|>self<|end|>"
    assert (new.eos_token, new.padding_side, new.model_max_length) == ("<|end|>", "left", 96)
    assert len(new) == made.config.vocab_size == (270 + 12 + 2 if extended else 330 + 3)
    assert made.generation_config.eos_token_id == made.config.eos_token_id == new.eos_token_id
    assert old.pad_token == new.pad_token == "<pad>"
    ids = [[x.get_vocab()[token] for token in ("<|end|>", "<|user|>", "<pad>", "a")] for x in (old, new)]
    ids[0].append(old.get_vocab()["<eos>"])
    ids[1].append(new.get_vocab()["<eos>" if extended else "</s>"])
    tables = [x.get_input_embeddings().weight for x in (sibling, made)]
    assert torch.equal(tables[0][ids[0]], tables[1][ids[1]])
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (card.license, card.base_model, card.pipeline_tag) == ("apache-2.0", "owner/base", "text-generation")
    assert (tmp_path / "out" / "NOTICE").read_text() == "of the sibling"


def test_models_of_another_family_are_refused(files, family, tmp_path):  # noqa: F811
    transferred, sibling = family
    save_tiny_model(tmp_path / "stranger")
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "stranger")
    torch.nn.init.normal_(stranger.get_input_embeddings().weight)
    stranger.save_pretrained(tmp_path / "stranger")
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    save_tiny_model(tmp_path / "wider", LlamaConfig(**sizes, tie_word_embeddings=True))
    shutil.copytree(sibling, tmp_path / "renamed")
    byte_level(["zz yy xx"] * 5, 275, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>").save_pretrained(
        tmp_path / "renamed"
    )
    for other, message in (
        ("stranger", "rows of the tokens that they share are not alike"),
        ("wider", "sibling: wanted a width of 32"),
        ("renamed", "sibling: wanted a model with the vocabulary that the transferred one had"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(transferred, tmp_path / other, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="transferred: wanted the output of a transfer"):
        apply(files["model"], sibling, tmp_path / "out")
    shutil.copytree(transferred, tmp_path / "torn")
    with (tmp_path / "torn" / "token_provenance.jsonl").open("a") as file:
        file.write('{"id": 1\n')
    with pytest.raises(ValueError, match=r"transferred: wanted an object with id, start, .* in line"):
        apply(tmp_path / "torn", sibling, tmp_path / "out")
    with pytest.raises(ValueError, match="eval_pieces: wanted at least 1, got 0"):
        apply(transferred, sibling, tmp_path / "out", eval_pieces=0)
    with pytest.raises(FileNotFoundError, match="eval_data: wanted a file or folder that is there"):
        apply(transferred, sibling, tmp_path / "out", eval_data=tmp_path / "nowhere.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="output: wanted a new or empty folder"):
        apply(transferred, sibling, tmp_path / "full")


def test_layers_that_were_trained_with_the_rows_are_told_to_stay_behind(files, family, tmp_path):  # noqa: F811
    """They are the sibling's; a result that trained on serves as well."""
    _, sibling = family
    given = {name: value for name, value in files.items() if "eval" not in name} | {
        "training": TrainingOptions(steps=0)
    }
    given |= {"healing": HealingOptions("lora", steps=2, objective="ntp")}
    transfer(**given, output=tmp_path / "healed")
    more = {"model": tmp_path / "healed", "tokenizer": tmp_path / "healed", "teacher": files["model"]}
    transfer(**given | more, output=tmp_path / "more")
    assert not apply(family[0], sibling, tmp_path / "rows").healed
    own = AutoModelForCausalLM.from_pretrained(sibling).state_dict()
    for name in ("healed", "more"):
        found = run_command("apply", f"--from={tmp_path / name}", f"--to={sibling}", f"--output={tmp_path / name}-out")
        assert found.exit_code == 0, found.output
        for told in (found.output, (tmp_path / f"{name}-out" / "README.md").read_text()):
            assert STAY in " ".join(told.split())
        made = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out").state_dict()
        assert all(torch.equal(made[x], own[x]) for x in own if "embed_tokens" not in x and "lm_head" not in x)


def test_a_sibling_for_another_task_has_no_rows_of_a_head(files, family, tmp_path):  # noqa: F811
    """Neither a table nor a bias, also where the transferred model has them."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_tiny_model(tmp_path / "phi", PhiConfig(**sizes))
    given = {"tokenizer": files["tokenizer"], "data": files["data"], "training": TrainingOptions(steps=1)}
    transfer(tmp_path / "phi", **given, output=tmp_path / "transferred")
    cases = ((family[0], files["model"], "model"), (tmp_path / "transferred", tmp_path / "phi", "phi"))
    for transferred, original, name in cases:
        sibling = AutoModelForSequenceClassification.from_pretrained(original, num_labels=3)
        sibling.save_pretrained(tmp_path / f"{name}-sibling")
        AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / f"{name}-sibling")
        apply(transferred, tmp_path / f"{name}-sibling", tmp_path / f"{name}-out")
        made = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{name}-out")
        old, new = (AutoTokenizer.from_pretrained(tmp_path / f"{name}-{x}") for x in ("sibling", "out"))
        (logits,) = made(**new("a", return_tensors="pt")).logits
        ids = torch.tensor([[old.bos_token_id, old.get_vocab()["a"]]])
        torch.testing.assert_close(logits, sibling.eval()(ids).logits[0])
    with pytest.raises(ValueError, match="eval_data wants a language model"):
        apply(transferred, tmp_path / "phi-sibling", tmp_path / "measured", eval_data=files["eval_data"])
    provenance = (tmp_path / "transferred" / "token_provenance.jsonl").read_text()
    (tmp_path / "phi-out" / "token_provenance.jsonl").write_text(provenance)
    with pytest.raises(ValueError, match="transferred: wanted a model with an output head, as the sibling has"):
        apply(tmp_path / "phi-out", tmp_path / "phi", tmp_path / "headless")


def test_rows_for_a_head_of_its_own_are_not_lost_in_a_tied_sibling(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name} | {
        "training": TrainingOptions(steps=1)
    }
    transfer(**given, untie=True, output=tmp_path / "untied")
    with pytest.raises(ValueError, match="transferred: wanted one table for embedding and head, as the sibling has"):
        apply(tmp_path / "untied", files["model"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_with_a_bias_keeps_that_of_shared_tokens(files, tmp_path):  # noqa: F811
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_tiny_model(tmp_path / "phi", PhiConfig(**sizes))
    given = {"tokenizer": files["tokenizer"], "data": files["data"], "training": TrainingOptions(steps=1)}
    transfer(tmp_path / "phi", **given, output=tmp_path / "transferred")
    sibling = AutoModelForCausalLM.from_pretrained(tmp_path / "phi")
    sibling.lm_head.bias.data += 1.0
    sibling.save_pretrained(tmp_path / "sibling")
    AutoTokenizer.from_pretrained(tmp_path / "phi").save_pretrained(tmp_path / "sibling")
    found = apply(tmp_path / "transferred", tmp_path / "sibling", tmp_path / "out")
    made, rows = (AutoModelForCausalLM.from_pretrained(tmp_path / x).lm_head.bias for x in ("out", "transferred"))
    lines = [json.loads(x) for x in (tmp_path / "transferred" / "token_provenance.jsonl").open()]
    shared = [x["id"] for x in lines if x["start"].startswith("copied")]
    assert len(shared) + len(found.carried) == found.shared
    assert torch.equal(made[-1], sibling.lm_head.bias[AutoTokenizer.from_pretrained(tmp_path / "phi").pad_token_id])
    assert torch.equal(
        made[shared], sibling.lm_head.bias[[x["teacher_ids"][0] for x in lines if x["id"] in set(shared)]]
    )
    new = sorted(set(range(len(rows))) - set(shared))
    assert torch.equal(made[new], rows[new])
