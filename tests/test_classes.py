"""Models that are no language models: the class that the folder names is written again, or refused by name."""

import copy
import json

import pytest
import torch
import transformers
from commands import run
from safetensors.torch import load_file
from tiny import TEXTS, byte_level, jsonl
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    FlaubertConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    MobileBertConfig,
    ModernBertConfig,
    Qwen2_5_VLConfig,
    RobertaConfig,
    T5Config,
)

from matt_fast import HealingOptions, TrainingOptions, transfer
from matt_fast.model.capture import capture
from matt_fast.model.classes import model_class
from matt_fast.model.tables import check_tables
from matt_fast.model.teacher import Teacher, only_errors

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
LLAMA, BERT = LlamaConfig(**SMALL), BertConfig(**SMALL, num_labels=3)
MODERN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
# class -> configuration, and whether its tokens see those behind them
CLASSES = {
    "BertModel": (BERT, True),
    "BertForSequenceClassification": (BERT, True),
    "BertForPreTraining": (BERT, True),
    "RobertaForQuestionAnswering": (RobertaConfig(**SMALL), True),
    "ModernBertForTokenClassification": (ModernBertConfig(**SMALL, **MODERN), True),
    "LlamaModel": (LLAMA, False),
    "LlamaForSequenceClassification": (LLAMA, False),
    "GPT2Model": (GPT2Config(n_embd=32, n_layer=3, n_head=4), False),
    "Gemma3TextModel": (Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=True), True),
}
TEXT = SMALL | {"num_key_value_heads": 2, "vocab_size": 275}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
SEEING = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
WITH_IMAGES = {
    "LlavaForConditionalGeneration": LlavaConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=VISION),
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": ROPE}, vision_config=SEEING
    ),
}


def save(folder, name, config):
    tokenizer = byte_level(TEXTS, 270, **ROLES)
    ids = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = copy.deepcopy(config)
    config.get_text_config().update(ids | {"vocab_size": 275})
    torch.manual_seed(0)
    with only_errors():
        model = getattr(transformers, name)._from_config(config)
        model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    new = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}  # RoBERTa wants the same id for padding
    byte_level(TEXTS, 330, **new).save_pretrained(folder / "tokenizer")
    (folder / "data.jsonl").write_text(jsonl(TEXTS))
    return folder


def job(folder, objective="aim"):
    return {
        "model": folder / "teacher",
        "tokenizer": folder / "tokenizer",
        "data": folder / "data.jsonl",
        "output": folder / "out",
        "max_length": 64,
        "batch_size": 2,
        "training": TrainingOptions(steps=2, objective=objective),
    }


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_is_kept_and_its_other_weights_bit_for_bit(tmp_path, name):
    folder = save(tmp_path, name, CLASSES[name][0])
    transfer(**job(folder, "aim+token-distillation"))
    before, after = (load_file(folder / x / "model.safetensors") for x in ("teacher", "out"))
    assert before.keys() == after.keys()
    changed = {x for x in before if before[x].shape != after[x].shape or not torch.equal(before[x], after[x])}
    tables = {x for x in before if before[x].shape[0] == 275}
    assert changed == tables
    assert all(after[x].shape[0] == 330 for x in tables)
    assert json.loads((folder / "out" / "config.json").read_text())["architectures"] == [name]
    with only_errors():
        getattr(transformers, name).from_pretrained(folder / "out")


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_language_models_with_images_keep_them(tmp_path, name):
    folder = save(tmp_path, name, WITH_IMAGES[name])
    (folder / "held-out.jsonl").write_text(json.dumps({"text": "".join(TEXTS)}) + "\n")
    result = transfer(**job(folder, "aim+ntp"), eval_data=folder / "held-out.jsonl")
    assert set(result.evaluations) == {"original", "initialised", "trained"}
    before, after = (load_file(folder / x / "model.safetensors") for x in ("teacher", "out"))
    assert before.keys() == after.keys()
    assert sum("vis" in x for x in before) > 10
    changed = {x for x in before if before[x].shape != after[x].shape or not torch.equal(before[x], after[x])}
    assert changed == {x for x in before if before[x].shape[0] == 275}
    assert json.loads((folder / "out" / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_layers_that_no_text_goes_through_are_not_trained(tmp_path, name, method):
    """Nor rounded to the precision of the run: they were saved in float32."""
    folder = save(tmp_path, name, WITH_IMAGES[name])
    healing = HealingOptions(method=method, steps=1, lr=1e-2, objective="ntp", keep_adapter=method == "lora")
    healed = transfer(**job(folder) | {"training": TrainingOptions(steps=0), "healing": healing}).healing
    before, after = (load_file(folder / x / "model.safetensors") for x in ("teacher", "out"))
    tables = {x for x in before if before[x].shape != after[x].shape}
    text = {x: before[x].numel() for x in before if "vis" not in x and "multi_modal" not in x and x not in tables}
    changed = {x for x in before if x not in tables and not torch.equal(before[x], after[x])}
    if method == "full":
        assert changed == text.keys()
        assert healed.trained_numbers == sum(text.values())
    else:
        assert changed == {x for x in text if x.endswith("_proj.weight")}
        adapter = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
        assert healed.trained_numbers == sum(x.numel() for x in adapter.values())
        assert all("language_model.layers." in x for x in adapter)


@pytest.mark.parametrize("name", CLASSES)
def test_whether_tokens_see_those_behind_them(tmp_path, name):
    teacher = Teacher(save(tmp_path, name, CLASSES[name][0]) / "teacher")
    assert teacher.masked == CLASSES[name][1]
    assert not teacher.kind.is_language_model
    trunk = teacher.trunk(teacher.load(torch.float32))
    ids, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        first, second = (trunk(input_ids=x).last_hidden_state[0, 0] for x in (ids, other))
        captured = capture(trunk, attention=[0], input_ids=ids).attention[0]
    assert torch.equal(first, second) != CLASSES[name][1]
    assert captured.causal != CLASSES[name][1]


def test_what_wants_a_language_model_says_so(tmp_path):
    folder = save(tmp_path, "BertForSequenceClassification", BERT)
    arguments = job(folder)
    for more in ({"eval_data": folder / "data.jsonl"}, {"init": "contextual"}, {"init_head": "boundary"}):
        with pytest.raises(ValueError, match=r"wants a language model, but .* is a BertForSequenceClassification"):
            transfer(**arguments, **more)
    assert not (folder / "out").exists()
    failed = run("evaluate", f"--model={folder / 'teacher'}", f"--data={folder / 'data.jsonl'}")
    assert failed.exit_code == 1
    assert "evaluate wants a language model" in " ".join(failed.output.split())


def test_an_objective_of_the_head_is_refused(tmp_path):
    folder = save(tmp_path, "LlamaModel", LLAMA)
    for objective in ("ntp", "aim+boundary-head"):
        with pytest.raises(ValueError, match=r"objective .* wants a language model, but .* is a LlamaModel"):
            transfer(**job(folder, objective))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (T5Config(), "T5ForConditionalGeneration"),
        (BartConfig(), "BartForSequenceClassification"),
        (LlavaConfig(), "LlavaNextForConditionalGeneration"),
        (CLIPConfig(), "CLIPModel"),
        (FlaubertConfig(), "FlaubertForSequenceClassificationOfSomeone"),
        (LlamaConfig(), "SomeoneModel"),
    ],
)
def test_other_kinds_are_refused_with_what_is_possible(config, name, tmp_path):
    config.architectures = [name]
    with pytest.raises(ValueError, match=rf"wanted one of causal language models .*, got {name}"):
        model_class(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"got {name}") as error:
        Teacher(tmp_path)
    assert len(str(error.value)) < 400


