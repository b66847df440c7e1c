"""The command line: `matt-fast transfer`, `plan`, `compare-inits` and `evaluate`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from matt_fast.support.threads import wait_passively

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False)
console = Console()

Model = Annotated[str, typer.Option(help="Folder or hub name of the model.")]
SplitOption = Annotated[str, typer.Option(help="Split of a hub dataset.")]
TextField = Annotated[str, typer.Option(help="Column that holds the text.")]
InitHead = Annotated[
    str, typer.Option(help="New output rows: 'same' as the input rows, or 'boundary', from what the teacher expects.")
]
RemoteCode = Annotated[bool, typer.Option(help="Let the repository run code of its own.")]
Parallel = Annotated[
    str | None,
    typer.Option(
        help="Texts and their translations, for wechsel and transtokenizers: a .tsv file with two columns, or .jsonl "
        "with source and target."
    ),
]
AllowPickle = Annotated[bool, typer.Option(help="Accept weights that are not safetensors (loading can run code).")]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpointing", help="Run the student's layers once more in backward: less memory, more time."),
]

Quantization = Annotated[
    str | None,
    typer.Option(
        help="Keep the frozen layers in 8bit or 4bit (bitsandbytes) while training; the result has the original ones."
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(help="Keep the frozen layers in cpu memory or on disk until each runs; wants --checkpointing."),
]


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print what is wrong with the input in one message, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/bold red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


@app.callback()
def main() -> None:
    """Give a pretrained language model a new tokenizer and keep what the model knows."""
    wait_passively()  # commands import torch later


@app.command()
def transfer(
    model: Model,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the new tokenizer.")],
    data: Annotated[str, typer.Option(help="Text: .txt, .md, .jsonl, .parquet, a folder of them, or a hub dataset.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    init: Annotated[
        str,
        typer.Option(
            help="New rows: mean, length-mean, random, zero, contextual, focus, omp, omp-self, wechsel, "
            "transtokenizers, tokalign, or ready ones (a folder or file)."
        ),
    ] = "mean",
    init_head: InitHead = "same",
    donor: Annotated[str | None, typer.Option(help="Model that has the new vocabulary, for --init omp.")] = None,
    parallel: Parallel = None,
    freeze_shared: Annotated[bool, typer.Option(help="Keep the rows of tokens that both have as they are.")] = True,
    layer: Annotated[
        str,
        typer.Option(
            "--layer",
            "--n-layers",
            help="Target layer, counted from 1: a number, 'third' of the depth, or 'sweep' to measure several depths "
            "on your data (writes a table and a plot, no model).",
        ),
    ] = "third",
    objective: Annotated[
        str,
        typer.Option(
            help="aim, aim_star, aim-all-layers, token-distillation, boundary-head or ntp; several joined by '+'."
        ),
    ] = "token-distillation",
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    warmup_steps: Annotated[int, typer.Option(help="The rate rises over so many steps at the start.")] = 0,
    decay_steps: Annotated[
        int | None, typer.Option(help="The rate falls to 0 over so many steps at the end; half of them by default.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a chunk; longer documents are cut into chunks.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per batch and process.")] = 4,
    moments: Annotated[
        str, typer.Option(help="Optimiser's moments of rows that a batch lacks: lazy (kept) or dense (they fade).")
    ] = "lazy",
    packing: Annotated[bool, typer.Option(help="Fill rows with as many chunks as they hold, each alone.")] = False,
    accumulation: Annotated[int, typer.Option(help="Batches per update.")] = 1,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0 for no clipping.")] = 1.0,
    metric: Annotated[str, typer.Option(help="mse or cosine.")] = "mse",
    reduction: Annotated[
        str, typer.Option(help="Mean over all pairs of a batch, or per document: pairs, documents.")
    ] = ("pairs"),
    backend: Annotated[str, typer.Option(help="Engine of the loss: auto, triton, torch or eager.")] = "auto",
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention of the layers: sdpa, eager, flash_attention_2 … .")
    ] = None,
    checkpointing: Checkpointing = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run the layers through torch.compile.")] = False,
    quantization: Quantization = None,
    offload: Offload = None,
    precision: Annotated[str, typer.Option(help="Of the frozen weights: auto, no (float32) or bf16.")] = "auto",
    split: SplitOption = "train",
    text_field: TextField = "text",
    data_cache: Annotated[
        Path | None, typer.Option(help="Folder to prepare data in before training, and to find it again.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out text: measure bits per byte on it.")] = None,
    eval_pieces: Annotated[int, typer.Option(help="Pieces of 2,048 bytes of it to score, at most.")] = 40,
    seed: Annotated[int, typer.Option(help="Of initialisation and order of the data.")] = 0,
    trust_remote_code: RemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Transfer a model to a new tokenizer and write a folder that loads and generates."""
    from matt_fast.cli import display as show
    from matt_fast.recipe.sweep import sweep_layers
    from matt_fast.recipe.transfer import transfer as run
    from matt_fast.training.options import TrainingOptions

    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes one prints
    with clear_errors(), show.ProgressDisplay(console, steps) as display:
        if layer not in ("third", "sweep") and not layer.isdecimal():
            raise ValueError(f"layer: wanted a number, 'third' or 'sweep', got {layer!r}")
        training = TrainingOptions(
            objective=objective,
            steps=steps,
            lr=lr,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            accumulation=accumulation,
            packing=packing,
            moments=moments,
            max_grad_norm=max_grad_norm or None,
            metric=metric,
            reduction=reduction,
            backend=backend,
            attn_implementation=attn_implementation,
            checkpointing=checkpointing,
            compile=compile,
            quantization=quantization,
            offload=offload,
        )
        options = {
            "init": init,
            "init_head": init_head,
            "donor": donor,
            "parallel": parallel,
            "freeze_shared": freeze_shared,
            "max_length": max_length,
            "batch_size": batch_size,
            "training": training,
            "precision": precision,
            "split": split,
            "text_field": text_field,
            "data_cache": data_cache,
            "eval_pieces": eval_pieces,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
            "on_step": display.on_step,
            "on_stage": display.on_stage,
        }
        if layer == "sweep":
            if eval_data is None:
                raise ValueError("eval_data: wanted held-out text to compare depths on, got none")
            outcome = sweep_layers(model, tokenizer, data, output, eval_data, **options)
        else:
            n_layers = None if layer == "third" else int(layer)
            options |= {"n_layers": n_layers, "eval_data": eval_data, "on_initialise": display.on_initialise}
            result = run(model, tokenizer, data, output, **options)
    if layer == "sweep":
        show.print_sweep(console, outcome)
    else:
        show.print_result(console, result)
    console.print(f"Written: {output}")


