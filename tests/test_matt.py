"""The reference library's interface: what preparing data, training and every setting promise."""

import copy
import importlib.machinery
import itertools
import logging
import math
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from test_processes import run_two
from tiny import TEXTS, byte_level, new_tokenizer
from tiny_matt import ROWS, save
from tokenizers import processors
from torch import nn
from transformers import AutoModelForCausalLM

from matt_fast import MATT, MATTConfig, MATTOutput
from matt_fast.data.batches import collate
from matt_fast.data.chunks import Side, make_chunks
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.head import Head
from matt_fast.reference.data import batches
from matt_fast.support.flops import FlopCounter
from matt_fast.training import loop
from matt_fast.training.objectives import next_token

HAS_GPU = torch.cuda.is_available()


def test_data_is_prepared_once(setting, caplog):
    matt, *_ = setting
    data, path = Dataset.from_dict({"text": TEXTS}), Path(matt.dataset_path)
    stamp = path.stat().st_ino
    arguments = {"max_length": 40, "num_proc": 1}
    matt.prepare_dataset(data, **arguments)
    assert (Path(matt.dataset_path), path.stat().st_ino) == (path, stamp)
    matt.student_tokenizer("text", truncation=True, max_length=3)  # leaves its mark
    matt.prepare_dataset(data, **arguments)
    assert (Path(matt.dataset_path), path.stat().st_ino) == (path, stamp)
    matt.prepare_dataset(data, **arguments, force_reprocess=True)
    assert Path(matt.dataset_path) == path
    assert path.stat().st_ino != stamp
    matt.prepare_dataset(data, max_length=41, num_proc=2)
    assert Path(matt.dataset_path) != path
    matt.prepare_dataset(Dataset.from_dict({"words": TEXTS}), **arguments, text_column_name="words", batch_size=3)
    assert len(list(path.parent.iterdir())) == 3
    with pytest.raises(ValueError, match="text_column_name: wanted one of the columns"):
        matt.prepare_dataset(data, **arguments, text_column_name="words")
    with pytest.raises(ValueError, match="dataset: wanted text to train on, got none in 1 rows"):
        matt.prepare_dataset(Dataset.from_dict({"text": [" "]}), **arguments)
    with pytest.raises(ValueError, match="text_column_name: wanted a column of texts, got 'n', which holds int64"):
        matt.prepare_dataset(Dataset.from_dict({"n": [1, 2]}), **arguments, text_column_name="n")
    with pytest.raises(TypeError, match=r"dataset: wanted a datasets\.Dataset .* got list"):
        matt.prepare_dataset(TEXTS, **arguments)


