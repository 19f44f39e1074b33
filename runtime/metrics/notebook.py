"""Drawing into a notebook's cell: frames of rich as HTML that takes the last one's place. Needs no ipywidgets."""

import io
import sys
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType

__all__ = ["NotebookFrame", "in_notebook"]

_COLUMNS, _ROWS = 100, 30
_PAGE = (
    "<pre style=\"font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:12px;line-height:1.25;"
    'white-space:pre;overflow-x:auto;margin:0">{code}</pre>'
)


def in_notebook() -> bool:
    """A kernel runs this process, and shows what it displays: Jupyter and its kin, not IPython on a terminal."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class NotebookFrame:
    """The part of `rich.live.Live` that the dashboard uses, for a notebook's cell."""

    size = (_COLUMNS, _ROWS)
    """Columns and rows of a frame."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __enter__(self) -> "NotebookFrame":
        from IPython.display import HTML, display

        self._handle = display(HTML(""), display_id=True)
        return self

    def update(self, frame: RenderableType, *, refresh: bool = True) -> None:
        """Shows `frame` instead of the one before."""
        from IPython.display import HTML

        if self._handle is not None:
            self._handle.update(HTML(_html(frame)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last frame stays."""


def _html(frame: RenderableType) -> str:
    console = Console(
        file=io.StringIO(),
        record=True,
        width=_COLUMNS,
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor",
    )
    console.print(frame)
    return console.export_html(inline_styles=True, code_format=_PAGE)