@app.command()
def plan(
    model: Model,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the new tokenizer.")],
    length: Annotated[int, typer.Option(help="Tokens of a chunk, --max-length of a transfer.")] = 512,
    batch: Annotated[int, typer.Option(help="Chunks, --batch-size of a transfer.")] = 4,
    vram: Annotated[float | None, typer.Option(help="GiB that a step may use: search what fits.")] = None,
    layer: Annotated[int | None, typer.Option(help="Target layer; a third of the depth by default.")] = None,
    objective: Annotated[str, typer.Option(help="As in transfer.")] = "token-distillation",
    accumulation: Annotated[int, typer.Option(help="Batches per update.")] = 1,
    checkpointing: Checkpointing = False,
    quantization: Quantization = None,
    offload: Offload = None,
    precision: Annotated[str, typer.Option(help="Of the frozen weights: no (float32) or bf16.")] = "bf16",
    freeze_shared: Annotated[bool, typer.Option(help="Keep the rows of tokens that both have as they are.")] = True,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    teraflops: Annotated[
        float | None, typer.Option(help="10¹² operations that your device does in a second: adds a modelled time.")
    ] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Predict memory and work of a training step from configurations alone, and what fits; no weights are loaded."""
    from matt_fast.cli.display import print_plan
    from matt_fast.planning.plan import plan as run
    from matt_fast.training.options import TrainingOptions

    with clear_errors(), console.status("planning"):
        if teraflops is not None and not teraflops > 0:
            raise ValueError(f"teraflops: wanted a number above 0, got {teraflops}")
        found = run(
            model,
            tokenizer,
            length=length,
            batch_size=batch,
            n_layers=layer,
            training=TrainingOptions(
                objective=objective,
                accumulation=accumulation,
                checkpointing=checkpointing,
                quantization=quantization,
                offload=offload,
            ),
            precision=precision,
            freeze_shared=freeze_shared,
            device=device,
            vram=None if vram is None else int(vram * (1 << 30)),
            trust_remote_code=trust_remote_code,
        )
    print_plan(console, found, teraflops)


@app.command()
def compare_inits(
    model: Model,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the new tokenizer.")],
    eval_data: Annotated[str, typer.Option(help="Held-out text: .txt, .md, .jsonl, .parquet, a folder, or a dataset.")],
    init: Annotated[list[str], typer.Option(help="As in transfer; give it several times.")],
    data: Annotated[
        str | None, typer.Option(help="Text for contextual, boundary, focus, omp-self, tokalign and wechsel.")
    ] = None,
    init_head: InitHead = "same",
    donor: Annotated[str | None, typer.Option(help="Model that has the new vocabulary, for omp.")] = None,
    parallel: Parallel = None,
    eval_pieces: Annotated[int, typer.Option(help="Pieces of 2,048 bytes of the text to score, at most.")] = 40,
    split: SplitOption = "train",
    text_field: TextField = "text",
    seed: Annotated[int, typer.Option(help="Of random draws.")] = 0,
    trust_remote_code: RemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Initialise a model for a new tokenizer in several ways and print what each costs, before any training."""
    from matt_fast.cli.display import print_initialisers
    from matt_fast.recipe.comparison import compare_initializers

    with clear_errors(), console.status("") as status:
        original, results = compare_initializers(
            model,
            tokenizer,
            eval_data,
            init,
            data=data,
            init_head=init_head,
            donor=donor,
            parallel=parallel,
            eval_pieces=eval_pieces,
            split=split,
            text_field=text_field,
            seed=seed,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            on_result=lambda result: status.update(escape(f"{result.init}: {result.bits_per_byte:.4f}")),
            on_progress=lambda init, done, total: status.update(escape(f"{init}: {done:,} of {total:,} rows")),
        )
    print_initialisers(console, original, results)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Held-out text: .txt, .md, .jsonl, .parquet, a folder, or a hub dataset.")],
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the model's own.")] = None,
    pieces: Annotated[int | None, typer.Option(help="Score at most so many pieces.")] = None,
    piece_bytes: Annotated[
        int | None, typer.Option(help="Bytes of a piece, each scored on its own; 2,048, or 480 for a masked model.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the weights: auto (as stored), no (float32) or bf16.")] = "auto",
    split: SplitOption = "train",
    text_field: TextField = "text",
    trust_remote_code: RemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Measure bits per byte of held-out text, the one figure that compares models with different tokenizers.

    Masked language models are scored by pseudo-likelihood; compare their figures with each other only.
    """
    from accelerate import Accelerator

    from matt_fast.data.documents import read_documents
    from matt_fast.evaluation.bits_per_byte import evaluate as run
    from matt_fast.model.teacher import Teacher
    from matt_fast.recipe.transfer import DTYPES

    with clear_errors():
        dtypes = {"auto": "auto", **DTYPES}
        if precision not in dtypes:
            raise ValueError(f"precision: wanted {', '.join(dtypes)}; got {precision!r}")
        source = Teacher(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        loaded = source.load(dtypes[precision]).to(Accelerator().device)
        documents = read_documents(data, split=split, text_field=text_field)
        result = run(
            loaded,
            source.load_tokenizer(tokenizer),
            documents,
            piece_bytes=piece_bytes,
            max_pieces=pieces,
            masked=source.masked,
        )
    console.print(f"bits per byte    {result.bits_per_byte:.4f}")
    console.print(f"bytes per token  {result.bytes_per_token:.3f}")
    console.print(f"scored           {result.n_bytes:,} bytes, {result.n_tokens:,} tokens")
