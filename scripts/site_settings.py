"""How the reference shows a setting: its default and its help text instead of the call that declares both.

An extension of griffe, which reads the docstrings for mkdocstrings; `mkdocs.yml` names this file.
"""

import ast
from typing import Any

from griffe import Attribute, Docstring, Expr, ExprCall, ExprKeyword, Extension

_LIMITS = {"at_least": "at least", "above": "above"}


class Settings(Extension):
    """`seed: int = setting(0, "keys initialisation", at_least=0)` is shown as `seed: int = 0`."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        call = attr.value
        if not isinstance(call, ExprCall) or str(call.function) != "setting":
            return
        given = [argument for argument in call.arguments if not isinstance(argument, ExprKeyword)]
        named = {argument.name: argument.value for argument in call.arguments if isinstance(argument, ExprKeyword)}
        attr.value = given[0] if given else named.get("default")
        text = given[1] if len(given) > 1 else named.get("help")
        if attr.docstring is None and text is not None:
            limits = [f"{words} {named[name]}" for name, words in _LIMITS.items() if name in named]
            told = _literal(text)
            sentence = f"{told[:1].upper()}{told[1:]}{f' ({limits[0]})' if limits else ''}."
            attr.docstring = Docstring(sentence, parent=attr, lineno=attr.lineno)


def _literal(text: str | Expr) -> str:
    return str(ast.literal_eval(str(text)))
