"""What the next token says on either side: classes of tokens that begin alike."""

from matt_fast.alignment.vocabulary import VocabularyPair, spell_tokens

LEFT_OUT = -1


def next_token_classes(vocabulary: VocabularyPair) -> tuple[list[int], list[int], int]:
    """Put the tokens of both sides into classes, so that both sides' next tokens can be compared where texts are level.

    Each shared token is a class. A token that only one side has belongs to the class of the other side's first token of
    it, and so on until that is a shared one: after "new", where the teacher goes on with "to" and "ken", a student that
    has " token" says the same when it gives it the probability of "to" (exact, where the student's vocabulary extends
    the teacher's and cuts texts where its own does). Tokens that this leads nowhere are left out.

    Returns:
        (classes of teacher rows, classes of student rows, number of classes): class numbers from 0, or LEFT_OUT.
    """
    shared = {student: match.teacher_id for student, match in vocabulary.matches.items()}
    teacher_shared = set(shared.values())
    only_teacher = {
        i: token
        for i, token in vocabulary.teacher_tokens.items()
        if i not in teacher_shared and i < vocabulary.teacher_rows
    }
    student_first = spell_tokens(only_teacher, vocabulary.student, vocabulary.rows)
    numbers = {teacher: number for number, teacher in enumerate(sorted(teacher_shared))}

    def class_of(student: int | None, teacher: int | None) -> int:
        for _ in range(len(vocabulary.tokens) + len(vocabulary.teacher_tokens)):
            if student is not None:
                teacher = shared.get(student)
                if teacher is None:
                    pieces = vocabulary.subtokens.get(student)
                    if not pieces:
                        return LEFT_OUT
                    teacher = pieces[0]
            if teacher in numbers:
                return numbers[teacher]
            pieces = student_first.get(teacher)
            if not pieces:
                return LEFT_OUT
            student = pieces[0]
        return LEFT_OUT

    teacher_classes = [class_of(None, i) for i in range(vocabulary.teacher_rows)]
    student_classes = [class_of(i, None) for i in range(vocabulary.rows)]
    return teacher_classes, student_classes, len(numbers)
