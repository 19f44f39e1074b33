"""The documentation site: built without a warning, complete, and as a real browser shows it, with nothing fetched.

UNLOCKED_SCREENSHOTS=FOLDER keeps what the browser showed.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser, open_browser

pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"start page": "index.html", "notebook": "notebooks/pipeline_fills.html", "reference": "api/training.html"}
# Nobody answers for any other name: what would be fetched from elsewhere fails, and is seen to.
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(source / "mkdocs.yml"), "-d", str(target)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # Material's word about another version of mkdocs
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    built = build(ROOT, target)
    assert built.returncode == 0, built.stderr[-3000:]
    assert not re.search("warning|error", built.stderr, re.IGNORECASE), built.stderr[-3000:]
    return target


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser"), ALONE) as opened:
        yield opened


class References(HTMLParser):
    """What a page makes a browser fetch, and the pages that it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        if tag == "a":
            self.links += [values["href"]] if "href" in values else []
        elif tag == "link":
            self.fetched += [values["href"]] if values.get("rel") not in ("canonical", "next", "prev") else []
        else:
            self.fetched += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]


def foreign(references: list[str]) -> list[str]:
    return [one for one in references if re.match(r"(?:https?:)?//", one)]


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    assert {page.name: found for page in pages if (found := foreign(References(page.read_text()).fetched))} == {}
    styles = [path for path in site.rglob("*.css") if re.search(r"url\(['\"]?(?:https?:)?//|@import", path.read_text())]
    assert styles == []


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    """Also those that Markdown does not know: of notebooks, of the reference, of raw HTML."""
    broken = []
    for page in sorted(site.rglob("*.html")):
        for link in References(page.read_text()).links:
            path = link.partition("#")[0]
            if path and not re.match(r"[a-z]+:|//", path) and page.name != "404.html":
                target = (page.parent / path).resolve()
                if not target.exists():
                    broken.append((str(page.relative_to(site)), link))
    assert broken == []


def test_every_notebook_and_every_linked_source_is_a_page(site: Path) -> None:
    books = [path.stem for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")]
    assert len(books) == 4
    for name in books:
        text = (site / "notebooks" / f"{name}.html").read_text()
        assert 'class="cell-output"' in text
        assert (site / "notebooks" / f"{name}.ipynb").exists()
    assert "class StageLoop" in re.sub(r"<[^>]+>", "", (site / "source" / "workers" / "loop.py.html").read_text())


def test_the_reference_shows_settings_as_values(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "training.html").read_text())
    assert re.search(r"seed: int = 0\b", text)
    assert "setting(" not in text
    assert "Keys initialisation, shuffling, augmentation and dropout (at least 0)." in text


@pytest.mark.alone
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser: Browser, address: str, width: int, scheme: str) -> None:
    browser.look_as(width, scheme)
    for name, path in PAGES.items():
        fetched = browser.open(address + path)
        assert browser.complaints() == []
        assert address + path in fetched
        assert [url for url in fetched if not url.startswith(address)] == []
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), name
        assert browser.find("article h1").is_displayed()
        background = browser.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert max(background[:3]) < 60 if scheme == "dark" else min(background[:3]) > 240, (name, background)
        keep(browser, f"{name}-{width}-{scheme}")
    browser.open(address + PAGES["start page"])
    shown = browser.run("""
        return [...document.querySelectorAll('.picture svg')].filter(svg => svg.getClientRects().length)
          .map(svg => [svg.classList[0], svg.getBoundingClientRect().width,
                       getComputedStyle(svg.querySelector('text')).fill]);
    """)
    assert [form for form, _, _ in shown] == ["narrow" if width < 600 else "wide"]
    assert shown[0][1] > min(width, 600) * 0.85
    ink = [int(part) for part in re.findall(r"\d+", shown[0][2])[:3]]
    assert min(ink) > 160 if scheme == "dark" else max(ink) < 100  # on the page's own background


@pytest.mark.alone
def test_every_page_fits_a_phone_and_fetches_nothing(browser: Browser, site: Path, address: str) -> None:
    browser.look_as(390, "light")
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    wide, fetched = [], []
    for page in pages:
        if not page.startswith("source/") and page != "404.html":
            fetched += browser.open(address + page)
            if browser.run("return document.documentElement.scrollWidth > window.innerWidth"):
                wide.append(page)
    assert wide == []
    assert [url for url in fetched if not url.startswith(address)] == []
    assert browser.complaints() == []


@pytest.mark.alone
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("opened", ["from a server", "from a file"])
def test_searching_finds_a_page(browser: Browser, site: Path, address: str, opened: str, width: int) -> None:
    browser.look_as(width, "light")
    home = address if opened == "from a server" else site.as_uri() + "/"
    fetched = browser.open(home + "index.html")
    if width < 600:
        browser.find("label[for=__search].md-header__button").click()
    field = browser.find("input.md-search__input")
    browser.wait("return document.querySelector('input.md-search__input').getClientRects().length > 0")
    field.send_keys("modulation")
    links = browser.wait("""
        const found = [...document.querySelectorAll('a.md-search-result__link')];
        return found.length ? found.map(a => a.href) : null;
    """)
    assert any("/rules.html" in link for link in links)
    keep(browser, f"search-{opened}-{width}".replace(" ", "-"))
    fetched += browser.fetched()
    assert [url for url in fetched if not url.startswith((home, "about:"))] == []
    assert browser.complaints() == []


def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("UNLOCKED_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.driver.save_screenshot(str(Path(folder, f"{name.replace(' ', '-')}.png")))


def test_a_page_that_fetches_is_seen(browser: Browser, tmp_path: Path) -> None:
    """The check of the checks: a script from elsewhere, in the text and in the browser."""
    page = tmp_path / "page.html"
    page.write_text(
        '<link rel="stylesheet" href="//fonts.example/css"><script src="https://cdn.example/a.js"></script>'
    )
    assert foreign(References(page.read_text()).fetched) == ["//fonts.example/css", "https://cdn.example/a.js"]
    assert "https://cdn.example/a.js" in browser.open(page.as_uri())
    assert browser.complaints() != []


def test_mistakes_fail_the_build(tmp_path: Path) -> None:
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("docs", "scripts", "site"):
            (tmp_path / path.name).symlink_to(path)
    docs = tmp_path / "docs"
    shutil.rmtree(docs / "api")  # they take most of a build's time; that they are missing is one mistake more
    (docs / "command_line.md").unlink()
    (docs / "forgotten.md").write_text("# In no list\n")
    (docs / "start.md").write_text("[a](nowhere.md), [b](rules.md#no-such-heading)\n")
    built = build(tmp_path, tmp_path / "built")
    assert built.returncode != 0
    for told in ("forgotten.md", "nowhere.md", "no-such-heading", "api/training.md"):
        assert told in built.stderr
