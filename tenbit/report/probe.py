"""A probe as one self-contained HTML page, with the figures also as files.

    write_page(study, folder)     folder/report.html, folder/figures/{scatter,logratio}-{light,dark}.png

The page has no script and loads nothing. Figures are embedded, one image a panel, so that they flow on a phone, on
light and on dark paper. What came from a model or a data set is escaped, and what cannot be seen is spelt out.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tenbit.report.probe_figures import DARK, LIGHT, THEMES, Panels, logratios, scatter, thinned
from tenbit.report.probe_words import LABELS, ROUTING, described, harmless, read, shown, verdict
from tenbit.report.template import style, template
from tenbit.report.words import factor, number, percent, scientific, whole
from tenbit.runlog import write_atomic
from tenbit.studies.probe import Pair, Study
from tenbit.studies.probe_measures import Measure

MUCH = 1.05  # shares above are not shown as numbers


def write_page(study: Study, folder: Path) -> Path:
    """Writes the figures and the page into an existing folder, and returns the page's path."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for panels in (scatter(study.pairs), logratios(study.pairs)):
        for theme in THEMES:
            write_atomic(figures / f"{panels.name}-{theme.name}.png", panels.together(study.pairs, theme))
    target = folder / "report.html"
    write_atomic(target, render(study, folder.name).encode("utf-8", "replace"))
    return target


def render(study: Study, name: str) -> str:
    said = verdict(study)
    return template("probe.html.jinja").render(
        name=name,
        title=_title(study),
        verdict=said[0],
        findings=said[1:],
        numbers=_numbers(study),
        notes=[*study.notes, *(f"{name} left out: {why}" for name, why in study.left_out.items())],
        scatters=_images(scatter(study.pairs), study.pairs, "π against μ of every token"),
        ratios_by_length=_images(logratios(study.pairs), study.pairs, "sequence log-ratio by response length"),
        thinned=any(thinned(pair)[2] for pair in study.pairs),
        pairs=[(p.name, described(p)) for p in study.pairs],
        measures=_measures(study.pairs),
        ratios=_ratios(study),
        by_length=_by_length(study.pairs),
        worst=[(p.name, [_told(row) for row in p.worst(study.tokenizer)]) for p in study.pairs],
        attribution=[(name, _causes(found)) for name, found in study.attribution.items()],
        versions=[(p.name, _versions(p)) for p in study.pairs if p.by_version],
        settings=_settings(study),
        style=style(),
    )


def _title(study: Study) -> str:
    source = study.settings["source"] or f"{study.settings['model']} on {study.settings['data']}"
    return f"sampler against trainer · {source}"


def _numbers(study: Study) -> list[tuple[str, str, str]]:
    """The few numbers under the verdict: (what, value, remark)."""
    out = []
    for pair in study.pairs:
        value, within = shown(pair.measures["kl_k3"], scientific)
        out.append((f"KL, {pair.name}", value, within))
    for a, b, found in study.ratios():
        if "kl_k3" in found:
            m = found["kl_k3"]
            within = "" if m.low is None or m.high is None else f"{factor(m.low)} to {factor(m.high)}"
            out.append((f"KL, {a.name} over {b.name}", f"{factor(m.value)}×", within))
    for pair in study.pairs:
        out.append((f"effective samples, {pair.name}", percent(pair.measures["seq_ess"].value), ""))
    return out


def _images(panels: Panels, pairs: Sequence[Pair], what: str) -> list[tuple[str, Markup, Markup]]:
    """(alternative text, light image, dark image) a pair; images as data URLs."""
    out = []
    for pair in pairs:
        light, dark = (_url(panels.single(pair, theme)) for theme in (LIGHT, DARK))
        std = number(pair.measures["seq_logratio_std"].value)
        words = f"{pair.name}: {what}. KL {number(pair.measures['kl_k3'].value)}, std of sequences {std}."
        out.append((words, light, dark))
    return out


