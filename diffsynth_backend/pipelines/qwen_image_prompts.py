"""Prompts for Qwen-Image: the chat template around a text, tokens, and the hidden states without the template.

Notable: how many leading tokens belong to the template is counted with the tokenizer at hand (34 for the real one), so
another vocabulary, the demo model's for example, works too.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.qwen_image_text_encoder import QwenImageTextEncoder

# As published with Qwen/Qwen-Image.
TEXT_TEMPLATE = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
                 "spatial relationships of the objects and background:<|im_end|>\n"
                 "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
MAX_TOKENS = 4096
TOKENIZER_FILES = ("vocab.json", "merges.txt")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The Qwen2 tokenizer from a folder with vocab.json and merges.txt, or tokenizer.json; never from the network.

    The class is fixed here, so no code or class name in the folder's files has a say.
    Raises FileNotFoundError naming the missing files.
    """
    from transformers import Qwen2Tokenizer

    folder = Path(folder)
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"no tokenizer in {folder}: {', '.join(missing)} missing; get the folder "
                                "tokenizer/ of Qwen/Qwen-Image and name it in tokenizer_config")
    return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)


def check_prompt(text: str) -> None:
    """Raises TypeError for what is no text."""
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a text, got {type(text).__name__}")


class TextPrompts:
    """A tokenizer together with the template for prompts without pictures."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        prefix = TEXT_TEMPLATE.partition("{}")[0]
        self.prefix_length = len(tokenizer(prefix)["input_ids"])

    @classmethod
    def load(cls, folder: str | Path) -> TextPrompts:
        """From a tokenizer folder; see `load_tokenizer`."""
        return cls(load_tokenizer(folder))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts in the template → input_ids and attention_mask (B, T), int64, padded on the right.

        Raises TypeError for what is no text and ValueError for one longer than MAX_TOKENS tokens.
        """
        for text in texts:
            check_prompt(text)
        batch = self.tokenizer([TEXT_TEMPLATE.format(text) for text in texts], padding=True, padding_side="right",
                               return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        longest = int(mask.sum(dim=1).max()) - self.prefix_length
        if longest > MAX_TOKENS:
            raise ValueError(f"the prompt has {longest} tokens, the text encoder takes {MAX_TOKENS}: shorten it")
        return ids, mask

    def embed(self, text_encoder: QwenImageTextEncoder, texts: Sequence[str],
              device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, D) of the texts without the template's head, and their mask (B, T)."""
        ids, mask = (t.to(device) for t in self.tokenize(texts))
        hidden = text_encoder(input_ids=ids, attention_mask=mask)
        return hidden[:, self.prefix_length:], mask[:, self.prefix_length:]
