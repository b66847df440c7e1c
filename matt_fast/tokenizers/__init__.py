"""Tokenizers made, extended, merged, pruned and judged, each a folder that `matt-fast transfer --tokenizer` takes."""

from matt_fast.tokenizers.check import check
from matt_fast.tokenizers.extend import extend
from matt_fast.tokenizers.merge import merge
from matt_fast.tokenizers.prune import prune
from matt_fast.tokenizers.train import train

__all__ = ["check", "extend", "merge", "prune", "train"]
