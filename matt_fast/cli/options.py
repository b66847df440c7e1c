"""Options of the commands: their types, names and help texts. What has no panel is shown first."""

from pathlib import Path
from typing import Annotated

from typer import Option

from matt_fast.cli.defaults import read_config, read_recipe, read_run

ROWS, OBJECTIVE, DATA = "Start of new rows", "Objective and optimiser", "Data"
HEALING = "Healing: layers trained together with the rows"
SPEED, WATCH, OUTPUT = "Memory and speed", "While it runs", "Output and security"

# What most people need.
Model = Annotated[str, Option(help="Folder or hub name of the model.")]
Tokenizer = Annotated[str, Option(help="Folder or hub name of the new tokenizer.")]
OtherTeacher = Annotated[
    str | None,
    Option(help="Another model to learn from, with a tokenizer of its own.", rich_help_panel=OBJECTIVE),
]
TEXTS = ".txt, .md, .jsonl, .csv (also .gz, .zst), .parquet"  # what help calls files of texts
TrainingData = Annotated[
    str | None,
    Option(
        help=f"Text: {TEXTS}, .arrow, a folder of them, a hub dataset, or a URL such as "
        "s3://…/*.parquet. May be left out with --snippets or --prepared."
    ),
]
HeldOutData = Annotated[
    str,
    Option(help=f"Held-out text: {TEXTS}, a folder, or a hub dataset."),
]
OutputFolder = Annotated[Path, Option(help="Folder to write; must be new or empty.")]
PlannedOutput = Annotated[
    Path | None, Option(help="Folder that a transfer would write: look at it and at the room on its disk.")
]
EvalData = Annotated[
    list[str] | None,
    Option(
        help="Held-out text: measure bits per byte on it. NAME=TEXT, several times, for several; the first decides."
    ),
]
Steps = Annotated[int, Option(help="Updates.")]
Epochs = Annotated[float | None, Option(help="Passes over the data, instead of --steps.")]
Resume = Annotated[
    Path | None,
    Option(
        help="Go on with the run in this output folder, with the options that it was begun with. auto: with that in "
        "--output, if there is one, else begin.",
        is_eager=True,
        callback=read_run,
    ),
]
Recipe = Annotated[
    str | None,
    Option(
        help="Options that go together: quick (minutes on a CPU), paper (as published) or best (the whole chain).",
        is_eager=True,
        callback=read_recipe,
    ),
]
Config = Annotated[
    Path | None,
    Option(
        help="YAML file with options by their long names, for example a run's run/run.yaml; the command line wins.",
        is_eager=True,
        callback=read_config,
    ),
]

# Where new rows start.
Init = Annotated[
    str,
    Option(
        help="New rows: mean, length-mean, first-piece, last-piece, exponential-first, exponential-last, random, zero, "
        "composed, contextual, focus, omp, omp-self, linear-map, wechsel, transtokenizers, tokalign, or ready ones (a "
        "folder or file).",
        rich_help_panel=ROWS,
    ),
]
Inits = Annotated[list[str], Option(help="As in transfer; give it several times.")]
InitHead = Annotated[
    str,
    Option(
        help="New output rows: 'same' as the input rows, 'boundary', from what the teacher expects, or, with an "
        "untied head, by another method of --init.",
        rich_help_panel=ROWS,
    ),
]
Donor = Annotated[
    str | None, Option(help="Model that has the new vocabulary, for omp and linear-map.", rich_help_panel=ROWS)
]
OmpK = Annotated[
    int, Option(help="Shared tokens that a new one is made of, at most, for omp and omp-self.", rich_help_panel=ROWS)
]
Parallel = Annotated[
    str | None,
    Option(
        help="Texts and their translations, for wechsel and transtokenizers: a .tsv file with two columns, or .jsonl "
        "with source and target.",
        rich_help_panel=ROWS,
    ),
]
Untie = Annotated[
    bool,
    Option(help="Give a tied model an output head of its own: new rows start and learn apart.", rich_help_panel=ROWS),
]
MapTokens = Annotated[
    list[str] | None,
    Option(
        "--map",
        help="NEW=OLD: a new special token that starts as the mean of the old tokens of a text; several times.",
        rich_help_panel=ROWS,
    ),
]
InitData = Annotated[
    str | None,
    Option(help="Text for contextual, boundary, focus, omp-self, tokalign and wechsel.", rich_help_panel=ROWS),
]
FreezeShared = Annotated[bool, Option(help="Keep the rows of tokens that both have as they are.", rich_help_panel=ROWS)]

