"""`matt-fast doctor`: the options of `transfer`, which are looked at and not carried out."""

import inspect

import typer

from matt_fast.cli import options as o
from matt_fast.cli.display import print_findings
from matt_fast.cli.output import command_output
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.cli.transfer import transfer, transfer_arguments
from matt_fast.recipe.arguments import check_arguments

OF_A_RUN = ("resume", "push_to_hub", "public", "yes")  # options of a transfer that there is nothing to look at for


def doctor(context: typer.Context, **given) -> None:
    """Look at everything that a transfer with these options needs, and train nothing.

    One line for each check: ok, look at this, or will fail, and what to do. Exit status 1 if something will fail.
    """
    typed = {name for name in given if context.get_parameter_source(name).name == "COMMANDLINE"}
    as_json, quiet, debug, output = (given[name] for name in ("json", "quiet", "debug", "output"))
    with command_output(as_json, quiet, debug) as out:
        given = given | {"resume": None, "layer": "third" if given["layer"] == "sweep" else given["layer"]}
        arguments = transfer_arguments(given, typed)
        del arguments["resume"]
        check_arguments(arguments | {"output": output})
        with ProgressDisplay(out.console, announce=False) as display:
            display.on_stage("libraries")
            from matt_fast.recipe.doctor import FAIL
            from matt_fast.recipe.doctor import doctor as run

            findings = run(**arguments, on_check=display.on_stage, on_progress=display.on_progress)
        print_findings(out.console, findings)
        fails = any(x.verdict == FAIL for x in findings)
        out.result({"will_fail": fails, "findings": findings})
        if fails:
            raise typer.Exit(1)


def _options_of_transfer() -> tuple[inspect.Signature, dict]:
    """The signature of the command, and its annotations: those of `transfer`, but that nothing must be written."""
    signature = inspect.signature(transfer)
    parameters = [x for x in signature.parameters.values() if x.name not in OF_A_RUN]
    needed = [x for x in parameters if x.default is x.empty and x.name != "output"]
    others = [x for x in parameters if x.default is not x.empty]
    output = inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=o.PlannedOutput)
    parameters = [x.replace(kind=x.KEYWORD_ONLY) for x in (*needed, output, *others)]
    return signature.replace(parameters=parameters), {x.name: x.annotation for x in parameters} | {"return": None}


doctor.__signature__, doctor.__annotations__ = _options_of_transfer()
