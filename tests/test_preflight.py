"""What is checked before training, each against what really happens when it is not."""

import errno
import json
import os
import shutil
import tempfile
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from tiny import TEXTS, byte_level, new_tokenizer, save_tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    RobertaConfig,
)

from matt_fast.model.positions import position_limit
from matt_fast.model.teacher import Teacher
from matt_fast.recipe import preflight
from matt_fast.recipe.export import repair_generation_config
from matt_fast.recipe.preflight import (
    check_max_length,
    check_pieces,
    check_room,
    check_tokenizers_differ,
    estimate_bytes,
    rehearse_saving,
)
from matt_fast.support import files
from matt_fast.support.checks import check_new_folder
from matt_fast.support.files import check_writable, seconds_to_write, whole_file, whole_folder

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def test_outputs_that_can_be_written_are_left_as_they_were(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "real")
    for output in (".", tmp_path / "link", tmp_path / "full", tmp_path / "new" / "deep" / "er", "relative"):
        check_writable("output", output)
        assert sorted(tmp_path.rglob("*")) == before


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "file", tmp_path / "file" / "x" / "y", tmp_path / "dangling", "/proc/matt-fast/x"):
        with pytest.raises(OSError, match=f"^output: wanted a folder that can be written, got {str(output)!r}: "):
            check_writable("output", output)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_home_folder_that_no_shell_has_named_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("~", "~/out"):
        with pytest.raises(ValueError, match=f"^output: wanted a path that names the home folder, got '{output}'"):
            check_writable("output", output)
    check_writable("output", "~out")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_that_is_a_link_or_the_present_one_is_filled(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "link")
    for path in (tmp_path / "link", "."):
        with pytest.raises(FileNotFoundError), whole_folder(path) as part:
            os.replace(part / "missing", part / "x")
        assert not list((tmp_path / "real").iterdir())
        with whole_folder(path) as part:
            (part / "deep").mkdir()
            (part / "deep" / "x").write_text("content")
        assert (tmp_path / "real" / "deep" / "x").read_text() == "content"
        shutil.rmtree(tmp_path / "real" / "deep")
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_write_left_in_an_empty_folder_is_in_nobodys_way(tmp_path):
    left = tmp_path / ".part-"
    left.mkdir()
    (left / "half").write_text("torn")
    check_new_folder("output", tmp_path)
    with whole_folder(tmp_path) as part:
        (part / "x").write_text("content")
    assert [x.name for x in tmp_path.iterdir()] == ["x"]
    with pytest.raises(FileExistsError, match="output: wanted a new or empty folder"):
        check_new_folder("output", tmp_path)


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    of_rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, "No space left on device"), of_rust):
        for whole in (whole_file, whole_folder):
            with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/x'$"), whole(tmp_path / "x"):
                raise error
    sizes = []

    def write_bytes(path, content):
        sizes.append(len(content))
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.Path, "write_bytes", write_bytes)
    for size in (0, 700, 1 << 30):
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'$"):
            seconds_to_write(tmp_path, size)
    assert sizes == [1, 700, files.PROBE]  # no more than a checkpoint
    assert not list(tmp_path.iterdir())


def test_room_is_asked_of_the_disk_that_the_output_is_on(tmp_path, monkeypatch):
    asked = []
    usage = namedtuple("usage", "total used free")

    def disk_usage(place):
        asked.append(place)
        return usage(0, 0, 3 << 30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_room(tmp_path / "a" / "b", 3 << 30)
    with pytest.raises(OSError, match=rf"output: wanted 4.5 GiB of room .*, got 3.0 GiB free in '{tmp_path}'"):
        check_room(tmp_path / "a" / "b", int(4.5 * 2**30))
    assert set(asked) == {tmp_path}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="free in"):
        check_room(".", 1 << 40)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_a_result_and_its_checkpoints(tmp_path, tied, dtype):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied), dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    estimate = estimate_bytes(Teacher(tmp_path / "model"), 5000, 4000)
    model.resize_token_embeddings(5000)
    model.save_pretrained(tmp_path / "result")
    result = (tmp_path / "result" / "model.safetensors").stat().st_size
    tables = 1 if tied else 2
    expected = result + tables * 32 * 4 * (3 * 3 * 4000 + 2 * 5000)
    assert expected < estimate < 1.15 * expected
    best = estimate_bytes(Teacher(tmp_path / "model"), 5000, 4000, validates=True) - estimate
    assert 3 * tables * 4000 * 32 * 4 < best < 5 * tables * 4000 * 32 * 4
    waiting = estimate_bytes(Teacher(tmp_path / "model"), 5000, 4000, predicts=True) - estimate
    assert waiting == pytest.approx(1.1 * 3 * 4000 * 32 * 4, abs=2)


