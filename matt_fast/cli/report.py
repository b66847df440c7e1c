"""`matt-fast report`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from matt_fast.cli import options as o
from matt_fast.cli.output import command_output, say
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.report.sentences import progress_line
from matt_fast.report.words import NAME
from matt_fast.runs.folder import damaged_files
from matt_fast.runs.record import read_record
from matt_fast.show.choices import PAGES, check_output, read_text
from matt_fast.support.files import write_text

SAMPLE, SHORT = 600, 240  # characters whose segments are shown, and whose attention influence is


def report(
    runs: Annotated[list[Path], Argument(help="Output folders of transfers, finished or not.")],
    output: Annotated[
        Path | None, Option(help=f"Page to write, .html; RUN/{NAME}, or {NAME} here for several runs, by default.")
    ] = None,
    text: Annotated[str | None, Option(help="Sample text; by default a part of the run's own.")] = None,
    file: Annotated[Path | None, Option(help=f"A file with the sample text: {o.TEXTS}.")] = None,
    influence: Annotated[
        bool, Option(help="Run both models on the sample and show what attention moves; it loads their lower layers.")
    ] = True,
    text_field: o.TextField = "text",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Write one page of what transfers did: figures, curves, tokens, warnings; several runs are compared."""
    with command_output(json, quiet, debug) as out:
        output = output or (runs[0] / NAME if len(runs) == 1 else Path(NAME))
        records = [read_record(folder) for folder in runs]
        check_output(output, PAGES)
        sample = None if text is None and file is None else read_text(text, file, SAMPLE, text_field)[0]
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from dataclasses import replace

            from matt_fast.report.page import report_page
            from matt_fast.report.writing import look_again

            shown = []
            for record in records:
                display.on_stage(f"tokenizers of {record.folder.name}")
                with damaged_files(record.folder / "run", "runs"):
                    found = look_again(record, sample, trust_remote_code=trust_remote_code)
                options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
                words = sample or record.sample
                if influence and words and record.has_model:
                    found = replace(found, **_influence(display, record.folder, words[:SHORT], options, found.missing))
                shown.append(found)
            with damaged_files(", ".join(str(x.folder / "run") for x in records), "runs"):
                page = report_page(shown)
        write_text(output, page)
        missing = {str(x.record.folder): dict(x.missing) for x in shown}
        for folder, parts in missing.items():
            for part, why in parts.items():
                say(out.console, f"{folder}: {part} not shown, {why}")
        for record in records:
            if record.at_work is not None:
                where = progress_line(record) or "before training"
                say(out.console, f"{record.folder}: at work ({record.at_work}): {where}")
        say(out.console, f"Written: {output}")
        out.result({"output": str(output), "runs": {str(x.folder): x.status for x in records}, "missing": missing})


def _influence(display: ProgressDisplay, folder: Path, text: str, options: dict, missing) -> dict:
    """The fields of a run that is shown which tell of attention influence."""
    from matt_fast.cli.show_influence import find

    try:
        found, _, note = find(display, text, (None, None, folder), None, None, None, options)
        return {"influence": found, "influence_note": note}
    except (OSError, TypeError, ValueError) as error:
        return {"missing": {**missing, "influence": f"as {' '.join(str(error).split())}"}}
