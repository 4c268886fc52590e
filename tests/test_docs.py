"""What the documents say is true: files they name exist, commands and snippets in them run (pitfall 30)."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import tenbit

from tenbit import Recipe
from tenbit.cli import app
from tenbit.precision import Precision
from tenbit.studies import audit_plan, evaluation_plan, perfectible_plan, probe_plan
from tenbit.studies.ablation import make_grid
from tenbit.tasks.datasets import shipped
from tenbit.tasks.templates import find_template

ROOT = Path(__file__).parents[1]
PAGES = [p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if p.name != "CHANGELOG.md"]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_documents_exist(page):
    named = re.findall(r"`((?:tenbit|tests|benchmarks|recipes|docs)/[\w./-]+\.\w+)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def fences(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block. Line by line: a closing fence looks like an opening one."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                found.append((line.strip().strip("`"), []))
        elif inside:
            found[-1][1].append(line)
    assert not inside, "a fence is not closed"
    return [(language, "\n".join(lines) + "\n") for language, lines in found]


def fenced(language: str) -> list[str]:
    return [content for name, content in fences(README) if name == language]


def commands_of(text: str) -> list[list[str]]:
    """Every `tenbit ...` in a fence that a shell would run, [name, argument, ...]; under torchrun, too."""
    found = []
    for language, block in fences(text):
        if language in ("", "bash", "sh"):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = shlex.split(line, comments=True)
                at = next((i for i, word in enumerate(words) if word in ("tenbit", ".venv/bin/tenbit")), None)
                if at == 0 or (at and words[at - 1] == "-m"):
                    found.append(words[at + 1 :])
    return found


def test_a_block_after_one_with_a_language_is_read():
    text = "a\n```python\nx = 1\n```\ntenbit no\n```\ntenbit one a  # b\n```\n"
    text += "\n- c\n\n  ```bash\n  go -m tenbit two \\\n    b\n  ```\n"
    assert [language for language, _ in fences(text)] == ["python", "", "bash"]
    assert commands_of(text) == [["one", "a"], ["two", "b"]]


def test_make_targets_exist():
    targets = re.findall(r"^make ([a-z-]+)", "\n".join(fenced("")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert set(targets) == {"demo", "test", "vllm-cpu", "scaling"}
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)


OWN = "recipes/sanity.toml model.path=/models/my-model task.data=my.jsonl task.template=chat --out runs/mine"
IN_README = f"""
train {OWN}
train {OWN} --resume
algorithms
precisions
recipes
report RUN
probe builtin --prompts 4 --samples 2 --out runs/probe
evaluate builtin --data arithmetic_test --limit 8 --samples 2 --out runs/scores
audit MODEL --data FILE --out runs/audit
audit MODEL --data FILE --apply recipes/sanity.toml
train recipes/demo.toml rollout.engine=vllm
plan recipes/dense_14b.toml --gpus 64 --memory 80
train recipes/sanity.toml rollout.engine=vllm
perfectible MODEL --data FILE --out mine.jsonl
sanity recipes/cpu/sanity.toml
ablate recipes/cpu/sanity.toml --precision fp16,bf16 --algorithm pg-is,grpo --seeds 3
report runs/ablation-sanity --out page.html
"""
RUN_HERE = ("algorithms", "precisions", "recipes", "plan")  # in no time, and without writing anything


def test_the_commands_of_the_readme_are_these():
    """So that none is left untested because it is not found."""
    assert commands_of(README) == [line.split() for line in IN_README.strip().splitlines()]


@pytest.mark.parametrize("words", [w for w in commands_of(README) if w[0] in RUN_HERE], ids=" ".join)
def test_the_quick_commands_of_the_readme_run(words):
    done = tenbit(*words, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [w for w in commands_of(README) if w[0] in ("probe", "evaluate")], ids=" ".join)
def test_the_first_looks_of_the_readme_run(words, tmp_path):
    done = tenbit(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- every command of every page, without running it

# The reader's own, and models of the Hugging Face hub.
MODELS = re.compile(r"[A-Z]+$|builtin$|/models/|runs/|my-model$|[\w.-]+/[\w.-]+$")
RUNS = re.compile(r"[A-Z]+(\.\.\.)?$|runs/")


def understood(words: list[str]) -> dict[str, Any]:
    """The command's parameters, parsed by the real command line, which refuses what it does not know."""
    name, *rest = words
    return typer.main.get_command(app).commands[name].make_context(name, rest).params  # pyright: ignore


def check(words: list[str]) -> None:
    """Raises for a command that would be refused: its options, its recipe with the overrides, the files it names."""
    name, given = words[0], understood(words)
    more = given.get("overrides") or []
    for source in _sources(given):
        assert source in shipped() or source == "FILE" or source.endswith((".jsonl", ".parquet")), source
    if given.get("template"):
        find_template(given["template"])
    if "recipe" in given:
        recipe = _recipe(given["recipe"])
        if recipe is None:
            assert name == "sanity", f"{given['recipe']}: a folder"
        elif name == "ablate":
            lists = {k: [v for v in given[k].split(",") if v] for k in ("precision", "algorithm")}
            listed = {"precisions": lists["precision"], "algorithms": lists["algorithm"], "seeds": given["seeds"]}
            assert make_grid(recipe, more, **listed)
        else:
            assert Recipe.load(recipe, more)
    elif name in PLANS:
        if given.get("model") is not None:
            assert MODELS.match(given["model"]), given["model"]
            PLANS[name](given)
    elif name == "watch":
        keys = [item for item in given["runs"] if "=" in item]
        assert Recipe.load(ROOT / "recipes" / "demo.toml", keys)
        assert all(RUNS.match(run) for run in given["runs"] if run not in keys)
    elif name == "report":
        assert all(RUNS.match(str(run)) or (ROOT / run).exists() for run in given["runs"])


