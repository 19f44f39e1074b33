"""The page: complete, offline, honest about what is missing, and as a real browser shows it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CONTRAST, Browser, open_browser
from sample_report import sample_memory, sample_report, sample_stages

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from unlocked.comparison.memory.page import memory_section
from unlocked.comparison.report.page import write_page
from unlocked.comparison.report.sections import Section
from unlocked.comparison.results import Report
from unlocked.comparison.stages.page import stages_section


def _studies() -> list[Section]:
    return [memory_section(sample_memory()), stages_section(sample_stages())]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(sample_report(), path, studies=_studies())
    return path


class Tags(HTMLParser):
    """Ids, links and headings of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [str(values[name]) for name in ("href", "src", "srcset", "action", "data") if values.get(name)]
        if tag == "svg":
            self.images.append(values)


def test_nothing_is_fetched(page: Path) -> None:
    text = page.read_text()
    tags = Tags(text)
    assert {link for link in tags.links if not link.startswith("#")} == {"data:,"}
    assert not re.search(r"https?:|@import|url\((?!#)|<script", text)
    assert len(text) < 2_000_000


def test_the_page_is_well_formed(page: Path) -> None:
    tags = Tags(page.read_text())
    assert len(tags.ids) == len(set(tags.ids))
    targets = {link[1:] for link in tags.links if link.startswith("#")}
    assert targets <= set(tags.ids)
    assert len(tags.images) == 2 * 7
    for image in tags.images:
        assert image["role"] == "img"
        assert len(image["aria-label"] or "") > 30


def test_everything_is_on_it(page: Path) -> None:
    text = page.read_text()
    report = sample_report()
    for title in (
        "Throughput",
        "Accuracy",
        "Where a step&#39;s time goes",
        "timelines",
        "logged run",
        "depth",
        "ran on",
    ):
        assert title in text
    for contender in report.contenders:
        assert contender.name in text
    assert "failed: RuntimeError: a &lt;made-up&gt; failure &amp; its reason" in text
    assert "not run: needs a CUDA device" in text
    assert "9 minutes by BP against 11 minutes by LLS" in text
    assert report.settings.command in text
    assert "4,500" in text


def test_what_was_not_measured_leaves_no_hole(tmp_path: Path) -> None:
    report = sample_report()
    bare = replace(
        report,
        contenders=tuple(replace(c, status="failed", reason="broke", runs=()) for c in report.contenders),
        timelines=(),
        logged=None,
    )
    write_page(bare, tmp_path / "bare.html")
    text = (tmp_path / "bare.html").read_text()
    assert "Nothing to compare" in text
    assert text.count("broke") == 2 * len(report.contenders)
    assert "<svg" not in text


def test_the_same_report_gives_the_same_page(page: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    write_page(
        Report.from_json(sample_report().to_json()),
        again,
        studies=_studies(),
    )
    assert again.read_bytes() == page.read_bytes()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.alone
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.look_as(width, scheme)
    assert browser.open(page.as_uri()) == [page.as_uri()]
    assert browser.complaints() == []

    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    shown = browser.find("#verdict")
    assert shown.is_displayed()
    assert "1.15 times" in shown.text
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]

    texts = browser.run(CONTRAST)
    assert len(texts) > 100
    assert [t for t in texts if t["contrast"] < 4.5] == []
    assert [t for t in texts if t["height"] < 9] == []
    visible = "return [...document.querySelectorAll('svg')].filter(e => e.getClientRects().length).length"
    assert browser.run(visible) == 7
    cut = """
        return [...document.querySelectorAll('svg')].filter(e => e.getClientRects().length).flatMap(svg => {
          const frame = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('text')].filter(t => {
            const box = t.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1;
          }).map(t => t.textContent);
        });
    """
    assert browser.run(cut) == []


@pytest.mark.alone
def test_a_browser_sees_a_request_and_an_overflow(browser: Browser, tmp_path: Path) -> None:
    """The check of the browser's checks: a page that breaks them is seen to."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="missing.png" width="2000"><p style="color:#999">pale</p>')
    assert len(browser.open(bad.as_uri())) == 2
    assert browser.complaints() != []
    assert browser.run("return document.documentElement.scrollWidth > window.innerWidth")
    assert [t["text"] for t in browser.run(CONTRAST) if t["contrast"] < 4.5] == ["pale"]


def test_without_matplotlib_one_line_says_so(tmp_path: Path) -> None:
    code = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, p=None: None if n == 'matplotlib' else find(n, p)\n"
        "from unlocked.comparison.report.figures import require_plotting\n"
        "require_plotting()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "ValueError: the page needs matplotlib, which is not installed; pip install 'unlocked[report]'" in done.stderr
    )
