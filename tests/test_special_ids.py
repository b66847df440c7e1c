"""Token ids in configurations, each against the token that the old id was and the new one is."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEXTS, byte_level, jsonl, new_tokenizer
from transformers import (
    AutoConfig,
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from matt_fast import TrainingOptions, transfer
from matt_fast.alignment.mapping import check_map, map_tokens
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.rows import initial_rows
from matt_fast.recipe.processor_files import copy_processor
from matt_fast.recipe.special_ids import check_special_ids, translate_ids

NAMED = ("<|a|>", "<|b|>", "<|c|>", "<|gone|>")
ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
IMAGES = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def with_tokens(size, names, **roles):
    tokenizer = byte_level(TEXTS, size, **roles)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    return tokenizer


@pytest.fixture(scope="module")
def pair():
    """Old ids 270 to 273 of the four names; new ones in another order, and no "<|gone|>" nor "<pad>"."""
    old = with_tokens(270, NAMED, **ROLES)
    new = with_tokens(285, ["<|c|>", "<|new|>", "<|a|>", "<|b|>"], eos_token="</s>", bos_token="<s>")
    return VocabularyPair(old, new, 280)


def old_of(pair, *names):
    return [pair.teacher.convert_tokens_to_ids(x) for x in names]


def new_of(pair, *names):
    return [pair.student.convert_tokens_to_ids(x) for x in names]


def test_ids_become_those_of_the_same_tokens_once_and_in_order(pair):
    a, b, c, gone = old_of(pair, *NAMED)
    config = LlamaConfig(vocab_size=280, eos_token_id=[a, gone, c], bos_token_id=a, pad_token_id=b)
    config.user_token_id, config.stop_tok_ids, config.unpadded_vocab_size = b, [c, gone], 274
    lines = translate_ids(config, pair)
    assert config.eos_token_id == new_of(pair, "</s>", "<|a|>", "<|c|>")
    assert config.bos_token_id == new_of(pair, "<s>")[0]
    assert config.pad_token_id == new_of(pair, "<|b|>")[0]  # the new tokenizer has no padding of its own
    assert config.user_token_id == new_of(pair, "<|b|>")[0]
    assert config.unpadded_vocab_size == pair.rows  # or a model cuts off the logits of the tokens behind
    assert config.stop_tok_ids == new_of(pair, "<|c|>")
    assert lines == [
        "config.json: eos_token_id: dropped '<|gone|>', which the new tokenizer does not have",
        "config.json: stop_tok_ids: dropped '<|gone|>', which the new tokenizer does not have",
    ]


def test_generation_settings_of_all_shapes(pair):
    a, b, c, gone = old_of(pair, *NAMED)
    new_a, new_b, new_c = new_of(pair, *NAMED[:3])
    same_letter = next(i for i, match in pair.matches.items() if match.teacher_id == 65)
    config = GenerationConfig(
        decoder_start_token_id=a,
        forced_bos_token_id=b,
        forced_eos_token_id=[c, gone],
        suppress_tokens=[a, pair.teacher.pad_token_id, 65],
        begin_suppress_tokens=[b],
        bad_words_ids=[[a, b], [gone, a], [c]],
        force_words_ids=[[[a, b], [gone]], [[c]]],
        sequence_bias={(a, b): -1.5, (gone,): 2.0},
        forced_decoder_ids=[[1, a], [2, gone], [3, None]],
        max_new_tokens=a,
        top_k=b,
    )
    config.lang_to_id = {"<|en|>": a, "<|xx|>": gone}
    lines = translate_ids(config, pair)
    assert (config.decoder_start_token_id, config.forced_bos_token_id) == (new_a, new_b)
    assert config.forced_eos_token_id == [new_c]
    assert (config.suppress_tokens, config.begin_suppress_tokens) == ([new_a, same_letter], [new_b])
    assert config.bad_words_ids == [[new_a, new_b], [new_c]]
    assert config.force_words_ids == [[[new_a, new_b]], [[new_c]]]
    assert config.sequence_bias == {(new_a, new_b): -1.5}
    assert config.forced_decoder_ids == [[1, new_a], [3, None]]
    assert config.lang_to_id == {"<|en|>": new_a}
    assert (config.max_new_tokens, config.top_k) == (a, b)  # numbers that are no ids
    named = {line.split(": ")[1] for line in lines}
    fields = {"forced_eos_token_id", "suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias"}
    assert named == fields | {"forced_decoder_ids", "lang_to_id"}


def test_a_model_ends_with_what_it_ended_with(pair):
    """Also where that is no list, and the tokenizer's own end of text is another token, as many chat models have it."""
    a, _, _, gone = old_of(pair, *NAMED)
    for old, wanted in ((a, ["</s>", "<|a|>"]), (pair.teacher.eos_token_id, "</s>"), (gone, "</s>"), (None, "</s>")):
        generation = GenerationConfig(eos_token_id=old)
        translate_ids(generation, pair)
        assert generation.eos_token_id == pair.student.convert_tokens_to_ids(wanted)
    config = LlamaConfig(eos_token_id=a)  # of which some classes take a single id alone
    translate_ids(config, pair)
    assert config.eos_token_id == pair.student.eos_token_id


