"""The report page, opened and used in a browser; and what is in it, whatever a run left."""

import json
import math
import re
from contextlib import contextmanager

import pytest
from browser import browser
from commands import run
from playwright.sync_api import expect
from tiny import TEXTS, byte_level, save_tiny_model

from matt_fast import HealingOptions, TrainingOptions, transfer
from matt_fast.alignment.vocabulary import Token
from matt_fast.report.charts import ticks
from matt_fast.report.comparison import names_of
from matt_fast.report.page import Shown, report_page
from matt_fast.report.tokens import tokens_page
from matt_fast.runs.record import read_record
from matt_fast.show.tokens import TokenRow, choose

HOSTILE = "</script><img src=x onerror=alert(1)>"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
KEYS = ("done", "bits", "compression", "training", "sample", "completions", "tokens", "warnings", "configuration")


@pytest.fixture(scope="module")
def chromium():
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run in "done", with healing, validation and a token that is markup; one that stopped in "stopped"."""
    folder = tmp_path_factory.mktemp("page")
    save_tiny_model(folder / "teacher")
    tokenizer = byte_level(TEXTS, 330, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.add_tokens([HOSTILE])
    tokenizer.save_pretrained(folder / "tokenizer")
    lines = [json.dumps({"text": text}) + "\n" for text in [*TEXTS[:9], f"self {HOSTILE} value"]]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "held.txt").write_text(f"title\nreturn self.{HOSTILE} déjà + value\n" + "x = self.alpha * 3\n" * 3)
    job = {
        "model": folder / "teacher", "tokenizer": folder / "tokenizer", "data": folder / "corpus.jsonl",
        "eval_data": {"<i>code</i>": folder / "held.txt", "more": folder / "held.txt"}, "max_length": 48,
        "batch_size": 2, "training": TrainingOptions(steps=6, lr=3e-2), "validate_every": 3,
        "healing": HealingOptions("lora", steps=6, rank=2, objective="boundary-kl+ntp"), "init": "mean",
        "on_message": lambda text: None,
    }  # fmt: skip
    transfer(**job, output=folder / "done")

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 4:
            raise Stop

    with pytest.raises(Stop):
        transfer(**job | {"seed": 1}, output=folder / "stopped", checkpoint_every=2, on_step=stop)
    return folder


@contextmanager
def opened(chromium, path, viewport=DESK, **options):
    """A page that may not complain nor ask anyone for anything."""
    context = chromium.new_context(viewport=viewport, **options)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append("a dialog"))
    page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page
    assert complaints == []
    context.close()


def column(page, number):
    return page.locator(f".sortable tbody tr td:nth-child({number})").all_inner_texts()


def report(*words):
    return run("report", *words, catch_exceptions=False)


def test_a_transfers_own_page_is_used(chromium, runs):
    done = runs / "done"
    records = [json.loads(line) for line in (done / "token_provenance.jsonl").open()]
    new = {x["id"]: x for x in records if not x["start"].startswith(("copied", "no token"))}
    with opened(chromium, done / "report.html") as page:
        assert [x.get_attribute("id") for x in page.locator(".run > section").all()] == [f"{x}-1" for x in KEYS]
        title, button = (page.locator(x).bounding_box() for x in ("h1", "#theme"))
        assert title["x"] + title["width"] <= button["x"]  # a long name does not run under the button
        # the table begins with the tokens seen most often, and is sorted by a click and by the keyboard
        ids, seen = (list(map(int, column(page, i))) for i in (2, 5))
        order = sorted(new, key=lambda i: (-new[i]["seen"], i))
        assert ids == order[:50]
        assert seen == [new[i]["seen"] for i in ids]
        page.locator("th[data-key=moved] button").click()
        by_move = sorted(new, key=lambda i: (-new[i]["moved"], i))
        assert list(map(int, column(page, 2))) == by_move[:50]
        assert page.locator("th[aria-sort]").get_attribute("data-key") == "moved"
        page.locator("th[data-key=id] button").press("Enter")
        page.locator("th[data-key=id] button").press("Enter")
        assert list(map(int, column(page, 2))) == sorted(new, reverse=True)[:50]
        page.get_by_role("button", name="Next").click()
        assert list(map(int, column(page, 2))) == sorted(new, reverse=True)[50:]
        assert page.get_by_role("button", name="Next").is_disabled()
        # what was searched for is found, a space as it is drawn, and markup is text
        page.get_by_role("searchbox").fill("onerror")
        assert column(page, 1) == [HOSTILE.replace(" ", "␣")]
        assert page.locator(".tools output").inner_text() == f"1 of {len(new)} tokens"
        page.get_by_role("searchbox").fill(HOSTILE[:15])
        assert len(column(page, 1)) == 1
        assert page.locator("img, i:not(.legend i), main script:not([type])").count() == 0
        # curves tell their values, by the pointer and by the arrow keys
        charts = page.locator("figure.chart").all()
        assert len(charts) == 6  # loss, validation, rate; of rows, and of rows and layers
        losses = [json.loads(line) for line in (done / "run" / "metrics.jsonl").open()]
        losses = [x["token-distillation"] for x in losses if "loss" in x]
        readout, svg = charts[0].locator(".readout"), charts[0].locator("svg")
        svg.press("Home")
        assert readout.inner_text() == f"step 1: token-distillation {float(f'{losses[0]:.5g}'):g}"
        svg.press("ArrowRight")
        assert readout.inner_text().startswith("step 2: token-distillation ")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 30)
        assert readout.inner_text().startswith("step 6: ")
        # the configuration is copied as it is, and may be shown in other colours
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy").click()
        expect(page.locator(".copy").first).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == (done / "run" / "run.yaml").read_text()
        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(paper)
        for name in ("light", "dark"):
            page.get_by_role("button", name="Colours").click()
            assert (page.evaluate(paper) == light) == (name == "light")
        page.reload()
        assert page.evaluate(paper) != light


def test_it_is_read_on_a_phone_in_the_dark_and_on_paper(chromium, runs):
    path = runs / "done" / "report.html"
    with opened(chromium, path, color_scheme="dark") as page:
        assert page.evaluate(LOW_CONTRAST) == []
    with opened(chromium, path, PHONE) as page:
        assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
        assert page.evaluate(LOW_CONTRAST) == []
        wide = "[...document.querySelectorAll('main *')].filter(x => !x.closest('.wide, pre, svg') && "
        assert page.evaluate(wide + "x.getBoundingClientRect().right > innerWidth + 1).map(x => x.outerHTML)") == []
        assert page.locator("figure.chart svg").first.bounding_box()["width"] > 330
        page.emulate_media(media="print", color_scheme="dark")
        assert page.locator("nav").is_hidden()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"


# Texts whose colour is too near to that behind them: WCAG 2, AA, 4.5 to 1; colours are read as a canvas draws them.
LOW_CONTRAST = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const drawn = colours => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const light = parts => parts.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const behind = x => x ? [...behind(x.parentElement), getComputedStyle(x).backgroundColor] : [];
  const found = new Set();
  for (const one of document.querySelectorAll('body *')) {
    const own = [...one.childNodes].some(x => x.nodeType === 3 && x.textContent.trim());
    if (!own || !one.checkVisibility() || one.closest('script, .hidden') || one.disabled) continue;
    const style = getComputedStyle(one), back = behind(one);
    const ink = one.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(drawn([...back, ink])), light(drawn(back))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) found.add(`${one.tagName}.${one.className}: ${ink}`);
  }
  return [...found];
}"""