def test_train_refuses_what_does_not_fit(setting):
    matt, architecture, folder = setting
    load = lambda **options: architecture.from_pretrained(folder, **{"n_layers": 2, **options})  # noqa: E731
    teacher = load()
    with pytest.raises(RuntimeError, match="prepare_dataset: wanted it to be called before train"):
        MATT(MATTConfig(), matt.teacher_tokenizer, matt.student_tokenizer).train(teacher, load())
    with pytest.raises(TypeError, match="student_model: wanted a PreTrainedModelForAIM, got LlamaForCausalLM"):
        matt.train(teacher, AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(TypeError, match="Lightning's Trainer have no meaning here, got fast_dev_run"):
        matt.train(teacher, load(), fast_dev_run=True)
    with pytest.raises(ValueError, match="student_model: wanted a model of its own"):
        matt.train(teacher, teacher)
    with pytest.raises(ValueError, match="n_layers: wanted the same for both models, got 2 and 3"):
        matt.train(teacher, load(n_layers=3))
    with pytest.raises(ValueError, match=r"with_ntp: wanted the same in .* got False and True"):
        matt.train(teacher, load(with_ntp=True))
    student = AutoModelForCausalLM.from_pretrained(folder)
    student.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"student_model: wanted a row for every id .* up to 32\d, got .* of 300 rows"):
        matt.train(teacher, architecture(student, n_layers=2))
    matt.config.precision = "bf16-mixed"
    with pytest.raises(ValueError, match="teacher_model: wanted weights in bfloat16 or float32, got float16"):
        matt.train(load(dtype=torch.float16), load())
    matt.config.num_warmup_steps, matt.config.num_decay_steps = 2, 3
    with pytest.raises(ValueError, match=r"num_warmup_steps and num_decay_steps: wanted at most the 3 .* 2 and 3"):
        matt.train(teacher, load())
    matt.config.num_warmup_steps = -1
    with pytest.raises(ValueError, match="num_warmup_steps: wanted at least 0, got -1"):
        matt.train(teacher, load())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("accelerator", "tpu", "accelerator: wanted one of auto, gpu, cuda, cpu"),
        ("devices", 0, "devices: wanted a number of processes, -1 or 'auto', got 0"),
        ("batch_size", 0, "batch_size: wanted at least 1, got 0"),
        ("num_workers", -1, "num_workers: wanted at least 0"),
        ("max_epochs", 0, "max_epochs: wanted -1 or at least 1, got 0"),
        ("max_epochs", -1, "max_steps: wanted at least 1 where max_epochs is -1"),
        ("max_epochs", -2, "max_epochs: wanted at least -1, got -2"),
        ("accumulate_grad_batches", 0, "accumulate_grad_batches: wanted at least 1, got 0"),
        ("pad_to_multiple_of", 0, "pad_to_multiple_of: wanted at least 1, got 0"),
        ("log_every_n_steps", 0, "log_every_n_steps: wanted at least 1, got 0"),
        ("save_every_n_steps", 0, "save_every_n_steps: wanted at least 1, got 0"),
        ("num_decay_steps", -1, "num_decay_steps: wanted at least 0, got -1"),
        ("max_steps", 0, "max_steps: wanted -1 or at least 1, got 0"),
        ("gradient_clip_val", -1.0, "gradient_clip_val: wanted at least 0"),
        ("gradient_clip_algorithm", "value", "clipping single values would change the direction of a row"),
        ("strategy", "fsdp", "strategy: wanted one of auto, ddp, .*there is nothing to shard"),
        ("precision", "16-mixed", "gradients of the AIM loss are too small for fp16"),
        ("precision", 64, "precision: wanted one of .* float64 is not offered.*; got '64'"),
        ("gradient_clip_val", math.nan, "gradient_clip_val: wanted at least 0, got nan"),
        ("seed", -1, "seed: wanted at least 0, got -1"),
        ("save_top_k", -2, "save_top_k: wanted at least -1"),
        ("loss", "mae", "loss: wanted one of mse, cosine"),
        ("aim_impl", "aim2", "aim_impl: wanted one of aim, aim_star"),
        ("lr", 0, "lr: wanted a number above 0, got 0"),
        ("num_warmup_steps", -1, "num_warmup_steps: wanted at least 0"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        MATTConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", "4", r"batch_size: wanted int, got '4' \(str\)"),
        ("batch_size", 2.5, "batch_size: wanted int, got 2.5"),
        ("max_steps", 10.5, "max_steps: wanted int, got 10.5"),
        ("num_workers", None, "num_workers: wanted int, got None"),
        ("seed", "x", "seed: wanted int, got 'x'"),
        ("save_top_k", True, "save_top_k: wanted int, got True"),
        ("lr", "1e-4", "lr: wanted float, got '1e-4'"),
        ("gradient_clip_val", "1", "gradient_clip_val: wanted float or None, got '1'"),
        ("checkpoint_output_dir", 5, "checkpoint_output_dir: wanted str or Path, got 5"),
        ("with_ntp", "False", "with_ntp: wanted bool, got 'False'"),
        ("strategy", None, "strategy: wanted str, got None"),
        ("devices", [0, 1], r"devices: wanted a number of processes, .* got \[0, 1\]; which GPUs .* CUDA_VISIBLE_DEV"),
    ],
)
def test_settings_of_another_type_are_refused(field, value, message):
    with pytest.raises(TypeError, match=message):
        MATTConfig(**{field: value})


def test_settings_that_say_the_same_are_accepted(tmp_path):
    for name in ("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"):
        assert MATTConfig(strategy=name).strategy == name
    config = MATTConfig(precision=32, devices="2", lr=1, gradient_clip_val=1, checkpoint_output_dir=tmp_path)
    assert (config.precision, config.devices) == ("32", 2)


def test_arguments_of_another_type_are_named(setting):
    matt, architecture, folder = setting
    with pytest.raises(TypeError, match=r"config: wanted MATTConfig, got \{\}"):
        MATT({}, matt.teacher_tokenizer, matt.student_tokenizer)
    with pytest.raises(TypeError, match="n_layers: wanted int, got '3'"):
        architecture.from_pretrained(folder, n_layers="3")
    with pytest.raises(TypeError, match="with_ntp: wanted bool, got 'False'"):
        architecture.from_pretrained(folder, 2, with_ntp="False")
    with pytest.raises(TypeError, match="frozen_mask: wanted a bool tensor, got list"):
        architecture.from_pretrained(folder, 2, frozen_embeddings_mask=[True] * 3)
    matt.config.with_ntp = "False"  # after the check
    with pytest.raises(TypeError, match="with_ntp: wanted bool, got 'False'"):
        matt.train(architecture.from_pretrained(folder, 2), architecture.from_pretrained(folder, 2))