def test_names_of_language_models():
    for config, name in ((LLAMA, "LlamaForCausalLM"), (GPT2Config(), "GPT2LMHeadModel"), (LLAMA, "LlamaForAIM")):
        config.architectures = [name]
        assert model_class(config).loader is transformers.AutoModelForCausalLM
    config = LlamaConfig()
    config.architectures = None
    assert model_class(config).is_language_model
    config = BertConfig()
    config.architectures = ["BertForMaskedLM"]
    assert model_class(config)[0] is transformers.AutoModelForMaskedLM


def outlined(config, name):
    teacher = Teacher.__new__(Teacher)
    teacher.untie = False
    config.architectures = [name]
    teacher.model, teacher.config, teacher.options, teacher.kind = "the model", config, {}, model_class(config)
    return teacher


GEMMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 8}
MANY = {**GEMMA, "vocab_size": 300, "vocab_size_per_layer_input": 290, "hidden_size_per_layer_input": 8}
MANY |= {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 4}
MANY |= {"layer_types": ["sliding_attention", "full_attention"] * 3}


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (Gemma3nTextConfig(**MANY), "Gemma3nForCausalLM", "has such rows in model.embed_tokens_per_layer.weight too"),
        (
            MobileBertConfig(num_hidden_layers=1, vocab_size=300),
            "MobileBertForMaskedLM",
            "has such rows in cls.predictions.dense.weight too",
        ),
        (
            MllamaConfig(text_config=SMALL | {"vocab_size": 300, "cross_attention_layers": [], "pad_token_id": 0}),
            "MllamaForConditionalGeneration",
            r"lm_head.weight \(316, 32\) instead of \(308, 32\)",
        ),
    ],
)
def test_further_tables_by_token_are_named(config, name, message):
    with pytest.raises(ValueError, match=message):
        check_tables(outlined(config, name))


def test_a_second_table_for_further_ids_is_named():
    config = LlamaConfig(**SMALL)
    check_tables(outlined(config, "LlamaForCausalLM"))
    config.additional_vocab_size = 128
    with pytest.raises(ValueError, match=r"has a second table for further ids \(additional_vocab_size"):
        check_tables(outlined(config, "LlamaForCausalLM"))


@pytest.mark.parametrize("positions", [275, 300])
def test_tables_that_are_as_long_by_chance_are_none(positions):
    for config, name in (
        (GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=275, n_positions=positions), "GPT2LMHeadModel"),
        (BertConfig(**SMALL | {"hidden_size": 300}, vocab_size=300, max_position_embeddings=positions), "BertModel"),
        (BertConfig(**SMALL, vocab_size=275, max_position_embeddings=positions), "BertForMaskedLM"),
        (RobertaConfig(**SMALL, vocab_size=275, max_position_embeddings=positions), "RobertaForMaskedLM"),
    ):
        check_tables(outlined(config, name))
