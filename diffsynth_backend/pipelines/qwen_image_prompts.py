"""Prompts for Qwen-Image: the chat template around a text, tokens, and the hidden states without the template.

Notable: how many leading tokens belong to the template is counted with the tokenizer at hand (34 for the real one, 64
with pictures), so another vocabulary, the demo model's for example, works too. Pictures become patches here, by the
published processor's arithmetic, because that one rounds every picture to 8 bits and ComfyUI's are not.
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..utils.pictures import MODES, Picture, check_picture, pixels, resized, size_of
from .prompts import check_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.qwen_image_text_encoder import QwenImageTextEncoder

# As published with Qwen/Qwen-Image.
TEXT_TEMPLATE = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
                 "spatial relationships of the objects and background:<|im_end|>\n"
                 "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
# As published with Qwen/Qwen-Image-Edit; its pictures stand before the text, those of a list with a number each.
PICTURE_TEMPLATE = ("<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, "
                    "objects, background), then explain how the user's text instruction should alter or modify the "
                    "image. Generate a new image that meets the user's requirements while maintaining consistency with "
                    "the original input where appropriate.<|im_end|>\n"
                    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
VISION_START, IMAGE_PAD, VISION_END = VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
NUMBERED = "Picture {}: {}"
NUMBERED_AREA = 384 * 384  # pixels of each picture of a list, about

MAX_TOKENS = 4096  # of a text

# processor/preprocessor_config.json of Qwen/Qwen-Image-Edit, which is Qwen/Qwen2.5-VL-7B-Instruct's.
MIN_PIXELS, MAX_PIXELS = 3136, 12845056
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH, MERGE, FRAMES = 14, 2, 2  # a patch is 14×14 pixels of two equal frames; 2×2 patches make a token
MAX_ASPECT = 200  # the longer side of a picture by the shorter one
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


class PicturePrompts:
    """A tokenizer together with the template for prompts that speak of pictures.

    Raises ValueError for a tokenizer without the tokens that stand for pictures.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        known = tokenizer.get_added_vocab()
        if missing := [token for token in VISION_TOKENS if token not in known]:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}, which stand for pictures in a prompt: its "
                             "folder needs the tokenizer_config.json (or tokenizer.json) of tokenizer/ of "
                             "Qwen/Qwen-Image, and the text encoder must be of that model too")
        self.tokenizer = tokenizer
        self.image_token_id = known[IMAGE_PAD]
        self.prefix_length = len(tokenizer(PICTURE_TEMPLATE.partition("{}")[0])["input_ids"])

    def tokenize(self, text: str, tokens: Sequence[int], numbered: bool) -> Tensor:
        """A text behind pictures of so many `tokens` each, in the template → input_ids (1, T), int64.

        Raises TypeError for what is no text and ValueError for one longer than MAX_TOKENS tokens, the pictures not
        counted, or one that has image tokens of its own.
        """
        check_prompt(text)
        pictures = [VISION_START + IMAGE_PAD * count + VISION_END for count in tokens]
        if numbered:
            pictures = [NUMBERED.format(number, picture) for number, picture in enumerate(pictures, 1)]
        ids = self.tokenizer(PICTURE_TEMPLATE.format("".join(pictures) + text), return_tensors="pt")["input_ids"]
        if int((ids == self.image_token_id).sum()) != sum(tokens):
            raise ValueError(f"the prompt contains {IMAGE_PAD}, which stands for a picture: remove it from the text")
        if (length := ids.shape[1] - self.prefix_length - sum(tokens)) > MAX_TOKENS:
            raise ValueError(f"the prompt has {length} tokens besides its pictures, the text encoder takes "
                             f"{MAX_TOKENS}: shorten it")
        return ids

    def embed(self, text_encoder: QwenImageTextEncoder, text: str, pictures: Sequence[Picture], numbered: bool,
              device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Hidden states (1, T, D) of the pictures and the text without the template's head, and their mask (1, T).

        numbered   the layout of Qwen-Image-Edit-2509 and later: "Picture 1: …", each shrunk or enlarged to about 384².
                   Without it the pictures are seen as they are, as Qwen-Image-Edit's one

        Raises what `tokenize` raises, what `picture_patches` raises, and ValueError for a tokenizer and a text encoder
        with different tokens.
        """
        if self.image_token_id != text_encoder.config.image_token_id:
            raise ValueError(f"{IMAGE_PAD} is token {self.image_token_id} of the tokenizer and token "
                             f"{text_encoder.config.image_token_id} of the text encoder: they are of different models, "
                             "take both from one")
        patches, grids = zip(*(picture_patches(picture, NUMBERED_AREA if numbered else None) for picture in pictures))
        ids = self.tokenize(text, [rows * columns // MERGE**2 for rows, columns in grids], numbered).to(device)
        mask = torch.ones_like(ids)
        grid = torch.tensor([(1, rows, columns) for rows, columns in grids], device=device)
        hidden = text_encoder(ids, mask, torch.cat(patches).to(device), grid)
        return hidden[:, self.prefix_length:], mask[:, self.prefix_length:]


# ---- pictures -------------------------------------------------------------------------------------------------------

def in_colour(picture: Picture, channels: int = 3) -> Picture:
    """The picture with 3 (colours) or 4 channels (and alpha), of its own kind: filters need true colours."""
    if isinstance(picture, Image.Image):
        return picture.convert(MODES[channels])
    return pixels(picture, channels)[0].movedim(0, -1)


def fitted_size(width: int, height: int, area: int) -> tuple[int, int]:
    """Width and height of about `area` pixels in the same proportion, multiples of 32."""
    ratio = width / height
    wide = math.sqrt(area * ratio)
    return round(wide / 32) * 32, round(wide / ratio / 32) * 32


def check_aspect(what: str, width: int, height: int) -> None:
    """Raises ValueError for a picture that is more than MAX_ASPECT times longer than it is wide, or the reverse."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{what} is {width}×{height} (width × height): one side may be {MAX_ASPECT} times the other "
                         "at most; crop it")


