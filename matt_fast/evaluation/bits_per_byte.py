"""Bits per byte of held-out text: the one figure that compares models with different tokenizers."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import special_affixes, start_of_text
from matt_fast.model.positions import position_limit
from matt_fast.support.checks import MANY, check_range, check_type


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    bits_per_byte: negative log2-likelihood of the text, per UTF-8 byte of it.
    bytes_per_token: UTF-8 bytes of the text per token.
    n_bytes, n_tokens: of the text scored.
    piece_bytes: each piece of the text, at most.
    masked: whether the likelihood is a masked language model's pseudo-likelihood.
    without_text: documents that were passed over: null, empty or white space.
    pieces: [document, bits, bytes] of each piece that was scored; documents with text are counted from 0. From these
        come the intervals of `intervals.py`.
    """

    bits_per_byte: float
    bytes_per_token: float
    n_bytes: int
    n_tokens: int
    piece_bytes: int
    masked: bool
    without_text: int = 0
    pieces: list[list[float]] = field(default_factory=list, repr=False)


PIECE_BYTES = 2048
MASKED_PIECE_BYTES = 480  # an encoder with 512 positions holds as many bytes, whatever its tokens are
MASKED_AT_ONCE = 7  # every seventh token: about the 15% that masked language models are trained with


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str | None],
    *,
    piece_bytes: int | None = None,
    max_pieces: int | None = None,
    masked: bool = False,
    on_piece: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Score documents under a language model.

    Documents are cut into pieces of at most `piece_bytes` bytes, at line ends where there are any. The pieces are the
    same for every tokenizer, and each is scored with nothing but itself as context, so that figures of different
    tokenizers compare. Every token is scored once.

    * A causal model predicts each token from those before it: the first one given the tokenizer's own special tokens
      in front of a text, else its bos token, else its eos token.
    * A masked model predicts each token from those around it (pseudo-likelihood): in seven passes, each with every
      seventh token masked. These figures compare with each other only: pieces of a word tell each other.

    Args:
        model: gives logits [B, n, vocabulary]; without dropout meanwhile.
        tokenizer: the model's own.
        documents: texts, as `matt_fast.data.documents.read_documents` gives those of a file; those that are None or
            have no text are passed over, and counted.
        piece_bytes: UTF-8 bytes of a piece, at most; 2,048 if None, 480 for a masked model.
        max_pieces: stop after so many pieces.
        masked: whether `model` is a masked language model.
        on_piece: called with the number of pieces that are scored, after each.

    Raises:
        TypeError: model and tokenizer are not loaded; `documents` is one text or a place, or holds something else.
        ValueError: there is no text; the tokenizer has neither a bos nor an eos token, or no mask token; an id has no
            logit; a piece has more tokens than the model has positions, see `position_limit`.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model: wanted a language model, loaded, got {model!r:.80} ({type(model).__name__})")
    check_type("tokenizer", tokenizer, PreTrainedTokenizerBase)
    if isinstance(documents, str | bytes) or not isinstance(documents, Iterable):
        kind = type(documents).__name__
        raise TypeError(
            f"documents: wanted texts, ['One text.', 'Another.'] for example, got {documents!r:.80} ({kind})"
        )
    check_range("max_pieces", max_pieces, 1, MANY)
    if piece_bytes is None:
        piece_bytes = MASKED_PIECE_BYTES if masked else PIECE_BYTES
    with _without_dropout(model):
        return _score(model, tokenizer, documents, piece_bytes, max_pieces, masked, on_piece)


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """All modules as in evaluation, then as they were."""
    trained = [x for x in model.modules() if x.training] if isinstance(model, torch.nn.Module) else []
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True


def _score(model, tokenizer, documents, piece_bytes, max_pieces, masked, on_piece) -> Evaluation:
    score = _masked_nats if masked else _causal_nats
    limit = position_limit(model) if isinstance(model, PreTrainedModel) else None
    check_scorable(tokenizer, masked)
    around = specials_around(tokenizer, masked)
    nats, n_bytes, n_tokens = 0.0, 0, 0
    without_text: Counter[str] = Counter()
    numbered = _numbered_pieces(_with_text(documents, without_text), piece_bytes)
    scored: list[list[float]] = []
    for number, piece in itertools.islice(numbered, max_pieces):
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        check_positions(piece, len(ids) + around, limit)
        rows = len(cast(torch.Tensor, model.get_input_embeddings().weight))
        if max(ids) >= rows:
            raise ValueError(f"tokenizer: wanted ids below the {rows} rows of the embedding, got {max(ids)}")
        found, size = score(model, tokenizer, ids), len(piece.encode())
        scored.append([number, found / math.log(2), size])
        nats, n_bytes, n_tokens = nats + found, n_bytes + size, n_tokens + len(ids)
        on_piece(len(scored))
    if n_tokens == 0:
        raise ValueError("documents: wanted text to score, got none")
    figures = nats / math.log(2) / n_bytes, n_bytes / n_tokens, n_bytes, n_tokens
    return Evaluation(*figures, piece_bytes, masked, without_text.total(), scored)


