"""What strangers' files would run: each way in has a payload that leaves a trace, and it never runs."""

import io
import json
import math
import pickle
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model
from transformers import AutoConfig, Gemma3Config

from matt_fast.data import documents
from matt_fast.model.teacher import Teacher
from matt_fast.model.tokenizer_files import load_tokenizer
from matt_fast.model.trust import check_implementations
from matt_fast.modeling import LlamaForAIM


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def paths(tmp_path):
    save_tiny_model(tmp_path / "model")
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = jsonl(TEXTS)
    (tmp_path / "data.jsonl").write_text(rows)
    (tmp_path / "held-out.jsonl").write_text(rows.replace("self", "that"))
    (tmp_path / "trace").mkdir()
    return tmp_path


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def donor(paths: Path) -> Path:
    """A model that has the new tokenizer."""
    folder = paths / "donor"
    save_tiny_model(folder, AutoConfig.from_pretrained(paths / "model"), padding_rows=60)
    for file in (paths / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def in_pickle(folder: Path, trace: Path, name: str) -> None:
    """Put a model's weights into a pickle with a payload, and let a file name it."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / ("pytorch_model.bin" if name == "alone" else "weights.bin")
    torch.save({**weights, "payload": Payload(trace)}, file)
    if name == "index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file.name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "half":
        first, *others = sorted(weights)
        save_file({first: weights[first]}, folder / "a.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(others, file.name) | {first: "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "configuration":
        change(folder / "config.json", transformers_weights=file.name)
    elif name == "disguise":
        file.rename(folder / "model.safetensors")


def transfer_options(paths: Path) -> list[str]:
    options = {"model": "model", "tokenizer": "tokenizer", "data": "data.jsonl", "output": "output"}
    sizes = ["--steps=1", "--max-length=48", "--batch-size=2", "--device=cpu"]
    return [*(f"--{name}={paths / place}" for name, place in options.items()), *sizes]


COMMANDS = ("transfer", "evaluate", "compare-inits", "donor", "ready rows")


def command(name: str, paths: Path) -> list[str]:
    model, tokenizer = f"--model={paths / 'model'}", f"--tokenizer={paths / 'tokenizer'}"
    held_out = f"--eval-data={paths / 'held-out.jsonl'}"
    return {
        "transfer": ["transfer", *transfer_options(paths)],
        "evaluate": ["evaluate", model, f"--data={paths / 'held-out.jsonl'}", "--device=cpu", "--pieces=1"],
        "plan": ["plan", model, tokenizer, "--device=cpu"],
        "compare-inits": ["compare-inits", model, tokenizer, held_out, "--init=mean", "--device=cpu"],
        "donor": ["transfer", *transfer_options(paths), "--init=omp", f"--donor={paths / 'donor'}"],
        "ready rows": ["transfer", *transfer_options(paths), f"--init={paths / 'donor'}"],
    }[name]


def traces(paths: Path) -> list[str]:
    return [x.name for x in (paths / "trace").iterdir()]


@pytest.mark.parametrize("way", ["alone", "index", "half", "configuration", "disguise"])
@pytest.mark.parametrize("name", COMMANDS)
def test_weights_in_a_pickle_are_not_read(paths, name, way):
    folder = donor(paths) if name in ("donor", "ready rows") else paths / "model"
    in_pickle(folder, paths / "trace" / way, way)
    done = run(*command(name, paths))
    assert done.exit_code == 1
    assert way == "disguise" or ".bin" in done.stderr
    assert way == "disguise" or "safetensors" in done.stderr
    assert traces(paths) == []
    assert not (paths / "output" / "config.json").exists()


def test_the_payload_would_leave_its_trace(paths):
    torch.save(Payload(paths / "trace" / "x"), paths / "x.bin")
    torch.load(paths / "x.bin", weights_only=False)
    assert traces(paths) == ["x"]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".npy", ".safetensors", ""])
@pytest.mark.parametrize("option", ["init", "data", "eval-data", "parallel", "model", "tokenizer", "donor"])
def test_no_option_takes_a_pickle(paths, option, suffix):
    file = paths / f"rows{suffix}"
    payload = Payload(paths / "trace" / option)
    if suffix in (".pt", ".bin"):
        torch.save({"input_embeddings": payload}, file)
    else:
        file.write_bytes(pickle.dumps(payload))
    extra = {"parallel": ["--init=transtokenizers"], "donor": ["--init=omp"]}.get(option, [])
    done = run("transfer", *transfer_options(paths), *extra, f"--{option}={file}")
    assert done.exit_code == 1
    assert traces(paths) == []


def test_files_of_a_dataset_are_not_unpickled(paths, monkeypatch):
    """Neither those of a local folder, nor those in the tar files of a dataset of the hub."""
    folder = paths / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    for name in ("a.pkl", "a.pickle", "a.pt", "a.pth", "dataset_info.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload(paths / "trace" / name)))
    assert list(documents.read_documents(folder)) == ["text"]

    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer)
    with tarfile.open(paths / "shard.tar", "w") as tar:
        for name, content in (("0.txt", b"words"), ("0.pth", buffer.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    load_dataset, load = documents.load_dataset, torch.load
    unpickled = []
    monkeypatch.setattr(torch, "load", lambda *a, **o: unpickled.append(a) or load(*a, **o))
    monkeypatch.setattr(
        documents, "load_dataset", lambda path, **o: load_dataset("webdataset", data_files=str(paths / path), **o)
    )
    assert list(documents.read_documents("shard.tar", text_field="txt")) == ["words"]
    assert unpickled == []
    assert traces(paths) == []


def code_of(folder: Path, trace: Path, keep_type: bool) -> None:
    """Let a configuration and a tokenizer name code that lies beside them."""
    (folder / "stranger.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'stranger'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    names = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    changed = {"auto_map": names} | ({} if keep_type else {"model_type": "stranger"})
    if (folder / "config.json").exists():
        change(folder / "config.json", **changed)
    tokenizer = {"auto_map": {"AutoTokenizer": ["stranger.Tokenizer", "stranger.Tokenizer"]}}
    tokenizer |= {} if keep_type else {"tokenizer_class": "Tokenizer"}
    change(folder / "tokenizer_config.json", **tokenizer)


@pytest.mark.parametrize("keep_type", [False, True])
@pytest.mark.parametrize("name", [*COMMANDS, "plan", "tokenizer"])
def test_code_of_a_repository_does_not_run(paths, name, keep_type):
    """Where the configuration is of a known type too, transformers' own class is taken."""
    folder = paths / ("tokenizer" if name == "tokenizer" else "model")
    folder = donor(paths) if name in ("donor", "ready rows") else folder
    code_of(folder, paths / "trace" / "code", keep_type)
    done = run(*command("transfer" if name == "tokenizer" else name, paths))
    if not keep_type and name != "tokenizer":
        assert done.exit_code == 1
        assert "trust_remote_code" in done.stderr
    assert traces(paths) == []


def test_code_of_a_repository_runs_where_it_may(paths):
    code_of(paths / "model", paths / "trace" / "code", keep_type=False)
    run(*command("plan", paths), "--trust-remote-code")
    assert traces(paths) == ["code"]


def test_nobody_is_asked_whether_code_may_run(paths, monkeypatch):
    """transformers asks, and waits, where it is not told: in a notebook that makes a tokenizer, for one."""
    code_of(paths / "model", paths / "trace" / "code", keep_type=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with suppress(ValueError):
        load_tokenizer(paths / "model")
    assert asked == traces(paths) == []


KERNELS = [
    {"attn_implementation": "strangers/attention"},
    {"attn_implementation": "strangers/attention@v1:function"},
    {"attn_implementation": "paged|strangers/attention"},
    {"_attn_implementation": "strangers/attention"},
    {"_attn_implementation_internal": "strangers/attention"},
    {"attn_implementation": {"": "strangers/attention"}},
    {"attn_implementation": "kernels-community/flash-attn2"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "strangers/flash_attention_2"},
    {"experts_implementation": "sonicmoe"},
    {"attn_implementation": 5},
]


@pytest.mark.parametrize(
    ("entry", "name"), [*((x, "plan") for x in KERNELS), *((KERNELS[0], x) for x in COMMANDS)], ids=str
)
def test_kernels_that_a_configuration_names_are_not_fetched(paths, monkeypatch, entry, name):
    fetched = []

    class Kernels:
        __spec__ = None

        def __getattr__(self, name):
            return lambda *arguments, **options: fetched.append((name, arguments))

    import transformers.integrations.hub_kernels as hub_kernels

    monkeypatch.setitem(sys.modules, "kernels", Kernels())
    for function in ("get_kernel", "lazy_load_kernel", "load_and_register_attn_kernel"):
        monkeypatch.setattr(hub_kernels, function, lambda *a, **o: fetched.append(a))
    folder = donor(paths) if name in ("donor", "ready rows") else paths / "model"
    change(folder / "config.json", **entry)
    done = run(*command(name, paths))
    if "_attn_implementation_internal" not in entry:  # which transformers leaves out
        assert done.exit_code == 1
        assert "trust_remote_code" in done.stderr
    assert fetched == []


def test_parts_of_a_configuration_are_looked_at_too(paths):
    config = Gemma3Config(attn_implementation={"": "sdpa", "vision_config": "strangers/attention"})
    with pytest.raises(ValueError, match=r"'x' names attn_implementation 'strangers/attention'.*trust_remote_code"):
        check_implementations(config, "x")
    for own in (None, "eager", "sdpa", "flex_attention"):
        check_implementations(Gemma3Config(attn_implementation=own), "x")
    change(paths / "model" / "config.json", attn_implementation="strangers/attention")
    assert Teacher(paths / "model", trust_remote_code=True).config._attn_implementation == "strangers/attention"


def test_a_model_for_aim_is_read_under_the_same_guards_as_a_teacher(paths):
    """Pickles, code that would be fetched, weights that are not there or not finite, folders of other things."""
    load = lambda **options: LlamaForAIM.from_pretrained(paths / "model", n_layers=2, **options)  # noqa: E731
    weights = load_file(paths / "model" / "model.safetensors")
    file = paths / "model" / "model.safetensors"
    upper = "model.layers.2.mlp.up_proj.weight"  # not read without with_ntp
    lower, head = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    for name, value, with_ntp, wanted in (
        (lower, None, False, "pretrained_model_name_or_path: wanted all weights, but 1 are missing"),
        (lower, math.nan, False, "finite in .*, got NaN or infinite values: model.layers.1.*1,536 values"),
        (upper, None, True, "wanted all weights, but 1 are missing"),
        (upper, math.inf, True, "got NaN or infinite values: "),
    ):
        changed = {x: tensor.clone() for x, tensor in weights.items()}
        if value is None:
            del changed[name]
        else:
            changed[name].fill_(value)
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ValueError, match=wanted):
            load(with_ntp=with_ntp)
        if with_ntp:
            load()
    save_file(weights, file, {"format": "pt"})
    change(paths / "model" / "config.json", tie_word_embeddings=False)  # so that the head has weights of its own
    load()
    with pytest.raises(ValueError, match=f"1 are missing in .*{head}"):
        load(with_ntp=True)
    change(paths / "model" / "config.json", tie_word_embeddings=True, attn_implementation="strangers/attention")
    with pytest.raises(ValueError, match=r"pretrained_model_name_or_path: the configuration .*trust_remote_code"):
        load()
    change(paths / "model" / "config.json", attn_implementation="eager")
    in_pickle(paths / "model", paths / "trace" / "index", "index")
    with pytest.raises(ValueError, match=r"wanted weights in \.safetensors"):
        load()
    with pytest.raises(ValueError, match=r"wanted config\.json in it, got tokenizer"):
        LlamaForAIM.from_pretrained(paths / "tokenizer", 2)
    assert traces(paths) == []


def test_every_way_to_load_a_model_looks_at_its_values(paths):
    """evaluate and compare-inits read whole models, a donor and ready rows give one table."""
    donor(paths)
    for folder, row in (("model", 7), ("donor", 300)):  # the latter of a new token
        file = paths / folder / "model.safetensors"
        weights = load_file(file)
        weights["model.embed_tokens.weight"][row] = math.nan
        save_file(weights, file, {"format": "pt"})
    for name in ("evaluate", "compare-inits"):
        done = run(*command(name, paths))
        assert (done.exit_code, "NaN or infinite values" in done.stderr) == (1, True), name
        assert "model.embed_tokens.weight (32 values, the first in row 7)" in done.stderr
    save_tiny_model(paths / "model")
    for name, wanted in (("donor", "donor: wanted numbers in "), ("ready rows", "rows: wanted input rows that are")):
        done = run(*command(name, paths))
        assert done.exit_code == 1
        assert wanted in done.stderr
        assert not (paths / "output").exists()
