"""LoRAs: files, their contents, the layers that they are for, and stacks of them on models."""
from .merge import merge_lora

__all__ = ["merge_lora"]
