"""Tokenizers made, extended, merged and pruned, each as a folder that `matt-fast transfer --tokenizer` takes."""

from matt_fast.tokenizers.check import check
from matt_fast.tokenizers.extend import extend

__all__ = ["check", "extend"]
