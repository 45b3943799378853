"""Tensors of a TorchScript archive, such as OpenAI published CLIP in; the programs in it are not run.

The archive is that of `torch.save` with code beside it. A copy without the code goes through torch's reader of tensors,
for which every class that the archive names is an inert stand-in.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODE = ("code", "constants.pkl")
CLASSES = "__torch__."  # what the names of an archive's own classes begin with


class StandIn:
    """An object of a class that is not loaded; its state becomes its attributes."""

    def __new__(cls, *given: Any) -> StandIn:
        """Return an object without looking at what it should be made of."""
        return super().__new__(cls)


def is_torch_script(file: Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torch_script(file: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers by name; raises what `torch.load` does for a file that is damaged."""
    plain = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(plain, "w") as copy:
        for name in archive.namelist():
            if name.split("/")[1] not in CODE:
                copy.writestr(name, archive.read(name))
            if name.endswith("/data.pkl") and name.count("/") == 1:
                named = unknown_names(archive.read(name))
    plain.seek(0)
    known: list[Any] = [(StandIn if name.startswith(CLASSES) else unchanged, name) for name in named]
    with torch.serialization.safe_globals(known):
        return dict(tensors_of(torch.load(plain, map_location="cpu", weights_only=True), ""))


def unchanged(value: Any, *kinds: Any) -> Any:
    """Return a list or a dictionary, which an archive has with the kinds of its entries."""
    return value


def unknown_names(instructions: bytes) -> list[str]:
    """Return the names that an archive's instructions look up and torch's reader of tensors does not know."""
    named = {
        str(given).replace(" ", ".")
        for operation, given, _ in pickletools.genops(instructions)
        if operation.name == "GLOBAL"
    }
    return sorted(name for name in named if name.startswith((CLASSES, "torch.jit._pickle.")))


def tensors_of(module: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """Return the tensors of a stand-in and of those in it, with the names that a module's state dict has."""
    found = []
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value.detach()))
        elif isinstance(value, StandIn):
            found += tensors_of(value, f"{prefix}{name}.")
    return found
