"""The report: all of a run on one page that needs no network, no script, and trusts no text it was given."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tenbit.report import axis, write_report
from tenbit.report.chart import Figure, Panel, Series, draw
from tenbit.report.figures import trend
from tenbit.report.svg import spread, stairs
from tenbit.report.words import number, percent, power_of_two, scientific, seconds

SPEC_NAMES = [
    "train/reward", "train/accuracy", "train/response_length", "train/truncated", "mismatch/kl_k1",
    "mismatch/kl_k3", "mismatch/logp_abs_mean", "mismatch/logp_abs_max", "mismatch/prob_diff_min",
    "mismatch/prob_diff_max", "mismatch/prob_diff_abs_mean", "mismatch/seq_logratio_mean",
    "mismatch/seq_logratio_std", "mismatch/seq_ess", "mismatch/seq_above_cap", "correction/weight_mean",
    "correction/outside", "optim/loss", "optim/grad_norm", "optim/lr", "optim/loss_scale", "optim/skipped",
    "policy/entropy", "policy/clip_fraction", "time/rollout", "time/grade", "time/proximal", "time/update",
    "time/sync", "time/step", "perf/tokens_per_second", "eval/sums/avg@4", "eval/sums/pass@4",
]  # fmt: skip
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{7*7}}"
COLOURS = {"light": 0, "dark": 1, "print": 2}


class Page(HTMLParser):
    """A page as a parser sees it: elements with attributes, the text of scripts, and all other text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.text = ""
        self.style = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif inside == "style":
            self.style += data
        else:
            self.text += data

    @property
    def charts(self) -> list[dict]:
        return [json.loads(text) for attributes, text in self.scripts if attributes.get("type") == "application/json"]

    def curve(self, label: str) -> dict:
        return next(row for chart in self.charts for row in chart["rows"] if row["label"] == label)


