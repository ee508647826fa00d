"""The page's own tests, which Node.js runs; `make test-web` installs what they need."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not (HERE / "node_modules").is_dir() or shutil.which("npx") is None,
                    reason="the page's tests need Node.js: make test-web")
def test_the_page_extension():
    done = subprocess.run(["npx", "vitest", "run"], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
