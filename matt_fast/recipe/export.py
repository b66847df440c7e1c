"""The result as a folder that transformers loads: model, tokenizer, configuration, provenance and model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import InitReport, Rows

OWN_ROW = "its own row"  # the start, in the provenance, of a row that trains on
NAMED = 5  # tokens that an error names
MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")  # other settings count in some of them only


def replace_vocabulary(model: PreTrainedModel, rows: Rows) -> None:
    """Give `model` new embeddings, in place; `vocab_size` of its configuration follows."""
    model.resize_token_embeddings(len(rows.input), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows.input)
        if rows.output is not None:
            model.get_output_embeddings().weight.copy_(rows.output)
        if rows.output_bias is not None:
            model.get_output_embeddings().bias.copy_(rows.output_bias)


def keep_digits(rows: Rows, start: Rows, model: PreTrainedModel, vocabulary: VocabularyPair) -> None:
    """Give those of `rows` that are a model's own, and as they started, the digits that it is stored with, in place.

    Args:
        rows: whole tables.
        start: those that they began as, made of the model in a dtype that may have fewer digits.
        model: the original, in the dtype that it is stored in.
        vocabulary: the two vocabularies.
    """
    old = {i: match.teacher_id for i, match in vocabulary.matches.items()}
    old |= {i: vocabulary.mapped[i][0] for i in vocabulary.own}
    ids = torch.tensor(sorted(old), dtype=torch.int64)
    theirs = torch.tensor([old[i] for i in ids.tolist()], dtype=torch.int64)
    head = model.get_output_embeddings()
    sources = {"input": model.get_input_embeddings().weight}
    sources |= {} if head is None else {"output": head.weight, "output_bias": getattr(head, "bias", None)}
    for name, source in sources.items():
        table, before = getattr(rows, name), getattr(start, name)
        if table is not None and len(ids):
            same = (table[ids] == before[ids].to(table)).reshape(len(ids), -1).all(1)
            table[ids[same]] = source.detach()[theirs[same]].to(table)


def check_rows(rows: Rows, dtype: torch.dtype, vocabulary: VocabularyPair) -> None:
    """Raise a ValueError that names the tokens whose rows are not finite in the dtype that the model is stored in."""
    for name in ("input", "output", "output_bias"):
        table = getattr(rows, name)
        if table is None or (finite := table.to(dtype).isfinite().reshape(len(table), -1).all(1)).all():
            continue
        ids = (~finite).nonzero().flatten().tolist()
        some = ", ".join(repr(vocabulary.student.convert_ids_to_tokens(i)) for i in ids[:NAMED])
        raise ValueError(
            f"rows: wanted {name} rows that are finite in {str(dtype).removeprefix('torch.')}, which the model is "
            f"stored in, but those of {len(ids)} tokens are not: {some}{' and others' if len(ids) > NAMED else ''}"
        )


def repair_generation_config(model: PreTrainedModel) -> list[str]:
    """`repair_generation` of a model's own, to be called before it is saved; nothing to do where it has none."""
    config = getattr(model, "generation_config", None)
    return [] if config is None else repair_generation(config)


def repair_generation(config: GenerationConfig) -> list[str]:
    """Leave out, in place, what keeps transformers from saving a generation configuration; a line says what.

    Many models come with settings that have no effect in their mode, such as a temperature without `do_sample`.
    transformers loads them and warns, but saves none that was changed. `generate` does the same without them.

    Raises:
        ValueError: transformers refuses it without naming a setting that could be left out.
    """
    dropped = {}
    while complaint := _complaint(config):
        named = {name: value for name, value in config.to_dict().items() if f"`{name}`" in complaint}
        named = {name: value for name, value in named.items() if value is not None and name not in MODES}
        if not named:
            raise ValueError(f"generation_config.json: wanted one that transformers can save: {complaint}")
        for name in named:
            setattr(config, name, None)
        dropped |= named
    if not dropped:
        return []
    settings = ", ".join(f"{name}={value!r}" for name, value in dropped.items())
    how = "" if config.do_sample else "; to sample with them, give `generate` do_sample=True beside them"
    return [f"generation_config.json: left out {settings}, without effect as it is and refused by transformers{how}"]


