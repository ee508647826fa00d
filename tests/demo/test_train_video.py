"""The script that trained the video demo still runs, and makes the files that the registry knows."""
from __future__ import annotations

from types import MethodType

import pytest
import torch
import torch.nn.functional as F

from diffsynth_backend.configs import demo_video
from diffsynth_backend.core import attention
from diffsynth_backend.core.loader.file import hash_model_file
from diffsynth_backend.demo import train_video
from diffsynth_backend.pipelines.presets import DEMO_WEIGHTS
from diffsynth_backend.pipelines.wan_prompts import MAX_TOKENS, TextPrompts


@pytest.fixture
def _same_attention():
    chosen = attention.chosen()
    yield
    attention.prefer(chosen, "the test")


def test_one_token_stands_for_all_the_padding():
    torch.manual_seed(0)
    drawer = train_video.Drawer().eval().requires_grad_(False)
    train_video.init_drawer(drawer)
    for parameter in drawer.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    prompts = TextPrompts.load(DEMO_WEIGHTS / "video" / "tokenizer")
    texts = ["a red circle moves left", "blue square moves up"]
    short, full = train_video.embed(prompts, drawer.text_encoder, texts), prompts.embed(drawer.text_encoder, texts)[0]
    assert full.shape[1] == MAX_TOKENS and torch.allclose(F.pad(short, (0, 0, 0, MAX_TOKENS - short.shape[1])), full)
    latents, timestep = torch.randn(2, 16, 5, 8, 8), torch.tensor([500.0, 900.0])
    wanted = drawer.dit(latents, timestep, full)
    for block in drawer.dit.blocks:
        block.cross_attn.forward = MethodType(train_video.counted_padding, block.cross_attn)
    assert (drawer.dit(latents, timestep, short) - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_few_steps_from_nothing(tmp_path, _same_attention):
    train_video.make_code(tmp_path)
    train_video.make_tokenizer(tmp_path)
    train_video.train_dit(tmp_path, steps=2, batch=4)
    for half in ("encoder", "decoder"):
        train_video.train_autoencoder(tmp_path, half, steps=1, batch=2)
    train_video.export(tmp_path, tmp_path / "weights")
    hashes = {hash_model_file(str(path)) for path in (tmp_path / "weights").rglob("*.safetensors")}
    assert hashes == {row["model_hash"] for row in demo_video.MODEL_CONFIGS}
    made, known = (folder / "tokenizer" / "tokenizer.json" for folder in (tmp_path / "weights", DEMO_WEIGHTS / "video"))
    assert made.read_text() == known.read_text()
