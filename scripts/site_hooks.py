"""What mkdocs can't do by itself for the documentation site (`mkdocs.yml` names this file; `make docs` builds).

- Files of the checkout that a page links to become pages of the site, so that every link works in a copy without a
  checkout or a network. The documents beside the README are pages of their own.
- Executed notebooks become pages, with the outputs that are kept in them. None is executed here.
- The pictures of `scripts/pictures.py` stand in the page itself: they take its colours, light or dark.
- The page of the command line has what `--help` says.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {
    ".md": "markdown",
    ".py": "python",
    ".sh": "bash",
    ".json": "json",
    ".cff": "yaml",
    ".toml": "toml",
    ".cu": "cuda",
}

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_kept: dict[str, str] = {}  # what takes a placeholder's place in the finished page, where no Markdown can touch it


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of something else.

    Raises:
        ValueError: a notebook that was not executed, or a link to a file that can't be shown.
    """
    _kept.clear()
    origins: dict[str, Path] = {}  # of each page's links, what they are relative to

    def add(uri: str, content: str) -> None:
        files.append(File.generated(config, uri, content=content))

    for name, uri in DOCUMENTS.items():
        add(uri, (ROOT / name).read_text())
        origins[uri] = ROOT
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        add(f"notebooks/{path.stem}.md", notebook_page(path))
    config.extra["origins"] = origins
    pages = [file for file in files if file.is_documentation_page()]
    for path in sorted({linked for page in pages for linked in _linked_sources(page, origins)}):
        add(_source_uri(path), source_page(path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the checkout lead to pages of the site; drawn pictures become placeholders."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    if uri == "command_line.md":
        markdown = f"{markdown}\n\n{all_help()}"
    here = _origin(uri, config.extra["origins"])

    def replaced(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = Path(os.path.normpath(here / target))
        if link["image"] and (narrow := path.with_stem(f"{path.stem}-narrow")).exists():
            return _placeholder(_picture(path, narrow, link["text"]))
        return f"{link['image']}[{link['text']}]({os.path.relpath(_site_uri(path), Path(uri).parent)}{anchor})"

    return "".join(part if part.startswith("```") else _LINK.sub(replaced, part) for part in _FENCE.split(markdown))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    return re.sub(r'<div data-kept="(\d+)"></div>', lambda found: _kept[found[1]], output)


def notebook_page(path: Path) -> str:
    """Markdown of an executed notebook.

    Raises:
        ValueError: a cell that was not executed, or that failed.
    """
    book = json.loads(path.read_text())
    parts = []
    for number, cell in enumerate(book["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        if not cell["execution_count"]:
            raise ValueError(f"cell {number} of {path.name} was not executed; `make notebooks` executes all")
        parts.append(f"```python\n{source}\n```")
        shown = [_output(output, path, number) for output in cell["outputs"]]
        if shown:
            parts.append(_placeholder(f'<div class="cell-output">{"".join(shown)}</div>'))
    parts.append(f'<a href="{path.name}" download>This notebook as a file</a>')
    return "\n\n".join(parts)


def _output(output: dict[str, Any], path: Path, number: int) -> str:
    """One output of a cell as HTML, in the richest form that it has."""
    if output["output_type"] == "error":
        raise ValueError(f"cell {number} of {path.name} failed: {output['ename']}: {output['evalue']}")
    data = output.get("data", {"text/plain": output.get("text", "")})
    for kind in ("text/html", "image/svg+xml"):
        if kind in data:
            return "".join(data[kind])
    if "image/png" in data:
        return f'<img alt="What the cell above drew" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return f"<pre><code>{escape(''.join(data['text/plain']))}</code></pre>"


def all_help() -> str:
    """What every command's `--help` says, as Markdown.

    Raises:
        ValueError: `unlocked --help` names no command.
    """
    told = _unlocked("--help")
    commands = re.findall(r"^  ([a-z][\w-]*) {2,}(.+)$", told, re.MULTILINE)
    if not commands:
        raise ValueError(f"no command is found in what `unlocked --help` says:\n{told}")
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda command: _unlocked(command[0], "--help"), commands)
        parts = [
            f"## unlocked {name}\n\n{summary[:1].upper()}{summary[1:]}.\n\n```text\n{text.strip()}\n```"
            for (name, summary), text in zip(commands, texts, strict=True)
        ]
    return "\n\n".join(parts)


def _unlocked(*words: str) -> str:
    """What the checkout's own command prints, at 90 columns.

    Raises:
        RuntimeError: it fails; with what it says.
    """
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"COLUMNS": "90", "PYTHONPATH": path}
    command = [sys.executable, "-m", "unlocked", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"unlocked {' '.join(words)} fails: {done.stderr[-2000:]}")
    return done.stdout


def source_page(path: Path) -> str:
    """A file of the checkout, to be read; found by links, not by searching."""
    name, language = path.relative_to(ROOT), LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n````{language}\n{path.read_text().strip()}\n````\n"


def _linked_sources(page: File, origins: dict[str, Path]) -> Iterator[Path]:
    here = _origin(page.src_uri, origins)
    for part in _FENCE.split(page.content_string):
        for link in () if part.startswith("```") else _LINK.finditer(part):
            path = Path(os.path.normpath(here / link["target"]))
            if "://" in link["target"] or path.is_relative_to(DOCS) or str(path.relative_to(ROOT)) in DOCUMENTS:
                continue
            if not path.is_file():
                raise ValueError(f"{page.src_uri} links to {link['target']}, which is no file of the checkout")
            yield path


def _origin(uri: str, origins: dict[str, Path]) -> Path:
    """The folder to which a page's links are relative."""
    return origins.get(uri, (DOCS / uri).parent)


def _site_uri(path: Path) -> str:
    """Where the site has a file of the checkout."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).with_suffix(".md" if path.suffix == ".ipynb" else path.suffix).as_posix()
    return DOCUMENTS.get(path.relative_to(ROOT).as_posix(), _source_uri(path))


def _source_uri(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def _placeholder(html: str) -> str:
    key = str(len(_kept))
    _kept[key] = html
    return f'<div data-kept="{key}"></div>'


def _picture(wide: Path, narrow: Path, text: str) -> str:
    shown = []
    for form, path in (("wide", wide), ("narrow", narrow)):
        svg = re.sub(r"<style>.*?</style>", "", path.read_text(), count=1, flags=re.DOTALL)
        shown.append(svg.replace("<svg ", f'<svg class="{form}" ', 1))
    caption = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return f'<figure class="picture">{"".join(shown)}<figcaption>{caption}</figcaption></figure>'