def make_run(folder: Path, rows: list[dict], **files: object) -> Page:
    """A run folder with these metrics and files (NAME_EXTENSION=content), and its page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / ".".join(name.rsplit("_", 1))).write_text(text)
    return Page(write_report(folder).read_text(encoding="utf-8"))


def random_rows(steps: int) -> list[dict]:
    chance = random.Random(0)
    return [{"step": s, **{name: chance.uniform(0.1, 0.9) for name in SPEC_NAMES}} for s in range(1, steps + 1)]


# --- the page ---------------------------------------------------------------------------------------------------


def test_a_folder_without_metrics_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl here\. Name the run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_text_from_models_recipes_and_names_is_escaped(tmp_path: Path) -> None:
    sample = {"step": 1, "problem": ATTACK, "prompt": ATTACK, "response": ATTACK, "reward": 1.0, "correct": True}
    page = make_run(
        tmp_path / "run <script>alert(3)<",
        [{"step": 1, "train/accuracy": 0.5, f"eval/{ATTACK}/avg@4": 0.5, f"odd/{ATTACK}": 0.5}],
        samples_jsonl=json.dumps(sample | {"length": 3, "finish": ATTACK}) + "\n",
        recipe_toml=f"# {ATTACK}\nname = 'x'\n",
        precision_json=[[ATTACK, ATTACK, ATTACK]],
        mismatch_json=[{"precision": ATTACK, "kl_k3": 1e-5}, {"precision": "bf16", "kl_k3": 1e-3}],
        summary_json={ATTACK: ATTACK},
    )
    assert page.text.count("alert(1)") >= 9
    assert "{{7*7}}" in page.text
    runnable = [attributes for attributes, _ in page.scripts if attributes.get("type") != "application/json"]
    assert runnable == [{}]
    assert not [tag for tag, _ in page.elements if tag == "img"]
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]


def test_the_policy_allows_this_one_script_only(tmp_path: Path) -> None:
    page = make_run(tmp_path, random_rows(2))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a) or ""
    script = next(text for attributes, text in page.scripts if not attributes)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = make_run(tmp_path, random_rows(3), recipe_toml="# see https://example.org/a")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    assert "url(" not in page.style
    assert "@import" not in page.style
    script = next(text for attributes, text in page.scripts if not attributes)
    assert not re.search(r"fetch|XMLHttpRequest|import\(|WebSocket|innerHTML", script)
    assert "https://example.org/a" in page.text  # text may say what it likes


def test_every_metric_of_the_specification_is_drawn(tmp_path: Path) -> None:
    rows = random_rows(5)
    page = make_run(tmp_path, rows)
    shown = {tuple(row["text"]) for chart in page.charts for row in chart["rows"]}
    drawn = {tuple(t) for t in shown}
    for name in SPEC_NAMES:
        if name in ("optim/skipped", "time/step"):  # crosses on the loss scale; the height of the pile
            continue
        values = [row[name] for row in rows]
        ways = [number, percent, scientific, power_of_two, seconds]
        ways += [lambda v: f"{v:,.0f}", lambda v: f"{v:.2%}"]
        assert any(tuple(map(way, values)) in drawn for way in ways), name


def test_a_metric_nobody_foresaw_is_shown_too(tmp_path: Path) -> None:
    rows = [{"step": s, "custom/thing": s * 1.5, "custom/still": 7} for s in (1, 2, 3)]
    page = make_run(tmp_path, rows)
    assert page.curve("thing")["text"] == ["1.5", "3", "4.5"]
    assert "custom/still 7" in page.text


def test_the_verdict_and_key_numbers_are_the_runs(tmp_path: Path) -> None:
    rows: list[dict] = [
        {"step": s, "train/accuracy": a, "optim/skipped": k, "optim/loss_scale": 1024.0, "mismatch/kl_k3": 3e-6}
        for s, a, k in ((1, 0.25, 1), (2, 0.5, 1), (3, 0.875, 0))
    ]
    table = [{"precision": "fp16", "kl_k3": 3e-6}, {"precision": "bf16", "kl_k3": 1.5e-4}]
    page = make_run(tmp_path, rows, mismatch_json=table, recipe_toml="steps = 9\n")
    assert "Training accuracy rose from 25.0% to 87.5% over 3 steps so far." in page.text
    assert "BF16’s mismatch is 50 times FP16’s" in page.text
    assert "3 of 9" in page.text
    assert "skipped updates2loss scale 2¹⁰ at the end" in page.text
    page = make_run(tmp_path, rows, recipe_toml="steps = 3\n")
    assert "so far" not in page.text


def test_a_run_being_written_can_be_reported(tmp_path: Path) -> None:
    make_run(tmp_path, random_rows(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/acc')
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "correct": true}\n{"step": 2, "pro')
    page = Page(write_report(tmp_path, tmp_path / "elsewhere" / "page.html").read_text())
    assert page.charts[0]["x"] == [1, 2, 3]
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not JSON"):
        write_report(tmp_path)


NULLS = {name: None for name in SPEC_NAMES}
CASES: dict[str, list[dict]] = {
    "no rows": [],
    "one step": random_rows(1),
    "two steps": random_rows(2),
    "all zero": [{"step": s, **dict.fromkeys(SPEC_NAMES, 0.0)} for s in range(1, 9)],
    "constant": [{"step": s, **dict.fromkeys(SPEC_NAMES, 0.3)} for s in range(1, 9)],
    "all null": [{"step": s, **NULLS} for s in range(1, 4)],
    "only evaluations": [{"step": 0, "eval/a/avg@1": 0.5}],
    "extremes": [{"step": s, **dict.fromkeys(SPEC_NAMES, (-1) ** s * 1e308)} for s in range(1, 9)],
    "subnormals": [{"step": s, **dict.fromkeys(SPEC_NAMES, s * 5e-324)} for s in range(1, 9)],
    "not numbers": [{"step": 1, "train/reward": "high", "train/accuracy": True, "a/b": [1]}],
    "sparse steps": [{"step": 10**s, "train/accuracy": 0.1 * s} for s in range(7)],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
def test_odd_runs_give_whole_pages(tmp_path: Path, rows: list[dict]) -> None:
    page = make_run(tmp_path, rows)
    assert page.open == []
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("d", "x", "y", "cx", "cy", "width", "height", "viewbox"):
                assert not re.search(r"nan|inf|None", value or ""), (tag, name, value)


def test_pictures_have_titles_and_descriptions(tmp_path: Path) -> None:
    page = make_run(tmp_path, random_rows(4), mismatch_json=[{"precision": "fp16", "kl_k3": 1e-6}])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    pictures = [a for tag, a in page.elements if tag == "svg"]
    assert len(pictures) >= 10
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)


def test_samples_come_from_first_middle_and_last_step(tmp_path: Path) -> None:
    samples = [
        {"step": s, "prompt": "p", "response": f"said {s} {c}\x00\x1b", "reward": 0.0, "correct": c == "right",
         "length": 3, "finish": "stop", "problem": "x"}
        for s in range(1, 8) for c in ("wrong", "right", "right")
    ]  # fmt: skip
    lines = "".join(json.dumps(s) + "\n" for s in samples)
    page = make_run(tmp_path, random_rows(7), samples_jsonl=lines)
    said = re.findall(r"said (\d) (\w+)", page.text)
    assert said == [(s, c) for s in "147" for c in ("right", "wrong")]
    assert "␀␛" in page.text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("mode", COLOURS)
def test_colours_have_contrast(tmp_path: Path, mode: str) -> None:
    """WCAG: 4.5 for text, 3 for what is drawn."""
    style = make_run(tmp_path, []).style
    block = re.findall(r":root \{(.*?)\}", style, flags=re.S)[COLOURS[mode]]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    assert len(colours) > 25
    surfaces = [luminance(colours[name]) for name in ("card", "paper")]
    for name, colour in colours.items():
        if name in ("paper", "card", "line", "grid", "rest"):
            continue
        need = 1.7 if name.startswith("phase") else 4.5  # areas of time are also told apart by place and read-out
        for surface in surfaces:
            light, dark = sorted([luminance(colour), surface], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= need, (name, colour)


# --- charts -----------------------------------------------------------------------------------------------------


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+),([-\d.]+)", path)]


def lines_of(svg: str, kind: str = "line") -> list[list[tuple[float, float]]]:
    return [points(d) for d in re.findall(rf'<path d="([^"]*)" class="{kind} ', svg)]


def test_a_curve_lies_where_its_values_are() -> None:
    x, y = [1, 2, 3, 5, 9], [0.0, 10.0, 5.0, 2.5, 7.5]
    drawn = draw(Figure("t", [Panel([Series("a", x, y)], axis.linear(y))]), axis.steps(1, 9), "f")
    (line,) = lines_of(drawn.svg)
    assert len(line) == 5
    (left, bottom), (_, top) = line[0], line[1]
    right = line[-1][0]
    for (px, py), step, value in zip(line, x, y, strict=True):
        assert px == pytest.approx(left + (step - 1) / 8 * (right - left), abs=0.06)
        assert py == pytest.approx(bottom + value / 10 * (top - bottom), abs=0.06)
    assert drawn.data["px"] == pytest.approx([p for p, _ in line])
    assert drawn.data["rows"][0]["y"] == pytest.approx([p for _, p in line])


def test_on_a_logarithmic_axis_decades_are_equally_far_apart() -> None:
    y = [1e-6, 1e-5, 1e-4, 1e-3]
    drawn = draw(Figure("t", [Panel([Series("a", range(4), y)], axis.log10(y))]), axis.steps(0, 3), "f")
    (line,) = lines_of(drawn.svg)
    heights = [py for _, py in line]
    assert [a - b for a, b in pairwise(heights)] == pytest.approx([heights[0] - heights[1]] * 3, abs=0.25)


def test_nulls_are_gaps_and_lone_values_are_dots() -> None:
    y = [1.0, 2.0, None, 3.0, None, None, 2.0, 1.0]
    drawn = draw(Figure("t", [Panel([Series("a", range(8), y)], axis.linear(y))]), axis.steps(0, 7), "f")
    assert [len(line) for line in lines_of(drawn.svg)] == [2, 2]
    assert drawn.svg.count("<circle") == 1
    assert drawn.data["rows"][0]["text"] == ["1", "2", "–", "3", "–", "–", "2", "1"]
    assert [v is None for v in drawn.data["rows"][0]["y"]] == [v is None for v in y]


def test_evaluations_are_joined_and_held_until_the_next() -> None:
    sparse = Series("e", range(5), [0.5, None, 0.7, None, None], style="points", show=percent)
    drawn = draw(Figure("t", [Panel([sparse], axis.linear([0, 1]))]), axis.steps(0, 4), "f")
    assert [len(line) for line in lines_of(drawn.svg)] == [2]
    assert drawn.data["rows"][0]["text"] == ["50.0%", "50.0%", "70.0%", "70.0%", "70.0%"]
    assert drawn.readout == [("plain", "e", "70.0%")]


def test_a_spike_of_one_step_among_thousands_is_drawn() -> None:
    y: list[float | None] = [1.0] * 5000
    y[3217] = 9.0
    drawn = draw(Figure("t", [Panel([Series("a", range(5000), y)], axis.linear(y, low=0))]), axis.steps(0, 4999), "f")
    (band,) = lines_of(drawn.svg, "band")
    (line,) = lines_of(drawn.svg)
    assert len(line) <= 400
    level, top = line[0][1], min(py for _, py in band)
    zero = 10.0 + 128.0
    assert (zero - top) / (zero - level) == pytest.approx(9.0, rel=0.01)
    spike = next(px for px, py in band if py == top)
    assert spike == pytest.approx(line[0][0] + 3217 / 4999 * (line[-1][0] - line[0][0]), abs=1.5)


def test_a_pile_is_as_high_as_its_sum_and_has_gaps() -> None:
    a, b = [1.0, 2.0, None, 1.0], [3.0, 2.0, None, 0.5]
    stack = Panel([Series("a", range(4), a), Series("b", range(4), b)], axis.linear([4.0], low=0), stacked=True)
    drawn = draw(Figure("t", [stack]), axis.steps(0, 3), "f")
    areas = lines_of(drawn.svg, "area")
    assert len(areas) == 4  # two series, in two blocks each
    zero, top = 10.0 + stack.height, 10.0
    assert min(py for _, py in areas[2]) == pytest.approx(top)
    assert {round((zero - py) / (zero - top) * 4, 2) for _, py in areas[3]} == {1.0, 1.5}


def test_skipped_steps_are_crossed_out() -> None:
    panel = Panel([Series("s", [1, 2, 3], [4.0, 2.0, 2.0], style="stairs")], axis.log2([4, 2]), marks=[2])
    drawn = draw(Figure("t", [panel]), axis.steps(1, 3), "f")
    assert drawn.svg.count('class="cross"') == 1
    assert stairs([(0, 0), (1, 5), (2, 3)]) == [(0, 0), (1, 0), (1, 5), (2, 5), (2, 3)]


VALUES = {
    "zeros": [0.0, 0.0],
    "constant": [143.0] * 3,
    "negative constant": [-2e-5] * 3,
    "nothing": [],
    "small": [1e-7, 3e-7],
    "around zero": [-0.3, 0.8],
    "far from zero": [100.0, 101.0],
    "large": [0.0, 48213.0],
    "huge": [-1e308, 1e308],
    "nearly constant": [1.0, 1.0 + 2**-52],
    "subnormal": [5e-324, 1e-323],
}


def meant(label: str, unit: str) -> float:
    """What a tick label says."""
    text = label.replace("−", "-").replace(",", "")
    factor = 1.0
    if text.endswith("k"):
        text, factor = text[:-1], 1000.0
    if unit:
        power = unit.removeprefix("×10").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
        factor *= 10.0 ** int(power)
    return float(text) * factor


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_linear_axes_hold_their_values_and_say_the_truth(values: list[float]) -> None:
    made = axis.linear(values)
    assert made.low < made.high
    assert 2 <= len(made.ticks) <= 9
    labels = [label for _, label in made.ticks]
    assert len(set(labels)) == len(labels)
    for position, label in made.ticks:
        assert meant(label, made.unit) == pytest.approx(position, rel=0.02, abs=(made.high - made.low) * 0.02)
    for value in values:
        if abs(value) < 1e300:
            assert made.low - 1e-9 * abs(value) <= value <= made.high + 1e-9 * abs(value)
            assert 0 <= (made.at(value) or 0.0) <= 1


def test_zeros_have_a_place_on_a_logarithmic_axis() -> None:
    made = axis.log10([0.0, 1e-6, 1e-4])
    assert made.ticks[0] == (-7.0, "0")
    assert made.at(0.0) == 0.0
    assert made.at(1e-4) == 1.0
    assert axis.log10([0.0, 0.0]).at(0.0) == 0.0
    assert axis.log10([1e-6, 1e-4]).at(0.0) is None


@pytest.mark.parametrize(("first", "last"), [(1, 1), (0, 1), (1, 2), (1, 7), (1, 120), (0, 40), (7, 100_000), (-3, 3)])
def test_step_ticks_are_whole_distinct_steps(first: int, last: int) -> None:
    made = axis.steps(first, last)
    at = [position for position, _ in made.ticks]
    assert all(position == int(position) and first <= position <= last for position in at)
    assert len({label for _, label in made.ticks}) == len(at) >= 1
    assert len(at) <= 8


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread([50, 51, 90], 12, 0, 100) == [50, 62, 90]
    assert spread([99, 98, 10], 12, 0, 100) == [100, 88, 10]
    assert spread([20, 60], 12, 0, 100) == [20, 60]


def test_the_trend_is_a_centred_mean_over_what_is_known() -> None:
    values = [float(i) for i in range(100)]
    assert trend(values)[10:90] == pytest.approx(values[10:90])
    gappy: list[float | None] = [1.0, None, 3.0, 5.0]
    assert trend(gappy) == [2.0, None, 3.0, 4.0]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (number(0.0), "0"), (number(1234567), "1,234,567"), (number(0.0312), "0.0312"), (number(-2.5), "−2.5"),
        (number(3.3e-6), "3.30·10⁻⁶"), (number(math.inf), "∞"), (scientific(2.04e-4), "2.0·10⁻⁴"),
        (power_of_two(65536.0), "2¹⁶"), (power_of_two(0.5), "2⁻¹"), (power_of_two(3.0), "3"),
        (seconds(0.318), "0.318 s"), (seconds(0.0021), "2.1 ms"), (seconds(47.2), "47 s"), (seconds(725), "12 min 5 s"),
        (seconds(12000), "3 h 20 min"),
        (percent(0.4839), "48.4%"),
    ],
)  # fmt: skip
def test_numbers_read_well(shown: str, text: str) -> None:
    assert shown == text


def test_alarms_and_a_sanity_verdict_are_on_the_page_and_harmless(tmp_path):
    folder = tmp_path
    evil = "<script>alert(1)</script>"
    rows = [{"step": i, "train/accuracy": 0.5} for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alarm = {"step": 3, "level": "warn", "signal": "kl", "reason": f"it grew {evil}", "remedy": f"lower it {evil}"}
    note = {"step": 2, "level": "note", "signal": "kl", "reason": "a spike", "remedy": "nothing to do"}
    (folder / "alarms.jsonl").write_text(json.dumps(note) + "\n" + json.dumps(alarm) + "\n")
    evidence = {
        "kl_k3": {"start": 2e-6, "peak": None, "end": 5e-5},
        "prob_diff": 0.75,
        "prob_diff_step": 3,
        "skipped": 2,
    }
    verdict = {"verdict": "collapsed", "reason": f"fell {evil}", "evidence": evidence}
    (folder / "sanity.json").write_text(json.dumps(verdict))
    page = write_report(folder).read_text()
    assert evil not in page
    for words in (
        "Sanity test: collapsed",
        "2.0·10⁻⁶",
        "5.0·10⁻⁵",
        "0.75, at step 3",
        "Updates skipped: 2",
        "it grew",
        "lower it",
    ):
        assert words in page, words
    assert "nothing to do" not in page  # a note needs no remedy
