"""Prompts for Wan: cleaned texts → umT5's hidden states, filled up with zeros; pictures as the CLIP encoder takes them.

Notable: the encoder sees a text's own tokens and no padding, which is the same as 512 tokens of which padding is hidden
and zeroed afterwards, for a fraction of the work. The published code cleans texts with the library ftfy where that is
installed; here every machine gives the same tokens: what it changes in a well-formed text is done by a table, and a
text in a broken encoding stays as it is.
"""
from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.wan_video_image_encoder import IMAGE_MEAN, IMAGE_STD
from ..utils.pictures import Picture, check_picture, pixels, resized
from .prompts import check_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..models.wan_video_text_encoder import WanTextEncoder

MAX_TOKENS = 512  # of a text, its end included; embeddings have this length
TOKENIZER_FILE = "tokenizer.json"
END = "</s>"  # of a text, for umT5
PADDING = 0  # any token would do: padding is never seen

_CONTROLS = (*range(0x09), *range(0x0E, 0x20), 0x7F, 0xFEFF)  # but those that are white space
_LIGATURES, _FULL_AND_HALF_WIDTH = range(0xFB00, 0xFB07), range(0xFF01, 0xFFF0)
_PLAIN = {
    **dict.fromkeys(_CONTROLS, ""),
    **dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in (*_LIGATURES, *_FULL_AND_HALF_WIDTH)},
}


# ---- texts ----------------------------------------------------------------------------------------------------------

def clean(text: str) -> str:
    """A text as Wan was trained on: HTML's entities resolved (twice over), straight quotes, no control characters, no
    ligatures, no full-width forms, composed (NFC), and single spaces in place of any other white space."""
    text = html.unescape(html.unescape(text))
    return " ".join(unicodedata.normalize("NFC", text.translate(_PLAIN)).split())


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """umT5's tokenizer from the tokenizer.json in a folder, which is data: no code or class name has a say.

    Raises FileNotFoundError if there is none, ValueError for a file that is no tokenizer or not umT5's.
    """
    from tokenizers import Tokenizer  # heavy: imported when a tokenizer is loaded

    file = Path(folder) / TOKENIZER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer in {folder}: {TOKENIZER_FILE} missing; get the folder google/umt5-xxl/ "
                                "of Wan-AI/Wan2.1-T2V-1.3B and name it in tokenizer_config")
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    # Files may ask for a length of their own.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.encode("").tokens != [END]:
        raise ValueError(f"{file} is of another model: umT5's tokenizer ends each text by {END}")
    return tokenizer


class TextPrompts:
    """umT5's tokenizer, and what Wan does before and after its text encoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> TextPrompts:
        """From a tokenizer folder; see `load_tokenizer`."""
        return cls(load_tokenizer(folder))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Cleaned texts → input_ids and attention_mask (B, T), int64, padded on the right to the longest one.

        Raises TypeError for what is no text and ValueError for one longer than MAX_TOKENS tokens.
        """
        for text in texts:
            check_prompt(text)
        tokens = [torch.tensor(self.tokenizer.encode(clean(text)).ids) for text in texts]
        if (longest := max(map(len, tokens))) > MAX_TOKENS:
            raise ValueError(f"the prompt has {longest} tokens, the text encoder takes {MAX_TOKENS}: shorten it")
        pad = torch.nn.utils.rnn.pad_sequence
        return (pad(tokens, batch_first=True, padding_value=PADDING),
                pad([torch.ones_like(ids) for ids in tokens], batch_first=True))

    def embed(self, text_encoder: WanTextEncoder, texts: Sequence[str],
              device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Hidden states (B, 512, D), zero behind each text's end, and their mask (B, 512), int64.

        Raises what `tokenize` raises, and ValueError for a tokenizer with more tokens than the text encoder has.
        """
        known, embedded = self.tokenizer.get_vocab_size(), text_encoder.token_embedding.num_embeddings
        if known > embedded:
            raise ValueError(f"the tokenizer has {known} tokens and the text encoder {embedded}: they are of different "
                             "models, take both from one")
        ids, mask = (tensor.to(device) for tensor in self.tokenize(texts))
        states = text_encoder(ids, mask) * mask[..., None]
        missing = MAX_TOKENS - ids.shape[1]
        return F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))


# ---- pictures -------------------------------------------------------------------------------------------------------

def clip_pixels(picture: Picture, width: int, height: int, side: int) -> Tensor:
    """A picture of a video (width × height) as the image encoder takes it: (1, 3, side, side), float32.

    First it gets the video's size, then a square's, whatever its proportions, by a bicubic filter that does not average
    when it shrinks: so the published code does.
    Raises TypeError or ValueError for what is no picture.
    """
    image = pixels(resized(check_picture("the picture", picture), width, height))
    image = F.interpolate(image, (side, side), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (image - mean) / std