def _url(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode()


def _measures(pairs: Sequence[Pair]) -> list[tuple[str, list[tuple[str, str]]]]:
    rows = [(label, [shown(read(pair, key), form) for pair in pairs]) for key, label, form in LABELS]
    routed = any(p.routing for p in pairs)
    for key, label in ROUTING if routed else ():
        rows.append((label, [(scientific(p.routing[key]), "") if p.routing else ("–", "") for p in pairs]))
    return [
        *rows,
        ("tokens", [(whole(p.tokens), "") for p in pairs]),
        ("responses", [(whole(len(p.table)), "") for p in pairs]),
    ]


def _ratios(study: Study) -> tuple[list[tuple[str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """Heads and rows of the table of ratios."""
    found = study.ratios()
    rows = []
    for key, label, _ in LABELS:
        if any(key in measures for _, _, measures in found):
            cells = [shown(m[key], factor) if key in m else ("–", "") for _, _, m in found]
            rows.append((label, cells))
    return [(f"{a.name} over {b.name}", "") for a, b, _ in found], rows


def _by_length(pairs: Sequence[Pair]) -> list[tuple[str, list[tuple[str, str]]]]:
    buckets = sorted({b for p in pairs for b in p.by_length}, key=lambda b: int(b.split("-")[0]))
    rows = []
    for bucket in buckets:
        cells = []
        for pair in pairs:
            found = pair.by_length.get(bucket)
            if found is None:
                cells.append(("–", ""))
                continue
            std = found["std"]
            within = "" if std["low"] is None else f"{scientific(std['low'])} to {scientific(std['high'])}, "
            cells.append((scientific(std["value"]), f"{within}n = {found['n']:,}"))
        rows.append((bucket.replace("-", "–"), cells))
    return rows


def _told(row: dict[str, Any]) -> dict[str, str]:
    return {
        "size": number(abs(row["logratio"])),
        "sign": "π > μ" if row["logratio"] > 0 else "π < μ",
        "pi": number(row["pi"]),
        "mu": number(row["mu"]),
        "at": f"token {row['position'] + 1:,} of {row['length']:,}",
        "sequence": f"response {row['sequence'] + 1:,}",
        "id": str(row["token_id"]),
        "token": harmless(row["token"]) or "(empty)",
        "context": harmless(row["context"], keep="\n\t"),
    }


def _versions(pair: Pair) -> list[tuple[str, str, str, str, str]]:
    """(version, KL, interval, tokens, responses)"""
    rows = []
    for version, row in pair.by_version.items():
        value, within = shown(Measure(**row["kl_k3"]), scientific)
        rows.append((version, value, within, whole(row["tokens"]), whole(row["sequences"])))
    return rows


def _causes(found: Any) -> dict[str, Any]:
    """Rows of causes that take something off the gap, and of those that do not, which the page folds away."""
    rows, others = [], []
    for cause in found.rows:
        carries = cause.share is not None and cause.share > 0
        # A switch cannot take off more than there is; above 1 is noise, or a gap that others had made smaller.
        share = "–" if cause.share is None else "over 100%" if cause.share > MUCH else percent(cause.share, 0)
        within = "" if cause.interval is None else f"{percent(cause.interval[0], 0)} to {percent(cause.interval[1], 0)}"
        before, after = ("–" if v is None else scientific(v) for v in (cause.kl_before, cause.kl_after))
        remedy = cause.remedy if carries else ""
        row = (cause.name, cause.what, before, after, share, within, remedy, cause.note)
        (rows if carries else others).append(row)
    return {"rows": rows, "others": others, "verdict": found.verdict, "total": scientific(found.total)}


def _settings(study: Study) -> list[tuple[str, str]]:
    s = study.settings
    out = [(key, str(s[key])) for key in ("model", "data", "engine", "source", "device") if s.get(key) is not None]
    out += [(key, f"{v:g}" if isinstance(v, float) else str(v)) for key, v in (s["sampling"] or {}).items()]
    return out + [(f"version of {key}", v) for key, v in s["versions"].items()]
