"""Tokens that no text gives."""

from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import Token, token_bytes

# What a token's text is put behind, one after another, until it comes out as a token of its own.
BEFORE = ("", "\n", "a", ".", " ", "0", "zq", "Ж", "語")


def unreachable(tokenizer: PreTrainedTokenizerBase, tokens: dict[int, Token] | None = None) -> list[int]:
    """Ids of tokens that their own text does not give, neither alone nor behind a line end, letters, a sign, a space.

    Special tokens are left out, and byte tokens. Parts of characters are judged by the model alone: whether its merges
    or pieces give the token. One that only another context gives would be listed wrongly. With ten tokenizers (BPE,
    Unigram, WordPiece) none that was listed occurred in 2.9 MB of text.

    Args:
        tokenizer: a fast tokenizer.
        tokens: its `token_bytes`, if they are there already.
    """
    tokens = token_bytes(tokenizer) if tokens is None else tokens
    entries = {i: entry for entry, i in tokenizer.get_vocab().items()}
    missing, texts = [], {}
    for i, token in tokens.items():
        if token.kind == "text" and token.bytes:
            try:
                texts[i] = token.bytes.decode()
            except UnicodeDecodeError:
                if [x.id for x in tokenizer.backend_tokenizer.model.tokenize(entries[i])] != [i]:
                    missing.append(i)
    for before in BEFORE:
        if not texts:
            break
        encoded = tokenizer([before + text for text in texts.values()], add_special_tokens=False, verbose=False)
        found = [i for i, ids in zip(texts, encoded["input_ids"], strict=True) if i in ids]
        for i in found:
            del texts[i]
    return sorted([*missing, *texts])
