"""Checks of weight files against what loading them really says, where transformers renames, fuses and ties."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
)

from matt_fast.model.checkpoint_files import check_pointers, check_savable, check_weights
from matt_fast.model.teacher import Teacher, only_errors

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
LLAMA = SMALL | {"num_key_value_heads": 2}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d7a2146" * 8 + "\nsize 134217728\n"


def gemma3():
    text = LLAMA | {"head_dim": 8, "sliding_window": 8, "vocab_size": 300}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def causal(config):
    return AutoModelForCausalLM.from_config(config)


MODELS = {
    "tied": lambda: causal(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "untied": lambda: causal(LlamaConfig(**LLAMA)),
    "gpt2": lambda: causal(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)),
    "neox": lambda: causal(GPTNeoXConfig(**SMALL)),
    "experts": lambda: causal(MixtralConfig(**LLAMA, num_local_experts=4)),
    "encoder": lambda: AutoModelForMaskedLM.from_config(BertConfig(**SMALL)),
    "images too": gemma3,
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    torch.manual_seed(0)
    with only_errors():
        MODELS[request.param]().save_pretrained(folder)
    return folder


def really_wrong(folder) -> bool:
    """Whether a real load, of the class that a teacher has, lacks something."""
    teacher = Teacher(folder)
    kind = type(teacher.outline(torch.float32))
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with only_errors():
        try:
            found = kind.from_pretrained(folder, config=teacher.config, **options)[1]
        except RuntimeError:
            return True
    return bool(found["missing_keys"] or found["mismatched_keys"])


def test_whole_checkpoints_pass_and_every_missing_tensor_is_found(saved, tmp_path):
    check_weights(Teacher(saved))
    assert not really_wrong(saved)
    folder = shutil.copytree(saved, tmp_path / "model")
    weights = load_file(saved / "model.safetensors")
    needed = []
    for name in list(weights)[::3]:
        save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
        if really_wrong(folder):
            needed.append(name)
            with pytest.raises(ValueError, match=r"model: wanted (all|weights) .*model'"):
                check_weights(Teacher(folder))
        else:
            check_weights(Teacher(folder))
    assert needed
    with only_errors():
        Teacher(saved).load("auto").save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    check_weights(Teacher(tmp_path / "shards"))


@pytest.fixture
def llama(tmp_path):
    save_tiny_model(tmp_path / "model", LlamaConfig(**LLAMA))
    return tmp_path / "model"


def change(folder, changed):
    file = folder / "model.safetensors"
    save_file(changed(load_file(file)), file, {"format": "pt"})


def test_what_is_missing_or_misnamed_is_listed(llama):
    change(llama, lambda w: {k: v for k, v in w.items() if "layers.1." not in k})
    with pytest.raises(ValueError, match=r"9 are missing in .*: model.layers.1.input_layernorm.weight, .* and 4 more"):
        check_weights(Teacher(llama))
    change(llama, lambda w: {"x." + k: v for k, v in w.items()})
    with pytest.raises(ValueError, match=r"are missing in .*; it has \d+ that are not expected: x.lm_head.weight, x\."):
        check_weights(Teacher(llama))


def test_another_shape_is_named(llama):
    change(llama, lambda w: w | {"model.norm.weight": torch.zeros(31)})
    with pytest.raises(
        ValueError, match=r"shapes that its configuration says, .*model.norm.weight \[31\] instead of \[32\]"
    ):
        check_weights(Teacher(llama))


def test_a_base_model_without_its_prefix_is_whole(llama):
    change(llama, lambda w: {k.removeprefix("model."): v for k, v in w.items()})
    assert not really_wrong(llama)
    check_weights(Teacher(llama))


def test_files_that_are_cut_off_or_not_there_are_named(llama, tmp_path):
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) - 1, 2000, 5):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model: wanted whole weights in .*model.safetensors'"):
            check_weights(Teacher(llama))
    weights.write_text(POINTER)
    with pytest.raises(ValueError, match=r"model.safetensors': wanted its content, got a pointer of git-lfs"):
        check_weights(Teacher(llama))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model: wanted model.safetensors or .*index.json in .*, got none"):
        check_weights(Teacher(llama))
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    with pytest.raises(
        FileNotFoundError, match=r"wanted model-1.safetensors in .*, which model.safetensors.index.json"
    ):
        check_weights(Teacher(llama))
    for content in ("{", "{}", "[]", '{"weight_map": {"model.norm.weight": "../model-1.safetensors"}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"wanted names of files beside it in the weight_map of .*index\.json'"):
            check_weights(Teacher(llama))


def test_pickles_are_refused_through_an_index_too(llama):
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "a.bin")
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "a.bin")}))
    with pytest.raises(
        ValueError, match=r"wanted weights in .safetensors, but .* names a.bin: loading a pickle can run"
    ):
        check_weights(Teacher(llama))
    check_weights(Teacher(llama, allow_pickle=True))
    index.unlink()
    (llama / "a.bin").rename(llama / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"got only pytorch_model.bin: loading a pickle can run code"):
        check_weights(Teacher(llama))
    check_weights(Teacher(llama, allow_pickle=True))


def test_pointers_in_a_tokenizers_folder_are_named(llama):
    check_pointers(llama)
    (llama / "tokenizer.json").write_text(POINTER)
    with pytest.raises(
        ValueError, match=r"tokenizer.json': wanted its content, got a pointer of git-lfs; `git lfs pull`"
    ):
        check_pointers(llama)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_that_cannot_be_saved_are_refused(llama, tmp_path, bits):
    check_savable(Teacher(llama))
    options = {"quantization_config": BitsAndBytesConfig(**{bits: True}), "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(llama, **options).save_pretrained(tmp_path / "quantised")
    teacher = Teacher(tmp_path / "quantised")
    check_weights(teacher)  # their names differ: not compared
    with pytest.raises(NotImplementedError):  # what would be seen at the end of the training
        teacher.load("auto").save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"model: wanted weights in full precision, .*quantised by bitsandbytes.*save"):
        check_savable(teacher)


def test_a_quantiser_that_gives_full_precision_is_let_pass(llama):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "dequantize": True}
    (llama / "config.json").write_text(json.dumps(config))
    check_savable(Teacher(llama))


def test_a_model_of_the_hub_is_known_by_headers_in_the_cache_or_there(llama, monkeypatch):
    import huggingface_hub

    teacher = Teacher(llama)
    teacher.model = "some/model"
    cached = {"model.safetensors": str(llama / "model.safetensors")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file, revision: cached.get(file))
    check_weights(teacher)
    change(llama, lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"1 are missing in 'some/model', .*: lm_head.weight"):
        check_weights(teacher)
    cached.clear()

    def unreachable(name, revision):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", unreachable)
    check_weights(teacher)