@pytest.fixture
def folder(tmp_path):
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_rehearsal_of_what_can_be_saved(folder):
    before = {x.name: x.read_bytes() for x in folder.iterdir()}
    assert rehearse_saving(Teacher(folder), new_tokenizer()) == []

    class Full(RuntimeError):
        """As tokenizers says it."""

    def save(*given, **more):
        raise Full("No space left on device (os error 28)")

    full = new_tokenizer()
    full.save_pretrained = save
    with pytest.raises(OSError, match=rf"No space left on device: '{tempfile.gettempdir()}'"):
        rehearse_saving(Teacher(folder), full)
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == before


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.6, "do_sample": False, "top_k": 20, "min_p": 0.1},
        {"length_penalty": 2.0, "early_stopping": True},
        {"do_sample": True, "temperature": 0.7, "output_scores": True},
    ],
)
def test_generation_settings_that_transformers_will_not_save_are_left_out(folder, settings, tmp_path):
    edit(folder / "generation_config.json", **settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = 5  # one that was changed is refused
    with pytest.raises(ValueError, match="`"):
        model.save_pretrained(tmp_path / "refused")
    (message,) = rehearse_saving(Teacher(folder), new_tokenizer())
    assert repair_generation_config(model) == [message]
    kept = {"do_sample": True, "temperature": 0.7} if settings.get("do_sample") else {}
    for name in settings.keys() - kept.keys() - {"do_sample"}:
        assert f"{name}={settings[name]!r}" in message
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    expected = GenerationConfig.from_pretrained(folder)
    assert (saved.eos_token_id, saved.bos_token_id) == (5, expected.bos_token_id)
    assert {name: getattr(saved, name) for name in kept} == kept
    saved.validate(strict=True)
    assert repair_generation_config(model) == []


def test_a_generation_configuration_that_cannot_be_loaded_is_an_error(folder):
    edit(folder / "generation_config.json", num_return_sequences=3)
    with pytest.raises(ValueError, match="num_return_sequences"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(
        ValueError, match="model: its generation configuration cannot be saved and loaded again: Greedy"
    ):
        rehearse_saving(Teacher(folder), new_tokenizer())
    (folder / "generation_config.json").write_text("{")  # not as if there were none
    with pytest.raises(
        ValueError, match=r"generation configuration cannot be saved and loaded again: .*not a valid JSON"
    ):
        rehearse_saving(Teacher(folder), new_tokenizer())


def test_generate_is_the_same_without_them(folder, tmp_path):
    edit(folder / "generation_config.json", temperature=0.1, top_k=1, length_penalty=3.0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[3, 70, 80]])
    before = model.generate(ids, max_new_tokens=12)
    repair_generation_config(model)
    assert torch.equal(model.generate(ids, max_new_tokens=12), before)


def test_what_cannot_be_saved_or_loaded_again_is_an_error(folder, monkeypatch):
    tokenizer = new_tokenizer()

    def refuse(*_, **__):
        raise NotImplementedError("not this one")

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", refuse)
        with pytest.raises(ValueError, match="tokenizer: it cannot be saved and loaded again: not this one"):
            rehearse_saving(Teacher(folder), tokenizer)
    other = byte_level(TEXTS, 300, eos_token="</s>")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: other)
        with pytest.raises(
            ValueError, match="tokenizer: wanted one that is the same when it was saved and loaded again"
        ):
            rehearse_saving(Teacher(folder), tokenizer)
    teacher = Teacher(folder)
    monkeypatch.setattr(type(teacher.config), "save_pretrained", refuse)
    with pytest.raises(ValueError, match="model: its configuration cannot be saved"):
        rehearse_saving(teacher, tokenizer)


def test_tokenizers_that_do_not_differ():
    one = byte_level(TEXTS, 300, eos_token="</s>")
    with pytest.raises(ValueError, match=r"tokenizer: wanted another than .* the same vocabulary of 300 tokens"):
        check_tokenizers_differ(byte_level(TEXTS, 300, eos_token="</s>"), one)
    check_tokenizers_differ(byte_level(TEXTS, 299, eos_token="</s>"), one)
    check_tokenizers_differ(byte_level(TEXTS, 300, eos_token="<end>"), one)


