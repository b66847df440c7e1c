"""Folders that are not what they seem: said in one line, or loaded as what they are."""

import json
import os
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXTS, byte_level, new_tokenizer, save_tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, CLIPConfig, GPT2Tokenizer, LlavaConfig, T5Config

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import initial_rows
from matt_fast.model.checkpoint_files import check_savable, configured_dtype
from matt_fast.model.folders import check_model_place, check_tokenizer_place
from matt_fast.model.teacher import Teacher
from matt_fast.model.tokenizer_files import first_difference, load_tokenizer
from matt_fast.recipe.preflight import rehearse_saving


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


def refusal(call, *arguments, kind=ValueError):
    with pytest.raises(kind) as found:
        call(*arguments)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_places_where_nothing_is_name_the_argument(model, tmp_path):
    for place in (tmp_path / "none", "./none", "a/b/c", "none.gguf"):
        start = f": wanted a file or folder that is there, or a name of the hub; got {str(place)!r}"
        assert refusal(Teacher, place, kind=FileNotFoundError).startswith("model" + start)
        assert refusal(Teacher(model).load_tokenizer, place, kind=FileNotFoundError).startswith("tokenizer" + start)


def test_folders_without_a_configuration(tmp_path):
    start = f"model: {str(tmp_path)!r} could not be loaded as a model: wanted config.json in it, got "
    assert refusal(Teacher, tmp_path) == start + "nothing"
    (tmp_path / "model.safetensors").touch()
    assert refusal(Teacher, tmp_path) == start + "model.safetensors"
    for inside in ("checkpoint-9", "snapshots/0ab1"):  # of a trainer, and in the hub's cache
        (tmp_path / inside).mkdir(parents=True)
        (tmp_path / inside / "config.json").touch()
    places = [repr(str(tmp_path / inside)) for inside in ("checkpoint-9", "snapshots/0ab1")]
    assert refusal(Teacher, tmp_path).endswith(f"; {', '.join(places)} have it")
    text = refusal(Teacher, tmp_path / "model.safetensors")
    assert text.startswith("model: wanted a folder with config.json and weights")


def test_what_cannot_be_read_is_named(model, monkeypatch):
    for closed in (model / "tokenizer.json", model):
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: path != closed)
        expected = f"wanted what can be read, got {str(closed)!r}: permission denied"
        for argument, check in (("model", check_model_place), ("tokenizer", check_tokenizer_place)):
            assert refusal(check, model, argument, kind=PermissionError) == f"{argument}: {expected}"


def test_the_argument_is_named_that_the_model_came_by(model, tmp_path):
    start = f"donor: {str(tmp_path)!r} could not be loaded"
    with pytest.raises(ValueError, match=start):
        Teacher(tmp_path, argument="donor")
    pair = VocabularyPair(byte_level(TEXTS, 270), new_tokenizer(), 270)
    outline = Teacher(model).load("auto")
    with pytest.raises(ValueError, match=rf"^donor: wanted .* vocabulary; got {start}"):
        initial_rows(outline, pair, "omp", 0, donor=tmp_path)
    with pytest.raises(
        ValueError, match=r"^init: wanted .* ready rows; got init: wanted a file or folder that is there"
    ):
        initial_rows(outline, pair, "./none", 0)


def test_pickled_weights_name_what_allows_them(model, tmp_path):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    torch.save(load_file(model / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"^model: the weights of .* are pickles, .* see allow_pickle$"):
        Teacher(tmp_path).load("auto")
    weight = Teacher(tmp_path, allow_pickle=True).load("auto").get_input_embeddings().weight
    assert torch.equal(weight, Teacher(model).load("auto").get_input_embeddings().weight)


def test_gguf_weights_are_called_by_their_name(tmp_path):
    (tmp_path / "tiny-Q4_K_M.gguf").touch()
    for place in (tmp_path, tmp_path / "tiny-Q4_K_M.gguf"):
        text = refusal(Teacher, place)
        assert text.startswith(f"model: wanted weights in .safetensors, got '{tmp_path}/tiny-Q4_K_M.gguf', GGUF")


def test_adapters_are_called_by_their_name(model, tmp_path):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    text = refusal(Teacher, tmp_path)
    assert text.startswith(f"model: wanted a whole model, got in {str(tmp_path)!r} a LORA adapter of 'org/base'.")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert "adapter of 'org/base', beside a model; take one of them out" in refusal(Teacher, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    assert "PEFT adapter of None" in refusal(Teacher, tmp_path)


@pytest.mark.parametrize(
    ("config", "name", "end"),
    [
        (T5Config, "T5ForConditionalGeneration", "an encoder with a decoder"),
        (LlavaConfig, "Some", "which transformers does not have"),
        (CLIPConfig, "Some", "which transformers does not have"),
    ],
)
def test_models_that_are_no_language_models_are_refused_in_one_line(config, name, end, tmp_path):
    config(architectures=[name]).save_pretrained(tmp_path)
    text = refusal(Teacher, tmp_path)
    assert re.fullmatch(rf"model: wanted one of causal language models .*, got {name}, {end}", text)


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"num_hidden_layers": 0}, "wanted num_hidden_layers"),
        ({"num_hidden_layers": "3"}, "could not be loaded as a model: .*'num_hidden_layers' expected int, got str"),
        ({"dtype": "float99"}, "could not be loaded as a model: .*float99"),
        ({"dtype": "float8_e4m3fn"}, "wanted a dtype such as float32, bfloat16 or float16 .*got torch.float8_e4m3fn"),
        ({"hidden_act": "exp"}, "no model can be made of the configuration of .*'exp'"),
        ({"num_attention_heads": 0}, "(no model can be made|could not be loaded)"),
        ({"vocab_size": -5}, "no model can be made of the configuration of .*"),
        ({"quantization_config": {"bits": 4}}, "wanted weights in full precision, got .*quantised by None"),
        (None, "could not be loaded as a model: "),
    ],
    ids=str,
)
def test_configurations_that_no_model_can_be_made_of(model, tmp_path, settings, got):
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text("3" if settings is None else json.dumps(config | settings))

    def everything(place):
        teacher = Teacher(place)
        check_savable(teacher)
        teacher.outline(torch.float32)
        configured_dtype(teacher)

    assert re.match(f"model: {got}", re.sub(f"{re.escape(repr(str(tmp_path)))} ", "", refusal(everything, tmp_path)))