def check_scorable(tokenizer: PreTrainedTokenizerBase, masked: bool) -> None:
    """Raise a ValueError if the tokenizer lacks the special token that scoring a text needs."""
    if masked and tokenizer.mask_token_id is None:
        raise ValueError("tokenizer: wanted a mask token to score text under a masked language model, got none")
    if not masked and not start_of_text(tokenizer):
        raise ValueError("tokenizer: wanted a bos or eos token to score the first token of a text, got neither")


def specials_around(tokenizer: PreTrainedTokenizerBase, masked: bool) -> int:
    """How many special tokens a piece is scored with."""
    return sum(map(len, special_affixes(tokenizer))) if masked else max(1, len(start_of_text(tokenizer)))


def check_positions(piece: str, tokens: int, limit: int | None, argument: str = "piece_bytes") -> None:
    """Raise a ValueError if a piece of text has more tokens than the model has positions."""
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{argument}: wanted pieces of text within the model's {limit} positions, got one of "
            f"{len(piece.encode())} bytes that has {tokens} tokens: {piece[:40]!r}"
        )


def _with_text(documents: Iterable[str | None], without: Counter) -> Iterator[str]:
    for document in documents:
        if document is not None and not isinstance(document, str):
            shown = f"{document!r:.80} ({type(document).__name__})"
            raise TypeError(f"documents: wanted each to be a str or None, got {shown}")
        if not document or document.isspace():
            without["documents"] += 1
        else:
            yield document


def _numbered_pieces(documents: Iterable[str], piece_bytes: int) -> Iterator[tuple[int, str]]:
    for number, document in enumerate(documents):
        for piece in cut_pieces([document], piece_bytes):
            yield number, piece


def token_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> torch.Tensor:
    """[n] float32: the negative log-likelihood of each token of a text under a causal model, see `evaluate`."""
    prefix = start_of_text(tokenizer)
    input_ids = torch.tensor([prefix + ids], device=model.device)
    logits = model(input_ids=input_ids).logits[0, len(prefix) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), input_ids[0, len(prefix) :], reduction="none")


def _causal_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> float:
    return token_nats(model, tokenizer, ids).sum().item()


def _masked_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> float:
    prefix, suffix = special_affixes(tokenizer)
    targets = torch.tensor(prefix + ids + suffix, device=model.device)
    position = torch.arange(len(targets), device=model.device) - len(prefix)
    in_text = (position >= 0) & (position < len(ids))
    passes = torch.arange(min(MASKED_AT_ONCE, len(ids)), device=model.device)
    hidden = in_text & (position % MASKED_AT_ONCE == passes[:, None])
    logits = model(input_ids=targets.where(~hidden, tokenizer.mask_token_id)).logits[hidden]
    expected = targets.expand_as(hidden)[hidden]
    return torch.nn.functional.cross_entropy(logits.float(), expected, reduction="sum").item()


def cut_pieces(documents: Iterable[str | None], piece_bytes: int) -> Iterator[str]:
    """Cut texts into pieces of at most `piece_bytes` UTF-8 bytes, at line ends where possible, else between characters.

    Joined again, the pieces of a document are the document. Pieces of white space only are left out, and documents that
    are None.

    Raises:
        ValueError: `piece_bytes` is below 4, the longest character, or above MANY.
    """
    check_range("piece_bytes", piece_bytes, 4, MANY)
    for document in documents:
        data = (document or "").encode()
        start = 0
        while start < len(data):
            end = min(start + piece_bytes, len(data))
            if end < len(data):
                line_end = data.rfind(b"\n", start, end) + 1
                while end > start and data[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
                end = line_end or end
            piece = data[start:end].decode()
            if not piece.isspace():
                yield piece
            start = end
