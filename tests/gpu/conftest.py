"""What needs a GPU is collected only where there is one."""
from __future__ import annotations

import pytest
import torch

WHY_NOT = None if torch.cuda.is_available() else "torch sees no CUDA device"
collect_ignore_glob = ["test_*.py"] if WHY_NOT else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHY_NOT:
        terminalreporter.write_line(f"tests/gpu not run: {WHY_NOT}")
