"""Objects by dotted name: classes and converters are named in data tables and imported when they are needed."""
from __future__ import annotations

import importlib
from typing import Any


def find_object(path: str, package: str | None = None) -> Any | None:
    """What the dotted `path` names, below `package` if that is given; None if it does not exist.

    Raises ImportError if its module is there but something that the module needs is not.
    """
    module_name, _, attribute = (f"{package}.{path}" if package else path).rpartition(".")
    if not module_name:
        return None
    try:
        return getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            return None
        raise