def _recipe(path: Path) -> Path | None:
    """The file, or what stands in for the reader's own; None for a run folder."""
    if str(path).startswith("recipes/"):
        assert (ROOT / path).is_file(), path
        return ROOT / path
    assert str(path) in ("RECIPE", "FOLDER", "RUN") or str(path).startswith("runs/"), path
    return ROOT / "recipes" / "demo.toml" if str(path).endswith((".toml", "RECIPE")) else None


def _sources(given: dict[str, Any]) -> list[str]:
    """The data sets that a command names."""
    data = given.get("data") or []
    keys = [item for item in given.get("more") or [] if "=" not in item]
    of_recipe = [o.partition("=")[2] for o in given.get("overrides") or [] if o.startswith("task.data=")]
    return [s.removesuffix("...") for s in [*([data] if isinstance(data, str) else data), *keys, *of_recipe]]


def _without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k not in ("model", "overrides", "out", "resume", *names)}


def _evaluate(given: dict[str, Any]) -> None:
    keys = [item for item in given["more"] or [] if "=" in item]
    sets = [*(given["data"] or []), *(item for item in given["more"] or [] if item not in keys)]
    # a run folder brings its sets
    own = ["arithmetic_test"] if given["model"].startswith("runs/") and not sets else sets
    evaluation_plan.make_plan(given["model"], data=own, **_without(given, "more", "data"), overrides=keys)


def _perfectible(given: dict[str, Any]) -> None:
    perfectible_plan.make_plan(given["model"], **_without(given), overrides=given["overrides"] or [])
    perfectible_plan.Files.of(given["out"])


def _probe(given: dict[str, Any]) -> None:
    data = given["data"] or (None if given["model"] == "builtin" else "arithmetic_test")
    options = _without(given, "rows", "named", "attribute", "data")
    probe_plan.make_plan(given["model"], data=data, **options, overrides=given["overrides"] or [])


def _audit(given: dict[str, Any]) -> None:
    options = {key: given[key] for key in ("data", "prompts", "samples", "max_tokens", "template", "seed")}
    target = ROOT / given["apply"] if given["apply"] else None
    audit_plan.make_plan(given["model"], options, given["precision"], target, given["overrides"] or [])


REFUSED = typer.BadParameter.__mro__[2]  # what the command line raises, click's ClickException
PLANS = {"audit": _audit, "evaluate": _evaluate, "perfectible": _perfectible, "probe": _probe}
EVERY = [(p, words) for p in PAGES for words in commands_of(p.read_text())]


@pytest.mark.parametrize(("page", "words"), EVERY, ids=[f"{p.name}: {' '.join(words)}" for p, words in EVERY])
def test_every_command_of_every_page_is_understood(page, words):
    check(words)


def test_pages_with_commands():
    """A page's commands are found at all."""
    named = {page.name for page, _ in EVERY}
    pages = "README evaluate paper_index perfectible probe report sampling_ahead scaling studies vllm watch"
    assert {f"{name}.md" for name in pages.split()} <= named


@pytest.mark.parametrize(
    "line",
    [
        "trian recipes/demo.toml", "train recipes/no.toml", "train recipes/demo.toml optim.lr=fast",
        "train recipes/demo.toml --ouput x", "sanity recipes/demo.toml precision=fp61",
        "ablate recipes/cpu/sanity.toml --algorithm grop", "ablate recipes/cpu/sanity.toml --precision fp17",
        "perfectible MODEL --data FILE --out mine.json", "perfectible builtin --data arithmetc --out mine.jsonl",
        "evaluate builtin --data math5000", "evaluate builtin --data math500 --samples many",
        "evaluate /models/my-model --data math500 --template chatt", "probe builtin --precision fp17",
        "watch RUN watch.kl.wran=4", "plan recipes/dense_14b.toml --gpu-s 64", "plan recipes/dense.toml",
        "report RUN --pgn", "report benchmarks/nothing",
    ],
)  # fmt: skip
def test_a_wrong_command_would_be_found(line):
    with pytest.raises((AssertionError, ValueError, KeyError, REFUSED)):
        check(line.split())


INLINE = [(p, code) for p in PAGES for code in re.findall(r"`tenbit ([a-z]+[^`]*)`", p.read_text())]


@pytest.mark.parametrize(("page", "code"), INLINE, ids=[f"{p.name}: {code}" for p, code in INLINE])
def test_commands_within_sentences_are_understood(page, code):
    """A name, alone or with an option, or a whole one."""
    words = code.split()
    if len(words) == 1 or (len(words) == 2 and words[1].startswith("--")):
        known = typer.main.get_command(app).commands[words[0]].params  # pyright: ignore
        assert set(words[1:]) <= {option for parameter in known for option in parameter.opts}
    else:
        check(words)


def test_the_python_snippet_runs(tmp_path, monkeypatch):
    """With fewer steps and problems than it asks for."""
    (snippet,) = fenced("python")
    smaller = '"steps=1", "rollout.prompts=2", "rollout.samples=2", "rollout.max_tokens=8", "eval.every=0"'
    code = snippet.replace('"steps=20"', smaller).replace("recipes/", f"{ROOT}/recipes/")
    assert code != snippet
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "runs" / "mine" / "model" / "config.json").is_file()


def test_the_precision_table_is_a_plan():
    (table,) = fenced("toml")
    plan = Precision.parse(tomllib.loads(table)["precision"])
    assert (plan.casting, plan.head, plan.loss_scale.interval) == ("autocast", "fp32", 1000)
