"""Files for people who contribute, cite or report: whole, and of this version."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import unlocked

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] == unlocked.__version__
    assert citation["license"] == project["license"]
    # What version 1.2.0 of the format asks of every file.
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Apolinario", "Roy", "Roy"]
    assert paper["title"].startswith("LLS: Local Learning Rule")
    assert paper["type"] == "conference-paper"


@pytest.mark.parametrize("name", ["bug", "idea", "figures"])
def test_an_issue_template_is_a_form(name: str) -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) > 1
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "markdown")
        assert field["attributes"]["label"]


def test_what_contributors_are_told_to_call_exists() -> None:
    text, makefile = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "Makefile").read_text()
    told = [line.split()[1] for line in text.splitlines() if line.startswith("make ")]
    assert told == ["test", "lint", "docs", "notebooks"]
    for target in told:
        assert f"\n{target}:" in makefile
