"""A tiny random-weight decoder with a byte-level tokenizer, saved as a folder, and texts to go with it."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

TEXTS = [
    f"def function_{name}(self, value={number}):\n    return self.{name} + value * {number}\n" * repeat
    for number, (name, repeat) in enumerate([("alpha", 3), ("beta", 1), ("gamma", 8), ("déjà", 5), ("日本", 4)] * 4)
]


def jsonl(texts) -> str:
    """A corpus: one object a line, its text under "text"."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def byte_level(texts: list[str], vocab_size: int, **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(roles.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if "bos_token" in roles:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def save_tiny_model(folder: Path, config=None, padding_rows: int = 5) -> PreTrainedTokenizerFast:
    """Save a model whose tokenizer has 270 tokens, and return this tokenizer."""
    tokenizer = byte_level(TEXTS, 270, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}"
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config or LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config.update({"vocab_size": len(tokenizer) + padding_rows, **ids})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": [ids["eos_token_id"], 65]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A larger vocabulary whose control tokens are named otherwise."""
    return byte_level(TEXTS, 330, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
