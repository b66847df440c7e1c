"""How tokens go on inside segments: the student's probabilities beside the teacher's."""

import torch

from matt_fast.data.batches import Batch, Continued
from matt_fast.model.distributions import chosen_logits, log_normalizers, log_sums, token_log_probs
from matt_fast.model.embeddings import OutputRows
from matt_fast.model.head import Head


def continuation_kl(
    batch: Batch, head: Head, hidden: torch.Tensor, rows: OutputRows, target: Head, target_hidden: torch.Tensor
) -> torch.Tensor:
    """Sum of KL divergences, in nats, of the student from the teacher in how the tokens of either side go on.

    Where the teacher has read the first pieces of a student token, it says what comes next; so it says how probable
    each of the student's tokens is among those that begin with these pieces, whether it is in the text or not. Where
    the student has read the first pieces of a token of the teacher, the teacher's probabilities of all its tokens that
    begin so say what comes next, given that such a token does.

    With the divergence of what begins (`class_divergence`) this is the divergence of what the two sides say of the text
    from the end of one segment on, by the chain rule; the classes along the text stand for all.

    Args:
        batch: with continuations.
        head, hidden, rows: the student's, as in `Head.loss`; the head's input is [B, n, hidden].
        target, target_hidden: the teacher's.
    """
    merged, split = batch.continuations
    hidden, target_hidden = hidden.flatten(0, 1), target_hidden.flatten(0, 1)
    sides = head, hidden, rows, target, target_hidden
    return _merged(merged, *sides) + _split(split, *sides)


def _merged(
    places: Continued, head: Head, hidden: torch.Tensor, rows: OutputRows, target: Head, target_hidden: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        states = target_hidden[places.piece_at]
        logs = chosen_logits(target, states, places.pieces, places.piece, places.piece_entry)
        logs = logs - log_normalizers(target, states)[places.piece_entry]
        rest = 1 - logs.new_zeros(len(states)).index_add_(0, places.piece_entry, logs.exp())
        # What goes on otherwise, or not at all, is the token that ends there.
        rest = rest[places.stops].clamp_min(torch.finfo(rest.dtype).tiny)
        logs = torch.cat([logs, rest.log()])
        entry = torch.cat([places.piece_entry, places.stops])
        logs = logs - log_sums(logs, entry, len(states))[entry]
    logits = chosen_logits(head, hidden[places.token_at], places.tokens, places.token, places.token_entry, rows)
    found = log_sums(logits, places.token_group, len(logs)) - log_sums(logits, places.token_entry, len(states))[entry]
    return (logs.exp() * (logs - found)).sum()


def _split(
    places: Continued, head: Head, hidden: torch.Tensor, rows: OutputRows, target: Head, target_hidden: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        states = target_hidden[places.token_at]
        logits = chosen_logits(target, states, places.tokens, places.token, places.token_entry)
        logs = log_sums(logits, places.token_group, len(places.piece))
        logs -= log_sums(logits, places.token_entry, len(states))[places.piece_entry]
    states = hidden[places.piece_at]
    logits = chosen_logits(head, states, places.pieces, places.piece, places.piece_entry, rows)
    # A logit less its log-probability is what all logits of a place are normalised by. The piece that the text has need
    # not be among these: the student may cut text otherwise than the token alone.
    first = torch.searchsorted(places.piece_entry, torch.arange(len(states), device=places.piece_entry.device))
    normalizers = logits[first] - token_log_probs(head, states, places.pieces[places.piece[first]], rows)
    return (logs.exp() * (logs - logits + normalizers[places.piece_entry])).sum()
