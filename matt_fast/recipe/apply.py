"""The rows of one transfer put into a sibling: a model that was fine-tuned from the same original."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import ROLES, Match, VocabularyPair, match_tokens
from matt_fast.data.documents import read_documents
from matt_fast.evaluation.bits_per_byte import Evaluation, evaluate
from matt_fast.initializers import InitReport, Rows
from matt_fast.model.checkpoint_files import check_savable, check_weights
from matt_fast.model.head import one_table
from matt_fast.model.tables import check_tables
from matt_fast.model.teacher import Teacher
from matt_fast.recipe.arguments import check_arguments
from matt_fast.recipe.base_card import FORMAT, Base, base_metadata, read_base
from matt_fast.recipe.card import code, lost_lines
from matt_fast.recipe.export import OWN_ROW
from matt_fast.recipe.saving import save_result
from matt_fast.runs.folder import Run
from matt_fast.runs.record import PROVENANCE, read_provenance
from matt_fast.support.checks import check_new_folder, checked
from matt_fast.support.files import whole_folder, write_text
from matt_fast.support.own_state import own_state
from matt_fast.support.version import own_version

ALIKE = 0.9  # of the cosine of a shared row in both models, at the median: below, they are not of one family
BY_ROLE = "copied (role)"
SETTINGS = ("padding_side", "truncation_side", "model_max_length")
STAY = "The layers that the transfer trained together with the rows stayed behind; what that costs, measuring tells."


@dataclass
class ApplyResult:
    """What `apply` did.

    Attributes:
        output: the folder written.
        shared, new: tokens that keep the sibling's rows, and that got the transferred ones.
        similarity: median cosine of the shared tokens' rows in both models.
        healed: whether the transferred rows were trained together with layers, which stay behind.
        carried: special tokens that the sibling alone had, which are among the shared ones.
        evaluations: "original" (the sibling as it was) and "applied" on the held-out text; empty without one.
        lost: a line for each thing of the sibling that the result could not take over.
    """

    output: Path
    shared: int
    new: int
    similarity: float
    healed: bool = False
    carried: list[str] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


@checked
@own_state()
@torch.no_grad()
def apply(
    transferred: str | Path,
    sibling: str | Path,
    output: str | Path,
    *,
    eval_data: str | Path | None = None,
    eval_pieces: int = 40,
    split: str = "train",
    text_field: str = "text",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_piece: Callable[[int], None] = lambda done: None,
) -> ApplyResult:
    """Give a sibling of a model that was transferred the same tokenizer, without training (the idea is ZeTT's).

    The sibling keeps its own rows for the tokens that both vocabularies share; new tokens get the transferred rows.
    Special tokens that the sibling alone has come behind all others. Its chat template, the roles of its special
    tokens, its padding side and its length stay. So do its layers: of a transfer that trained them together with the
    rows (healing), measure the result.

    Args:
        transferred: the output folder of a transfer.
        sibling: folder or hub name of a model with the vocabulary that the transferred model had, and the same width.
        output: folder to write; it must be new or empty.
        eval_data, eval_pieces, split, text_field, trust_remote_code, allow_pickle: as in `transfer`.
        on_stage, on_piece: called as each stage begins, and with the pieces that are scored.

    Raises:
        FileExistsError: `output` is not empty.
        ValueError: the models are no siblings; the message says by what.
    """
    check_arguments({"eval_data": eval_data, "eval_pieces": eval_pieces, "text_field": text_field})
    check_new_folder("output", output)
    output = Path(output)
    hub = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    on_stage("models")
    donor = Teacher(transferred, argument="transferred", **hub)
    source = Teacher(sibling, argument="sibling", **hub)
    if eval_data is not None:
        source.check_language_model("eval_data")
    for each in (donor, source):
        check_weights(each)
    check_savable(source)
    check_tables(source)
    model, given = source.load("auto"), donor.load("auto")
    rows_before = len(model.get_input_embeddings().weight)
    teacher, student = source.load_tokenizer(), source.load_tokenizer(transferred)
    before = _Before.read(Path(transferred))
    carried = _take_over(student, teacher, rows_before, before)
    vocabulary = VocabularyPair(teacher, student, rows_before)
    vocabulary.matches |= {
        i: Match(old, "role")
        for i, old in before.roles.items()
        if old < rows_before and (i not in vocabulary.matches or vocabulary.matches[i].how == "role")
    }
    _check_vocabulary(before, vocabulary, str(sibling))
    rows, similarity = _joined(model, given, vocabulary)
    healed = _healed(Path(transferred))
    found = ApplyResult(output, len(vocabulary.matches), len(vocabulary.new), similarity, healed, carried)
    texts = None if eval_data is None else read_documents(eval_data, split=split, text_field=text_field)

    def measure(name: str, scored, tokenizer) -> None:
        if texts is not None:
            on_stage(f"evaluation ({name})")
            options = {"max_pieces": eval_pieces, "masked": source.masked, "on_piece": on_piece}
            found.evaluations[name] = evaluate(scored, tokenizer, texts, **options)

    measure("original", model, vocabulary.teacher)
    on_stage("writing")
    with whole_folder(output) as part:
        base = read_base(sibling, found.lost.append)
        found.lost += save_result(part, source, model, rows, vocabulary)
        tag = base.pipeline_tag or source.kind.pipeline_tag
        write_text(part / "README.md", _card(transferred, sibling, found, base, tag))
    measure("applied", source.load_result(output, model.dtype), vocabulary.student)
    write_text(output / "README.md", _card(transferred, sibling, found, base, tag))
    return found


@dataclass(frozen=True)
class _Before:
    """What a transfer's provenance tells of the model that it began with.

    Attributes:
        copied: new id -> old id, the shared tokens.
        roles: those of them that were matched by their role, such as beginning or end.
        trained_on: the transfer kept the tokenizer, so that the old ids are the new ones.
    """

    copied: dict[int, int]
    roles: dict[int, int]
    trained_on: bool

    @classmethod
    def read(cls, folder: Path) -> "_Before":
        if not (path := folder / PROVENANCE).is_file():
            raise ValueError(f"transferred: wanted the output of a transfer, but {str(path)!r} is not there")
        lines = read_provenance(folder, "transferred", copied=True)
        trained_on = any(x["start"] == OWN_ROW for x in read_provenance(folder, "transferred"))
        copied = {x["id"]: x["teacher_ids"][0] for x in lines}
        roles = {x["id"] for x in lines if x["start"] == BY_ROLE and not trained_on}
        return cls(copied, {i: copied[i] for i in roles}, trained_on)


def _take_over(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_rows: int, before: _Before
) -> list[str]:
    """Give a transferred tokenizer, in place, what the sibling's has; returns the special tokens that it lacked."""
    matches = match_tokens(student, teacher).values()
    shared = {x.teacher_id for x in matches if x.how == "bytes" or before.trained_on} | {*before.roles.values()}
    added = [x for i, x in sorted(teacher.added_tokens_decoder.items()) if i not in shared and i < teacher_rows]
    lacking = [x for x in added if x.special]  # others are text, which the transferred tokenizer spells in its own way
    student.add_tokens(lacking, special_tokens=True)
    known = student.get_vocab()
    for role in ROLES:
        if getattr(teacher, role, None) in known:
            setattr(student, role, getattr(teacher, role))
    for name in SETTINGS:
        student.init_kwargs[name] = getattr(teacher, name)
        setattr(student, name, getattr(teacher, name))
    if teacher.chat_template:
        student.chat_template = None  # that of the model which was transferred; the sibling's comes as it is saved
    return [x.content for x in lacking]


def _check_vocabulary(before: _Before, vocabulary: VocabularyPair, sibling: str) -> None:
    """Compare the sibling's vocabulary with that of the model which was transferred."""
    copied, ours = before.copied, {student: match.teacher_id for student, match in vocabulary.matches.items()}
    if before.trained_on:
        copied, ours = ({i: i for i in x} for x in (copied, ours))
    if different := sorted(x for x in copied if copied[x] != ours.get(x)):
        token = vocabulary.student.convert_ids_to_tokens(different[0])
        raise ValueError(
            f"sibling: wanted a model with the vocabulary that the transferred one had, but in {sibling!r} "
            f"{len(different):,} tokens are others, {token!r} for example"
        )


def _healed(folder: Path) -> bool:
    """Whether a transfer trained layers, as far as its folder tells."""
    return Run(folder, "transferred").read("run.json").get("settings", {}).get("heal") is not None


def _joined(model, given, vocabulary: VocabularyPair) -> tuple[Rows, float]:
    """The sibling's rows and the transferred ones in one table, and how alike the shared ones are."""
    ids = torch.tensor(sorted(vocabulary.matches))
    teacher_ids = torch.tensor([vocabulary.matches[i].teacher_id for i in ids.tolist()])
    given_rows = len(given.get_input_embeddings().weight)
    both = ids < given_rows  # tokens that the sibling alone has come behind
    length = max(given_rows, vocabulary.rows)
    tied = one_table(model)
    if tied and model.get_output_embeddings() is not None and not one_table(given):
        raise ValueError(
            "transferred: wanted one table for embedding and head, as the sibling has, got a model whose head has rows "
            "of its own (a transfer with untie)"
        )
    if not tied and given.get_output_embeddings() is None:
        raise ValueError("transferred: wanted a model with an output head, as the sibling has, got one without")
    tables, similarity = [], 1.0
    for name in ("input", "output")[: 2 - tied]:
        old, new = (getattr(x, f"get_{name}_embeddings")().weight for x in (model, given))
        if old.shape[1] != new.shape[1]:
            raise ValueError(
                f"sibling: wanted a width of {new.shape[1]}, as the transferred model has, got {old.shape[1]}"
            )
        found = cosine_similarity(old[teacher_ids[both]].float(), new[ids[both]].float(), dim=-1).median().item()
        similarity = min(similarity, found)
        table = torch.cat([new.float(), torch.zeros(length - given_rows, new.shape[1])])
        table[ids] = old[teacher_ids].float()
        tables.append(table)
    if similarity < ALIKE:
        raise ValueError(
            f"sibling: wanted a model of the transferred one's family, but the rows of the tokens that they share are "
            f"not alike (median cosine {similarity:.3f}, wanted {ALIKE} or more)"
        )
    bias, own = (getattr(x.get_output_embeddings(), "bias", None) for x in (given, model))
    if own is not None:
        bias = torch.cat([own.new_zeros(given_rows) if bias is None else bias, own.new_zeros(length - given_rows)])
        bias[ids] = own[teacher_ids].to(bias.dtype)
    none = InitReport(shared=len(ids), initialized=0, subtoken_mean=0, unspelled=0)
    output = tables[1] if len(tables) > 1 else None
    return Rows(tables[0], output, None if own is None else bias, none), similarity


def _card(transferred: str | Path, sibling: str | Path, found: ApplyResult, base: Base, tag: str | None) -> str:
    name, rows = (code(Path(x).resolve().name if Path(x).exists() else str(x)) for x in (sibling, transferred))
    lines = [
        "---",
        base_metadata(base, tag).to_yaml(line_break="\n"),
        "---",
        "",
        f"# {name} with a new tokenizer",
        "",
        f"Made with matt-fast {own_version()}: {found.new:,} tokens got the rows that a transfer made for {rows}"
        f"; {found.shared:,} keep those of {name} (median cosine between both models {found.similarity:.4f}). All "
        f"other weights are those of {name}. {FORMAT}" + (f" {STAY}" if found.healed else ""),
    ]
    if found.carried:
        lines += ["", f"Special tokens that {name} alone has: {', '.join(map(code, found.carried))}."]
    if found.evaluations:
        lines += ["", "| | bits per byte | bytes per token |", "|---|---|---|"]
        lines += [f"| {k} | {v.bits_per_byte:.4f} | {v.bytes_per_token:.3f} |" for k, v in found.evaluations.items()]
    return "\n".join(lines + lost_lines(found.lost)) + "\n"
