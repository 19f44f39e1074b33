"""A trained network in one safetensors file: its weights by plain names, and as JSON what must be known to use them.

The format has no code in it and reading one executes none. What it can't hold is a network's architecture: one of
`unlocked.models` is named, and built anew; any other is the caller's to bring.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.models import plain_module, rebuild
from unlocked.models.errors import first_line
from unlocked.runtime.saving.whole_file import json_text, whole_file
from unlocked.runtime.tensors import weights_digest

__all__ = ["load", "read_model", "save_model"]

_KEY = "unlocked"  # of our JSON among the file's metadata
_FORMAT = 1
_SHOWN = 3  # names in an error about many


def save_model(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes the file whole.

    Args:
        about: JSON values; "architecture" is what `unlocked.models.rebuild` needs, or None.

    Raises:
        ValueError: a weight that such a file can't hold (names it).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # A copy each: weights that share memory (tied ones) are refused by the format.
    dense = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    digest = weights_digest(sorted(dense.items()))
    text = json_text({**about, "format": _FORMAT, "sha256": digest})
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as temporary:
            save_file(dense, temporary, {_KEY: text, "format": "pt"})
    except (SafetensorError, KeyError, ValueError) as error:
        kinds = {str(value.dtype) for value in dense.values()}
        raise ValueError(
            f"{path} can't hold these weights ({', '.join(sorted(kinds))}): {first_line(error)}"
        ) from error


def read_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a file that `RunResult.save` wrote, and what it says about them.

    Raises:
        ValueError: there is no such file, it is no such file, or it is damaged (names it).
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give what RunResult.save has written")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        written, digest = int(about["format"]), about["sha256"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no file that RunResult.save wrote, or is damaged ({type(error).__name__}: {first_line(error)})"
        ) from error
    if written > _FORMAT:
        raise ValueError(f"{path} has format {written}, newer than this version's {_FORMAT}; update unlocked")
    if weights_digest(sorted(weights.items())) != digest:
        raise ValueError(f"{path} is damaged: the weights are not those that were written")
    return weights, about


def load(path: str | Path, model: nn.Module | Sequence[nn.Module] | None = None) -> nn.Module:
    """The trained network from a file that `RunResult.save` wrote, as one plain module in eval mode.

    Args:
        model: a network of the same architecture, whose weights are overwritten: the module that was cut, an
            nn.Sequential, or the list of layers. None: the file names a network of `unlocked.models`, which is built.

    Raises:
        ValueError: no such file, or a damaged one; no `model` for an architecture that the file does not name; weights
            of another architecture (lists what is missing, unexpected, or of another shape).
    """
    weights, about = read_model(path)
    if model is None:
        architecture = about.get("architecture")
        if architecture is None:
            raise ValueError(
                f"{path} holds the weights of {about.get('kind', 'a network')}, which is not one of unlocked.models, "
                "and a file of weights has no code: build the network and give it, as in load(path, MyNetwork())"
            )
        try:
            module = plain_module(rebuild(architecture))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} names a network that can't be built here: {first_line(error)}") from error
    elif isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        module = model
    elif isinstance(model, Sequence | nn.ModuleList) and all(isinstance(layer, nn.Module) for layer in model):
        module = plain_module(model)
    else:
        raise ValueError(f"model is a {type(model).__name__}; give a module, or a list of modules")
    _fill(module, weights, path)
    return module.eval()


def _fill(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    other = [
        f"{name} is {weights[name].dtype} {list(weights[name].shape)}, the network's {value.dtype} {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and (weights[name].shape, weights[name].dtype) != (value.shape, value.dtype)
    ]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "other shapes or types": other,
    }
    told = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"the weights of {path} don't fit {type(module).__name__}: {'; '.join(told)}")
    module.load_state_dict(dict(weights), strict=False)  # by now nothing but extra state may be missing


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
