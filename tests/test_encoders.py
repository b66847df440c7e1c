"""Masked language models: no causal constraint in attention, loss or evaluation, and the whole job on tiny ones."""

import math
import re
import sys
from collections import Counter

import pytest
import torch
from commands import run
from peft import PeftModel
from tiny import TEXTS, byte_level, jsonl
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    pipeline,
)

from matt_fast import HealingOptions, TrainingOptions, aim_loss, capture_attention, doctor, evaluate, transfer
from matt_fast.alignment.vocabulary import VocabularyPair, match_tokens
from matt_fast.data.batches import collate
from matt_fast.data.chunks import Side, make_chunks
from matt_fast.initializers import initial_rows
from matt_fast.model.packed import first_position, positions_padding
from matt_fast.model.teacher import Teacher
from matt_fast.tokenizers import train
from matt_fast.training.loop import freeze
from matt_fast.training.objectives import losses
from matt_fast.training.student import make_student

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "modernbert": ModernBertConfig(**SIZES, global_attn_every_n_layers=2, local_attention=8),
    "xlm_roberta": XLMRobertaConfig(**SIZES, max_position_embeddings=514),
}
ROLES = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
LAYERS = 2  # ModernBERT's second layer here has a window


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(TEXTS, vocab_size, **ROLES)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


@pytest.fixture(params=list(CONFIGS))
def folder(tmp_path, request):
    tokenizer, config = tokenizer_of(275), CONFIGS[request.param]
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
    config.update({"vocab_size": 277, **ids, "eos_token_id": tokenizer.sep_token_id})
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    tokenizer_of(330).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus.jsonl").write_text(jsonl(TEXTS))
    return tmp_path


