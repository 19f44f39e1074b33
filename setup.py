"""What pyproject.toml can't say: the README as a package index shows it, where nothing lies beside it.

Its links to files become links into the repository that [project.urls] names as Source, for the version that is built;
without such a name they are left out and their words stay. Pictures and images of other places stay as they are.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

_HERE = Path(__file__).resolve().parent
_LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def for_an_index(text: str, source: str | None) -> str:
    """`text` with no link that leads to a file beside it.

    Args:
        source: where the repository's files can be read, such as https://HOST/OWNER/NAME/blob/v1.0; None: nowhere.
    """

    def replaced(link: re.Match[str]) -> str:
        picture, words, target = link["picture"], link["words"], link["target"]
        if "://" in target or target.startswith(("#", "mailto:")):
            return link[0]
        if source is None:
            return "" if picture else words
        base = source.replace("/blob/", "/raw/") if picture else source
        return f"{picture}[{words}]({base}/{target})"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(replaced, text))


def _source() -> str | None:
    project = tomllib.loads((_HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Source")
    return None if repository is None else f"{repository.rstrip('/')}/blob/v{project['version']}"


if __name__ == "__main__":
    setup(
        long_description=for_an_index((_HERE / "README.md").read_text(encoding="utf-8"), _source()),
        long_description_content_type="text/markdown",
    )
