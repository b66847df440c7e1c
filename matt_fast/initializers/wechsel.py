"""WECHSEL: a new token's row as a mix of the rows of the teacher's tokens that are nearest in meaning.

B. Minixhofer, F. Paischer and N. Rekabsaz, "WECHSEL: Effective initialization of subword embeddings for cross-lingual
transfer of monolingual language models" (NAACL 2022, https://arxiv.org/abs/2112.06598). Words of both languages get
fastText vectors; a dictionary turns one space onto the other (orthogonal Procrustes); a token's vector is the mean of
those of the words that it is part of; the nearest tokens of the teacher are mixed by the softmax of their cosines.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from matt_fast.alignment.vocabulary import Token, VocabularyPair, vocabulary_rows
from matt_fast.initializers.fasttext import fasttext_vectors
from matt_fast.initializers.mixtures import Mixtures, mixtures, text_tokens
from matt_fast.initializers.word_alignment import align, encode
from matt_fast.support.texts import bounded_pieces

WORD = r"\w+|[^\w\s]"
UNKNOWN = "<unknown>"
MAX_WORDS = 1_000_000
LEAST = 5  # occurrences that a word, and alignments that a pair of words needs


class WordVectors(NamedTuple):
    """Vectors of the words of a language.

    Attributes:
        words: [n] different words.
        vectors: [n, dim] float32.
        counts: [n] int64, how often each occurs.
    """

    words: list[str]
    vectors: torch.Tensor
    counts: torch.Tensor


def train_word_vectors(
    texts: Iterable[str], *, dim: int = 100, epochs: int = 20, min_count: int = LEAST, seed: int = 0
) -> WordVectors:
    """fastText vectors of the words (letters and digits, or one other sign) of a text, with WECHSEL's options.

    Raises:
        ImportError: fastText is missing.
        ValueError: no word occurs `min_count` times.
    """
    texts = list(texts) if iter(texts) is texts else texts  # they are read twice
    tokenizer = word_tokenizer(texts, min_count)
    found = fasttext_vectors(texts, tokenizer, dim=dim, epochs=epochs, min_count=min_count, seed=seed)
    known = found.ids != tokenizer.unk_token_id
    ids = found.ids[known]
    return WordVectors(tokenizer.convert_ids_to_tokens(ids.tolist()), found.vectors[known], found.counts[ids])


def word_tokenizer(texts: Iterable[str], min_count: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words that occur `min_count` times."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(
        vocab_size=MAX_WORDS, min_frequency=min_count, special_tokens=[UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(bounded_pieces(texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)


def dictionary_from_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Word pairs of a parallel text: those of which each is what the other is aligned with most often.

    Args:
        pairs: texts and their translations.
    """
    sides = list(zip(*pairs, strict=True))
    tokenizers = [word_tokenizer(side, LEAST) for side in sides]
    known = [[i for i in tokenizer.get_vocab().values() if i != tokenizer.unk_token_id] for tokenizer in tokenizers]
    encoded = [encode(*arguments) for arguments in zip(tokenizers, sides, known, strict=True)]
    links = align(*encoded)
    best = _first_of_each(links.sources, links.counts) & _first_of_each(links.targets, links.counts)
    chosen = best & (links.counts >= LEAST)
    words = [
        tokenizer.convert_ids_to_tokens(ids[chosen].tolist())
        for tokenizer, ids in zip(tokenizers, (links.sources, links.targets), strict=True)
    ]
    return list(zip(*words, strict=True))


def _first_of_each(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n] bool: where the largest value of each group is, the first of equal ones."""
    order = np.lexsort((np.arange(len(groups)), -values, groups))
    found = np.zeros(len(groups), bool)
    found[order[np.unique(groups[order], return_index=True)[1]]] = True
    return found


def procrustes(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The orthogonal [dim, dim] matrix that takes `source` [n, dim] nearest to `target` [n, dim]: source @ it."""
    # [dim, n] @ [n, dim] -> [dim, dim]
    left, _, right = torch.linalg.svd(source.double().T @ target.double())
    return left @ right