def test_training_shows_how_far_it_is(setting, capsys):
    matt, architecture, folder = setting
    matt.train(*(architecture.from_pretrained(folder, 2) for _ in range(2)))
    assert re.search(r"training: step 3 of 3, .*tokens/s", capsys.readouterr().out)


@pytest.mark.parametrize("multiple", [1, 16])
def test_batches_are_padded_to_a_multiple(setting, multiple):
    matt, *_ = setting
    matt.config.pad_to_multiple_of, matt.config.batch_size = multiple, 2
    data = load_from_disk(matt.dataset_path).with_format("numpy")
    lengths = set()
    for batch in itertools.islice(batches(data, matt.config, Accelerator(cpu=True)), 20):
        for ids, documents in (
            (batch.teacher_ids, batch.teacher_documents),
            (batch.student_ids, batch.student_documents),
        ):
            longest = int((documents >= 0).sum(1).max())
            assert ids.shape[1] == math.ceil(longest / multiple) * multiple
            lengths.add(longest % 16)
    assert len(lengths) > 1


def losses_of(setting, caplog, **settings) -> list[float]:
    matt, architecture, folder = setting
    usual = matt.config
    matt.config = MATTConfig(**{**vars(usual), "log_every_n_steps": 1, **settings})
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="matt_fast.reference.matt"):
        torch.manual_seed(0)
        student = architecture.from_pretrained(folder, n_layers=2, with_ntp=matt.config.with_ntp)
        try:
            matt.train(architecture.from_pretrained(folder, n_layers=2), student)
        finally:
            matt.config = usual
    return [float(x) for x in re.findall(r"step \d+: loss ([^,]+)", caplog.text)]


def test_settings_do_what_they_say(setting, caplog):
    usual = losses_of(setting, caplog)
    assert len(usual) == 3
    assert losses_of(setting, caplog) == usual
    assert losses_of(setting, caplog, num_workers=2, pad_to_multiple_of=32) == pytest.approx(usual, rel=1e-3)
    for different in (
        {"seed": 1},
        {"loss": "cosine"},
        {"aim_impl": "aim_star"},
        {"with_ntp": True},
        {"batch_size": 2},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
    ):
        assert losses_of(setting, caplog, **different)[0] != usual[0], different
    for later in ({"lr": 1e-3}, {"num_warmup_steps": 3}):  # the first step's loss is before any update
        changed = losses_of(setting, caplog, **later)
        assert changed[0] == usual[0]
        assert changed[1:] != usual[1:]
    assert losses_of(setting, caplog, num_decay_steps=2)[:2] == usual[:2]
    assert (
        losses_of(setting, caplog, lr=1.0, gradient_clip_val=1e-9)[1:]
        != losses_of(setting, caplog, lr=1.0, gradient_clip_val=None)[1:]
    )
    assert losses_of(setting, caplog, devices="1", strategy="ddp", accelerator="auto" if HAS_GPU else "cpu") == usual
    assert losses_of(setting, caplog, log_every_n_steps=2) == usual[1:]  # every second step, and the last
    with pytest.raises(ValueError, match="devices: wanted the 1 processes that were started, got 2"):
        losses_of(setting, caplog, devices=2)
    if not HAS_GPU:
        with pytest.raises(ValueError, match="accelerator: wanted a CUDA device for 'gpu', got none"):
            losses_of(setting, caplog, accelerator="gpu")


def test_what_comes_first_ends_training(setting, caplog):
    matt, *_ = setting
    chunks = len(load_from_disk(matt.dataset_path))
    assert chunks % 7
    batches = math.ceil(chunks / 7)  # the last one of a pass is smaller
    settings = {"batch_size": 7}
    assert len(losses_of(setting, caplog, **settings, max_steps=-1, max_epochs=2)) == 2 * batches
    assert len(losses_of(setting, caplog, **settings, max_steps=10_000)) == batches
    assert len(losses_of(setting, caplog, **settings, max_steps=batches + 1, max_epochs=-1)) == batches + 1
    by_two = {"accumulate_grad_batches": 2, "max_steps": -1}
    assert len(losses_of(setting, caplog, **settings, **by_two)) == math.ceil(batches / 2)
    assert len(losses_of(setting, caplog, batch_size=1000, max_steps=-1)) == 1