# Objective and optimiser.
Objective = Annotated[
    str,
    Option(
        help="aim, aim_star, aim-all-layers, token-distillation, boundary-head, ntp, alm, boundary-kl or segment-kl; "
        "several joined by '+'.",
        rich_help_panel=OBJECTIVE,
    ),
]
Heal = Annotated[
    str | None,
    Option(
        help="Then train layers together with the rows: lora, outer (the first and last layers) or full.",
        rich_help_panel=HEALING,
    ),
]
HealSteps = Annotated[int, Option(help="Updates of it.", rich_help_panel=HEALING)]
HealRate = Annotated[float, Option(help="Learning rate of the layers.", rich_help_panel=HEALING)]
HealRowsRate = Annotated[float, Option(help="Learning rate of the rows meanwhile.", rich_help_panel=HEALING)]
HealObjective = Annotated[str, Option(help="Objective, as --objective.", rich_help_panel=HEALING)]
HealRank = Annotated[int, Option(help="Rank of lora.", rich_help_panel=HEALING)]
HealOuterLayers = Annotated[int, Option(help="Layers at either end, of outer.", rich_help_panel=HEALING)]
HealMaxWorse = Annotated[
    float | None,
    Option(help="Stop where a further --eval-data gets worse by more than this share.", rich_help_panel=HEALING),
]
KeepAdapter = Annotated[
    bool, Option(help="Write lora's adapter too, beside the weights it is merged into.", rich_help_panel=HEALING)
]
Layer = Annotated[
    str,
    Option(
        "--layer",
        "--n-layers",
        help="Target layer, counted from 1: a number, 'third' of the depth, or 'sweep' to measure several depths "
        "on your data (writes a table and a plot, no model).",
        rich_help_panel=OBJECTIVE,
    ),
]
PlannedLayer = Annotated[int | None, Option(help="Target layer; a third of the depth by default.")]
AlmTemperature = Annotated[
    float, Option(help="alm: probabilities count as their power of 1/temperature.", rich_help_panel=OBJECTIVE)
]
AlmDivergence = Annotated[str, Option(help="alm: kl, reverse-kl or tvd.", rich_help_panel=OBJECTIVE)]
LearningRate = Annotated[float, Option(help="Learning rate.", rich_help_panel=OBJECTIVE)]
WarmupSteps = Annotated[int, Option(help="The rate rises over so many steps at the start.", rich_help_panel=OBJECTIVE)]
DecaySteps = Annotated[
    int | None,
    Option(
        help="The rate falls to 0 over so many steps at the end; half of them by default.", rich_help_panel=OBJECTIVE
    ),
]
Moments = Annotated[
    str,
    Option(
        help="Optimiser's moments of rows that a batch lacks: lazy (kept) or dense (they fade).",
        rich_help_panel=OBJECTIVE,
    ),
]
Accumulation = Annotated[int, Option(help="Batches per update.", rich_help_panel=OBJECTIVE)]
MaxGradNorm = Annotated[
    float, Option(help="Clip gradients to this norm; 0 for no clipping.", rich_help_panel=OBJECTIVE)
]
Metric = Annotated[str, Option(help="Of the AIM losses: mse or cosine.", rich_help_panel=OBJECTIVE)]
Reduction = Annotated[
    str,
    Option(
        help="Of the AIM losses: mean over all pairs of a batch, or per document: pairs, documents.",
        rich_help_panel=OBJECTIVE,
    ),
]
Seed = Annotated[int, Option(help="Of initialisation and order of the data.", rich_help_panel=OBJECTIVE)]

