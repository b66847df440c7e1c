"""Texts that a model writes of itself, so that what it learns from does not lack what it was.

Self-synthesized rehearsal (J. Huang et al., 2024, https://arxiv.org/abs/2403.01244). A chat model makes up the
questions too: given its template as far as where the user speaks, it writes what a user says (Magpie, Z. Xu et al.,
2024, https://arxiv.org/abs/2406.08464), and then its answer. Any other model writes on from where a text begins.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import VocabularyPair, start_of_text
from matt_fast.model.sampling import continuations

QUESTION, ANSWER = 48, 160  # tokens, at most
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": 0.95}  # what is sharper would be learned too
ROUNDS = 4  # of questions: one that says nothing is drawn again
BROKEN = "\N{REPLACEMENT CHARACTER}"
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
    said = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    try:
        whole = tokenizer.apply_chat_template(said, tokenize=False)
        asked = tokenizer.apply_chat_template(said[:1], tokenize=False)
        prompt = tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"rehearse: wanted a chat template that takes a question and an answer: {error}") from error
    if not (whole.count(USER) == whole.count(ASSISTANT) == prompt.count(USER) == 1):
        raise ValueError("rehearse: wanted a chat template that shows a question and an answer once each")
    opened, behind = whole.split(ASSISTANT)
    return Template(*(opened if prompt == asked else prompt).split(USER), behind)


def own_texts(
    model: PreTrainedModel,
    vocabulary: VocabularyPair,
    count: int,
    seed: int,
    *,
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
        on_progress: called with the prompts done and their number in this round.

    Returns:
        `count` texts, or fewer where some said nothing in four rounds: a question of up to 48 tokens and an answer of
        up to 160 in the template, special tokens as their text; 208 tokens without a template.

    Raises:
        ValueError: the model is of a class that cannot generate, or what `template_of` raises.
    """
    tokenizer = vocabulary.teacher
    template = template_of(tokenizer)
    writer = _Writer(model, vocabulary, seed, on_progress)
    if template is None:
        prompts = dict.fromkeys(range(count), start_of_text(tokenizer))
        return [text for text, _ in writer(prompts, QUESTION + ANSWER, 0).values() if text.strip()]
    before = _ids(tokenizer, template.before)
    questions: dict[int, str] = {}
    for number in range(ROUNDS):
        missing = {i: before for i in range(count) if i not in questions}
        found = writer(missing, QUESTION, number)
        questions |= {i: text.strip() for i, (text, _) in found.items() if text.strip()}
    asked = {i: template.before + questions[i] + template.between for i in sorted(questions)}
    answers = writer({i: _ids(tokenizer, text) for i, text in asked.items()}, ANSWER, ROUNDS)
    return [
        asked[i] + (answer.rstrip() + template.behind if ended else answer)
        for i, (answer, ended) in answers.items()
        if answer.strip()
    ]


class _Writer:
    """Writes on behind prompts; what is drawn depends on the seed, the prompt's number and the round."""

    def __init__(self, model: PreTrainedModel, vocabulary: VocabularyPair, seed: int, on_progress: Callable):
        self.model, self.tokenizer, self.seed, self.on_progress = model, vocabulary.teacher, seed, on_progress
        special = (i for i, token in vocabulary.teacher_tokens.items() if token.kind == "special")
        self.ends = sorted({*special, *self.tokenizer.all_special_ids})
        self.usable = torch.zeros(vocabulary.teacher_rows, dtype=torch.bool)
        self.usable[[i for i in vocabulary.teacher_tokens if i < vocabulary.teacher_rows]] = True

    def __call__(self, prompts: dict[int, list[int]], longest: int, number: int) -> dict[int, tuple[str, bool]]:
        """Number -> what was written, and whether it came to its end."""
        if not prompts:
            return {}
        draws = np.stack([np.random.default_rng([self.seed, i, number]).random(longest) for i in prompts])
        given = {"ends": self.ends, "on_progress": self.on_progress, **SAMPLING}
        found = continuations(self.model, list(prompts.values()), draws, self.usable, **given)
        written = {}
        for i, ids in zip(prompts, found, strict=True):
            text, broken, _ = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).partition(BROKEN)
            written[i] = text, len(ids) < longest and not broken
        return written


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
