"""The two tokenizers: by themselves, beside each other, and on the data."""

import unicodedata
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.offsets import tokenize
from matt_fast.alignment.reachable import unreachable
from matt_fast.alignment.vocabulary import ROLES, Token, special_affixes
from matt_fast.recipe.doctor.finding import Said, look, ok, share
from matt_fast.recipe.doctor.sample import sample_of
from matt_fast.recipe.export import lost_chat_template
from matt_fast.recipe.subject import Subject

ROUND_TRIP, OFFSETS = 1 << 17, 1 << 16  # characters looked at
SHOWN = 24  # characters of an example
FEW = 0.001  # a share that is not worth a word
CHAT = ({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."})


def loaded(subject: Subject) -> Iterator[Said]:
    """Both can be loaded, are fast, and keep spaces."""
    vocabulary = subject.vocabulary
    for name, tokenizer in (("the model's", vocabulary.teacher), ("the new one", vocabulary.student)):
        yield ok(f"{name}: {type(tokenizer.backend_tokenizer.model).__name__}, {len(tokenizer):,} tokens")
    taken = next_added(vocabulary.student)
    if taken is not None:
        yield look(
            f"some ids of the new one have no token, and the next that add_tokens would give, {taken[0]:,}, is that of "
            f"{taken[1]!r}",
            "before more tokens are added to the result, think of tokenizer extend --words, which gives free ids",
        )


def next_added(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    """The id that `tokenizers` would give to the next added token, and the token that has it; None if none has."""
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    last = max(tokenizer.added_tokens_decoder, default=-1)
    following = last + 1 if last >= size else size
    entry = next((entry for entry, i in tokenizer.get_vocab().items() if i == following), None)
    return None if entry is None else (following, entry)


def shared(subject: Subject) -> Iterator[Said]:
    vocabulary = subject.vocabulary
    unspelled = len(vocabulary.new) - len(vocabulary.subtokens)
    line = (
        f"{len(vocabulary.matches):,} of {len(vocabulary.tokens):,} tokens are shared, {len(vocabulary.new):,} are new"
        + (f", of which {unspelled:,} cannot be spelled by the model's tokens" if unspelled else "")
    )
    if len(vocabulary.matches) * 20 < len(vocabulary.tokens):
        yield look(line, "look whether both spell bytes and spaces alike: fewer than 5% is unusual")
    else:
        yield ok(line)


def never_made(subject: Subject) -> Iterator[Said]:
    """Tokens that no text gives, and new ones that this data does not give."""
    vocabulary, sample = subject.vocabulary, sample_of(subject)
    dead = unreachable(vocabulary.student, vocabulary.tokens)
    if dead:
        some = ", ".join(map(repr, vocabulary.student.convert_ids_to_tokens(dead[:3])))
        advice = "its merges do not make them (appended without merges?); they only cost memory"
        yield look(f"{share(len(dead), len(vocabulary.tokens))} new tokenizer's tokens are in no text: {some}", advice)
    else:
        yield ok("every token of the new tokenizer can occur in a text")
    if subject.job.data is None:
        return
    new = [i for i in vocabulary.new if vocabulary.tokens[i].kind != "special"]
    seen = set(sample.segments.ids.tolist())
    unseen = sum(i not in seen for i in new)
    line = f"{share(unseen, len(new))} new tokens are nowhere in {sample.name}"
    if new and unseen * 2 > len(new) and sample.whole:
        yield look(line, "they stay as they are initialised: take more text, or fewer tokens (see --init)")
    else:
        yield ok(line)


def special(subject: Subject) -> Iterator[Said]:
    """Tokens with a role, and what is put around a text."""
    vocabulary = subject.vocabulary
    teacher, student = vocabulary.teacher, vocabulary.student
    ids = (f"{x}_id" for x in ROLES)
    lost = [x.removesuffix("_token_id") for x in ids if getattr(teacher, x) is not None and getattr(student, x) is None]
    if lost:
        advice = "name them in its tokenizer_config.json" + ("; without eos generation does not end" * ("eos" in lost))
        yield look(f"the new tokenizer has no {', '.join(lost)} token, and the model's has", advice)
    around = [_named(x, special_affixes(x)) for x in (teacher, student)]
    if [bool(x) for x in around[0]] != [bool(x) for x in around[1]]:
        advice = "set its post_processor, unless that is meant: generation sees it from the first token on"
        yield look(
            f"around a text the model's tokenizer puts {_pair(around[0])}, the new one {_pair(around[1])}", advice
        )
    elif not lost:
        yield ok(f"the roles of the model's tokenizer are filled; around a text it puts {_pair(around[1])}")


def chat(subject: Subject) -> Iterator[Said]:
    """The result's chat template, which is tried."""
    vocabulary = subject.vocabulary
    teacher, student = vocabulary.teacher, vocabulary.student
    own, lost = student.chat_template, lost_chat_template(student, teacher)
    if not own and not teacher.chat_template:
        yield ok("neither tokenizer has a template")
        return
    if lost is not None and not own:
        yield look(lost, "add such tokens as special ones, or give it a template")
        return
    if lost is not None:
        yield look(lost, "if the model does not know that one, give the new tokenizer the model's")
    try:
        template = (student if own else teacher).get_chat_template()  # of several the default one
        text = student.apply_chat_template(list(CHAT), chat_template=template, tokenize=False)
    except Exception as error:  # of the template's language, or raised by the template
        line = " ".join(str(error).split())
        yield look(f"the {'new' if own else 'model'} template does not take a question and an answer: {line}")
        return
    count = len(student(text, add_special_tokens=False)["input_ids"])
    yield ok(f"{'the new one is used' if own else 'kept from the model'}; a question and an answer are {count} tokens")


def round_trip(subject: Subject) -> Iterator[Said]:
    """Whether texts of the data come back from each tokenizer, and how often a tokenizer has no token for something."""
    sample = sample_of(subject)
    for name, tokenizer in _both(subject):
        documents = changed = tokens = unknown = 0
        example = ""
        for texts in sample.batches(ROUND_TRIP):
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            for text, ids in zip(texts, encoded, strict=True):
                tokens += len(ids)
                unknown += ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
                back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                documents += 1
                if back not in (text, " " + text):
                    changed += 1
                    example = example or _difference(text, back)
        if unknown > FEW * tokens:
            yield look(
                f"{name} has no token for {share(unknown, tokens)} pieces of text", "is it made for this language?"
            )
        elif changed:
            yield look(f"{name} changes {share(changed, documents)} documents: {example}")
        else:
            yield ok(f"{name}: all {documents:,} documents come back as they were")


def offsets(subject: Subject) -> Iterator[Said]:
    """Whether each token's bytes are the text that its offsets point at: segments are made of offsets."""
    sample = sample_of(subject)
    tokens_of = subject.vocabulary.teacher_tokens, subject.vocabulary.tokens
    for (name, tokenizer), known in zip(_both(subject), tokens_of, strict=True):
        tokens, wrong, example = 0, 0, ""
        for texts in sample.batches(OFFSETS):
            for text, ids, spans in zip(texts, *tokenize(tokenizer, texts), strict=True):
                tokens += len(ids)
                for i, (start, end) in zip(ids.tolist(), spans.tolist(), strict=True):
                    if not _fits(known.get(i), text[start:end]):
                        wrong += 1
                        token = tokenizer.convert_ids_to_tokens(i)
                        example = example or f"{token!r} at {start} to {end}, which is {text[start:end][:SHOWN]!r}"
        if wrong > FEW * tokens:
            advice = "segments will be wrong there; its post_processor or normaliser moves them"
            yield look(f"{name}: {share(wrong, tokens)} tokens have offsets of other text: {example}", advice)
        else:
            yield ok(f"{name}: {share(tokens - wrong, tokens)} tokens have the offsets of their text")


def _both(subject: Subject) -> list[tuple[str, PreTrainedTokenizerBase]]:
    vocabulary = subject.vocabulary
    return [("the model's tokenizer", vocabulary.teacher), ("the new one", vocabulary.student)]


def _named(tokenizer: PreTrainedTokenizerBase, affixes: tuple[list[int], list[int]]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in affixes]


def _pair(affixes: list[list[str]]) -> str:
    before, after = (" ".join(x) for x in affixes)
    return (
        " and ".join(part for part in (before and f"{before!r} before", after and f"{after!r} behind") if part)
        or "nothing"
    )


def _difference(text: str, back: str) -> str:
    """Where two texts begin to differ."""
    back = back.removeprefix(" ") if not text.startswith(" ") else back
    at = next(
        (i for i, (one, other) in enumerate(zip(text, back, strict=False)) if one != other), min(map(len, (text, back)))
    )
    start = max(0, at - SHOWN // 4)
    return f"{text[start : start + SHOWN]!r} becomes {back[start : start + SHOWN]!r}"


def _fits(token: Token | None, text: str) -> bool:
    """Whether a token is of a piece of text, however it is normalised. A part of a character fits anything."""
    if token is None or token.kind != "text":
        return True
    try:
        one, other = _plain(token.bytes.decode()), _plain(text)
    except UnicodeDecodeError:
        return True
    return one in other or other in one


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).casefold()
    return "".join(x for x in folded if not x.isspace() and not unicodedata.combining(x))