def influences(model, layer: int, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """[H, m, m, d]: what each segment's last token takes from each segment, from eager attention weights."""
    seen = {}
    model = model.base_model
    eager = sys.modules[type(model).__module__]
    original = eager.eager_attention_forward

    def spying(module, *arguments, **options):
        output, weights = original(module, *arguments, **options)
        if module.layer_idx == layer:
            seen.update(weights=weights[0].double(), value=arguments[2][0].double())
        return output, weights

    eager.eager_attention_forward = spying
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(input_ids=ids[None])
    finally:
        eager.eager_attention_forward = original
        model.set_attn_implementation(before)
    count = int(segments.max()) + 1
    ends = torch.tensor([int((segments == i).nonzero().max()) for i in range(count)])
    members = torch.stack([segments == i for i in range(count)]).double()
    return torch.einsum("hin,jn,hnd->hijd", seen["weights"][:, ends], members, seen["value"])


def test_the_loss_is_over_all_pairs_of_eager_attention_and_blind_to_padding(folder):
    source = Teacher(folder / "teacher")
    assert source.masked
    model = source.load(torch.float32)
    freeze(model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    vocabulary = VocabularyPair(source.load_tokenizer(), tokenizer, 277)
    start = initial_rows(model, vocabulary, "random", 0)
    student = make_student(model, vocabulary, start, freeze_shared=True, objectives=("aim",))
    sides = Side("teacher", vocabulary.teacher, 277, 60), Side("student", tokenizer, vocabulary.rows, 60)
    chunks = list(make_chunks(TEXTS[:3], *sides, Counter()))
    batch = collate([[chunks[0]], [chunks[1]]], Counter())
    assert len(set((batch.student_documents >= 0).sum(1).tolist())) == 2  # there is padding
    rows = student.rows(batch.student_ids)
    options = TrainingOptions(objective="aim", reduction="documents")
    ours = losses(
        source.trunk(model), source.trunk(model), student, rows, batch, LAYERS, options, causal=False
    )["aim"]  # fmt: skip
    ours.backward()
    assert rows.input.trainable.grad.abs().sum() > 0

    renewed = source.load(torch.float32)
    renewed.resize_token_embeddings(vocabulary.rows, mean_resizing=False)
    renewed.get_input_embeddings().weight.data.copy_(student.input.weight())
    each = []
    for chunk in (chunks[0], chunks[1]):
        ids = [torch.from_numpy(x) for x in (chunk.teacher_ids, chunk.student_ids)]
        segments = [torch.from_numpy(x) for x in (chunk.teacher_segments, chunk.student_segments)]
        theirs, mine = (
            influences(m, LAYERS - 1, i, s) for m, i, s in zip((model, renewed), ids, segments, strict=True)
        )
        each.append((theirs - mine).square().mean())
        with torch.no_grad():  # in a loop of one's own
            caught = [
                capture_attention(m, LAYERS - 1, input_ids=i[None]) for m, i in zip((model, renewed), ids, strict=True)
            ]
        found = aim_loss(*(x.states for x in caught), *(x[None] for x in segments), **caught[1].options)
        torch.testing.assert_close(found.double(), each[-1], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(ours.double(), torch.stack(each).mean(), rtol=1e-3, atol=1e-9)


def test_every_token_is_scored_once_with_every_seventh_masked(folder):
    model = AutoModelForMaskedLM.from_pretrained(folder / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    text = TEXTS[2][:300]
    result = evaluate(model, tokenizer, [text], masked=True)
    ids = tokenizer(text)["input_ids"]
    nats = 0.0
    for position in range(1, len(ids) - 1):
        hidden = [i for i in range(1, len(ids) - 1) if (i - position) % 7 == 0]
        shown = torch.tensor([[tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(ids)]])
        with torch.no_grad():
            nats -= model(input_ids=shown).logits[0, position].log_softmax(-1)[ids[position]].item()
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    assert (result.n_tokens, result.piece_bytes, result.masked) == (len(ids) - 2, 480, True)
    with pytest.raises(ValueError, match="tokenizer: wanted a mask token"):
        evaluate(model, byte_level(TEXTS, 270, cls_token="<s>"), [text], masked=True)


def test_the_whole_job(folder):
    held_out = folder / "held-out.jsonl"
    held_out.write_text("".join(reversed((folder / "corpus.jsonl").read_text().splitlines(keepends=True))))
    result = transfer(
        folder / "teacher",
        folder / "tokenizer",
        folder / "corpus.jsonl",
        folder / "output",
        n_layers=LAYERS,
        max_length=48,
        eval_data=held_out,
        training=TrainingOptions(steps=30, lr=1e-2),
    )
    assert sum(result.progress.losses[-5:]) < 0.9 * sum(result.progress.losses[:5])
    before = AutoModelForMaskedLM.from_pretrained(folder / "teacher")
    after = AutoModelForMaskedLM.from_pretrained(folder / "output")
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("output", "teacher")]
    shared = {i: match.teacher_id for i, match in match_tokens(*tokenizers).items()}
    mine, theirs = list(shared), list(shared.values())
    assert torch.equal(after.get_input_embeddings().weight[mine], before.get_input_embeddings().weight[theirs])
    assert torch.equal(after.get_output_embeddings().bias[mine], before.get_output_embeddings().bias[theirs])
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
    filled = pipeline("fill-mask", model=str(folder / "output"), tokenizer=str(folder / "output"))("def <mask>")
    assert all(guess["sequence"].startswith("def") for guess in filled)
    assert [x.masked for x in result.evaluations.values()] == [True] * 3
    assert "by pseudo-likelihood" in (folder / "output" / "README.md").read_text()
    arguments = [f"--model={folder / 'output'}", f"--data={folder / 'corpus.jsonl'}", "--pieces=40"]
    measured = run("evaluate", *arguments)
    assert f"{result.evaluations['trained'].bits_per_byte:.4f}" in measured.output
    assert result.completions == []
    refused = run("evaluate", *arguments, "--speed")
    assert "speed: wanted causal language models" in " ".join(refused.output.split())


def test_layers_are_trained_too(folder):
    healing = HealingOptions(objective="token-distillation", steps=2, lr=1e-2, rank=3, keep_adapter=True)
    paths = [folder / x for x in ("teacher", "tokenizer", "corpus.jsonl", "healed")]
    transfer(*paths, training=TrainingOptions(steps=0), healing=healing, precision="no", max_length=48)
    before, after = (AutoModelForMaskedLM.from_pretrained(folder / x) for x in ("teacher", "healed"))
    ids = AutoTokenizer.from_pretrained(folder / "healed")("def function", return_tensors="pt")["input_ids"]
    expected = after(input_ids=ids).logits
    linear = {f"{name}.weight" for name, x in before.named_modules() if isinstance(x, torch.nn.Linear)}
    tables = {name for name, x in before.named_parameters() if len(x) == before.config.vocab_size}
    new = after.state_dict()
    changed = {name for name, x in before.named_parameters() if name not in tables and not torch.equal(x, new[name])}
    assert changed
    assert changed <= linear
    before.resize_token_embeddings(after.config.vocab_size)
    before.load_state_dict({name: x for name, x in new.items() if name not in changed}, strict=False)
    apart = PeftModel.from_pretrained(before, folder / "healed" / "adapter").eval()
    torch.testing.assert_close(apart(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_padding_is_not_seen(folder):
    """Rows of several lengths in one batch give what they give one by one."""
    found = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        training = TrainingOptions(objective="aim", reduction="documents", steps=2, accumulation=accumulation)
        output = folder / f"output-{batch_size}"
        result = transfer(
            *(folder / name for name in ("teacher", "tokenizer", "corpus.jsonl")),
            output,
            n_layers=LAYERS,
            max_length=60,
            batch_size=batch_size,
            seed=1,
            training=training,
        )
        rows = AutoModelForMaskedLM.from_pretrained(output).get_input_embeddings().weight
        found.append((result.progress.padding, result.progress.losses, rows))
    (padded, losses_together, together), (none, losses_apart, apart) = found
    assert padded > 0.05 > none == 0
    assert losses_together == pytest.approx(losses_apart, rel=1e-4)
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"training": TrainingOptions(objective="aim+ntp")},
            "objective: ntp, alm, boundary-kl, segment-kl and boundary-head want a causal language",
        ),
        ({"init": "composed"}, "init: 'composed', .* want a causal language model.*; got init 'composed'"),
        (
            {"init_head": "boundary"},
            "init: .* want a causal language model.*; got init 'mean' with init_head 'boundary'",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_decoders_alone_have_is_refused_before_work(folder, given, message):
    paths = [folder / x for x in ("teacher", "tokenizer", "corpus.jsonl")]
    options = {"on_message": lambda text: None} | given
    assert any(re.search(message, x.found) for x in doctor(*paths, **options) if x.verdict == "will fail")
    with pytest.raises(ValueError, match=message):
        transfer(*paths, folder / "refused", **options)
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("folder", ["xlm_roberta"], indirect=True)
def test_positions_are_counted_from_the_same_padding(folder):
    """RoBERTa and its kin begin behind the padding token's id: another id would shift all of them, untold."""
    ids = torch.arange(5, 9)[None]
    model = AutoModelForMaskedLM.from_pretrained(folder / "teacher").eval()
    first = model.config.pad_token_id + 1
    expected = model(ids, position_ids=torch.arange(first, first + 4)[None]).logits
    assert torch.equal(model(ids).logits, expected)
    assert first_position(model) == first
    byte_level(TEXTS, 330, **({"pad_token": "<pad>"} | ROLES)).save_pretrained(folder / "other")
    got = AutoTokenizer.from_pretrained(folder / "other").pad_token_id
    places = (folder / x for x in ("teacher", "other", "corpus.jsonl", "output"))
    with pytest.raises(ValueError, match=rf"tokenizer: wanted a padding token with the id {first - 1}, .* got {got}"):
        transfer(*places, device="cpu", max_length=64)
    train(folder / "trained", data=folder / "corpus.jsonl", size=320)
    assert AutoTokenizer.from_pretrained(folder / "trained").pad_token_id == 1  # as these models have


@pytest.mark.parametrize("kind", ["roberta", "ibert", "xglm", "mpnet", "bert", "opt"])
def test_what_positions_depend_on_padding_is_known(kind):
    """Where another id changes what the same weights make of the same vectors, and nowhere else."""
    sizes = SIZES | {"vocab_size": 60, "max_position_embeddings": 40}
    sizes |= {"xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4}}.get(kind, {})
    sizes |= {"opt": {"word_embed_proj_dim": 32}}.get(kind, {})
    models = [AutoModel.from_config(AutoConfig.for_model(kind, **sizes, pad_token_id=pad)).eval() for pad in (1, 5)]
    models[1].load_state_dict(dict(models[0].named_parameters()), strict=False)
    vectors = torch.randn(1, 16, 32)
    with torch.no_grad():
        first, second = (model(inputs_embeds=vectors)[0] for model in models)
    assert torch.equal(first, second) == (positions_padding(models[0]) == positions_padding(models[1]))
