"""What every browser loads from web/: small, plain text set as text, and nothing from elsewhere."""
from __future__ import annotations

import re

import pytest

from tests.helpers.pack import ROOT

SCRIPTS = sorted((ROOT / "web").rglob("*.js"))
MAX_BYTES = 60_000
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function")
IMPORT = re.compile(r"""(?:\bfrom|\bimport)\s*\(?\s*["']([^"']+)["']""")


def test_it_is_small():
    """Each .js below web/ is loaded by every browser, so nothing else may lie there, tests least of all."""
    assert sum(path.stat().st_size for path in SCRIPTS) < MAX_BYTES
    assert {path.parent for path in SCRIPTS} == {ROOT / "web/js"}
    assert not [path for path in SCRIPTS if "test" in path.name or "spec" in path.name]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_plain(path):
    source = path.read_text(encoding="utf-8")
    assert source.startswith("/* "), "each says at its top what it is"
    assert not MARKUP.search(source), "text is set as text"
    assert not re.search(r"https?://|\bwss?://|//cdn", source), "no request leaves the machine"
    for name in IMPORT.findall(source):
        local = name.startswith("./") and (path.parent / name).is_file()
        assert local or name in ("../../../scripts/app.js", "../../../scripts/api.js"), f"{name} is not there"