def test_a_page_of_several_runs_and_of_one_that_stopped(chromium, runs):
    page_file = runs / "both.html"
    done = report(runs / "done", runs / "stopped", "--output", page_file, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["runs"] == {str(runs / "done"): "finished", str(runs / "stopped"): "running"}
    evaluations = json.loads((runs / "done" / "run" / "evaluations.json").read_text())
    with opened(chromium, page_file) as page:
        first, second = page.locator("section.run").all()
        assert "This run is not finished" in second.locator(".notice").inner_text()
        assert "at step 2 of 6" in second.locator(".notice").inner_text()
        assert f"matt-fast transfer --resume {runs / 'stopped'}" in second.locator(".notice").inner_text()
        assert second.locator("#training-2 figure.chart").count() == 3
        assert "not written yet" in second.locator("#tokens-2").inner_text()
        assert first.locator(".notice").count() == 0
        comparison = page.locator("#comparison")
        differs = comparison.get_by_role("region", name="options that differ").locator("tbody tr")
        assert differs.locator("th").all_inner_texts() == ["checkpoint-every", "seed"]
        assert differs.locator("td").all_inner_texts() == ["auto", "2", "0", "1"]
        legend = comparison.locator("figure.chart").first.locator(".legend li").all_inner_texts()
        assert [x.strip() for x in legend] == ["done", "stopped"]
        # bits per byte, and what is worse than the original
        rows = first.get_by_role("region", name="bits per byte").locator("tbody tr")
        for row, text in zip(rows.all(), ("<i>code</i>", "more"), strict=True):
            bits = [round(evaluations[x][text]["bits_per_byte"], 4) for x in ("original", "initialised", "trained")]
            assert row.locator("th").inner_text() == text
            cells = row.locator("td").all()
            assert [float(x.inner_text()) for x in cells[:3]] == bits
            for cell, value in zip(cells[1:3], bits[1:], strict=True):
                kind = "worse" if value > bits[0] else "better" if value < bits[0] else "same"
                assert kind in cell.get_attribute("class").split()
            assert f"{bits[2] / bits[0]:.2f}" in cells[3].inner_text()
        # segments and influence of the sample, whose values are told at a pointer
        assert first.locator(".segment").count() == second.locator(".segment").count() > 5
        maps = first.locator("figure.map").all()
        assert len(maps) == 3
        maps[0].locator("svg").press("ArrowDown")
        assert re.fullmatch(r".+ draws on .+: [\d.e-]+", maps[0].locator(".readout").inner_text())
        assert second.locator("figure.map").count() == 0


def test_24_000_tokens_and_what_else_a_run_may_hold(chromium, runs, tmp_path):
    record = read_record(runs / "done")
    completions = [{"text": "<b>t</b>", "prompt": "<u>x", "original": "a\n<s>", "adapted": "<em>"}]
    record.result["completions"] = completions
    count = 24_000
    records = [
        {"id": i, "start": "mean", "teacher_ids": [i % 200, 7], "seen": i % 977, "moved": float(i % 5000), "norm": 2.5}
        for i in range(count)
    ]
    tokens = {i: Token("text", f" слово{i}".encode()) for i in range(count)}
    path = tmp_path / "large.html"
    path.write_text(report_page([Shown(record, records, tokens, tokens)]), encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    with opened(chromium, path) as page:
        assert page.locator(".tools output").inner_text() == "24,000 of 24,000 tokens"
        page.locator("th[data-key=moved] button").click()
        assert column(page, 2)[:4] == ["4999", "9999", "14999", "19999"]
        page.get_by_role("searchbox").fill(" Слово77")  # noqa: RUF001
        assert page.locator(".tools output").inner_text() == "111 of 24,000 tokens"
        assert len(column(page, 1)) == 50
        assert page.locator("#completions-1 .sides p").all_inner_texts() == ["a\n<s>", "<em>"]
        assert page.locator("#completions-1 blockquote").inner_text() == "<u>x"
        assert "Segments: not shown" in page.locator("#sample-1").inner_text()
    crowd = [{**x, "seen": 10**9 + x["id"], "moved": 123.0} for x in records] * 2
    page = report_page([Shown(record, crowd, tokens, tokens)] * 2)
    assert len(page.encode()) < 3_000_000
    assert "seen most often are in this table" in page


def test_a_page_of_new_tokens(chromium, tmp_path):
    """`matt-fast show tokens --output`: ordered as asked, what stands out marked, neighbours told, markup as text."""
    rows = [TokenRow(i, f"w{i}", "mean", ("a", "b"), True, i % 7, 1.5, float(i), 0.0) for i in range(120)]
    rows[7] = TokenRow(7, HOSTILE, "<b>mean</b>", (HOSTILE,), True, 9, math.nan, 500.0, 9.0, (), ((HOSTILE, 0.5),))
    path = tmp_path / "tokens.html"
    path.write_text(tokens_page(choose(rows), 400, "moved", "<i>note</i>"), encoding="utf-8")
    with opened(chromium, path) as page:
        told = page.locator("main > p").inner_text()
        assert told.startswith("120 of 400 new tokens; how they started: 119 mean, 1 <b>mean</b>. 17 were never seen")
        assert "1 stand out" in told
        assert list(map(int, column(page, 2))) == [7, *range(119, 70, -1)]
        heads = [x.get_attribute("data-key") for x in page.locator("th").all()]
        assert heads == ["token", "id", "start", "pieces", "seen", "moved", "norm", "after", "outlier"]
        assert page.locator(".marked").count() == 1
        assert page.locator(".marked bdi").all_inner_texts() == [HOSTILE] * 3
        assert page.locator(".marked small").all_inner_texts() == ["0.50"]
        page.locator("th[data-key=seen] button").click()
        assert list(map(int, column(page, 5)))[:3] == [9, 6, 6]
        page.get_by_role("searchbox").fill("w11")
        assert sorted(column(page, 1)) == sorted(f"w{i}" for i in (11, *range(110, 120)))
        assert page.locator("img, b, i, main script:not([type])").count() == 0
    path.write_text(tokens_page([], 400, "id", ""), encoding="utf-8")
    with opened(chromium, path) as page:
        assert page.locator(".tools output").inner_text() == "0 of 0 tokens"


def test_what_is_no_run_or_a_damaged_one_is_refused(runs, tmp_path):
    for words, told in (
        ([tmp_path], "runs: wanted the output folder of a transfer, got"),
        ([runs / "done", tmp_path / "nowhere"], "runs: wanted the output folder of a transfer, got"),
        ([runs / "done", "--output", tmp_path / "x.pdf"], "output: wanted a file that ends in .html"),
        ([runs / "done", "--text", "x", "--file", "y"], "text and file: wanted one of them, got both"),
    ):
        refused = report(*words)
        assert refused.exit_code == 1
        assert f"Error: {told}" in refused.stderr
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "run.yaml", "state.json"):
        (run / name).write_bytes((runs / "done" / "run" / name).read_bytes())
    for name, text, told in (
        ("metrics.jsonl", "{}\n[1]\n", "metrics.jsonl, line 2: wanted a JSON object"),
        ("state.json", "[", "runs: wanted a JSON object in"),
        ("run.yaml", "{", "runs: wanted what a transfer wrote in"),
        ("run.json", "{}", "runs: wanted what a transfer wrote in"),
    ):
        was = (run / name).read_bytes() if (run / name).exists() else b""
        (run / name).write_text(text)
        refused = report(tmp_path, "--no-influence", "--quiet")
        assert refused.exit_code == 1
        assert told in refused.stderr
        (run / name).write_bytes(was)


def test_a_page_that_cannot_be_drawn_does_not_lose_the_model(runs, tmp_path, monkeypatch):
    from matt_fast.report import writing

    def fail(shown):
        raise RuntimeError("no page")

    monkeypatch.setattr(writing, "report_page", fail)
    told = []
    places = (runs / "teacher", runs / "tokenizer", runs / "corpus.jsonl", tmp_path / "out")
    transfer(*places, max_length=48, batch_size=2, training=TrainingOptions(steps=0), on_message=told.append)
    assert told[-1] == "no report.html: RuntimeError: no page"
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "expected"),
    [(0, 10, False, [0, 2, 4, 6, 8, 10]), (1.03, 1.17, False, [1.05, 1.1, 1.15]), (3, 3, False, [3]),
     (0.2, 30, True, [0.2, 0.5, 1, 2, 5, 10, 20]), (1e-8, 1, True, [1e-8, 1e-6, 1e-4, 1e-2, 1]),
     (2.1, 4.9, True, [2.1, 4.9])],
)  # fmt: skip
def test_ticks_are_round(low, high, logarithmic, expected):
    assert ticks(low, high, logarithmic) == pytest.approx(expected)


def test_runs_are_told_apart(runs):
    record = read_record(runs / "done")
    from dataclasses import replace

    folders = [runs / x for x in ("a/out", "b/out", "c")]
    assert names_of([replace(record, folder=x) for x in folders]) == ["a/out", "b/out", f"{runs.name}/c"]
    assert names_of([record, record])[1].endswith("done (2)")
