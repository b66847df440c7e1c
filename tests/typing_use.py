"""What users write, for mypy to read as strictly as it can (`make typecheck`); nothing here runs.

`assert_type` says what a checker has to know of the results.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import assert_type

import matt_kernels
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import matt_fast
from matt_fast import (
    AIMLoss,
    HealingOptions,
    MATTConfig,
    TrainingOptions,
    TransferResult,
    aim_loss,
    align_segments,
    align_segments_batch,
    apply,
    capture_attention,
    compare_initializers,
    doctor,
    evaluate,
    initialize,
    layer_config,
    match_tokens,
    plan,
    sweep_layers,
    tokenizers,
    transfer,
)
from matt_fast.evaluation import Evaluation
from matt_fast.recipe.doctor import Finding

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def whole_job(folder: Path, texts: dict[str, Path]) -> TransferResult:
    tokenizers.extend("base", folder / "tokenizer", data="corpus.jsonl", add=5000)
    findings = doctor("base", folder / "tokenizer", "corpus.jsonl")
    assert_type(findings, list[Finding])
    result = transfer(
        "base",
        folder / "tokenizer",
        "corpus.jsonl",
        folder / "adapted",
        eval_data=texts,
        training=TrainingOptions(steps=2000, objective="aim+token-distillation"),
        healing=HealingOptions("lora", steps=2000),
        on_step=lambda progress: print(progress.step, progress.loss),
    )
    assert_type(result, TransferResult)
    assert_type(result.evaluations["trained"], Evaluation)
    assert_type(result.evaluations["trained"].bits_per_byte, float)
    apply("sibling", result.output, folder / "sibling")
    return result


def before_a_job(model: str) -> tuple[float, int | None]:
    planned = plan(model, "tokenizer", healing=HealingOptions("full"), vram=24 * 2**30)
    original, compared = compare_initializers(model, "tokenizer", "held-out.txt", ["mean", "omp-self"])
    assert_type(original, float)
    print([one.bits_per_byte for one in compared])
    sweep_layers(model, "tokenizer", "corpus.jsonl", "held-out.txt", "sweep", depths=[2, 4])
    return original, planned.longest


def own_loop(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    segments: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    matches = match_tokens(old, new)
    print(len(matches))
    with torch.no_grad():
        known = capture_attention(teacher, 4, input_ids=ids)
    learnt = capture_attention(student, 4, input_ids=ids)
    loss = aim_loss(known.states, learnt.states, *segments, teacher_documents=known.documents, metric="cosine")
    assert_type(loss, torch.Tensor)
    starred = AIMLoss(variant="aim_star").forward(known.states, learnt.states, *segments)
    return loss + starred


def parts(query: torch.Tensor, offsets: list[tuple[int, int]], model: PreTrainedModel) -> torch.Tensor:
    qkv: Tensors = (query, query, query)
    first, second = align_segments(offsets, offsets)
    print(first.shape, second.shape, layer_config(model.config, 3))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    align_segments_batch([offsets], [offsets])
    config = MATTConfig(batch_size=4)
    print(config.batch_size, matt_fast.__version__)
    return matt_kernels.aim_loss(qkv, qkv, ids, ids)


def held_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    rows = initialize(torch.zeros(4, 2), 5, match_tokens(tokenizer, tokenizer), {4: [1, 2]}, method="length-mean")
    assert_type(rows, torch.Tensor)
    return evaluate(model, tokenizer, texts, max_pieces=40).bits_per_byte
