"""What this package does with many architectures of transformers: docs/architectures.md, made anew.

    python benchmarks/architectures.py [NAME ...]

Each is a tiny model with random weights. `doctor`, `transfer` (2 steps), `evaluate`, and in transformers alone loading
and generating are run on it, a transfer with the attention objective, and the chain of start, rows and layers, whose
adapter is put beside the original by peft. A row says that all worked, or what was said.
"""

import json
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import TEXTS, byte_level  # the tests' tokenizer and texts
from usage import arguments

from matt_fast import HealingOptions, TrainingOptions, doctor, evaluate, transfer
from matt_fast.support.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEADS = SIZES | {"num_key_value_heads": 4}
ROLES = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}

INTRODUCTION = """\
Made by `python benchmarks/architectures.py`: a tiny model with random weights of each architecture, with transformers
{version}. On each, `doctor` and `transfer` (2 steps of the default objective), then, in transformers alone, loading the
result, generating (or, for an encoder, its logits), and bits per byte. The next column has a step of the objective
`aim`, which wants softmax attention in the target layer. The last has the whole chain, `composed`, a step of rows by
`ntp`, and 2 of LoRA by `segment-kl+ntp` (encoders: `mean`, token distillation), and puts the adapter beside the
original by peft: its logits are the result's. What does not work is refused with this message: in the third column
before anything is initialised, under `aim` at the first step. `doctor` says the same before it. LoRA adapts what peft's
`all-linear` means: linear layers, and in some architectures experts; what it leaves as it was is named, and `--heal
full` or `outer` train that too."""
MASKED = ("ModernBertConfig", "XLMRobertaConfig", "BertConfig")

# Whose pre-tokeniser both tokenizers have; GPT-2's if it is not here.
RULES = {"Qwen2.5": "Qwen2Tokenizer"}
# Name -> configuration class, and what of it is not its default.
MODELS = {
    "Llama": ("LlamaConfig", SIZES),
    "Mistral": ("MistralConfig", SIZES),
    "Qwen3": ("Qwen3Config", SIZES | {"head_dim": 8}),
    "Gemma 3": (
        "Gemma3TextConfig",
        SIZES | {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "Qwen2.5": ("Qwen2Config", SIZES),
    "Qwen2.5, a tokenizer with other rules": ("Qwen2Config", SIZES),
    "Phi-3, Phi-4": ("Phi3Config", SIZES),
    "OLMo 2": ("Olmo2Config", SIZES),
    "SmolLM3": ("SmolLM3Config", SIZES),
    "Granite": ("GraniteConfig", SIZES),
    "Cohere 2": ("Cohere2Config", SIZES | {"head_dim": 8, "sliding_window": 16}),
    "Falcon H1": ("FalconH1Config", SIZES | MAMBA),
    "GPT-OSS": ("GptOssConfig", SIZES | EXPERTS | {"head_dim": 8, "sliding_window": 16}),
    "DeepSeek-V3": ("DeepseekV3Config", HEADS | LATENT | ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1}),
    "Gemma 2": ("Gemma2Config", SIZES | {"head_dim": 8, "sliding_window": 16}),
    "ModernBERT": ("ModernBertConfig", SIZES | {"local_attention": 16}),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        SIZES
        | {"head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4}
        | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 16}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "Phi": ("PhiConfig", SIZES),
    "OLMo 3": ("Olmo3Config", SIZES | {"sliding_window": 16}),
    "GLM-4": ("Glm4Config", SIZES | {"head_dim": 8}),
    "Nemotron": ("NemotronConfig", SIZES | {"head_dim": 8}),
    "Llama 4": ("Llama4TextConfig", SIZES | EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48}),
    "LFM2": ("Lfm2Config", SIZES | {"full_attn_idxs": [1, 3], "layer_types": ["conv", "full_attention"] * 2}),
    "Jamba": ("JambaConfig", SIZES | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "Mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}),
    "BLOOM": ("BloomConfig", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "MPT": ("MptConfig", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 512}),
    "OPT": ("OPTConfig", HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
    "XLM-RoBERTa": ("XLMRobertaConfig", HEADS),
    "Mixtral": ("MixtralConfig", SIZES | EXPERTS),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        SIZES | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        SIZES
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "StarCoder2": ("Starcoder2Config", SIZES | {"sliding_window": None}),
    "StableLM": ("StableLmConfig", SIZES),
    "EXAONE 4": ("Exaone4Config", SIZES | {"sliding_window": 16}),
    "Apertus": ("ApertusConfig", SIZES),
    "Seed-OSS": ("SeedOssConfig", SIZES | {"head_dim": 8}),
    "Hunyuan": ("HunYuanDenseV1Config", SIZES | {"head_dim": 8}),
    "ERNIE 4.5": ("Ernie4_5Config", SIZES | {"head_dim": 8}),
    "Falcon": ("FalconConfig", HEADS),
    "GPT-NeoX": ("GPTNeoXConfig", HEADS),
    "GPT-J": ("GPTJConfig", {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4}),
    "GPT-BigCode": ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
    "XGLM": ("XGLMConfig", {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48}),
    "OLMoE": ("OlmoeConfig", SIZES | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": (
        "Qwen2MoeConfig",
        SIZES
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
    ),
    "Granite MoE": ("GraniteMoeConfig", SIZES | EXPERTS),
    "Phi-3.5-MoE": ("PhimoeConfig", SIZES | EXPERTS),
    "DeepSeek-V2": ("DeepseekV2Config", HEADS | LATENT | ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1}),
    "GLM-4 MoE": (
        "Glm4MoeConfig",
        SIZES | ROUTED | {"head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "MiniMax": (
        "MiniMaxConfig",
        SIZES | EXPERTS | {"head_dim": 8, "block_size": 16, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "Mamba 2": (
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    ),
    "Bamba": ("BambaConfig", SIZES | HYBRID | {"attn_layer_indices": [1, 3]}),
    "Granite 4 hybrid": (
        "GraniteMoeHybridConfig",
        SIZES
        | HYBRID
        | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 48},
    ),
    "Nemotron-H": (
        "NemotronHConfig",
        SIZES
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}
        | {"hybrid_override_pattern": "M*M-"},
    ),
    "RecurrentGemma": ("RecurrentGemmaConfig", SIZES | {"lru_width": 32, "attention_window_size": 16}),
    "RWKV": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 6, "context_length": 512}),
    "BERT": ("BertConfig", HEADS),
    "T5": ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
}