def test_two_processes_prepare_once_and_train_the_same_rows(setting, tmp_path):
    matt, _, _ = setting
    matt.student_tokenizer.save_pretrained("student")
    run_two("two_processes_matt.py", str(tmp_path))
    first, second = (torch.load(f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["rows"], second["rows"])
    assert len(list(Path("datasets").iterdir())) == 1
    assert sum(path.name.startswith("step4_") for path in Path("checkpoints").iterdir()) == 2  # it trains twice
    assert first["steps"] == second["steps"] == math.ceil(len(load_from_disk(matt.dataset_path)) / 2 / 16)


def test_wandb(setting, caplog, tmp_path, monkeypatch):
    """A module of that name that writes down what it is told; without one, an error that names the package."""
    monkeypatch.setattr("matt_fast.reference.matt.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"use_wandb: wandb is missing: .*pip install wandb"):
        losses_of(setting, caplog, use_wandb=True)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    told = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.config = types.SimpleNamespace(update=lambda values, **_: told.append(values))
    fake.log = lambda values, **options: told.append((values, options))
    fake.finish = lambda: told.append("finish")
    fake.init = lambda **options: told.append(options) or fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB])
    options = {"use_wandb": True, "wandb_project": "mine", "wandb_output_dir": "there"}
    losses = losses_of(setting, caplog, **options, with_ntp=True)
    assert (told[0]["project"], told[0]["dir"]) == ("mine", "there")
    assert Path("there").is_dir()
    assert told[1]["wandb_project"] == "mine"
    (first, _), *steps, (at_end, at_step) = [entry for entry in told if isinstance(entry, tuple)]
    assert first.keys() == {"flops"}
    assert [values["loss"] for values, _ in steps] == pytest.approx(losses, rel=1e-4)
    for values, _ in steps:
        assert values["aim_loss"] == values["aim"]
        assert values["ntp_loss"] == values["ntp"]
        assert values["ntp_scaling_factor"] * values["ntp"] == pytest.approx(values["aim"])
        assert values["aim_loss"] + values["scaled_ntp_loss"] == pytest.approx(values["loss"], rel=1e-5)
    assert at_step["step"] == 3
    assert at_end["total_training_time_seconds"] == setting[0].progress.seconds > 0
    assert ("peak_vram_gb" in at_end) == HAS_GPU
    assert told[-1] == "finish"
    told.clear()
    losses_of(setting, caplog, **options)
    assert not any("ntp" in name for entry in told if isinstance(entry, tuple) for name in entry[0])


@pytest.mark.parametrize("accumulation", [1, 2, 16])  # the last goes on into a second pass
def test_flops_are_those_of_a_chunk(setting, monkeypatch, accumulation):
    """Counted around what the step calls, by the chunks that it was given."""
    matt, architecture, folder = setting
    matt.config.batch_size, matt.config.accumulate_grad_batches, matt.config.max_steps = 9, accumulation, 1
    logged, chunks, counter = [], [], FlopCounter()
    monkeypatch.setattr("matt_fast.reference.matt.Accelerator.log", lambda self, values, **_: logged.append(values))
    given = loop.losses

    def losses(*arguments, **options):
        chunks.append(len(arguments[4].student_ids))
        return given(*arguments, **options)

    monkeypatch.setattr(loop, "losses", losses)
    models = [architecture.from_pretrained(folder, n_layers=2) for _ in range(2)]
    with counter:
        matt.train(*models)
    assert len(chunks) == accumulation
    assert logged[0] == {"flops": pytest.approx(counter.flops / sum(chunks), abs=1)}


def test_rows_of_a_model_in_float32_stay_as_they_are(setting):
    """bf16-mixed does not round them; bf16-true does."""
    matt, architecture, folder = setting
    mask = matt.prepare_frozen_embeddings_mask()
    old = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    for precision, same in (("bf16-mixed", True), ("bf16-true", False)):
        matt.config.precision = precision
        teacher = architecture.from_pretrained(folder, 2, dtype=torch.float32)
        result = matt.train(teacher, architecture.from_pretrained(folder, 2, mask, dtype=torch.float32))
        assert torch.equal(result[mask].float(), old[mask]) == same


