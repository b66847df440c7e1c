"""What a changed tokenizer keeps of the one it was made of, looked at before its folder takes its name."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import ROLES, token_bytes
from matt_fast.model.tokenizer_files import PROBE
from matt_fast.support.printable import some
from matt_fast.tokenizers.source import Source

CONVERSATION = (
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Grüße, 日本!  What is 2 + 2?\n"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "def f(x):\n    return x"},
)


def check(
    made: PreTrainedTokenizerBase,
    base: Source,
    texts: Iterable[str] = (),
    *,
    new: Mapping[str, int] | None = None,
    removed: Collection[str] | None = None,
) -> None:
    """Raise a ValueError unless a tokenizer keeps what it should of the one that it was made of.

    Special tokens and their roles stay, as do added tokens and the text of the chat template; every id decodes; texts
    come back as they do from the base. With `new`, ids stay, every new token is reached, and texts have the tokens of
    the base but where new ones stand for several of these. With `removed`, each token that stays is reached as it was,
    and lines in which no removed token occurs have the tokens of the base.

    Args:
        made: the changed tokenizer, loaded from its folder.
        base: what it was made of.
        texts: in which to look, beside lines that tokenizers differ in.
        new: the new tokens as their file writes them -> id, where some were appended.
        removed: those that are gone, where some were removed.
    """
    source = Source(made, json.loads(made.backend_tokenizer.to_str()), "output")
    _check_special_tokens(source, base, same_ids=new is not None)
    _check_template(made, base.tokenizer)
    texts = [*PROBE, *texts]
    tokens = token_bytes(made)
    silent = [i for i, token in tokens.items() if token.kind != "special" and not token.bytes]
    _require(not silent, "every token to stand for some text", f"ids that do not: {some(silent)}")
    ours, theirs = (_encode(x, texts) for x in (made, base.tokenizer))
    for text, one, other in zip(texts, ours, theirs, strict=True):
        back, before = (x.decode(ids) for x, ids in ((made, one), (base.tokenizer, other)))
        _require(back in (before, text), f"{text[:60]!r} to come back", repr(back[:60]))
    if new is not None:
        _check_new(source, base, new, texts, ours, theirs)
    if removed is not None:
        _check_rest(source, base, frozenset(removed), texts)


def _check_new(made: Source, base: Source, new: Mapping[str, int], texts, ours, theirs) -> None:
    model, old = made.by_merges, base.by_merges
    wrong = [entry for entry, i in new.items() if [token.id for token in model.tokenize(entry)] != [i]]
    _require(not wrong, "every new token to be reached", f"{len(wrong):,} that are not: {some(wrong)}")
    pieces = {i: [token.id for token in old.tokenize(entry)] for entry, i in new.items()}
    for text, one, other in zip(texts, ours, theirs, strict=True):
        spelled = [piece for i in one for piece in pieces.get(i, (i,))]
        if spelled != other:
            at = next((k for k, (x, y) in enumerate(zip(spelled, other, strict=False)) if x != y), len(other))
            got = base.tokenizer.convert_ids_to_tokens(spelled[max(at - 2, 0) : at + 3])
            wanted = base.tokenizer.convert_ids_to_tokens(other[max(at - 2, 0) : at + 3])
            _require(False, f"the base's tokens {wanted} inside the new ones in {text[:60]!r}", str(got))


def _check_rest(made: Source, base: Source, removed: Collection[str], texts) -> None:
    old, model, ids = base.by_merges, made.by_merges, made.entries
    kept = [entry for entry in base.entries if entry not in removed]
    _require(sorted(ids) == sorted(kept), f"{len(kept):,} tokens of the base", f"{len(ids):,}")
    wrong = [
        entry
        for entry in kept
        if [x.value for x in old.tokenize(entry)] == [entry] != [x.value for x in model.tokenize(entry)]
    ]
    _require(not wrong, "every token to be reached as before", f"{len(wrong):,} that are not: {some(wrong)}")
    lines = [line for text in texts for line in text.splitlines() if line]
    before, after = (x.encode_batch(lines, add_special_tokens=False) for x in (base.plain, made.plain))
    for line, one, other in zip(lines, before, after, strict=True):
        same = one.tokens == other.tokens or not removed.isdisjoint(one.tokens)
        _require(same, f"the base's tokens {one.tokens[:20]} of {line[:60]!r}", str(other.tokens[:20]))


def _check_special_tokens(made: Source, base: Source, same_ids: bool) -> None:
    before, after = base.tokenizer, made.tokenizer
    for role in ROLES:
        _require(
            getattr(before, role, None) == getattr(after, role, None),
            f"the {role} {getattr(before, role, None)!r}",
            repr(getattr(after, role, None)),
        )
    found = {token["content"]: token for token in made.backend["added_tokens"]}
    for token in base.backend["added_tokens"]:
        other = found.get(token["content"])
        same = other is not None and all(other[k] == token[k] for k in token if same_ids or k != "id")
        _require(same, f"the added token {token}", str(other))
    ids = made.entries
    moved = [entry for entry, i in base.tokenizer.get_vocab().items() if same_ids and ids.get(entry) != i]
    _require(not moved, "the base's ids", f"others for {some(moved)}")
    missing = set(before.all_special_tokens) - set(after.all_special_tokens)
    _require(not missing, "the base's special tokens", f"none of {some(sorted(missing))}")


def _check_template(made: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> None:
    if getattr(base, "chat_template", None) is None:
        return
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]):
        try:
            wanted = base.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template refuses roles in its own way
            continue
        got = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        _require(got == wanted, f"the chat template's text {wanted!r}", repr(got))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _require(fits: bool, wanted: str, got: str) -> None:
    if not fits:
        raise ValueError(f"output: wanted {wanted}, got {got}")