def seen_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which the vision tower sees a picture of this size: multiples of 28 within its limits."""
    side = PATCH * MERGE
    seen = round(width / side) * side, round(height / side) * side
    if math.prod(seen) > MAX_PIXELS:
        scale = math.sqrt(width * height / MAX_PIXELS)
        return tuple(max(side, math.floor(length / scale / side) * side) for length in (width, height))
    if math.prod(seen) < MIN_PIXELS:
        scale = math.sqrt(MIN_PIXELS / (width * height))
        return tuple(math.ceil(length * scale / side) * side for length in (width, height))
    return seen


def picture_patches(picture: Picture, area: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """A picture as the vision tower takes it: patches (rows·columns, 1176) float32, and (rows, columns).

    Patches that make a token together follow one another. A patch is channels × frames × 14 × 14, normalised. With an
    `area` the picture is first resized to about so many pixels.
    Raises TypeError or ValueError for what is no picture, and ValueError for one that is too long.
    """
    picture = in_colour(check_picture("a picture of the prompt", picture))
    check_aspect("a picture of the prompt", *size_of(picture))
    if area is not None:
        picture = resized(picture, *fitted_size(*size_of(picture), area))
    image = pixels(resized(picture, *seen_size(*size_of(picture))))[0]  # (3, H, W)
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    grid = ((image - mean) / std).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (3, rows, columns, 14, 14)
    rows, columns = grid.shape[1:3]
    tokens = grid.unflatten(2, (-1, MERGE)).unflatten(1, (-1, MERGE))  # (3, rows/2, 2, columns/2, 2, 14, 14)
    patches = tokens.permute(1, 3, 2, 4, 0, 5, 6).flatten(0, 3)  # (rows·columns, 3, 14, 14)
    return patches[:, :, None].expand(-1, -1, FRAMES, -1, -1).flatten(1), (rows, columns)


def check_processor(folder: str | Path) -> None:
    """Raises FileNotFoundError and ValueError unless a folder `processor/` prepares pictures as it is done here."""
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no preprocessor_config.json in {folder}: get the folder processor/ of "
                                "Qwen/Qwen-Image-Edit, or leave processor_config out, which is not needed")
    ours = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "patch_size": PATCH, "merge_size": MERGE,
            "temporal_patch_size": FRAMES, "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD)}
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if other := [f"{name} {theirs[name]} instead of {value}" for name, value in ours.items()
                 if theirs.get(name) not in (None, value)]:
        raise ValueError(f"{file} has {', '.join(other)}: it is of another model than Qwen-Image's editing")
