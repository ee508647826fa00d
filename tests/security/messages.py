"""Every text with which the loader refuses something, read from its source."""
from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import diffsynth_backend

PACKAGE = Path(diffsynth_backend.__file__).parent
FILES = ("core/loader/containment.py", "core/loader/model_files.py", "core/loader/safetensors_header.py",
         "core/loader/pickle_layout.py", "core/loader/pickles.py", "core/loader/file.py", "core/loader/repackaged.py",
         "core/loader/registry_file.py", "core/loader/convert.py", "core/loader/model.py", "models/model_loader.py")
# Not for people: torch.load is tried next, or the text goes through `refuse`, which adds the advice.
INTERNAL = {"Unmappable", "DamagedArchive"}
WHOLE = "…"  # a text that a function makes: of an unknown layout, and of `refuse` itself
REFUSE = " The file is damaged or incomplete: delete it and download it again"  # what `refuse` adds


def messages() -> list[str]:
    """File, kind of error and text, "…" for what is filled in, of every `raise` and `refuse`."""
    found = [f"{name}: {message}" for name in FILES for message in _messages(ast.parse((PACKAGE / name).read_text()))]
    return list(dict.fromkeys(found))


def _messages(tree: ast.Module) -> Iterator[str]:
    constants = {node.targets[0].id: node.value.value for node in tree.body
                 if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                 and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)}
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        name = call.func.id
        if isinstance(node, ast.Raise) and name not in INTERNAL and (said := text(call.args[0], constants)) != WHOLE:
            yield f"{name}: {said}"
        elif name == "refuse" and len(call.args) > 1:
            yield f"CorruptFile: {text(call.args[1], constants)}.{REFUSE}"


def text(node: ast.expr, constants: Mapping[str, str]) -> str:
    """The text of a string, with "…" for its variable parts."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return constants.get(node.value.id, "…")
    return "…"