def model_name(text: str) -> str:
    if text not in MODELS:
        raise ValueError(text)
    return text


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows: dict[str, tuple[str, ...]] = {}
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = examined(name, Path(folder)), with_attention(Path(folder)), with_layers(name, Path(folder))
        print(f"{name}: {' | '.join(rows[name])}", flush=True)
    if not names:
        write_text(PAGE, page(rows))


def examined(name: str, folder: Path) -> str:
    """What became of a model of this configuration, in one cell."""
    masked = save(name, folder)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXTS))
    (folder / "held-out.jsonl").write_text(json.dumps({"text": "Held out, and not trained on: 12 of 34."}) + "\n")
    paths = {"model": folder / "model", "tokenizer": folder / "tokenizer", "data": folder / "data.jsonl"}
    job = paths | {"output": folder / "output", "eval_data": folder / "held-out.jsonl", "device": "cpu"}
    options = {"max_length": 48, "batch_size": 2, "training": TrainingOptions(steps=2), "on_message": lambda text: None}
    fails = [x for x in doctor(**job, **options) if x.verdict == "will fail"]
    try:
        transfer(**job, **options)
    except (ValueError, NotImplementedError) as error:
        told = " ".join(str(error).replace(str(folder / "model"), "model").split())
        where = "refused" if fails else "refused by transfer, not by doctor"
        return f"{where}: {told}"
    if fails:
        return f"works, but doctor said: {fails[0].found}"
    loader = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = loader.from_pretrained(folder / "output").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "output")
    ids = tokenizer("def function", return_tensors="pt")["input_ids"]
    if masked:
        assert model(ids).logits.isfinite().all()
    else:
        new = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert new.shape[1] == ids.shape[1] + 4
    assert len(model.get_input_embeddings().weight) == len(tokenizer)
    assert evaluate(model, tokenizer, ["def function"], masked=masked).bits_per_byte > 0
    return "works"


