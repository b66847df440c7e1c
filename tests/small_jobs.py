"""A small transfer, and texts that it is measured on."""

from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model

from matt_fast import TrainingOptions


def held_out(arguments):
    """A file of the same texts, which is not the file that is trained on."""
    path = arguments["data"].with_name("held-out.jsonl")
    path.write_text(jsonl(TEXTS[::-1]))
    return path


def small_job(folder):
    """(arguments of a small transfer, the tokenizer of its model), with what it needs in a folder."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text(jsonl(TEXTS))
    teacher_tokenizer = save_tiny_model(folder / "teacher")
    new_tokenizer().save_pretrained(folder / "tokenizer")
    return {
        "model": folder / "teacher",
        "tokenizer": folder / "tokenizer",
        "data": corpus,
        "output": folder / "output",
        "max_length": 48,
        "batch_size": 2,
        "training": TrainingOptions(steps=4, lr=1e-2),
    }, teacher_tokenizer
