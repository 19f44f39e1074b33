"""The checkout's source as data: its files, what each of them imports, and how long they and their functions are."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOMS", "Import", "Source", "circles", "function_lengths"]

ROOMS = ("kernels", "models", "data", "rules", "workers", "runtime", "comparison", "launch")
_SCOPES = re.compile(r"\b(namespace|extern|struct|class|enum|union)\b")


@dataclass(frozen=True)
class Import:
    name: str  # a file of the namespace by its dotted name, or whatever else is imported
    executed: bool  # when the file is imported: neither inside a function nor for a type checker


class Source:
    """The rooms below `root` as files of the namespace `unlocked`: dotted name -> path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {"unlocked": root / "src" / "unlocked" / "__init__.py"}
        for room in ROOMS:
            for path in sorted((root / room).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                self.files[".".join(("unlocked", *parts)).removesuffix(".__init__")] = path

    def below(self, prefix: str) -> list[str]:
        """The files of `unlocked.prefix`, a room or an inner room or a file."""
        start = f"unlocked.{prefix}"
        return [name for name in self.files if name == start or name.startswith(f"{start}.")]

    def imports(self, path: Path) -> set[Import]:
        """Everywhere in a file: inside functions, for type checkers, and by a constant name at run time."""
        found = set()
        for node, executed in _nodes(ast.parse(path.read_text()), True):
            for name in self._names(node, path):
                found.add(Import(name, executed))
        return found

    def graph(self) -> dict[str, set[str]]:
        """Which files of the namespace each file imports; a package's `__init__` is a file."""
        return {
            name: {i.name for i in self.imports(path) if i.name in self.files} - {name}
            for name, path in self.files.items()
            if path.exists()
        }

    def needs(self, start: str) -> dict[str, tuple[str, ...]]:
        """All that `start` imports, itself or through others: name -> the way there.

        A file brings its packages with it: what their `__init__` executes counts, what it only offers does not.
        """
        ways: dict[str, tuple[str, ...]] = {start: (start,)}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            path = self.files.get(name)
            if path is None or not path.exists():
                continue
            facade = path.name == "__init__.py"
            names = {i.name for i in self.imports(path) if i.executed or not facade}
            parts = name.split(".")
            names |= {".".join(parts[:k]) for k in range(1, len(parts))}
            for found in sorted(names - ways.keys()):
                ways[found] = (*ways[name], found)
                waiting.append(found)
        return ways

    def _names(self, node: ast.AST, path: Path) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (self._file(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            yield from (self._file(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            (argument, *_) = node.args
            if isinstance(argument, ast.Constant):
                yield self._file(str(argument.value))

    def _file(self, name: str) -> str:
        """The file of the namespace that holds `name`, or `name`."""
        if name.split(".")[0] != "unlocked":
            return name
        parts = name.split(".")
        known = (".".join(parts[:k]) for k in range(len(parts), 1, -1))
        return next((file for file in known if file in self.files), name if len(parts) < 3 else ".".join(parts[:-1]))


def _nodes(node: ast.AST, executed: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `node`, and whether importing the file executes them."""
    for child in ast.iter_child_nodes(node):
        inside = executed and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and child in node.body:
            inside = False
        yield child, inside
        yield from _nodes(child, inside)


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The groups of files that reach each other, each sorted by name."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {
        tuple(sorted({other for other in reached[name] if name in reached.get(other, ())} | {name}))
        for name in graph
        if name in reached[name]
    }
    return sorted(groups)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph.get(waiting.pop(), set()) - found:
            found.add(name)
            waiting.append(name)
    return found


def function_lengths(path: Path) -> Iterator[tuple[str, int]]:
    """Each function's name and lines: of Python without its decorators, of C++ from its head to its last brace."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1
    else:
        yield from _blocks(text)


def _blocks(text: str) -> Iterator[tuple[str, int]]:
    """Outermost pairs of braces that are no scope: their heads' names and their lines, heads included."""
    blank = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", _spaces, text, flags=re.DOTALL)
    begin, scopes, depth, opened = 0, 0, 0, 0
    for match in re.finditer(r"[{};]", blank):
        sign, at = match.group(), match.start()
        if sign == "{":
            depth += 1
            head = blank[begin:at]
            if depth == scopes + 1 and _SCOPES.search(head) and "(" not in head:
                scopes += 1
            elif depth == scopes + 1:
                opened = at
        elif sign == "}":
            if depth == scopes + 1:
                lines = blank[begin : at + 1].strip().count("\n") + 1
                names = [name for name in re.findall(r"(\w+)\s*\(", blank[begin:opened]) if not name.startswith("__")]
                yield (names[0] if names else "?"), lines
            depth -= 1
            scopes = min(scopes, depth)
        if depth == scopes:
            begin = at + 1


def _spaces(match: "re.Match[str]") -> str:
    return re.sub(r"[^\n]", " ", match.group())
