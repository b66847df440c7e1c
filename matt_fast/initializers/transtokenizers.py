"""Trans-tokenization: a new token's row as a mix of the rows of the teacher's tokens that translate it.

F. Remy, P. Delobelle, H. Avetisyan, A. Khabibullina, M. de Lhoneux and T. Demeester, "Trans-Tokenization and
Cross-lingual Vocabulary Transfers: Language Adaptation of LLMs for Low-Resource NLP" (COLM 2024,
https://arxiv.org/abs/2408.04303). The weights are how often the tokens are aligned in parallel text, each side
tokenised by its own tokenizer.
"""

from collections.abc import Iterable

import numpy as np
import torch

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.mixtures import Mixtures, mixtures, text_tokens
from matt_fast.initializers.word_alignment import align, encode

LEAST = 10.0  # pairs of tokens that are aligned less often, in expectation, are noise and do not count


def transtokenizer_mixtures(pairs: Iterable[tuple[str, str]], vocabulary: VocabularyPair) -> Mixtures:
    """Mixtures for the new tokens with a letter that occur in the translations.

    Args:
        pairs: texts in a language that the teacher knows, and their translations.
        vocabulary: the two vocabularies.

    Raises:
        ValueError: no pair of texts that can be aligned.
    """
    pairs = list(pairs)
    teacher_ids = [i for i in text_tokens(vocabulary.teacher_tokens) if i < vocabulary.teacher_rows]
    sources = encode(vocabulary.teacher, [source for source, _ in pairs], teacher_ids)
    targets = encode(vocabulary.student, [target for _, target in pairs], text_tokens(vocabulary.tokens))
    links = align(sources, targets)
    often = links.counts >= LEAST
    return mixtures(
        vocabulary,
        torch.from_numpy(links.targets[often]),
        torch.from_numpy(links.sources[often]),
        torch.from_numpy(links.counts[often]),
        torch.from_numpy(np.bincount(np.concatenate(targets), minlength=vocabulary.rows)),
    )
