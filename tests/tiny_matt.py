"""Tiny models of every architecture, and MATT with data prepared from the texts of tiny."""

import functools
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tiny import TEXTS, byte_level, new_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from matt_fast import MATT, MATTConfig
from matt_fast.modeling import Gemma3ForAIM, GPTNeoXForAIM, LlamaForAIM, MistralForAIM, Qwen3ForAIM

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS = {
    "gemma3": (Gemma3ForAIM, Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=9), True),
    "gemma2": (Gemma3ForAIM, Gemma2Config(**GROUPED, head_dim=8, sliding_window=9, query_pre_attn_scalar=8), True),
    "gpt_neox": (GPTNeoXForAIM, GPTNeoXConfig(**SIZES, tie_word_embeddings=False), False),
    "llama": (LlamaForAIM, LlamaConfig(**GROUPED, tie_word_embeddings=True), True),
    "mistral": (MistralForAIM, MistralConfig(**GROUPED, sliding_window=7), False),
    "qwen3": (Qwen3ForAIM, Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=False), False),
}
ROWS = 330
DATA = {"dataset": Dataset.from_dict({"text": TEXTS}), "max_length": 40, "num_proc": 1}


def save(folder: Path, kind: str, tokenizer, seed: int = 0) -> None:
    """A tiny model with a row for each token of either tokenizer."""
    config = MODELS[kind][1]
    config.update({"vocab_size": ROWS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@functools.cache
def made() -> TemporaryDirectory:
    """The prepared data, which are the same for all models; gone with this process."""
    folder = TemporaryDirectory()
    _matt(dataset_output_dir=folder.name).prepare_dataset(**DATA)
    return folder


def _matt(**settings) -> MATT:
    settings = {"max_steps": 3, "precision": "32", "lr": 1e-2, "num_workers": 0, **settings}
    return MATT(MATTConfig(**settings), byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>"), new_tokenizer())


def prepared(kind: str, **settings):
    """(matt with prepared data, class, folder) in the current folder."""
    matt = _matt(**settings)
    save(Path("teacher"), kind, matt.teacher_tokenizer)
    shutil.copytree(made().name, matt.config.dataset_output_dir)
    matt.prepare_dataset(**DATA)  # finds them
    return matt, MODELS[kind][0], "teacher"
