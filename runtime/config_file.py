"""Settings in a file: YAML, JSON or TOML, and the `config.json` that a run has saved."""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unlocked.runtime.fields import checked_value
from unlocked.runtime.line_parser import nearest

__all__ = ["as_yaml", "read_config"]

_NOT_TOLD = frozenset({"run_number"})  # a run's own: another run of the same settings has another one


def read_config(path: Path, owners: Mapping[str, type | None]) -> dict[str, Any]:
    """The settings in a file, by name; a dash in a name is as good as an underscore.

    A run's saved config has them below the key `settings`, beside what else it tells, which is left out.

    Args:
        owners: every setting -> the dataclass that has it; None: checked elsewhere.

    Raises:
        ValueError: the file can't be read, a name is not known, or a value not valid; names the file and the setting,
            in one line.
    """
    content = _content(path)
    settings = content["settings"] if isinstance(content.get("settings"), Mapping) else content
    told: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name in _NOT_TOLD:
            continue
        if name not in owners:
            raise ValueError(f"config {path}: {key!r} is no setting{nearest(name, owners)}; see --help")
        if name in told:
            raise ValueError(f"config {path}: {name!r} is there twice; leave one of them out")
        owner = owners[name]
        try:
            told[name] = value if owner is None else checked_value(owner, name, value)
        except ValueError as error:
            raise ValueError(f"config {path}: {error}") from error
    return told


def as_yaml(settings: Mapping[str, Any]) -> str:
    """JSON values as the text of a file that `read_config` reads."""
    import yaml

    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return str(yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True))


def _content(path: Path) -> Mapping[str, Any]:
    """Raises: ValueError: no such file, or none of these forms."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ValueError(f"config {path} can't be read ({why}); give a file of settings, or a run's config.json") from (
            error
        )
    try:
        content = _READERS.get(path.suffix.lower(), _from_yaml)(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path} can't be read as {_form(path)}: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(
            f"config {path} holds a {type(content).__name__}; write one setting a line, such as 'lr: 0.01'"
        )
    return content


def _form(path: Path) -> str:
    return {".json": "JSON", ".toml": "TOML"}.get(path.suffix.lower(), "YAML")


def _from_yaml(text: str) -> Any:
    """Raises: ValueError: it is no YAML, or has a name twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"{twice[0]!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(str(error)) from error


_READERS: Mapping[str, Callable[[str], Any]] = {".json": json.loads, ".toml": tomllib.loads}