def subword_vectors(
    tokenizer: PreTrainedTokenizerBase, tokens: dict[int, Token], words: WordVectors
) -> tuple[torch.Tensor, torch.Tensor]:
    """A vector for each token that is part of a word: the mean of such words' vectors, by how often they occur.

    Words are tokenised with and without a space before them.

    Args:
        tokenizer: of a vocabulary.
        tokens: id -> Token, from `token_bytes`.
        words: vectors of words.

    Returns:
        ([vocabulary rows, dim] float64, zeros for a token that is part of none; [vocabulary rows] int64, how often the
        words of each token occur).
    """
    kept = text_tokens(tokens)
    parts = []
    for space in ("", " "):
        encoded = encode(tokenizer, [space + word for word in words.words], kept)
        owners = np.repeat(np.arange(len(encoded)), [len(ids) for ids in encoded])
        parts.append(np.stack([np.concatenate(encoded), owners]))
    # A word counts once for each token and form, however often the token is in it.
    ids, owners = np.concatenate([np.unique(part, axis=1) for part in parts], axis=1)
    ids, owners = torch.from_numpy(ids), torch.from_numpy(owners)
    rows = vocabulary_rows(tokens)
    sums = torch.zeros(rows, words.vectors.shape[1], dtype=torch.float64)
    sums.index_add_(0, ids, words.vectors.double()[owners] * words.counts[owners, None])
    totals = torch.zeros(rows, dtype=torch.int64).index_add_(0, ids, words.counts[owners])
    return sums / totals.clamp_min(1)[:, None], totals


def wechsel_mixtures(
    vocabulary: VocabularyPair,
    source: WordVectors,
    target: WordVectors,
    dictionary: Sequence[tuple[str, str]],
    *,
    neighbors: int = 10,
    temperature: float = 0.1,
    block_bytes: int = 1 << 28,
) -> Mixtures:
    """Mixtures for the new tokens with a letter that are part of a word with a vector.

    Args:
        vocabulary: the two vocabularies.
        source: words of a language that the teacher knows.
        target: words of the language of the new tokens, of the same dimension.
        dictionary: (source word, target word); pairs of which a word has no vector are not used.
        neighbors: tokens of the teacher in each mixture.
        temperature: of the softmax.
        block_bytes: bound of the temporary memory for the cosines of a block; at least one row is taken at a time.

    Raises:
        ValueError: vectors of different dimensions, or no pair of the dictionary with vectors.
    """
    if source.vectors.shape[1] != target.vectors.shape[1]:
        raise ValueError(
            f"source, target: wanted vectors of one dimension, got {source.vectors.shape[1]} and "
            f"{target.vectors.shape[1]}"
        )
    places = [{word: i for i, word in enumerate(side.words)} for side in (source, target)]
    used = [(places[0][s], places[1][t]) for s, t in dictionary if s in places[0] and t in places[1]]
    if not used:
        raise ValueError(
            f"dictionary: wanted a pair of words with vectors on both sides, got none in {len(dictionary)} pairs"
        )
    left, right = torch.tensor(used).T
    turn = procrustes(source.vectors[left], target.vectors[right])
    anchors, _ = subword_vectors(vocabulary.teacher, vocabulary.teacher_tokens, source)
    anchors = anchors[: vocabulary.teacher_rows] @ turn
    targets, counts = subword_vectors(vocabulary.student, vocabulary.tokens, target)
    teacher_ids, student_ids = (vectors.any(1).nonzero()[:, 0] for vectors in (anchors, targets))
    anchors, targets = (
        torch.nn.functional.normalize(vectors[ids]).float()
        for vectors, ids in ((anchors, teacher_ids), (targets, student_ids))
    )
    found = [
        # [b, dim] @ [dim, s] -> [b, s]
        (block @ anchors.T).topk(min(neighbors, len(anchors)), dim=1)
        for block in targets.split(max(1, block_bytes // (4 * len(anchors))))
    ]
    cosines, nearest = (torch.cat(part) for part in zip(*found, strict=True))
    weights = (cosines.double() / temperature).softmax(1)
    return mixtures(
        vocabulary,
        student_ids[:, None].expand_as(nearest).flatten(),
        teacher_ids[nearest].flatten(),
        weights.flatten(),
        counts,
    )
