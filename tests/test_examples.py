"""The examples on tiny models: what they minimise against float64 without padding, and that they train nothing else."""

import copy
import gzip
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny import TEXTS, new_tokenizer, save_tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from matt_fast import aim_loss, align_segments, capture_attention
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import initial_rows
from matt_fast.initializers.omp import apply, omp_coefficients
from matt_fast.model.teacher import Teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import aligned_batches
import parallel_text
import wordllama_donor

LAYER = 1
ROWS = [{"text": text} for text in TEXTS]
BATCH, EPOCHS, LR = 4, 6, 1e-2
AIM_WEIGHT = 1e5  # the AIM loss of these models is about 3e-5


class Recorder(aligned_batches.AlignedCollator):
    """Keeps the texts that it was given, batch by batch."""

    def __call__(self, rows):
        self.batches = [*getattr(self, "batches", []), [row["text"] for row in rows]]
        return super().__call__(rows)


class Job:
    """A teacher, a student with another tokenizer, and copies of both as they were before training."""

    def __init__(self, folder, tied=True):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=tied,
        )  # fmt: skip
        self.tokenizers = save_tiny_model(folder, config), new_tokenizer()
        self.teacher, self.student = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
        self.student.resize_token_embeddings(len(self.tokenizers[1]), mean_resizing=False)
        embedding = self.student.get_input_embeddings()
        embedding.weight.data.normal_(std=0.2)
        # The old tokenizer's padding has the id of a token that occurs.
        embedding.padding_idx = self.tokenizers[1](TEXTS[0])["input_ids"][1]
        self.before = copy.deepcopy(self.teacher), copy.deepcopy(self.student)
        self.collator = Recorder(*self.tokenizers)

    def batches(self):
        return DataLoader(ROWS * EPOCHS, batch_size=BATCH, shuffle=True, collate_fn=self.collator)

    def aim(self, texts, student=None):
        """The AIM loss in float64: every text on its own, by the formula, then the mean over all pairs."""
        teacher, student = (copy.deepcopy(x).double() for x in (self.teacher, student or self.before[1]))
        total, pairs = 0.0, 0
        for text in texts:
            encoded = [x(text, return_offsets_mapping=True, return_special_tokens_mask=True) for x in self.tokenizers]
            segments = align_segments(
                *(x["offset_mapping"] for x in encoded), *(x["special_tokens_mask"] for x in encoded)
            )
            with torch.no_grad():
                states = [
                    capture_attention(
                        model, LAYER, attn_implementation="eager", input_ids=torch.tensor([x["input_ids"]])
                    ).states
                    for model, x in zip((teacher, student), encoded, strict=True)
                ]
            count = int(segments[0].max()) + 1
            weight = count * (count + 1) // 2
            loss = aim_loss(*states, *(torch.from_numpy(x)[None] for x in segments), backend="eager")
            total, pairs = total + weight * loss.item(), pairs + weight
        return total / pairs

    def cross_entropy(self, texts):
        """The language modelling loss of the untrained student in float64, every text on its own."""
        student = copy.deepcopy(self.before[1]).double()
        losses = []
        for text in texts:
            ids = torch.tensor(self.tokenizers[1](text)["input_ids"])
            with torch.no_grad():
                losses.append(
                    torch.nn.functional.cross_entropy(student(ids[None]).logits[0, :-1], ids[1:], reduction="none")
                )
        return torch.cat(losses).mean().item()

    def check_what_moved(self):
        for before, after in zip(self.before, (self.teacher, self.student), strict=True):
            embedding = after.get_input_embeddings().weight
            for (name, x), y in zip(before.named_parameters(), after.parameters(), strict=True):
                assert (after is self.student and y is embedding) or torch.equal(x, y), name
        weights = [x.get_input_embeddings().weight for x in (self.before[1], self.student)]
        moved = (weights[0] != weights[1]).any(1).nonzero().flatten().tolist()
        occurred = {i for texts in self.collator.batches for ids in self.tokenizers[1](texts)["input_ids"] for i in ids}
        assert moved == sorted(occurred)
        assert len(moved) < len(weights[0])

    def check_that_it_learned(self):
        assert self.aim(TEXTS, self.student) < 0.5 * self.aim(TEXTS)


def test_plain_loop(tmp_path):
    from plain_loop import train

    job = Job(tmp_path)
    losses = train(job.teacher, job.student, job.batches(), LAYER, lr=LR)
    assert losses[0] == pytest.approx(job.aim(job.collator.batches[0]), rel=1e-5)
    job.check_that_it_learned()
    job.check_what_moved()


