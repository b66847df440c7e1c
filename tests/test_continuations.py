"""How tokens go on inside segments, against dictionaries and whole distributions of ordinary models."""

from collections import Counter

import pytest
import torch
from test_objectives import CONFIGS, Sides, each_document, log_probabilities
from tiny import byte_level

from matt_fast.alignment.vocabulary import spell_tokens
from matt_fast.training.objectives import INSIDE


@pytest.fixture(params=list(CONFIGS))
def sides(tmp_path, request):
    """The student lacks tokens of the teacher, has some that begin like others, and cuts off ends of words.

    It cuts "):" otherwise before the end of a line than alone, and has " fu" twice.
    """
    texts = ["ion_alpha return_gamma tion_beta " * 99, "lue = val fun elf. ion " * 40]
    tokenizer = byte_level(texts, 330, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.add_tokens([":\n", " fu"])
    return Sides(tmp_path / "teacher", request.param, tokenizer)


def reference(sides, whole) -> tuple[torch.Tensor, Counter]:
    """The sum over all places, and how many there are of which kind and at which depth."""
    vocabulary = sides.vocabulary
    merged = {i: [match.teacher_id] for i, match in vocabulary.matches.items()} | vocabulary.subtokens
    shared = {match.teacher_id for match in vocabulary.matches.values()}
    lost = {i: token for i, token in vocabulary.teacher_tokens.items() if i not in shared}
    split = spell_tokens(lost, vocabulary.student, vocabulary.rows)
    total, kinds = torch.zeros((), dtype=torch.float64), Counter()
    for (teacher_ids, teacher_segments), (student_ids, student_segments) in each_document(sides):
        of_teacher = log_probabilities(sides.model, teacher_ids).detach().double()
        of_student = log_probabilities(whole, student_ids).double()
        for segment in range(int(teacher_segments.max())):
            t, s = (int((x == segment).nonzero().max()) for x in (teacher_segments, student_segments))
            coming = teacher_ids[t + 1 :][teacher_segments[t + 1 :] >= 0].tolist()
            written = student_ids[s + 1 :][student_segments[s + 1 :] >= 0].tolist()
            pieces = merged[written[0]]
            for size in range(1, len(pieces) + 1):
                begun = {i: x[size:] for i, x in merged.items() if x[:size] == pieces[:size]}
                if coming[:size] != pieces[:size] or not any(begun.values()):
                    break
                p = {rest[0]: of_teacher[t + size, rest[0]].exp() for rest in begun.values() if rest}
                if not all(begun.values()):  # a token ends here
                    p[None] = (1 - sum(p.values())).clamp_min(0)
                q = {x: sum(of_student[s, i].exp() for i, rest in begun.items() if (rest or [None])[0] == x) for x in p}
                for x in p:
                    share = p[x] / sum(p.values())
                    total = total + torch.xlogy(share, share) - share * (q[x] / sum(q.values())).log()
                kinds["merged", size] += 1
                kinds["equal bytes"] += sum(not rest for rest in begun.values()) > 1
            pieces = split.get(coming[0], ())
            for size in range(1, len(pieces)):
                if written[:size] != pieces[:size]:
                    break
                begun = {i: x[size] for i, x in split.items() if x[:size] == pieces[:size] and len(x) > size}
                p = {x: sum(of_teacher[t, i].exp() for i in begun if begun[i] == x) for x in begun.values()}
                for x in p:
                    share = p[x] / sum(p.values())
                    total = total + share * (share.log() - of_student[s + size, x])
                kinds["split", size] += 1
                kinds["cut otherwise"] += written[size] not in p
    return total, kinds


def test_segment_kl_adds_how_tokens_go_on(sides):
    rows = sides.student.rows(sides.batch.distinct_ids)
    at_ends, ours = (sides.losses(name, rows)[name] for name in ("boundary-kl", "segment-kl"))
    ours = (ours - at_ends) / INSIDE * len(sides.batch.places.student_ends)
    ours.backward()
    whole = sides.whole_student()
    expected, kinds = reference(sides, whole)
    wanted = ("merged", 1), ("merged", 2), ("split", 1), ("split", 2), "equal bytes", "cut otherwise"
    assert all(kinds[kind] for kind in wanted), kinds
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=2e-4)
    sides.check_gradients(rows, whole, atol=1e-5)