# Data.
MaxLength = Annotated[
    int, Option(help="Tokens of a chunk; longer documents are cut into chunks.", rich_help_panel=DATA)
]
BatchSize = Annotated[int, Option(help="Rows per batch and process.", rich_help_panel=DATA)]
Packing = Annotated[bool, Option(help="Fill rows with as many chunks as they hold, each alone.", rich_help_panel=DATA)]
Split = Annotated[str, Option(help="Split of a hub dataset.", rich_help_panel=DATA)]
TextField = Annotated[str, Option(help="Column that holds the text.", rich_help_panel=DATA)]
PerToken = Annotated[
    int | None,
    Option(help="Read text first in which every new token comes so often, where there is any.", rich_help_panel=DATA),
]
Snippets = Annotated[
    int | None,
    Option(
        help="Let the teacher write short texts around new tokens that come less often than this in the text.",
        rich_help_panel=DATA,
    ),
]
Rehearse = Annotated[
    int,
    Option(
        help="Let the teacher write so many texts of its own, a chat model: conversations. A fifth of what is read are "
        "these, so that the model does not forget how it wrote.",
        rich_help_panel=DATA,
    ),
]
DataCache = Annotated[
    Path | None,
    Option(help="Folder to prepare data in before training, and to find it again.", rich_help_panel=DATA),
]
Prepared = Annotated[
    str | None,
    Option(
        help="Folder or URL (s3:// …) of chunks made by `matt-fast prepare`; --data may then be left out.",
        rich_help_panel=DATA,
    ),
]
DataWorkers = Annotated[
    int | None,
    Option(
        help="Processes that tokenise ahead of the training, 0 for none; the result is the same. By default 1 beside a "
        "CPU that trains, else as many as cores are free, at most 8.",
        rich_help_panel=DATA,
    ),
]
EvalPieces = Annotated[
    int, Option(help="Pieces of 2,048 bytes of the held-out text to score, at most.", rich_help_panel=DATA)
]
Completions = Annotated[
    int,
    Option(
        help="Places in held-out documents where the original and the result write on, side by side; 0 for none.",
        rich_help_panel=DATA,
    ),
]

# Memory and speed.
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, mps …; the fastest by default.", rich_help_panel=SPEED)]
Precision = Annotated[
    str,
    Option(
        help="Of the frozen weights: no (float32), bf16, or auto: bf16 where GPU or CPU multiply in it.",
        rich_help_panel=SPEED,
    ),
]
Backend = Annotated[str, Option(help="Engine of the loss: auto, triton, torch or eager.", rich_help_panel=SPEED)]
Attention = Annotated[
    str | None, Option(help="Attention of the layers: sdpa, eager, flash_attention_2 … .", rich_help_panel=SPEED)
]
Checkpointing = Annotated[
    bool,
    Option(
        "--checkpointing",
        help="Run the student's layers once more in backward: less memory, more time.",
        rich_help_panel=SPEED,
    ),
]
Compile = Annotated[bool, Option("--compile", help="Run the layers through torch.compile.", rich_help_panel=SPEED)]
Quantization = Annotated[
    str | None,
    Option(
        help="Keep the frozen layers in 8bit or 4bit (bitsandbytes) while training; the result has the original ones.",
        rich_help_panel=SPEED,
    ),
]
Offload = Annotated[
    str | None,
    Option(
        help="Keep the frozen layers in cpu memory or on disk until each runs; wants --checkpointing.",
        rich_help_panel=SPEED,
    ),
]
Shard = Annotated[
    bool,
    Option(
        "--shard/--no-shard",
        help="Spread the frozen layers over the processes, for models larger than a card; see torchrun.",
        rich_help_panel=SPEED,
    ),
]

# While it runs.
CheckpointEvery = Annotated[
    str,
    Option(
        help="Steps, or a time such as 30s, 10m or 2h, between checkpoints; auto is ten minutes, or longer where "
        "writing them is slow.",
        rich_help_panel=WATCH,
    ),
]
ValidateEvery = Annotated[
    str | None,
    Option(help="Steps or a time between measurements on --eval-data; the best rows are kept.", rich_help_panel=WATCH),
]
Patience = Annotated[
    int | None, Option(help="Stop after so many measurements that are not the best.", rich_help_panel=WATCH)
]
Track = Annotated[
    str | None, Option(help="tensorboard, wandb or trackio; several joined by ','.", rich_help_panel=WATCH)
]

# Output and security.
Json = Annotated[
    bool, Option("--json", help="Print the result as JSON; all else goes to stderr.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[
    bool, Option("--quiet", help="Print nothing but errors and what --json prints.", rich_help_panel=OUTPUT)
]
Language = Annotated[
    list[str] | None,
    Option(
        help="Language that the new model is for, as a code (uk, deu, code): for its card. Several times.",
        rich_help_panel=OUTPUT,
    ),
]
PushToHub = Annotated[
    str | None,
    Option(help="Push the result to this repository of the Hugging Face hub, OWNER/NAME.", rich_help_panel=OUTPUT),
]
Public = Annotated[bool, Option("--public", help="Let everyone see it there.", rich_help_panel=OUTPUT)]
Yes = Annotated[bool, Option("--yes", help="Push without asking.", rich_help_panel=OUTPUT)]
RemoteCode = Annotated[bool, Option(help="Let the repository run code of its own.", rich_help_panel=OUTPUT)]
AllowPickle = Annotated[
    bool, Option(help="Accept weights that are not safetensors (loading can run code).", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, Option("--debug", help="Print the traceback of an error.", rich_help_panel=OUTPUT)]
