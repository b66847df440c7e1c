"""The reference library's README: its scripts run with other imports, and its names are where it has them."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import TEXTS, byte_level, new_tokenizer
from tiny_matt import MODELS, ROWS, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import matt_fast
from matt_fast import MATTConfig, modeling

README_QUICKSTART = """
import torch
from datasets import load_dataset
from transformers import AutoTokenizer, AutoModelForCausalLM
from matt import MATT, MATTConfig
from matt.modeling import Gemma3ForAIM

# 1. Load tokenizers
teacher_tokenizer = AutoTokenizer.from_pretrained("google/gemma-2-2b")
student_tokenizer = AutoTokenizer.from_pretrained("meta-llama/Llama-3-8B")

# 2. Configure training
config = MATTConfig(
    max_steps=10000,
    batch_size=4,
    lr=1e-4,
    precision="bf16-mixed",
)

# 3. Create MATT instance
matt = MATT(
    config=config,
    teacher_tokenizer=teacher_tokenizer,
    student_tokenizer=student_tokenizer,
)

# 4. Prepare dataset (cached to disk)
dataset = load_dataset("wikitext", "wikitext-103-raw-v1", split="train")
matt.prepare_dataset(
    dataset=dataset,
    max_length=512,
    num_proc=8,
)

# 5. (Optional) Create frozen embeddings mask for efficiency
frozen_mask = matt.prepare_frozen_embeddings_mask()

# 6. Load truncated models (using only first 3 layers for efficiency)
teacher_model = Gemma3ForAIM.from_pretrained(
    "google/gemma-2-2b",
    n_layers=3,
)
student_model = Gemma3ForAIM.from_pretrained(
    "google/gemma-2-2b",  # Same architecture, different tokenizer
    n_layers=3,
    frozen_embeddings_mask=frozen_mask,
)

# 7. Train embeddings
learned_embeddings = matt.train(teacher_model, student_model)

# 8. Load full model and replace embeddings
full_model = AutoModelForCausalLM.from_pretrained(
    "google/gemma-2-2b",
    torch_dtype=torch.bfloat16,
)
full_model.get_input_embeddings().weight.data.copy_(learned_embeddings)

# 9. Save adapted model
full_model.save_pretrained("output/gemma-2-2b-llama-tokenizer")
student_tokenizer.save_pretrained("output/gemma-2-2b-llama-tokenizer")
"""
# The README shows these lines of its example for untied embeddings; the lines in between are those of the quickstart.
README_NTP = """
# 1. Enable NTP in the config
config = MATTConfig(
    with_ntp=True,
    max_steps=10000,
    lr=1e-4,
)
matt = MATT(config=config, teacher_tokenizer=teacher_tokenizer, student_tokenizer=student_tokenizer)
matt.prepare_dataset(dataset=dataset, max_length=512)
teacher_model = Qwen3ForAIM.from_pretrained("Qwen/Qwen3-0.6B", n_layers=9)

# 2. Keep the student model at full depth (n_layers is still used for AIM target layer)
student_model = Qwen3ForAIM.from_pretrained(
    "Qwen/Qwen3-0.6B",
    n_layers=9,        # layer used for AIM signal (~1/3 of 28)
    with_ntp=True,     # keep full model, train output embeddings too
)

# 3. After training, also update the LM head weights
learned_embeddings = matt.train(teacher_model, student_model)

full_model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", torch_dtype=torch.bfloat16)
full_model.get_input_embeddings().weight.data.copy_(learned_embeddings)

# Copy output embeddings from the trained student model
full_model.get_output_embeddings().weight.data.copy_(
    student_model.get_output_embeddings().weight.data
)
"""


def run_script(script: str, **names) -> dict:
    script = script.replace("from matt.modeling", "from matt_fast.modeling").replace("from matt ", "from matt_fast ")
    exec(compile(script, "script", "exec"), names)
    return names


@pytest.fixture(params=["gemma3", "gemma2"])
def hub(request, tmp_path, monkeypatch):
    """Folders with the names of the README's hub repositories; the data set of that name is ours."""
    monkeypatch.chdir(tmp_path)
    MODELS["qwen3"][1].update({"num_hidden_layers": 10, "layer_types": ["full_attention"] * 10})
    save(Path("google/gemma-2-2b"), request.param, byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>"))
    save(Path("Qwen/Qwen3-0.6B"), "qwen3", byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>"))
    new_tokenizer().save_pretrained("meta-llama/Llama-3-8B")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_dict({"text": TEXTS}))


def test_the_readmes_quickstart_runs_with_other_imports(hub, caplog):
    found = run_script(README_QUICKSTART)
    saved = AutoModelForCausalLM.from_pretrained("output/gemma-2-2b-llama-tokenizer")
    before = AutoModelForCausalLM.from_pretrained("google/gemma-2-2b", dtype=torch.bfloat16)
    weight, old = saved.get_input_embeddings().weight, before.get_input_embeddings().weight
    mask = found["frozen_mask"]
    assert torch.equal(weight[mask], old[mask])
    assert (weight[~mask] != old[~mask]).any()
    assert "frozen rows of student_model are not the teacher's rows of the same tokens" in caplog.text
    assert len(AutoTokenizer.from_pretrained("output/gemma-2-2b-llama-tokenizer")) == ROWS


@pytest.mark.parametrize("hub", ["gemma3"], indirect=True)
def test_the_readmes_ntp_example_runs_with_other_imports(hub):
    setup = README_QUICKSTART.replace("import Gemma3ForAIM", "import Qwen3ForAIM").split("# 5.")[0]
    found = run_script(setup + README_NTP)
    full, before = found["full_model"], AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.bfloat16)
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        assert (getattr(full, getter)().weight != getattr(before, getter)().weight).any()
    learned = found["learned_embeddings"]
    assert torch.equal(full.get_input_embeddings().weight, learned.input_embeddings)
    assert torch.equal(full.get_output_embeddings().weight, learned.output_embeddings)


REFERENCE_NAMES = """
from matt import MATT, MATTConfig, MATTOutput, __version__
from matt import Gemma3ForAIM, GPTNeoXForAIM, LlamaForAIM, MistralForAIM, Qwen3ForAIM
from matt import PartlyFrozenEmbeddings, PreTrainedModelForAIM
"""


def test_what_the_reference_library_has_at_its_top_is_there():
    names = run_script(REFERENCE_NAMES)
    for name in set(modeling.__all__) - {"AIMOutput"}:
        assert names[name] is getattr(modeling, name)
        assert name in dir(matt_fast)
    assert names["__version__"] == importlib.metadata.version("matt-fast")
    assert run_script("from matt.config import MATTConfig".replace("matt.", "matt_fast."))["MATTConfig"] is MATTConfig
