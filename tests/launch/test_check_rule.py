"""`unlocked check-rule`: on the template, on the rules of the page that teaches them, and on what is no rule."""

import re
from pathlib import Path
from typing import Any

import pytest

from unlocked.launch.check_rule import find_rule, main
from unlocked.rules import MonoForward
from unlocked.runtime.conformance import train_small

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "examples" / "rule_template.py"
PAGE = (ROOT / "docs" / "add_a_rule.md").read_text()


@pytest.mark.alone
def test_the_template_passes_in_processes_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(TEMPLATE)]) == 0
    lines = capfd.readouterr().out.splitlines()
    names = ["fits", "deterministic", "exact", "resumable", "exact over processes", "local", "cost"]
    assert [re.match(r"ok +([\w ]+):", line)[1] for line in lines] == names  # type: ignore[index]
    shown = re.findall(r"^ok +([\w ]+):", PAGE, re.MULTILINE)
    assert shown == names


@pytest.mark.parametrize("number", [0, 1])
def test_the_rules_of_the_page_train(number: int, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[number]
    file = tmp_path / f"page{number}.py"
    file.write_text(code)
    rule: Any = find_rule(str(file), None)
    if number:  # Oja's is for linear blocks
        rule = [MonoForward, MonoForward, rule]
    assert train_small(rule).steps == 10


def test_a_rule_that_leaks_ends_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "leaking.py"
    file.write_text(
        "import torch\n"
        "from unlocked.rules import LocalRule\n"
        "class Leaking(LocalRule):\n"
        "    last = torch.zeros(())\n"
        "    def forward(self, activations, labels):\n"
        "        loss = (activations.mean() - Leaking.last) ** 2\n"
        "        Leaking.last = activations.detach().mean()\n"
        "        return loss\n"
    )
    assert main([str(file), "--no-processes"]) == 1
    assert re.search(r"^FAILED +local: other start values of layer \w+ change", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (None, [], "is neither a file nor a rule of the library; those are LLS"),
        ("x = 1", [], "has the rules none; say which"),
        ("1 / 0", [], "can't be imported: ZeroDivisionError"),
        (
            "from unlocked.rules import LocalRule\nclass A(LocalRule): ...\nclass B(LocalRule): ...",
            [],
            "has the rules A, B",
        ),
        ("from unlocked.rules import LocalRule\nclass A(LocalRule): ...", ["C"], "has no C; its rules are A"),
    ],
)
def test_what_is_no_rule(
    text: str | None, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    assert main([str(file), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
