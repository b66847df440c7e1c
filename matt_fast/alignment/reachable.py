"""Tokens that a tokenizer can never make of a text."""

import json

from transformers import PreTrainedTokenizerBase


def unreachable(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that no text gives, since the tokenizer's model makes other tokens of the very piece that they stand for.

    A merge is missing that would make the token, or other merges come before it; in a Unigram model other pieces score
    better. Added tokens are found in texts as they are. WordPiece and word lists take the longest entry, so any of
    theirs can be reached. Bytes of a byte fallback stand for what has no token, and count as reached.

    Args:
        tokenizer: a fast tokenizer.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind not in ("BPE", "Unigram") or model.get("ignore_merges"):
        return []
    added = {entry["id"] for entry in backend["added_tokens"]}
    split = tokenizer.backend_tokenizer.model.tokenize
    unknown = {model.get("unk_id"), tokenizer.backend_tokenizer.token_to_id(model.get("unk_token") or "")}
    bytes_of = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    found = []
    for token, i in tokenizer.get_vocab().items():
        if i in added or i in unknown or token in bytes_of:
            continue
        if [piece.id for piece in split(token)] != [i]:
            found.append(i)
    return sorted(found)
