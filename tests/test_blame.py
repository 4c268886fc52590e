"""A message with a remedy is told from an error that nobody meant to raise."""

from __future__ import annotations

import json

import pytest

from tenbit import Recipe, cli
from tenbit.blame import NOT_OURS, was_raised_by_tenbit
from tenbit.precision import Format, Precision


@pytest.mark.parametrize(
    ("act", "own"),
    [
        (lambda: Precision.parse({"preset": "fp16", "casting": "autocast"}).deepspeed(), True),
        (lambda: Recipe.of({"steps": 1, "rollout": {"max_tokens": 8}, "stepz": 2}), True),
        (lambda: int("no number"), False),
        (lambda: json.loads("{"), False),
        (lambda: Format("fp17"), False),
    ],
    ids=["plan", "recipe", "int", "json", "enum"],
)
def test_who_raised_it(act, own):
    with pytest.raises(ValueError) as seen:  # noqa: PT011
        act()
    assert was_raised_by_tenbit(seen.value) == own


def test_a_mistake_of_the_users_is_one_line_and_anything_else_says_how_to_see_it(tmp_path, monkeypatch, capsys):
    def run(error_of) -> str:
        monkeypatch.setattr(cli, "app", error_of)
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        return capsys.readouterr().err

    assert NOT_OURS in run(lambda: list(zip([1], [], strict=True)))
    assert run(lambda: Recipe.load(tmp_path / "missing.toml")).count("\n") == 1