def test_a_scalar_without_a_token_is_no_token(pair, tmp_path):
    (gone,) = old_of(pair, "<|gone|>")
    generation = GenerationConfig(decoder_start_token_id=gone)
    assert len(translate_ids(generation, pair)) == 1
    assert generation.decoder_start_token_id is None
    config = gemma3(vocab_size=280, image_token_index=gone, boi_token_index=5000, eoi_token_index=None)
    lines = translate_ids(config, pair)
    assert [config.image_token_id, config.boi_token_id, config.eoi_token_id] == [-1, -1, None]
    assert any("boi_token_index: dropped the id 5000" in line for line in lines)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).image_token_id == -1


def test_parts_of_a_configuration_and_plain_dictionaries(pair):
    a, b, c, gone = old_of(pair, *NAMED)
    config = gemma3(vocab_size=280, image_token_index=a)
    config.vision_config.image_token_id = b
    config.audio_config = LlamaConfig(vocab_size=999, eos_token_id=a)  # sounds have a vocabulary of their own
    config.text_config.eos_token_id = [a, c]
    config.text_config.codebook_pad_token_id = a
    config.task_specific_params = {"chat": {"eos_token_id": a, "forced_bos_token_id": gone, "length": b}}
    translate_ids(config, pair)
    assert config.image_token_id == new_of(pair, "<|a|>")[0]
    assert config.vision_config.image_token_id == new_of(pair, "<|b|>")[0]
    assert (config.audio_config.eos_token_id, config.text_config.codebook_pad_token_id) == (a, a)
    assert config.text_config.eos_token_id == new_of(pair, "</s>", "<|a|>", "<|c|>")
    chat = {"eos_token_id": new_of(pair, "</s>")[0], "forced_bos_token_id": None, "length": b}
    assert config.task_specific_params["chat"] == chat


def test_names_that_are_no_ids_of_tokens_stay(pair):
    fields = {"pad_token_type_id": 270, "layer_idx": 271, "ignore_index": 270, "num_image_tokens": 271}
    fields |= {"tokens_per_second": 270, "is_token_id": True, "image_token": "<|a|>", "label2id": {"x": 270}}
    content = dict(fields)
    assert translate_ids(content, pair, where="file.json") == []
    assert content == fields


def test_tokens_of_images_that_are_listed_by_name_are_refused():
    config = LlamaConfig()
    check_special_ids(config)
    config.vocabulary_map = {"IMGIMGA": 4}
    with pytest.raises(ValueError, match=r"lists tokens by name and id \(config.json: vocabulary_map\)"):
        check_special_ids(config)


def gemma3(vocab_size, **ids):
    text = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)


@pytest.fixture(scope="module")
def with_images(tmp_path_factory):
    """A model with a processor of images, as Gemma 3 4B has."""
    folder = tmp_path_factory.mktemp("images")
    tokenizer = with_tokens(280, IMAGES, **ROLES)
    names = dict(zip(("boi_token", "eoi_token", "image_token"), IMAGES, strict=True))
    tokenizer._set_model_specific_special_tokens(names)
    boi, eoi, image = tokenizer.convert_tokens_to_ids(list(IMAGES))
    config = gemma3(len(tokenizer) + 5, boi_token_index=boi, eoi_token_index=eoi, image_token_index=image)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder / "teacher")
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4
    )
    processor.save_pretrained(folder / "teacher")
    (folder / "corpus.jsonl").write_text(jsonl(TEXTS))
    return folder


def result_of(folder, tokenizer, output):
    lines = []
    transfer(
        folder / "teacher",
        tokenizer,
        folder / "corpus.jsonl",
        output,
        max_length=64,
        batch_size=2,
        training=TrainingOptions(steps=1),
        on_message=lines.append,
    )
    return lines


def test_a_processor_takes_images_for_the_result(with_images, tmp_path):
    tokenizer = with_tokens(330, ["<|other|>", *IMAGES[::-1]], **ROLES)
    boi, eoi, image = tokenizer.convert_tokens_to_ids(list(IMAGES))
    lines = result_of(with_images, tokenizer, tmp_path / "out")
    assert not [x for x in lines if "dropped" in x or "left out" in x]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
    inputs = processor(text="def <start_of_image> x", images=[picture], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(image) == 4
    assert ids.index(boi) < ids.index(image) < ids.index(eoi)
    model = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    old = AutoProcessor.from_pretrained(with_images / "teacher")
    before = Gemma3ForConditionalGeneration.from_pretrained(with_images / "teacher").eval()
    with torch.no_grad():
        features = [x.model.get_image_features(inputs["pixel_values"]).pooler_output for x in (model, before)]
    assert torch.equal(*features)
    same = old(text="def <start_of_image> x", images=[picture], return_tensors="pt")
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, len(ids) + 2)


