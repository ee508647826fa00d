"""Plain messages on stdout for programs that have set up no logging, so that a script shows what is loaded.

Notable: where logging is set up (ComfyUI does, and so may any program later on), nothing is added or printed twice.
"""
from __future__ import annotations

import logging
import sys
from typing import TextIO

_PACKAGE = __name__.rpartition(".core.")[0]


class _PlainHandler(logging.StreamHandler):
    """Writes to whatever is stdout at the moment, while the root logger has no handler of its own."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)
        self.addFilter(lambda record: not logging.getLogger().handlers)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def ensure_plain_output() -> None:
    """Print the package's messages of level INFO and above, unless the program handles its log messages itself."""
    package_logger = logging.getLogger(_PACKAGE)
    if not package_logger.hasHandlers():
        package_logger.addHandler(_PlainHandler())
        package_logger.setLevel(logging.INFO)
