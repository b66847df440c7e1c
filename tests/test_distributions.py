"""Comparing next-token distributions chunk by chunk, against whole logits and autograd."""

import pytest
import torch
from test_head import some_rows, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matt_fast.alignment.next_token import LEFT_OUT, next_token_classes
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.model import head as head_module
from matt_fast.model.distributions import chosen_logits, class_divergence, log_normalizers, log_sums, token_log_probs
from matt_fast.model.head import Head

RULES = [{}, {"scale": 3.0, "softcap": 1.5}]


def logits_of(hidden, weight, scale=1.0, softcap=None):
    logits = hidden @ weight.T * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Side:
    """A head over 37 rows of width 5, every third of them frozen, in float64."""

    def __init__(self, tokens: int, rule: dict):
        generator = torch.Generator().manual_seed(tokens)
        of_table = table(37, 5)
        of_table.trainable = of_table.trainable.double()
        self.rows = some_rows(of_table, torch.tensor([1, 2, 3, 8, 20, 36]))
        self.weight, self.rule = of_table.weight().double(), rule
        self.head = Head(self.weight, **rule)
        self.hidden = torch.randn(tokens, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        self.theirs = [x.detach().clone().requires_grad_() for x in (self.hidden, self.weight)]

    def check(self, ours: torch.Tensor, expected: torch.Tensor) -> None:
        (ours * 1.7).sum().backward()
        (expected * 1.7).sum().backward()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(self.hidden.grad, self.theirs[0].grad)
        torch.testing.assert_close(self.rows.trainable.grad, self.theirs[1].grad[self.rows.ids])


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("at_once", [1, 37 * 5, 1 << 24])
@pytest.mark.parametrize("rule", RULES, ids=["plain", "softcap"])
def test_log_probabilities_of_tokens(tokens, at_once, rule, monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", at_once)
    side = Side(tokens, rule)
    targets = torch.randint(37, (tokens,))
    weights = torch.randn(tokens, dtype=torch.float64)
    ours = token_log_probs(side.head, side.hidden, targets, side.rows) * weights
    expected = logits_of(*side.theirs, **rule).log_softmax(-1)[torch.arange(tokens), targets] * weights
    side.check(ours, expected)


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("at_once", [1, 5 * 7, 1 << 24])
@pytest.mark.parametrize("rule", RULES, ids=["plain", "softcap"])
def test_logits_of_chosen_tokens(tokens, at_once, rule, monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", at_once)
    side = Side(tokens, rule)
    chosen = torch.tensor([0, 2, 5, 8, 20, 21, 36])  # trained ones, frozen ones, some that are not in the step
    place, token = torch.rand(tokens, len(chosen)).gt(0.4).nonzero().T
    group = torch.arange(len(place)) // 3
    weights = torch.randn(int(group.max()) + 1 if len(group) else 0, dtype=torch.float64)

    ours = chosen_logits(side.head, side.hidden, chosen, token, place, side.rows)
    whole = logits_of(*side.theirs, **rule)
    expected = torch.stack([*(x.logsumexp(0) for x in whole[place, chosen[token]].split(3)), torch.zeros(())])[:-1]
    side.check(log_sums(ours, group, len(weights)) * weights, expected * weights)
    frozen = chosen_logits(side.head, side.hidden, chosen, token, place)
    assert torch.equal(frozen, ours)
    torch.testing.assert_close(log_normalizers(side.head, side.hidden), whole.logsumexp(-1))


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("at_once", [1, 41 * 5, 1 << 24])
@pytest.mark.parametrize("rule", RULES, ids=["plain", "softcap"])
def test_divergence_by_classes(tokens, at_once, rule, monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", at_once)
    side = Side(tokens, rule)
    target_weight, target_hidden = (torch.randn(n, 3, dtype=torch.float64) for n in (41, tokens))
    classes, target_classes = torch.arange(37) % 9, torch.arange(41) % 9
    classes[[4, 30]] = target_classes[0] = LEFT_OUT
    target = Head(target_weight, scale=0.7)
    ours = class_divergence(side.head, side.hidden, classes, side.rows, target, target_hidden, target_classes, 9)

    def by_class(logits, classes):
        kept = logits[:, classes >= 0].softmax(-1)
        return torch.stack([kept[:, classes[classes >= 0] == x].sum(-1) for x in range(9)], -1)

    wanted = by_class(target_hidden @ target_weight.T * 0.7, target_classes)
    found = by_class(logits_of(*side.theirs, **rule), classes)
    side.check(ours, (wanted * (wanted / found).log()).sum() / max(1, tokens))


def tokenizer_of(merges: list[tuple[str, str]], special: str) -> PreTrainedTokenizerFast:
    """Single bytes, the tokens that these merges make, and one special token."""
    words = [special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=[special])


def test_tokens_are_in_the_class_of_the_shared_token_that_they_begin_with():
    """Words that extend the other side's, that only one side has, and that nothing leads on from."""
    teacher = tokenizer_of([("a", "b"), ("ab", "c"), ("d", "e")], "<one>")
    student = tokenizer_of([("a", "b"), ("ab", "d"), ("abd", "e")], "<two>")
    of_teacher, of_student, count = next_token_classes(VocabularyPair(teacher, student, len(teacher) + 2))
    teacher_class = lambda token: of_teacher[teacher.convert_tokens_to_ids(token)]  # noqa: E731
    student_class = lambda token: of_student[student.convert_tokens_to_ids(token)]  # noqa: E731
    shared = [*pre_tokenizers.ByteLevel.alphabet(), "ab"]
    assert {teacher_class(x) for x in shared} == set(range(count))
    assert all(teacher_class(x) == student_class(x) for x in shared)
    assert student_class("abd") == student_class("abde") == teacher_class("abc") == teacher_class("ab")
    assert teacher_class("de") == student_class("d")
    assert teacher_class("<one>") == student_class("<two>") == LEFT_OUT
    assert of_teacher[-2:] == [LEFT_OUT] * 2  # rows without a token
