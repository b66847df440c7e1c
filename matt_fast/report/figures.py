"""What was measured: bits per byte by text and stage, compression, completions."""

from collections.abc import Mapping
from html import escape

from matt_fast.report.words import DIGITS, NOTHING, cell, named, table
from matt_fast.runs.record import Record

HEADS = {"original": "original", "initialised": "after initialisation", "trained": "after training"}
THOUSAND = 1000
TIMES = "\N{MULTIPLICATION SIGN}"


def bits_table(record: Record) -> str:
    """Bits per byte of every text; what is worse than the original is marked."""
    if not record.evaluations:
        return "<p>Not measured: the run was given no held-out text (<code>--eval-data</code>).</p>"
    rows = []
    for text, found in record.evaluations.items():
        original = found.get("original")
        cells = [cell(escape(text), head=True)]
        cells += [_bits(found.get(stage), original if stage != "original" else None) for stage in HEADS]
        cells.append(_against(found.get("trained"), original))
        rows.append("".join(cells))
    first = next(iter(next(iter(record.evaluations.values())).values()))
    how = ", by pseudo-likelihood" if first.get("masked") else ""
    note = (
        f"<p>Bits per byte{how}: less is better, and models with different tokenizers compare. "
        '<span class="worse">▲ worse</span> and <span class="better">▼ better</span> than the original. '
        f"{first['n_bytes']:,} bytes of the first text were scored.</p>"
    )
    return table(["text", *HEADS.values(), "against the original"], rows, "bits per byte", "figures") + note


def verdict(now: float, before: float) -> str:
    """ "worse", "better" or "same", at the digits that are shown."""
    now, before = round(now, DIGITS), round(before, DIGITS)
    return "worse" if now > before else "better" if now < before else "same"


def ratio(found: Mapping, original: Mapping) -> float:
    """Bits per byte over the original's."""
    return found["bits_per_byte"] / original["bits_per_byte"] if original["bits_per_byte"] else 1.0


def _bits(found: Mapping | None, original: Mapping | None) -> str:
    if found is None:
        return cell(NOTHING, "number")
    kind = "" if original is None else verdict(found["bits_per_byte"], original["bits_per_byte"])
    return cell(f"{found['bits_per_byte']:.{DIGITS}f}", f"number {kind}".strip())


def _against(found: Mapping | None, original: Mapping | None) -> str:
    if found is None or original is None:
        return cell(NOTHING, "number")
    kind = verdict(found["bits_per_byte"], original["bits_per_byte"])
    sign = {"worse": "▲ ", "better": "▼ ", "same": ""}[kind]
    return cell(f"{sign}{ratio(found, original):.3f}{TIMES}", f"number {kind}")


def compression_table(record: Record) -> str:
    """How many tokens texts are under both tokenizers."""
    rows = []
    for text, found in record.evaluations.items():
        new = found.get("trained") or found.get("initialised")
        if new is None or "original" not in found:
            continue
        tokens = [THOUSAND / x["bytes_per_token"] for x in (found["original"], new)]
        share = tokens[1] / tokens[0]
        bars = "".join(
            f'<span class="bar {name}" style="width:{100 * x / max(tokens):.1f}%"></span>'
            for name, x in zip(("old", "new"), tokens, strict=True)
        )
        change = f"{abs(1 - share):.1%} {'fewer' if share <= 1 else 'more'}"
        rows.append(
            cell(escape(text), head=True)
            + "".join(cell(f"{x:.1f}", "number") for x in tokens)
            + cell(change, f"number {'better' if share < 1 else 'worse' if share > 1 else ''}".strip())
            + cell(bars, "bars")
        )
    if not rows:
        return "<p>Not measured yet.</p>" if record.evaluations else "<p>Not measured: there was no held-out text.</p>"
    heads = ["text", "original tokenizer", "new tokenizer", "change", '<span class="hidden">both as bars</span>']
    return table(heads, rows, "tokens of 1,000 bytes of text", "figures") + "<p>Tokens of 1,000 bytes of text.</p>"


def completions(record: Record) -> str:
    """Both models' continuations of the same beginnings; "" where there are none."""
    blocks = []
    for found in record.completions:
        text = named(found["text"]) if found.get("text") else "prompt"
        sides = "".join(
            f"<div><h4>{name}</h4><p>{escape(str(found.get(key, '')))}</p></div>"
            for name, key in (("original", "original"), ("adapted", "adapted"))
        )
        prompt = escape(str(found["prompt"]))
        blocks.append(
            f'<article class="completion"><h3>{text}</h3><blockquote>{prompt}</blockquote>'
            f'<div class="sides">{sides}</div></article>'
        )
    return "".join(blocks)


def key_figures(record: Record) -> str:
    """The few figures that one looks for first."""
    facts = []
    for text, found in list(record.evaluations.items())[:2]:
        if {"original", "trained"} <= found.keys():
            kind = verdict(found["trained"]["bits_per_byte"], found["original"]["bits_per_byte"])
            times = f'<span class="{kind}">{ratio(found["trained"], found["original"]):.3f}{TIMES}</span>'
            tokens = found["original"]["bytes_per_token"] / found["trained"]["bytes_per_token"] - 1
            facts.append((f"{escape(text)}, bits per byte against the original", times))
            facts.append((f"{escape(text)}, tokens", f"{abs(tokens):.1%} {'more' if tokens > 0 else 'fewer'}"))
    if record.result and len(facts) < 4:
        facts.append(("new tokens", f"{record.result['new']:,}"))
    if not facts:
        return ""
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="key">{items}</dl>'
