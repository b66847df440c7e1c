"""WECHSEL beside the authors' package: the same word vectors and dictionary give the same weights.

    pip install wechsel==0.0.4 && python benchmarks/wechsel_package.py

The package works with numpy 2.4.6, transformers 5.23.0 and gensim 4.4.0. It is not what `--init wechsel` runs: its
fastText training takes no seed and a sentence model that is downloaded, it draws the rows of tokens without a vector at
random, and it looks at one token at a time in Python.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import wechsel
from gensim.models import Word2Vec

from matt_fast.initializers.wechsel import WordVectors, wechsel_mixtures

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from translations import WORDS, sentences, two_vocabularies

DIM = 12


def word_vectors(words: list[str], seed: int) -> tuple[Word2Vec, WordVectors]:
    """Random vectors and counts, as the package wants them and as ours."""
    counts = torch.arange(len(words)) + 3
    vectors = torch.randn(len(words), DIM, generator=torch.Generator().manual_seed(seed))
    model = Word2Vec(vector_size=DIM, min_count=1)
    model.build_vocab([[word] * int(count) for word, count in zip(words, counts, strict=True)])
    for word, vector in zip(words, vectors, strict=True):
        model.wv.vectors[model.wv.key_to_index[word]] = vector.numpy()
    return model, WordVectors(words, vectors, counts)


def main() -> None:
    vocabulary = two_vocabularies(sentences(300))
    (their_source, source), (their_target, target) = word_vectors([*WORDS], 0), word_vectors([*WORDS.values()], 1)
    weight = np.random.default_rng(0).normal(size=(vocabulary.teacher_rows, 16)).astype(np.float32)
    # The package also tries each word of the dictionary in lower case and as a title.
    tried = [
        (s, t)
        for first, second in WORDS.items()
        for s in (first, first.lower(), first.title())
        for t in (second, second.lower(), second.title())
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as dictionary:
        dictionary.write("".join(f"{s}\t{t}\n" for s, t in WORDS.items()))
        dictionary.flush()
        theirs = wechsel.WECHSEL(their_source, their_target, bilingual_dictionary=dictionary.name)
    for neighbors in (1, 5, 10):
        begin = time.perf_counter()
        rows, info = theirs.apply(
            vocabulary.teacher, vocabulary.student, weight, use_subword_info=False, neighbors=neighbors
        )
        middle = time.perf_counter()
        found = wechsel_mixtures(vocabulary, source, target, tried, neighbors=neighbors)
        ours = found.rows(torch.from_numpy(weight)).numpy()
        end = time.perf_counter()
        expected = np.stack([info.sources[entry][1] for entry in vocabulary.student.convert_ids_to_tokens(found.ids)])
        np.testing.assert_allclose(found.coefficients.values.view(-1, neighbors), expected, rtol=1e-4)
        # Tokens of the same words are equally near. Where the last neighbour is one of such, either may be taken.
        equal = np.isclose(ours, rows[found.ids.numpy()], atol=1e-4).all(1)
        print(
            f"{neighbors:3} neighbours: weights of {len(ours)} tokens equal, rows of {equal.sum()}; package "
            f"{middle - begin:.3f} s, ours {end - middle:.3f} s"
        )


if __name__ == "__main__":
    main()
