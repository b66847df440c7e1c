"""A donor for `--init omp` from a package: the token embeddings of WordLlama, 32,000 Llama 2 tokens of 256 numbers.

    pip download --no-deps wordllama==0.4.0.post1
    python examples/wordllama_donor.py wordllama-*.whl DONOR
    matt-fast transfer --tokenizer DONOR --donor DONOR --init omp …

The folder holds the tokenizer, and a model of one layer around the table: `omp` reads nothing else of a donor.
"""

import io
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main(wheel: str, folder: str) -> None:
    with zipfile.ZipFile(wheel) as package:
        (table,) = load(package.read("wordllama/weights/l2_supercat_256.safetensors")).values()
        written = io.TextIOWrapper(package.open("wordllama/tokenizers/l2_supercat_tokenizer_config.json")).read()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(written), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    rows, width = table.shape
    config = LlamaConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight = torch.nn.Parameter(table.float())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(Path(folder))
    print(f"{folder}: {rows:,} tokens, rows of {width}")


if __name__ == "__main__":
    main(*sys.argv[1:])
