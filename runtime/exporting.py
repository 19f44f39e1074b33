"""A trained network for whoever runs it without this project, or without Python: torch.export and ONNX."""

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.models.errors import first_line
from unlocked.runtime.saving.whole_file import whole_file

__all__ = ["export"]

_SUFFIXES = (".pt2", ".onnx")


def export(
    module: nn.Module, path: str | Path, samples: Tensor, named: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Writes the network in eval mode as a graph of its operations, for any number of samples.

    Args:
        path: ends in .pt2 (`torch.export.load(path).module()` runs it) or .onnx (for ONNX Runtime and others; needs the
            extra `onnx`). The input is called `samples`, the output `scores` in ONNX.
        samples: what it reads, [B, ...], of at least two rows; the values don't matter.
        named: what forward() takes by name beside them, each with as many rows; the graph takes them so, too.

    Raises:
        ValueError: another suffix; or a network whose forward() can't be followed to a graph (names it).
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'}; give a path that ends in {' or '.join(_SUFFIXES)}"
        )
    if not isinstance(samples, Tensor) or samples.dim() < 1 or len(samples) < 2:
        raise ValueError("samples must be a tensor of at least two rows, so that their number can be left open")
    modes = [(one, one.training) for one in module.modules()]
    place = next((p.device for p in module.parameters()), samples.device)
    module.eval()
    try:
        with _quiet():
            program = _program(module, samples.to(place), {name: one.to(place) for name, one in named.items()})
            content = _onnx(program, list(named)) if path.suffix == ".onnx" else _pt2(program)
    except _MissingPackage as error:
        raise ValueError(f"{path} needs the package {error}; pip install 'unlocked[onnx]'") from error
    except Exception as error:  # what a tracer meets in someone's forward() may be anything
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise ValueError(
            f"{type(module).__name__} can't be exported to {path.suffix}: {type(first).__name__}: {first_line(first)}; "
            "its weights can be kept all the same, by RunResult.save"
        ) from error
    finally:
        for one, training in modes:
            one.training = training
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


class _MissingPackage(Exception):
    """An optional package is not installed; its name."""


def _program(module: nn.Module, samples: Tensor, named: dict[str, Tensor]) -> Any:
    rows = {0: torch.export.Dim("batch")}
    told = _Told(module, list(named)) if named else module
    shapes: Any = dict.fromkeys(("samples", *named), rows) if named else (rows,)
    with torch.no_grad():
        return torch.export.export(told, (samples,), named or None, dynamic_shapes=shapes)


class _Told(nn.Module):
    """Says by what names the module's forward() is called: torch finds no open sizes behind **kwargs."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module

        def forward(samples: Tensor, **named: Tensor) -> Any:
            return module(samples, **named)

        keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        first = inspect.Parameter("samples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = inspect.Signature([first, *keywords])  # type: ignore[attr-defined]
        self.forward = forward


def _pt2(program: Any) -> bytes:
    with io.BytesIO() as buffer:
        torch.export.save(program, buffer)
        return buffer.getvalue()


def _onnx(program: Any, names: list[str]) -> bytes:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise _MissingPackage(package) from error
    inputs = ["samples", *names]
    made = torch.onnx.export(program, input_names=inputs, output_names=["scores"], dynamo=True, verbose=False)
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracers print pages of advice that is about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
