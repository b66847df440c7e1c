"""Texts that a model writes of itself, so that what it learns from does not lack what it was.

Self-synthesized rehearsal (J. Huang et al., 2024, https://arxiv.org/abs/2403.01244). A chat model makes up the
questions too: given its template as far as where the user speaks, it writes what a user says (Magpie, Z. Xu et al.,
2024, https://arxiv.org/abs/2406.08464), and then its answer. Any other model writes on from where a text begins.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import VocabularyPair, start_of_text
from matt_fast.model.positions import position_limit
from matt_fast.model.sampling import continuations
from matt_fast.support.texts import BROKEN

QUESTION, ANSWER = 48, 160  # tokens, at most
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": 0.95}  # what is sharper would be learned too
ROUNDS = 4  # of questions: one that says nothing is drawn again
TAIL = 4  # tokens of a prompt that its continuation is decoded behind: alone it may lose the space before it
USER, ASSISTANT = "USER\u2063SPEAKS", "ASSISTANT\u2063SPEAKS"  # stand for what is said; in no template


class Template(NamedTuple):
    """A conversation of one question and answer, around them.

    Attributes:
        before: the question.
        between: question and answer: the generation prompt, where the template has one.
        behind: the answer.
    """

    before: str
    between: str
    behind: str


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The tokenizer's chat template; None where it has none, and texts begin with `start_of_text`.

    Raises:
        ValueError: it does not take a question and an answer, or does not show them once each; or there is neither a
            template nor a token that begins or ends a text.
    """
    if not tokenizer.chat_template:
        if not start_of_text(tokenizer):
            raise ValueError(
                "rehearse: wanted a tokenizer with a chat template, or with a token that begins or ends a text, got "
                f"neither in {tokenizer.name_or_path!r}"
            )
        return None
    reasons = []
    for shape in (lambda text: text, lambda text: [{"type": "text", "text": text}]):  # of models that see, too
        try:
            return _around(tokenizer, shape)
        except Exception as error:  # whatever a template raises
            reasons.append(error)
    raise ValueError(
        f"rehearse: wanted a chat template that takes a question and an answer: {reasons[0]}"
    ) from reasons[0]


def _around(tokenizer: PreTrainedTokenizerBase, shape: Callable[[str], object]) -> Template:
    """What a template puts around contents of a shape."""
    said = [{"role": "user", "content": shape(USER)}, {"role": "assistant", "content": shape(ASSISTANT)}]
    show = partial(tokenizer.apply_chat_template, tokenize=False)
    whole, asked, prompt = show(said), show(said[:1]), show(said[:1], add_generation_prompt=True)
    if not (whole.count(USER) == whole.count(ASSISTANT) == prompt.count(USER) == 1):
        raise ValueError("it has to show them once each")
    if not (whole.split(USER)[0].strip(" ") or start_of_text(tokenizer)):
        raise ValueError("nothing comes before the question, and no token begins or ends a text")
    opened, behind = whole.split(ASSISTANT)
    before, between = (opened if prompt == asked else prompt).split(USER)
    return Template(before, between.rstrip(" "), behind)  # the space before an answer is the model's to write