def test_trainer(tmp_path):
    """Two batches an update; untied embeddings, as the language modelling loss moves every row of tied ones."""
    from trainer import AIMTrainer

    job = Job(tmp_path, tied=False)
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, num_train_epochs=2 * EPOCHS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2, learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = AIMTrainer(
        job.student,
        arguments,
        job.collator,
        train_dataset=ROWS,
        teacher=job.teacher,
        layer=LAYER,
        aim_weight=AIM_WEIGHT,
    )
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    expected = [AIM_WEIGHT * job.aim(texts) + job.cross_entropy(texts) for texts in job.collator.batches[:2]]
    assert losses[0] == pytest.approx(sum(expected) / 2, rel=1e-5)
    job.check_that_it_learned()
    job.check_what_moved()


def test_trainer_evaluates(tmp_path):
    from trainer import AIMTrainer

    job = Job(tmp_path)
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = AIMTrainer(job.student, arguments, job.collator, teacher=job.teacher, layer=LAYER, aim_weight=AIM_WEIGHT)
    found = trainer.evaluate(ROWS[:4])["eval_loss"]
    texts = TEXTS[:4]
    assert found == pytest.approx(AIM_WEIGHT * job.aim(texts) + job.cross_entropy(texts), rel=1e-5)


def test_lightning_module(tmp_path):
    import lightning
    from lightning_module import AIMModule

    losses = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
            losses.append(outputs["loss"].item())

    job = Job(tmp_path)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Losses()],
    )  # fmt: skip
    trainer.fit(AIMModule(job.teacher, job.student, LAYER, lr=LR), job.batches())
    assert losses[0] == pytest.approx(job.aim(job.collator.batches[0]), rel=1e-5)
    job.check_that_it_learned()
    job.check_what_moved()


@pytest.mark.parametrize("name", ["aligned_batches", "plain_loop", "trainer", "lightning_module"])
def test_each_is_short(name):
    assert len(Path(aligned_batches.__file__).with_name(f"{name}.py").read_text().splitlines()) < 40


def test_parallel_text_follows_the_structure_of_pages(tmp_path):
    """A block more, one that is not translated, code, links, and sentences where both sides have equally many."""
    english = (
        "<head><title>T</title></head><h1>Packages</h1><p>One package. Two packages!</p><dd>Only here.</dd>"
        '<p>See <a href="ch02.en.html#x">chapter 2</a>. It is long.</p><pre>apt-get</pre><ul><li>Same<li>First.</ul>'
    )
    german = (
        "<head><title>T</title></head><h1>Pakete</h1><p>Ein Paket. Zwei Pakete!</p>"
        '<p>Siehe das lange <a href="ch02.de.html#x">Kapitel\n 2</a>.</p><pre>apt-get</pre><ul><li>Same<li>Erstens.'
    )
    (tmp_path / "a.en.html").write_text(english)
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "a.de.html.gz").write_bytes(gzip.compress(german.encode()))
    ours, theirs = parallel_text.pages(tmp_path / "."), parallel_text.pages(tmp_path / "de")
    assert set(theirs) == {"a"} < set(ours)
    assert list(parallel_text.page_pairs(ours["a"], theirs["a"])) == [
        ("Packages", "Pakete"),
        ("One package.", "Ein Paket."),
        ("Two packages!", "Zwei Pakete!"),
        ("See chapter 2. It is long.", "Siehe das lange Kapitel 2."),
        ("First.", "Erstens."),
    ]


def test_a_donor_from_a_packages_table(tmp_path):
    tokenizer, wheel = new_tokenizer(), tmp_path / "package.whl"
    added = tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    table = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(added))
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("wordllama/weights/l2_supercat_256.safetensors", save({"embedding.weight": table.half()}))
        package.writestr("wordllama/tokenizers/l2_supercat_tokenizer_config.json", tokenizer.backend_tokenizer.to_str())
    wordllama_donor.main(str(wheel), str(tmp_path / "donor"))
    save_tiny_model(tmp_path / "teacher")
    teacher, donor = Teacher(tmp_path / "teacher"), Teacher(tmp_path / "donor")
    vocabulary = VocabularyPair(teacher.load_tokenizer(), donor.load_tokenizer(), 275)
    rows = initial_rows(teacher.load(torch.float32), vocabulary, "omp", 0, donor=tmp_path / "donor")
    assert rows.report.initialized == len(vocabulary.tokens) - len(vocabulary.matches)
    made, shared = sorted(rows.report.made), sorted(vocabulary.matches)
    found = omp_coefficients(table.half().float()[made], table.half().float()[shared])
    torch.testing.assert_close(rows.input[made], apply(found, rows.input[shared]))