def _complaint(config: GenerationConfig) -> str:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""


def keep_chat_template(tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Give `tokenizer` the teacher's chat template if it has none and knows every special token the template names."""
    if not tokenizer.chat_template and teacher.chat_template and lost_chat_template(tokenizer, teacher) is None:
        tokenizer.chat_template = teacher.chat_template


def lost_chat_template(tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """A line that says why the result does not have the teacher's chat template; None if it does, or there is none."""
    template = teacher.chat_template
    if not template or tokenizer.chat_template == template:
        return None
    if tokenizer.chat_template:
        return "the model's chat template is lost, since the new tokenizer has another"
    text = template if isinstance(template, str) else "\n".join(template.values())
    special = [x.content for x in teacher.added_tokens_decoder.values() if x.special]
    known = tokenizer.get_vocab()
    lacking = [x for x in dict.fromkeys((*teacher.all_special_tokens, *special)) if x in text and x not in known]
    if not lacking:
        return None
    return f"the model's chat template is lost, since the new tokenizer lacks {', '.join(map(repr, lacking))}"


def row_lengths(vocabulary: VocabularyPair, start: torch.Tensor, rows: torch.Tensor) -> dict[int, tuple[float, float]]:
    """new token's id -> (norm of its input row's change, norm of the row), in float32, by 4 digits.

    Args:
        vocabulary: the two vocabularies.
        start, rows: [student rows, hidden], where rows began and what they are now.
    """
    if not vocabulary.new:
        return {}
    ids = torch.tensor(sorted(vocabulary.new))
    before, now = (x[ids].float().cpu() for x in (start, rows))
    lengths = torch.stack([(now - before).norm(dim=1), now.norm(dim=1)], dim=1).tolist()
    return {i: tuple(float(f"{x:.4g}") for x in pair) for i, pair in zip(ids.tolist(), lengths, strict=True)}


def unmoved(
    vocabulary: VocabularyPair, start: Rows, rows: Rows, seen: torch.Tensor, dtype: torch.dtype
) -> tuple[int, int]:
    """How many of the new tokens that training saw have rows that moved by less than a dtype tells; how many it saw.

    Args:
        vocabulary: the two vocabularies.
        start, rows: whole tables, where they began and as they are now.
        seen: [student rows] int64, how often training saw each id.
        dtype: that the model is stored in, to which a number is rounded by half of its eps at most.
    """
    ids = torch.tensor(sorted(i for i in vocabulary.new if seen[i]), dtype=torch.int64)
    same = torch.ones(len(ids), dtype=torch.bool)
    for before, now in ((start.input, rows.input), (start.output, rows.output)):
        if before is not None and now is not None:
            before, now = before[ids].cpu().float(), now[ids].cpu().float()
            same &= ((now - before).abs() <= torch.finfo(dtype).eps / 2 * before.abs()).all(1)
    return int(same.sum()), len(ids)


def write_provenance(
    path: Path,
    vocabulary: VocabularyPair,
    init: str,
    report: InitReport,
    trained: Sequence[bool],
    seen: Sequence[int],
    lengths: Mapping[int, tuple[float, float]],
) -> None:
    """Write one JSON line per row: id, token, how it started, from which teacher ids, trained or frozen, times seen.

    A new token's start is `init` where the method made its row, else what it was left to; `lengths` of `row_lengths`
    tell how far its input row moved, and how long it is.
    """
    entries = {i: text for text, i in vocabulary.student.get_vocab().items()}
    with path.open("w", encoding="utf-8") as file:
        for i in range(vocabulary.rows):
            match = vocabulary.matches.get(i)
            left_to = "its sub-tokens" if i in vocabulary.subtokens else "mean of all rows"
            left_to = OWN_ROW if i in vocabulary.own else left_to
            start = init if i in report.made else left_to if i in vocabulary.tokens else "no token"
            record = {
                "id": i,
                "token": entries.get(i),
                "start": start if match is None else f"copied ({match.how})",
                "teacher_ids": vocabulary.subtokens.get(i, []) if match is None else [match.teacher_id],
                "trained": trained[i],
                "seen": seen[i],
            }
            if i in lengths:
                record |= dict(zip(("moved", "norm"), lengths[i], strict=True))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
