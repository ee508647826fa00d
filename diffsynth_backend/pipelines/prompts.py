"""What every family asks of a prompt."""
from __future__ import annotations


def check_prompt(text: str) -> None:
    """Raises TypeError for what is no text."""
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a text, got {type(text).__name__}")
