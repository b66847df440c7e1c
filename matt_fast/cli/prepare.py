"""`matt-fast prepare`."""

import json as json_library
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.recipe.arguments import EXECUTORS, check_prepare


def prepare(
    model: o.Model,
    tokenizer: o.Tokenizer,
    data: Annotated[
        str,
        Option(help=f"Text: {o.TEXTS}, a folder of them, a hub dataset, or a URL of files."),
    ],
    output: Annotated[Path, Option(help="Folder to write; the same command goes on with one that is not finished.")],
    max_length: o.MaxLength = 512,
    shards: Annotated[int, Option(help="Files to write; a streamed folder wants one for each training process.")] = 16,
    workers: Annotated[
        int | None, Option(help="Shards that are made at a time; all cores, or what the cluster gives, by default.")
    ] = None,
    executor: Annotated[str, Option(help=f"Of datatrove: {', '.join(EXECUTORS)}.")] = "local",
    executor_option: Annotated[
        list[str] | None,
        Option(help="NAME=VALUE: an argument of datatrove's executor, such as partition=cpu. Several times."),
    ] = None,
    teacher: o.OtherTeacher = None,
    split: o.Split = "train",
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
) -> None:
    """Make the aligned chunks of a text once, as shards that `transfer --prepared` reads, here or on a cluster."""
    arguments = {"model": model, "tokenizer": tokenizer, "data": data, "output": output, "teacher": teacher}
    arguments |= {"max_length": max_length, "shards": shards, "workers": workers, "executor": executor}
    arguments |= {"split": split, "text_field": text_field, "trust_remote_code": trust_remote_code}
    with command_output(json, quiet, debug) as out:
        arguments |= {"executor_options": executor_options(executor_option or [])}
        check_prepare(arguments)
        with ProgressDisplay(out.console) as display:
            display.on_stage("libraries")
            from matt_fast.recipe.preparing import prepare as run
            from matt_fast.recipe.preparing import summary

            callbacks = {"on_stage": display.on_stage, "on_progress": display.on_progress}
            result = run(**arguments, **callbacks)
        if result.manifest is None:
            say(out.console, f"Submitted: {shards} shards and, behind them, the manifest; logs are in {output}/logs")
            out.result({"output": str(output), "shards": shards, "submitted": True})
            return
        told = summary(result.manifest)
        for name in ("texts", "chunks", "teacher_tokens", "student_tokens", "bytes"):
            say(out.console, f"{name.replace('_', ' '):<16} {told[name]:,}")
        for reason, count in told["skipped"].items():
            say(out.console, f"left out         {count:,} {reason}")
        say(out.console, f"Written: {output} ({result.made} of {shards} shards now)")
        out.result({"output": str(output), "shards": shards, "made": result.made, **told})


def executor_options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE as arguments: numbers, true, false and {"a": 1} as in JSON, all else as text.

    Raises:
        ValueError: no NAME=VALUE, or a name that is given twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier() or name in found:
            raise ValueError(f"executor_option: wanted NAME=VALUE, each name once, got {text!r}")
        try:
            found[name] = json_library.loads(value)
        except ValueError:
            found[name] = value
    return found
