"""Every text with which the loader refuses something, read from its source."""
from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import diffsynth_backend

PACKAGE = Path(diffsynth_backend.__file__).parent
FILES = ("core/loader/containment.py", "core/loader/model_files.py", "core/loader/safetensors_header.py",
         "core/loader/description.py", "core/loader/pickle_names.py", "core/loader/pickle_layout.py",
         "core/loader/pickles.py", "core/loader/file.py", "core/loader/repackaged.py", "core/loader/registry_file.py",
         "core/loader/convert.py", "core/loader/model.py", "models/model_loader.py", "core/loader/config.py",
         "core/loader/download.py", "core/loader/download_file.py", "core/loader/download_hubs.py",
         "core/loader/watch.py")
# Not for people: torch.load is tried next, the text becomes the reason in a message that adds the advice, or another
# attempt to download follows, of which the last tells the reason.
INTERNAL = {"Unmappable", "DamagedArchive", "NoDescription", "_Interrupted"}
RETURNED = {"DownloadFailed", "NotEnoughSpace", "CorruptFile"}  # made by a function, raised by its caller
WHOLE = "…"  # nothing but this: a text that a function makes, of an unknown layout, and of `refuse` itself
REFUSE = " The file is damaged or incomplete: delete it and download it again"  # what `refuse` adds


def messages() -> list[str]:
    """File, kind of error and text, "…" for what is filled in, of each `raise`, `refuse` and error returned."""
    found = [f"{name}: {message}" for name in FILES for message in _messages(ast.parse((PACKAGE / name).read_text()))]
    return list(dict.fromkeys(found))


def _messages(tree: ast.Module) -> Iterator[str]:
    constants = {node.targets[0].id: node.value.value for node in tree.body
                 if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                 and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)}
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else getattr(node, "value", None)
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        name = call.func.id
        is_error = isinstance(node, ast.Raise) or (isinstance(node, ast.Return) and name in RETURNED)
        if is_error and name not in INTERNAL and (said := text(call.args[0], constants)).strip(WHOLE):
            yield f"{name}: {said}"
        elif isinstance(node, ast.Expr) and name == "refuse" and len(call.args) > 1:
            yield f"CorruptFile: {text(call.args[1], constants)}.{REFUSE}"


def text(node: ast.expr, constants: Mapping[str, str]) -> str:
    """The text of a string, with "…" for its variable parts."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left, constants) + text(node.right, constants)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return constants.get(node.value.id, "…")
    return "…"