def test_a_step_without_trainable_rows_is_skipped_and_counted(setting):
    matt, architecture, folder = setting
    for with_ntp in (False, True):
        matt.config.with_ntp = with_ntp
        mask = torch.ones(ROWS, dtype=torch.bool)
        student = architecture.from_pretrained(folder, 2, frozen_embeddings_mask=mask, with_ntp=with_ntp)
        before = student.get_input_embeddings().to_embeddings().weight
        result = matt.train(architecture.from_pretrained(folder, 2), student)
        assert matt.progress.steps_without_new_tokens == matt.progress.step == 3
        assert torch.equal(result, before.float())


def test_an_end_token_that_is_also_padding_is_learned(setting):
    """The next-token loss knows padding by lengths, not by its id."""
    matt, *_ = setting
    student = byte_level(TEXTS, 300, eos_token="</s>", pad_token="</s>")
    end = student.eos_token_id
    student.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    sides = Side("teacher", matt.teacher_tokenizer, ROWS, 40), Side("student", student, ROWS, 40)
    batch = collate([[chunk] for chunk in itertools.islice(make_chunks(TEXTS, *sides, Counter()), 3)], Counter(), 8)
    lengths = (batch.student_documents >= 0).sum(1)
    assert all(int(row[length - 1]) == end for row, length in zip(batch.student_ids, lengths, strict=True))
    torch.manual_seed(0)
    hidden, weight = torch.randn(*batch.student_ids.shape, 4), torch.randn(ROWS, 4)
    rows = EmbeddingTable(weight, torch.full((ROWS,), -1), weight).output_rows()
    given = types.SimpleNamespace(
        batch=batch,
        student=types.SimpleNamespace(head_input=hidden),
        rows=types.SimpleNamespace(output=rows),
        head=Head(weight.clone()),
    )
    labels = batch.student_ids.clone()
    labels[batch.student_documents < 0] = -100
    expected = nn.functional.cross_entropy((hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(next_token(given), expected)


def test_checkpoints(setting):
    matt, architecture, folder = setting
    matt.config = MATTConfig(
        **{**vars(matt.config), "max_steps": 6, "save_every_n_steps": 2, "save_top_k": 2, "with_ntp": True}
    )
    student = architecture.from_pretrained(folder, n_layers=2, with_ntp=True)
    result = matt.train(architecture.from_pretrained(folder, n_layers=2), student)
    names = sorted(path.name for path in Path("output/checkpoints").iterdir())
    assert len(names) == 3
    assert names[0] == "last.safetensors"
    assert all(re.fullmatch(r"step[246]_loss\S+\.safetensors", name) for name in names[1:])
    last = load_file("output/checkpoints/last.safetensors")
    torch.testing.assert_close(last["input_embeddings"], result.input_embeddings)


def test_output_is_a_tensor_and_more(tmp_path):
    rows = torch.randn(ROWS, 32)
    output = MATTOutput(rows, output_embeddings=rows + 1)
    assert isinstance(output, torch.Tensor)
    assert torch.equal(torch.empty(ROWS, 32).copy_(output), rows)
    assert type(output + 1) is torch.Tensor
    torch.save(output, tmp_path / "output.pt")
    for again in (copy.deepcopy(output), torch.load(tmp_path / "output.pt", weights_only=False)):
        assert torch.equal(again, rows)
        assert torch.equal(again.input_embeddings, rows)
        assert torch.equal(again.output_embeddings, rows + 1)
    save(tmp_path / "tied", "llama", new_tokenizer())
    save(tmp_path / "untied", "qwen3", new_tokenizer())
    tied, untied = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("tied", "untied"))
    with pytest.raises(ValueError, match="it cannot hold both tables"):
        output.apply_to(tied)
    output.apply_to(untied)
    assert torch.equal(untied.get_input_embeddings().weight, rows)
    assert torch.equal(untied.get_output_embeddings().weight, rows + 1)
    MATTOutput(rows, output_embeddings=rows).apply_to(tied)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    before = untied.get_output_embeddings().weight.clone()
    MATTOutput(rows + 2).apply_to(untied)
    assert torch.equal(untied.get_output_embeddings().weight, before)
    with pytest.raises(ValueError, match=re.escape("model: wanted input embeddings of shape (3, 32), got (330, 32)")):
        MATTOutput(rows[:3]).apply_to(untied)


def test_prepared_chunks_are_those_of_the_recipe(setting):
    """Cut, not truncated: every byte of the texts is there."""
    matt, *_ = setting
    rows = load_from_disk(matt.dataset_path)
    ids = [i for row in rows for i, s in zip(row["student_ids"], row["student_segments"], strict=True) if s >= 0]
    assert matt.student_tokenizer.decode(ids) == "".join(TEXTS)
    assert max(len(row["teacher_ids"]) for row in rows) <= 40