def scaled(**rope):
    return LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope})


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300}
OPT = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LIMITS = {
    "gpt2": (GPT2Config(**GPT2, n_positions=48), 48),
    "opt": (OPTConfig(**OPT, vocab_size=300, max_position_embeddings=48), 48),
    "bert": (BertConfig(**SMALL, max_position_embeddings=48, architectures=["BertForMaskedLM"]), 48),
    "roberta": (RobertaConfig(**SMALL, max_position_embeddings=48, architectures=["RobertaForMaskedLM"]), 46),
    "llama": (LlamaConfig(**SMALL, max_position_embeddings=64), 64),
    "default": (scaled(rope_type="default"), 64),
    "linear": (scaled(rope_type="linear", factor=2.0), None),
    "dynamic": (scaled(rope_type="dynamic", factor=2.0), None),
    "mpt": (MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=300, max_seq_len=48), 48),
    "alibi": (FalconConfig(**SMALL, alibi=True, max_position_embeddings=64), None),
}
TABLES = ("gpt2", "opt", "bert", "roberta", "mpt")


@pytest.mark.parametrize("name", LIMITS)
def test_positions_end_where_the_model_does(tmp_path, name):
    config, limit = LIMITS[name]
    config.save_pretrained(tmp_path)
    teacher = Teacher(tmp_path)
    assert type(teacher.config) is type(AutoConfig.from_pretrained(tmp_path))
    assert position_limit(teacher.trunk(teacher.outline(torch.float32))) == limit
    if name in TABLES:
        torch.manual_seed(0)
        trunk = teacher.trunk(type(teacher.outline(torch.float32))(teacher.config).eval())
        ids = torch.full((1, limit), 7)
        trunk(input_ids=ids)
        with pytest.raises((IndexError, RuntimeError)):
            trunk(input_ids=torch.full((1, limit + 1), 7))


def test_lengths_are_held_against_the_limit():
    tokenizers = [byte_level(TEXTS, 300, bos_token="<s>"), new_tokenizer()]
    text = "日本語" * 400  # 3,600 bytes
    longest = max(1 + len(t("日本語" * 227)["input_ids"]) for t in tokenizers)
    check_max_length(64, 64)
    check_max_length(65, None)
    with pytest.raises(ValueError, match="max_length: wanted at most the model's 64 positions, got 65"):
        check_max_length(65, 64)
    options = {"masked": False, "max_pieces": 3}
    check_pieces([None, "", text], tokenizers, longest + 5, **options)
    check_pieces([text], tokenizers, None, **options)
    with pytest.raises(
        ValueError, match=r"eval_data: .*within the model's 500 positions, got one of 2046 bytes that has"
    ):
        check_pieces([text], tokenizers, 500, **options)
    masked = [byte_level(TEXTS, 300, mask_token="<mask>")]
    with pytest.raises(ValueError, match=r"positions, got one of 48\d bytes"):
        check_pieces([text], masked, 50, masked=True, max_pieces=1)
    with pytest.raises(ValueError, match="wanted a mask token to score text"):
        check_pieces([text], tokenizers, 50, masked=True, max_pieces=1)
    with pytest.raises(ValueError, match="eval_data: wanted text to score, got none"):
        check_pieces([None, " \n"], tokenizers, 50, **options)
    with pytest.raises(ValueError, match="eval_data 'fr': wanted text to score, got none"):
        check_pieces([], tokenizers, 50, argument="eval_data 'fr'", **options)
    assert preflight.PIECE_BYTES == 2048


def test_a_class_that_transformers_forces_on_a_tokenizer_is_named(tmp_path):
    """Qwen2Tokenizer stands in for every tokenizer beside a Qwen 2 model."""
    Qwen2Config(architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer, which transformers .* as its unk_token and pad_token: give"):
        rehearse_saving(Teacher(tmp_path), byte_level(TEXTS, 300, eos_token="<eos>"))
    roles = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = byte_level(TEXTS, 300, **roles)
    with pytest.raises(ValueError, match="transformers takes Qwen2Tokenizer beside a model of type 'qwen2'"):
        rehearse_saving(Teacher(tmp_path), tokenizer)
    rules = Qwen2Tokenizer().backend_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = rules.pre_tokenizer
    tokenizer.backend_tokenizer.normalizer = rules.normalizer
    assert rehearse_saving(Teacher(tmp_path), tokenizer) == []