def test_without_tokens_for_images_the_result_takes_text_only_and_says_so(with_images, tmp_path):
    lines = result_of(with_images, new_tokenizer(), tmp_path / "out")
    assert any("image_token_index: dropped '<image_soft_token>'" in x for x in lines)
    assert any(x.startswith("processor_config.json: left out") and "takes text only" in x for x in lines)
    assert not (tmp_path / "out" / "processor_config.json").exists()
    model = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert model.config.image_token_id == -1
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)


def test_ids_in_processor_files_and_what_sentence_transformers_needs(pair, tmp_path):
    a, gone = old_of(pair, "<|a|>", "<|gone|>")
    source, result = tmp_path / "source", tmp_path / "result"
    (source / "1_Pooling").mkdir(parents=True)
    result.mkdir()
    (source / "preprocessor_config.json").write_text(json.dumps({"audio_token_id": a, "size": [a, gone]}))
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]))
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    pair.student.save_pretrained(result)
    assert copy_processor(source, result, pair) == []
    content = json.loads((result / "preprocessor_config.json").read_text())
    assert content == {"audio_token_id": new_of(pair, "<|a|>")[0], "size": [a, gone]}
    assert json.loads((result / "1_Pooling" / "config.json").read_text()) == {"pooling_mode_mean_tokens": True}
    assert json.loads((result / "modules.json").read_text())[1] == {"path": "1_Pooling"}
    (source / "processor_config.json").write_text(json.dumps({"image_processor": {"image_token": "<|gone|>"}}))
    (line,) = copy_processor(source, None, pair)
    assert "'<|gone|>'" in line
    before = {path: path.read_bytes() for path in result.rglob("*.json")}
    for path in ("../outside", "/etc", "1_Pooling/../..", 5):  # "." is the model itself, whose files are not copied
        (source / "modules.json").write_text(json.dumps([{"path": "."}, {"path": path}]))
        for folder in (None, result):
            with pytest.raises(ValueError, match=r"wanted folders in .* as the paths of modules.json, got"):
                copy_processor(source, folder, pair)
    (source / "modules.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wanted a list in .*modules.json', got dict"):
        copy_processor(source, None, pair)
    (source / "modules.json").write_text('[{"path": "."}]')
    (source / "config.json").write_text("{}")
    (source / "processor_config.json").unlink()
    copy_processor(source, result, pair)
    assert {path.name for path in result.rglob("*.json")} == {path.name for path in before}
    (source / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"wanted an object in .*preprocessor_config.json', got list"):
        copy_processor(source, None, pair)


def test_new_special_tokens_start_from_old_ones_that_are_named():
    old = with_tokens(270, NAMED, **ROLES)
    new = with_tokens(285, ["<|c|>", "<|new|>", "<|a=b|>"], eos_token="</s>", bos_token="<s>")
    vocabulary = VocabularyPair(old, new, 280)
    eos, fresh, odd = new_of(vocabulary, "</s>", "<|new|>", "<|a=b|>")
    assert vocabulary.matches[eos].how == "role"
    entries = ["<|new|>=<|a|>def <|b|>", "<|a=b|>=<|gone|>", "</s>=<|c|>"]
    check_map(entries)
    pieces = old("def ", add_special_tokens=False)["input_ids"]
    a, b, c, gone = old_of(vocabulary, *NAMED)
    wanted = {fresh: [a, *pieces, b], odd: [gone], eos: [c]}
    assert map_tokens(vocabulary, entries) == wanted == vocabulary.mapped
    assert eos not in vocabulary.matches
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(vocab_size=280, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    weight = teacher.get_input_embeddings().weight.detach()
    for init in ("mean", "random", "zero"):
        rows = initial_rows(teacher, vocabulary, init, 0)
        for i, ids in wanted.items():
            assert torch.allclose(rows.input[i], weight[ids].mean(0), atol=1e-7)
            assert torch.allclose(rows.output[i], teacher.lm_head.weight[ids].mean(0), atol=1e-7)
    for entry, message in (
        ("<|nothing|>=def", "NEW a token of the new tokenizer"),
        ("<|c|>=<|a|>", "both tokenizers have that token"),
        ("<|new|>=def", "each new token once"),
    ):
        with pytest.raises(ValueError, match=rf"^map: .*{re.escape(message)}"):
            map_tokens(vocabulary, [entry])
    for entry in ("<|new|>", "=x", "x="):
        with pytest.raises(ValueError, match=r"^map: wanted NEW=OLD"):
            check_map([entry])
