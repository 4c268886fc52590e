"""What the documents say is true: files they name exist, commands and snippets in them run (pitfall 30)."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from test_cli import tenbit
from typer.testing import CliRunner

from tenbit import Recipe
from tenbit.cli import app
from tenbit.precision import Precision

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


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_make_targets_exist():
    targets = re.findall(r"^make ([a-z-]+)", "\n".join(fenced("")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)


def test_every_tenbit_command_in_the_readme_is_understood():
    """Each is parsed by the real command line; `train` also resolves its recipe with its overrides."""
    lines = [line.split("#")[0].strip() for block in fenced("") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if re.match(r"(\.venv/bin/)?tenbit ", line)]
    assert len(commands) >= 6
    for _, name, *rest in commands:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
        if name == "train":
            recipe, *others = rest
            assert Recipe.load(ROOT / recipe, [o for o in others if "=" in o and not o.startswith("--")])
        elif name != "report":
            assert tenbit(name, *rest, cwd=ROOT).returncode == 0


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