def with_attention(folder: Path) -> str:
    """Whether the objective that wants softmax attention at the target layer can be had too."""
    return outcome(folder, "attention", training=TrainingOptions(steps=1, objective="aim"))


def with_layers(name: str, folder: Path) -> str:
    """Whether the chain of start, rows and layers can be had too, and which layers' weights that changes."""
    masked = MODELS[name][0] in MASKED
    rows, layers = ("token-distillation",) * 2 if masked else ("ntp+token-distillation", "segment-kl+ntp")
    given = {
        "training": TrainingOptions(steps=1, objective=rows),
        "healing": HealingOptions(steps=2, lr=1e-2, objective=layers, keep_adapter=True, max_worse=None),
        "precision": "no",
    }
    found = outcome(folder, "healed", **given if masked else given | {"init": "composed", "per_token": 1})
    if found != "works":
        return found
    loader = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    before, after, apart = (loader.from_pretrained(folder / x).eval() for x in ("model", "healed", "healed"))
    old, new = before.state_dict(), after.state_dict()
    changed = {x for x in new if old[x].shape == new[x].shape and not torch.equal(old[x], new[x])}
    apart.load_state_dict({x: old[x] for x in changed}, strict=False)
    apart = PeftModel.from_pretrained(apart, folder / "healed" / "adapter").eval()
    ids = torch.arange(7)[None]
    torch.testing.assert_close(apart(input_ids=ids).logits, after(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    linear = {f"{x}.weight" for x, module in before.named_modules() if isinstance(module, torch.nn.Linear)}
    candidates = linear | {x for x in old if old[x].dim() == 3 and ".experts." in x}
    kinds = {x: re.split(r"\.\d+\.", x.removesuffix(".weight"))[-1] for x in candidates if re.search(r"\.\d+\.", x)}
    left = sorted(set(kinds.values()) - {kinds[x] for x in changed & kinds.keys()})
    return "works" + (f"; without adapters: {', '.join(left)}" if left else "")


def outcome(folder: Path, output: str, **given) -> str:
    """What becomes of a transfer, in one cell."""
    paths = (folder / x for x in ("model", "tokenizer", "data.jsonl", output))
    options = {"max_length": 48, "batch_size": 2, "device": "cpu", "on_message": lambda text: None}
    try:
        transfer(*paths, **options, **given)
    except ValueError as error:
        told = str(error).split(";")[0].split(". ")[0]
        return "as before" if "tokenizer:" in told or "model: wanted" in told else f"refused: {told}"
    return "works"


def save(name: str, folder: Path) -> bool:
    """Write a model with random weights, and both tokenizers; returns whether it is a masked one."""
    kind, settings = getattr(transformers, MODELS[name][0]), MODELS[name][1]
    roles = ROLES | {"mask_token": "<mask>"}
    old, new = byte_level(TEXTS, 280, **roles), byte_level(TEXTS, 330, **roles)
    if name in RULES:
        rules = getattr(transformers, RULES[name])().backend_tokenizer
        for tokenizer in (old.backend_tokenizer, new.backend_tokenizer):
            tokenizer.pre_tokenizer, tokenizer.normalizer = rules.pre_tokenizer, rules.normalizer
    old.save_pretrained(folder / "model")
    new.save_pretrained(folder / "tokenizer")
    ids = {f"{x}_id": getattr(old, f"{x}_id") for x in ("bos_token", "eos_token", "pad_token")}
    more = {"vocab_size_per_layer_input": len(old)} if kind is transformers.Gemma3nTextConfig else {}
    config = kind(**settings, **ids, **more, vocab_size=len(old))
    masked = MODELS[name][0] in MASKED
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model: PreTrainedModel = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else auto).from_config(config)
    model.save_pretrained(folder / "model")
    return masked


def cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def page(rows: dict[str, tuple[str, ...]]) -> str:
    lines = [
        "# Architectures",
        "",
        INTRODUCTION.format(version=version("transformers")),
        "",
        "| | configuration | token-distillation | aim | start, rows and LoRA |",
        "|---|---|---|---|---|",
        *(f"| {name} | `{MODELS[name][0]}` | {' | '.join(map(cell, row))} |" for name, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(arguments(__doc__, model_name))
