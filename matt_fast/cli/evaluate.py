"""`matt-fast evaluate`."""

from typing import Annotated

from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.display import print_evaluation
from matt_fast.cli.output import command_output
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.recipe.arguments import PRECISIONS, TEXT_FILES, check_device
from matt_fast.support.checks import MANY, check_choice, check_location, check_range


def evaluate(
    model: o.Model,
    data: o.HeldOutData,
    tokenizer: Annotated[str | None, Option(help="Another tokenizer than the model's own.")] = None,
    pieces: Annotated[int | None, Option(help="Score at most so many pieces.")] = None,
    piece_bytes: Annotated[
        int | None, Option(help="Bytes of a piece, each scored on its own; 2,048, or 480 for a masked model.")
    ] = None,
    precision: Annotated[str, Option(help="Of the weights: auto (as stored), no (float32) or bf16.")] = "auto",
    split: o.Split = "train",
    text_field: o.TextField = "text",
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Measure bits per byte of held-out text, the one figure that compares models with different tokenizers.

    Masked language models are scored by pseudo-likelihood; compare their figures with each other only.
    """
    with command_output(json, quiet, debug) as out:
        check_choice("precision", precision, PRECISIONS)
        check_device(device)
        check_range("pieces", pieces, 1, MANY)
        check_range("piece_bytes", piece_bytes, 4, MANY)  # the longest character
        for name, value in (("model", model), ("tokenizer", tokenizer), ("data", data)):
            check_location(name, value, TEXT_FILES)
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            import torch
            from accelerate import Accelerator

            from matt_fast.data.documents import read_documents
            from matt_fast.evaluation.bits_per_byte import evaluate as run
            from matt_fast.model.checkpoint_files import check_weights
            from matt_fast.model.teacher import Teacher
            from matt_fast.model.weight_values import check_values

            display.on_stage("model")
            source = Teacher(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
            source.check_language_model("evaluate")
            check_values(source, check_weights(source), display.on_progress)
            dtype = {"auto": "auto", "no": torch.float32, "bf16": torch.bfloat16}[precision]
            loaded = source.load(dtype).to(device or Accelerator().device)
            documents = read_documents(data, split=split, text_field=text_field)
            display.on_stage("evaluation")
            result = run(
                loaded,
                source.load_tokenizer(tokenizer),
                documents,
                piece_bytes=piece_bytes,
                max_pieces=pieces,
                masked=source.masked,
                on_piece=lambda done: display.on_progress("pieces", done, pieces),
            )
        print_evaluation(out.console, result)
        out.result(result)