def lacking_tokens(tokenizer: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> list[str]:
    """The added tokens of `template_of` a tokenizer, such as "<|im_end|>", that a new one does not have."""
    template = template_of(tokenizer)
    if template is None:
        return []
    text, known = "".join(template), new.get_vocab()
    return [x.content for x in tokenizer.added_tokens_decoder.values() if x.content in text and x.content not in known]


def read_as_text(lacking: list[str]) -> str:
    """What a person should know of `lacking_tokens`."""
    shown = ", ".join(map(repr, lacking))
    return f"rehearse: the new tokenizer lacks {shown} of the chat template, and reads them as text"


def own_texts(
    model: PreTrainedModel,
    vocabulary: VocabularyPair,
    count: int,
    seed: int,
    *,
    once: Callable[[str, Callable[[], list]], list] = lambda key, make: make(),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Let a model write texts of its own: conversations where its tokenizer has a chat template.

    Drawn at a temperature of 1, since a student that learns from the texts learns how sure the model is too; without
    the unlikeliest 5%, in which a small model loses itself.

    Args:
        model: a causal language model.
        vocabulary: its vocabulary is the teacher's.
        count: texts.
        seed: of all that is drawn; a text depends on it and on the text's number.
        once: of `continuations`, so that a call that is stopped need not draw all anew.
        on_progress: called with the texts done, questions alone counting as a part of theirs, and `count`.

    Returns:
        `count` texts, or fewer where some said nothing in four rounds: a question of up to 48 tokens and an answer of
        up to 160 in the template, special tokens as their text; 208 tokens without a template. What a model thinks
        before it answers is part of the answer.

    Raises:
        ValueError: the model is of a class that cannot generate or has fewer positions than a text may have tokens, or
            what `template_of` raises.
    """
    tokenizer = vocabulary.teacher
    template = template_of(tokenizer)
    around = start_of_text(tokenizer) if template is None else _ids(tokenizer, "".join(template))
    longest = len(around) + QUESTION + ANSWER
    if (limit := position_limit(model)) is not None and longest > limit:
        raise ValueError(
            f"rehearse: wanted a model with positions for texts of {longest} tokens, got {limit} positions"
        )
    writer = _Writer(model, vocabulary, seed, once, lambda share: on_progress(int(count * share), count))
    if template is None:
        prompts = dict.fromkeys(range(count), start_of_text(tokenizer))
        return [text for text, _ in writer(prompts, QUESTION + ANSWER, 0).values() if text.strip()]
    before = _ids(tokenizer, template.before.rstrip(" ")) or start_of_text(tokenizer)
    questions: dict[int, str] = {}
    for number in range(ROUNDS):
        missing = {i: before for i in range(count) if i not in questions}
        found = writer(missing, QUESTION, number, template.between)
        questions |= {i: text.strip() for i, (text, _) in found.items() if text.strip()}
    asked = {i: template.before + questions[i] + template.between for i in sorted(questions)}
    writer.ends = _ends_of_answers(model, vocabulary, template)
    answers = writer({i: _ids(tokenizer, text) for i, text in asked.items()}, ANSWER, ROUNDS, template.behind)
    return [
        asked[i] + (answer.rstrip() + template.behind if ended else answer)
        for i, (answer, ended) in answers.items()
        if answer.strip()
    ]


class _Writer:
    """Writes on behind prompts; what is drawn depends on the seed, the prompt's number and the round.

    Attributes:
        ends: ids that end what is written; all special ones until others are set.
        behind: tokens of a text that were drawn before, at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: VocabularyPair,
        seed: int,
        once: Callable,
        on_share: Callable[[Fraction], None],
    ):
        self.model, self.tokenizer, self.seed = model, vocabulary.teacher, seed
        self.once, self.on_share, self.behind = once, on_share, 0
        self.special = _special(vocabulary)
        self.ends = sorted(self.special)
        self.usable = torch.zeros(vocabulary.teacher_rows, dtype=torch.bool)
        self.usable[[i for i in vocabulary.teacher_tokens if i < vocabulary.teacher_rows]] = True

    def __call__(
        self, prompts: dict[int, list[int]], longest: int, number: int, behind: str = ""
    ) -> dict[int, tuple[str, bool]]:
        """Number -> what was written, and whether it came to its end: one of `ends`, or the first line of `behind`."""
        if not prompts:
            return {}
        draws = np.stack([np.random.default_rng([self.seed, i, number]).random(longest) for i in prompts])
        now = longest if number in (0, ROUNDS) else 0  # the rounds between have few prompts

        def told(done: int, total: int) -> None:
            self.on_share((self.behind + Fraction(now * done, total)) / (QUESTION + ANSWER))

        given = {"ends": self.ends, "once": self.once, "on_progress": told, **SAMPLING}
        found = continuations(self.model, list(prompts.values()), draws, self.usable, **given)
        self.behind += now
        stop = behind.strip().partition("\n")[0]  # "[/INST]": not all templates' marks are special tokens
        written = {}
        for (i, prompt), ids in zip(prompts.items(), found, strict=True):
            text, broken, _ = self._decoded(prompt, ids).partition(BROKEN)
            text, stopped, _ = text.partition(stop) if stop else (text, "", "")
            written[i] = text, bool(stopped) or (len(ids) < longest and not broken)
        return written

    def _decoded(self, prompt: list[int], ids: list[int]) -> str:
        """What `ids` add to the text of a prompt; a tokenizer begins anew behind a special token."""
        tail = [] if prompt[-1] in self.special else prompt[-TAIL:]
        before, both = (self.tokenizer.decode(x, clean_up_tokenization_spaces=False) for x in (tail, tail + ids))
        return both.removeprefix(before)


def _special(vocabulary: VocabularyPair) -> dict[int, str]:
    """Id -> text."""
    special = {i: x.bytes.decode(errors="replace") for i, x in vocabulary.teacher_tokens.items() if x.kind == "special"}
    return dict(zip(vocabulary.teacher.all_special_ids, vocabulary.teacher.all_special_tokens, strict=True)) | special


def _ends_of_answers(model: PreTrainedModel, vocabulary: VocabularyPair, template: Template) -> list[int]:
    """All special ids but those that the template names and that end nothing: parts of answers, such as thoughts."""
    tokenizer, special = vocabulary.teacher, _special(vocabulary)
    source = tokenizer.get_chat_template()
    stated = model.generation_config.eos_token_id
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    ends |= set(stated) if isinstance(stated, list) else {stated}
    ends |= {i for i, text in special.items() if template.behind.strip().startswith(text)}
    return sorted({i for i, text in special.items() if text not in source} | ends - {None})


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