def test_an_attention_whose_package_is_missing_is_named(model, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"attn_implementation": "flash_attention_2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = f"model: the configuration of {str(tmp_path)!r} names attn_implementation 'flash_attention_2', which is not"
    assert refusal(Teacher, tmp_path).startswith(named)
    trusting = Teacher(tmp_path, trust_remote_code=True)
    named = f"model: {str(tmp_path)!r}, whose configuration names the attention 'flash_attention_2', needs"
    assert refusal(trusting.outline, "float32").startswith(named)


# Tokenizers -----------------------------------------------------------------------------------------------------------


def groups_of_three_digits():
    """As GPT-4o's, and unlike what a GPT2Tokenizer makes of digits."""
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Sequence([split, last]), decoders.ByteLevel()
    options = {"show_progress": False, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    numbers = [f"in {n} and {n * 7} " for n in range(100000, 100400)]
    raw.train_from_iterator(TEXTS + numbers, trainers.BpeTrainer(vocab_size=400, special_tokens=["<e>"], **options))
    return raw


def test_a_class_that_builds_another_tokenizer_than_its_file_gives_way_to_the_file(tmp_path):
    raw = groups_of_three_digits()
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<e>"})
    )
    by_class = AutoTokenizer.from_pretrained(tmp_path)
    assert "650841823" in first_difference(by_class, raw)
    with pytest.warns(UserWarning, match=r"^tokenizer: GPT2Tokenizer, which .* of '650841823 .* of the file are taken"):
        found = load_tokenizer(tmp_path)
    found.save_pretrained(tmp_path / "again")
    for tokenizer in (found, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in ("650841823 in 2023", "  don't 12345"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == raw.encode(text).ids
        assert tokenizer.eos_token == "<e>"


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}])
def test_classes_that_agree_with_their_file_are_kept(settings, tmp_path):
    new_tokenizer().save_pretrained(tmp_path)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_tokenizer(tmp_path)
    assert type(found) is type(AutoTokenizer.from_pretrained(tmp_path))


def test_a_tokenizer_object_that_does_not_survive_saving_is_refused(model):
    tokenizer = GPT2Tokenizer(vocab={"<e>": 0, **{x: i for i, x in enumerate("abĠ", 1)}}, merges=[], eos_token="<e>")
    tokenizer.backend_tokenizer.pre_tokenizer = groups_of_three_digits().pre_tokenizer
    tokenizer.backend_tokenizer.model = groups_of_three_digits().model
    with pytest.raises(ValueError, match=r"^tokenizer: wanted one that is the same when it was saved and loaded again"):
        rehearse_saving(Teacher(model), tokenizer)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_bare_tokenizer_json_gets_its_special_tokens_by_name(as_file, tmp_path):
    file = tmp_path / "tokenizer.json"
    byte_level(TEXTS, 300, eos_token="</s>", bos_token="<s>", unk_token="<unk>").backend_tokenizer.save(str(file))
    with pytest.warns(
        UserWarning, match=r"taken by their names: bos_token '<s>', eos_token '</s>', .*; it has no pad_"
    ):
        tokenizer = load_tokenizer(file if as_file else tmp_path)
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id
    assert ids == (*map(tokenizer.backend_tokenizer.token_to_id, ("<s>", "</s>", "<unk>")), None)
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").special_tokens_map == tokenizer.special_tokens_map


def test_a_bare_tokenizer_without_special_tokens_says_so(tmp_path):
    byte_level(TEXTS, 300).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match="by their names: none; it has no bos_token, eos_token, pad_token"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused_by_its_argument(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    text = refusal(Teacher(model).load_tokenizer, tmp_path)
    assert text.startswith(f"tokenizer: {str(tmp_path)!r} could not be loaded as a tokenizer: ")
    (tmp_path / "tokenizer.json").rename(tmp_path / "a.json")
    assert refusal(Teacher(model).load_tokenizer, tmp_path).endswith("wanted tokenizer.json in it, got a.json")


def test_a_tokenizer_that_draws_its_tokens_is_refused_wherever_it_is_loaded(tmp_path):
    tokenizer = new_tokenizer()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    tokenizer.save_pretrained(tmp_path)
    assert "tokenizer: wanted one that always gives" in refusal(load_tokenizer, tmp_path)
