"""How much of what a model would answer is kept: bits per byte of its own answers under models that were made of it.

    .venv/bin/python benchmarks/own_answers.py ORIGINAL [MODEL ...]

The original, a chat model, answers sixteen English questions; each model then reads questions and answers in its own
tokens. A model that has learned a text may be better on held-out text of that kind and still have forgotten how it
answered.
"""

from math import log

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from usage import arguments

QUESTIONS = (
    "What is the capital of France and what is it known for?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a short poem about autumn.",
    "How do I boil an egg?",
    "Give me three tips for a job interview.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "Translate 'good morning' into French and Spanish.",
    "Why is the sky blue?",
    "Write a polite email asking for a day off.",
    "What are the health benefits of walking?",
    "Tell me a fun fact about octopuses.",
    "Who was Marie Curie?",
    "How does a bicycle stay upright?",
    "Give me a recipe for pancakes.",
    "What should I pack for a week in the mountains?",
)
WRITTEN = 96  # tokens of an answer


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def answers(folder: str) -> list[tuple[str, str]]:
    """(question as the model is asked, answer) of each question."""
    model, tokenizer = load(folder)
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "pad_token_id": tokenizer.eos_token_id}
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=WRITTEN, **sampling)[0, ids.input_ids.shape[1] :]
        found.append((asked, tokenizer.decode(written, skip_special_tokens=True)))
    return found


@torch.no_grad()
def bits_per_byte(folder: str, dialogues: list[tuple[str, str]]) -> float:
    (model, tokenizer), nats = load(folder), 0.0
    for asked, answer in dialogues:
        before, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (asked, answer))
        logs = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        nats -= logs.gather(1, torch.tensor(ids)[:, None]).sum().item()
    return nats / log(2) / sum(len(answer.encode()) for _, answer in dialogues)


if __name__ == "__main__":
    folders = arguments(__doc__, str, least=1)
    dialogues = answers(folders[0])
    for folder in folders:
        print(f"{folder}: {bits_per_byte(folder, dialogues):.4f} bits per byte", flush=True)
