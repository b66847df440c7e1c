"""The whole job on tiny models from the command line."""

import re

from commands import run
from small_jobs import held_out
from tiny import TEXTS

from matt_fast import TrainingOptions, transfer


def test_the_command_line_transfers_and_evaluates(job):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data", "output")]
    training = ("--steps=40", "--max-length=48", "--objective=ntp", "--lr=1e-2")
    done = run("transfer", *paths, *training, f"--eval-data={held_out(arguments)}")
    assert done.exit_code == 0, done.output
    assert "after training" in done.output
    assert (arguments["output"] / "model.safetensors").exists()
    measured = run("evaluate", f"--model={arguments['output']}", f"--data={arguments['data']}", "--pieces=40")
    assert measured.exit_code == 0, measured.output
    figure = re.search(r"(\d+\.\d{4}) \(", measured.output)[1]
    assert figure in (arguments["output"] / "README.md").read_text()


def test_packing_fills_the_rows_and_says_so(job):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    shares = {}
    for packing in ("--packing", "--no-packing"):
        done = run(
            "transfer", *paths, f"--output={arguments['output']}{packing}", "--steps=3", "--max-length=200", packing
        )
        assert done.exit_code == 0, done.output
        shares[packing] = float(re.search(r"data\s+(\d+\.\d)% of the rows is padding", done.output)[1])
    assert shares["--packing"] < shares["--no-packing"] / 2


def test_initialisers_side_by_side(job):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer")]
    inits = ["--init=mean", "--init=zero", f"--init={arguments['model']}"]
    failed = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", *inits)
    assert "init: wanted input_embeddings with at least 330 rows" in " ".join(failed.output.split())
    done = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", *inits[:2])
    assert done.exit_code == 0, done.output
    result = transfer(**arguments, eval_data=held_out(arguments))
    for name in ("original", "initialised"):
        assert f"{result.evaluations[name].bits_per_byte:.4f}" in done.output


def test_rows_from_the_teachers_states_from_the_command_line(job, tmp_path):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    scored = f"--eval-data={held_out(arguments)}"
    contextual = run("compare-inits", *paths, scored, "--init=contextual")
    boundary = run("compare-inits", *paths, scored, "--init=mean", "--init-head=boundary")
    assert contextual.exit_code == boundary.exit_code == 0, contextual.output + boundary.output
    for objective in ("aim", "ntp"):  # the teacher's lower layers are loaded, or all of it
        given = {**arguments, "output": tmp_path / objective, "eval_data": held_out(arguments)}
        given["training"] = TrainingOptions(steps=1, objective=objective)
        result = transfer(**given, init="contextual")
        assert f"{result.evaluations['initialised'].bits_per_byte:.4f}" in contextual.output
    result = transfer(**{**arguments, "output": tmp_path / "head"}, eval_data=held_out(arguments), init_head="boundary")
    assert f"{result.evaluations['initialised'].bits_per_byte:.4f}" in boundary.output
    wrong = run("transfer", *paths, f"--output={tmp_path / 'x'}", "--init-head=mean")
    assert "init_head: wanted same or boundary for a model whose output head is tied" in " ".join(wrong.output.split())
    apart = run("compare-inits", *paths, scored, "--init=last-piece", "--init-head=first-piece", "--untie")
    assert apart.exit_code == 0, apart.output


def test_parallel_text_from_the_command_line(job, tmp_path):
    arguments, _ = job
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"def {text.splitlines()[0]}\t{text.splitlines()[0]}\n" for text in TEXTS))
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    inits = [f"--init={name}" for name in ("mean", "transtokenizers", "wechsel", "tokalign")]
    failed = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", *inits)
    assert "parallel: wanted pairs of texts and translations for init 'transtokenizers'" in " ".join(
        failed.output.split()
    )
    done = run("compare-inits", *paths, f"--eval-data={held_out(arguments)}", f"--parallel={pairs}", *inits)
    assert done.exit_code == 0, done.output
    result = transfer(**arguments, eval_data=held_out(arguments), init="transtokenizers", parallel=pairs)
    assert f"{result.evaluations['initialised'].bits_per_byte:.4f}" in done.output
    trained = run(
        "transfer", *paths, f"--output={tmp_path / 'x'}", "--init=transtokenizers", f"--parallel={tmp_path}/no"
    )
    assert "parallel: wanted a .tsv or .jsonl file of pairs" in " ".join(trained.output.split())
    assert not (tmp_path / "x").exists()


def test_prepared_data_is_found_again(job, tmp_path):
    arguments, _ = job
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data")]
    folders = []
    for output in ("one", "two"):
        options = [f"--output={tmp_path / output}", f"--data-cache={tmp_path / 'cache'}", "--packing"]
        done = run("transfer", *paths, *options, "--steps=2", "--max-length=48")
        assert done.exit_code == 0, done.output
        folders.append(sorted(tmp_path.joinpath("cache").iterdir()))
    assert len(folders[0]) == 1
    assert folders[0] == folders[1]
