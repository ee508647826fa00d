"""The steps one by one, against the pipeline's own call, and what they refuse."""
from __future__ import annotations

import dataclasses
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

from diffsynth_backend.core.vram import iter_managed
from diffsynth_backend.pipelines.handle import ModelSource, PipelineHandle, VramChoice, decide
from diffsynth_backend.pipelines.owner import DeviceMemory, WeightsOwner
from diffsynth_backend.pipelines.report import describe, plan_lines
from diffsynth_backend.pipelines.steps import (
    Sigmas,
    Steps,
    Tiles,
    decode_latents,
    encode_pictures,
    encode_prompts,
    sample,
)
from tests.helpers.tiny import MODELS


@pytest.fixture(scope="module")
def weights() -> WeightsOwner:
    return WeightsOwner()


@pytest.fixture(scope="module")
def handle(tiny_files) -> PipelineHandle:
    sources = tuple(ModelSource(model, (tiny_files.file(model),)) for model in MODELS)
    return PipelineHandle("qwen-image", sources, tiny_files.tokenizer, torch.float32, "cpu", slot="1")


@pytest.fixture(scope="module")
def prompt(handle, weights):
    return encode_prompts(handle, "a red circle", "a dog", weights)


EMPTY = torch.zeros(1, 16, 1, 8, 8)


def test_the_steps_draw_what_the_pipeline_draws(handle, weights, prompt):
    samples = sample(handle, prompt, EMPTY, Steps(3), seed=5, cfg_scale=3.0, weights=weights)
    picture = decode_latents(handle, samples, weights=weights)[0]
    image = weights.get(handle)("a red circle", "a dog", cfg_scale=3.0, height=64, width=64, seed=5,
                                num_inference_steps=3, progress_bar_cmd=iter)
    assert np.abs(np.asarray(image) / 255 - picture.numpy()).max() <= 0.5 / 255 + 1e-4


def test_image_to_image_draws_what_the_pipeline_draws(handle, weights, prompt):
    from PIL import Image

    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    eight_bit = (picture * 255).round().byte()
    latents = encode_pictures(handle, eight_bit.float() / 255, weights=weights)
    samples = sample(handle, prompt, latents, Steps(4, 0.6), seed=5, cfg_scale=1.0, weights=weights)
    image = weights.get(handle)("a red circle", cfg_scale=1.0, height=64, width=64, seed=5, num_inference_steps=4,
                                input_image=Image.fromarray(eight_bit[0].numpy()), denoising_strength=0.6,
                                progress_bar_cmd=iter)
    ours = decode_latents(handle, samples, weights=weights)[0].numpy()
    assert np.abs(np.asarray(image) / 255 - ours).max() <= 0.5 / 255 + 1e-3


def test_a_prompt_is_encoded_once_for_all_sizes_and_scales(handle, weights, prompt):
    assert "QwenImageUnit_PromptEmbedder" not in prompt.bundle.pending and "prompt_emb" in prompt.bundle.names()
    before = prompt.bundle.dicts()
    for latents, cfg in ((EMPTY, 1.0), (torch.zeros(2, 16, 4, 6), 4.0)):
        assert sample(handle, prompt, latents, Steps(1), 0, cfg, weights=weights).shape == \
            (len(latents), 16, 1, *latents.shape[-2:])
    assert prompt.bundle.dicts()[1].keys() == before[1].keys()


def test_inputs_are_not_written_into(handle, weights, prompt):
    latents = torch.randn(1, 16, 1, 8, 8)
    copy = latents.clone()
    sample(handle, prompt, latents, Steps(2, 0.5), 0, 4.0, weights=weights)
    decode_latents(handle, latents, weights=weights)
    assert torch.equal(latents, copy)


def test_tiles_and_pictures_are_counted(handle, weights):
    counted: list[int] = []

    def progress(parts):
        counted.append(len(parts))
        return iter(parts)

    decode_latents(handle, torch.zeros(3, 16, 1, 8, 8), progress=progress, weights=weights)
    decode_latents(handle, torch.zeros(1, 16, 1, 24, 8), Tiles(128, 64), progress=progress, weights=weights)
    encode_pictures(handle, torch.zeros(2, 64, 64, 3), progress=progress, weights=weights)
    assert counted == [3, 2, 2]


def test_a_prompt_of_another_text_encoder_is_refused(handle, weights, prompt, tiny_files, tmp_path):
    other = tmp_path / "other.safetensors"
    other.symlink_to(tiny_files.file("text_encoder"))
    elsewhere = dataclasses.replace(handle, sources=(ModelSource("other", (str(other),)), *handle.sources[1:]))
    with pytest.raises(ValueError, match="connect Prompt Encode to the pipeline that denoises"):
        sample(elsewhere, prompt, EMPTY, Steps(1), 0, 1.0, weights=weights)


def test_a_pipeline_without_a_text_encoder_takes_a_prompt(handle, weights, prompt):
    parts = dataclasses.replace(handle, tokenizer=None, sources=handle.sources[1:], slot="2")
    alone = sample(parts, prompt, EMPTY, Steps(2), 0, 4.0, weights=weights)
    assert torch.equal(alone, sample(handle, prompt, EMPTY, Steps(2), 0, 4.0, weights=weights))


@pytest.mark.parametrize("index", [[0, 1], [-1], [5000]])
def test_a_batch_index_that_does_not_fit_is_refused(handle, weights, prompt, index):
    with pytest.raises(ValueError, match="batch_index"):
        sample(handle, prompt, EMPTY, Steps(1), 0, 1.0, batch_index=index, weights=weights)


def test_left_over_noise_is_kept_as_comfyui_keeps_it(handle, weights, prompt):
    """x = (1 − σ)·x₀ + σ·ε leaves as x / (1 − σ), and comes in again times (1 − σ): raw latents of one picture."""
    whole = Sigmas((1.0, 0.6, 0.3, 0.0))
    first = sample(handle, prompt, EMPTY, Sigmas((1.0, 0.6)), 1, 4.0, weights=weights)
    second = sample(handle, prompt, first, Sigmas((0.6, 0.3, 0.0), adds_noise=False), 99, 4.0, weights=weights)
    assert torch.allclose(second, sample(handle, prompt, EMPTY, whole, 1, 4.0, weights=weights), atol=1e-4)


def test_the_report(handle, weights):
    text = describe(handle, weights.get(handle))
    assert text.splitlines()[0] == "Qwen-Image · computes in float32 on cpu"
    assert "dit: QwenImageDiT, 3.7 million parameters" in text
    parts = dataclasses.replace(handle, tokenizer=None, sources=handle.sources[1:2], slot="3")
    assert "vae: not loaded" in describe(parts, weights.get(parts))


# ---- weights that move ----------------------------------------------------------------------------------------------

MIB = 1 / 1024  # GiB


def streamed(handle: PipelineHandle, limit: float | None, preset: str = "disk") -> PipelineHandle:
    return dataclasses.replace(handle, slot="s", vram=VramChoice(preset, limit).settings(torch.float32, "cpu", 16))


def test_a_run_reports_what_was_streamed(handle, weights, prompt):
    lines: list[str] = []
    kept = sample(handle, prompt, EMPTY, Steps(2), 0, 4.0, weights=weights, report=lines.append)
    assert lines == [], "nothing moves"
    moved = sample(streamed(handle, 0.0), prompt, EMPTY, Steps(2), 0, 4.0, weights=weights, report=lines.append)
    assert torch.equal(kept, moved)
    [line] = lines
    assert line == weights.get(streamed(handle, 0.0)).last_loop.traffic.describe() and "streamed in 3 passes" in line
    sample(streamed(handle, None), prompt, EMPTY, Steps(2), 0, 4.0, weights=weights, report=lines.append)
    assert lines == [line], "all layers stay"


def test_a_preview_plans_for_the_run_and_touches_no_weight(handle, weights, prompt):
    limited = streamed(handle, 14 * MIB)
    pipe = weights.get(limited)
    before = pipe.preview(64, 64)
    models = [model for _, model in pipe.named_models()]
    assert {layer.state for model in models for layer in iter_managed(model)} == {0}
    assert all(parameter.is_meta for parameter in pipe.dit.parameters()) and pipe.last_loop is None
    assert list(before) == ["text_encoder", "dit", "vae"]
    plans: list = []
    sample(limited, prompt, EMPTY, Steps(1), 0, 4.0, weights=weights,
           step_callback=lambda step: plans.append(pipe.last_loop.plan))
    assert plans[0].activation_bytes == before["dit"].activation_bytes == 2 * pipe.activation_bytes(EMPTY[:, :, 0], {})
    dit, vae = before["dit"], before["vae"]
    assert dit.activation_bytes + dit.ring_bytes + dit.resident_bytes <= 14 * 2**20 and vae.activation_bytes == 0
    assert 0 < plans[0].bytes_per_step < dit.bytes_per_step, "what depends on the timestep alone crosses once"
    assert pipe.preview(64, 64, cfg=False)["dit"].activation_bytes == dit.activation_bytes // 2
    assert pipe.preview(64, 64, batch=2, cfg=False)["dit"].activation_bytes == dit.activation_bytes


def test_there_is_no_preview_of_what_does_not_move(handle, weights):
    assert weights.get(handle).preview(64, 64) == {} and plan_lines(weights.get(handle), 64, 64) == []
    alone = dataclasses.replace(streamed(handle, 0.0), tokenizer=None, sources=handle.sources[2:])
    assert list(weights.get(alone).preview(64, 64)) == ["vae"]


def test_the_report_of_weights_that_move(handle, weights):
    limited = streamed(handle, 14 * MIB)
    decision = decide(1 << 30, None, 0)
    title, *lines = describe(limited, weights.get(limited), (64, 64), decision).splitlines()
    assert decision.preset == "disk" and decision.describe() in lines
    assert f"limit: {14 * MIB:g} GiB of cpu, weights and the loop's computation" in lines
    assert lines[-3:] == plan_lines(weights.get(limited), 64, 64)
    starts = ("text_encoder: ", "dit at 64×64: ", "vae: ")
    assert all(line.startswith(start) and "cross per step" in line for line, start in zip(lines[-3:], starts))
    assert lines[-2].endswith("MiB for the computation")


def test_the_report_of_a_size_that_does_not_fit(handle, weights):
    limited = streamed(handle, 14 * MIB)
    with pytest.raises(ValueError, match="the floor is"):
        weights.get(limited).preview(1328, 1328)
    last = describe(limited, weights.get(limited)).splitlines()[-1]
    assert last.startswith("1328×1328 does not fit: vram_limit is 0.01 GiB, but the floor is ")


def test_weights_that_would_go_or_are_its_own_count_as_free_ram(handle):
    owner, size = WeightsOwner(available=lambda: 1000), handle.weight_bytes()
    other = dataclasses.replace(handle, tokenizer=None, sources=handle.sources[2:], slot="2")
    assert owner.ram_for(handle) == 1000
    owner.get(handle)
    for asked in (handle, streamed(handle, 0.0), other):
        assert 0.9 * size < owner.ram_for(asked) - 1000 <= size
    with owner.use(handle):
        assert owner.ram_for(handle) > 1000 == owner.ram_for(other), "at work"
    owner.free_all()
    owner.get(streamed(handle, 0.0))
    assert owner.ram_for(handle) < 1000 + 0.5 * size, "on disk"


def test_mapped_files_are_not_counted_twice(handle, monkeypatch):
    owner = WeightsOwner(available=lambda: 1000)
    owner.get(handle)
    monkeypatch.setattr("diffsynth_backend.pipelines.owner.private_bytes", lambda: 10)
    assert owner.ram_for(handle) == 1010


class Watched(DeviceMemory):
    """Notes which models are at work."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def in_use(self, handle, models):
        names = "+".join(type(model).__name__ for model in models)
        self.events.append(names)
        try:
            yield
        finally:
            self.events.append(f"/{names}")


@pytest.mark.parametrize("fails", [False, True])
def test_the_program_around_us_hears_of_each_model_that_works_and_when_it_is_done(handle, fails):
    owner = WeightsOwner()
    owner.memory = Watched()

    def stop(step):
        if fails:
            raise InterruptedError

    prompt = encode_prompts(handle, "a red circle", "", owner)
    with suppress(InterruptedError):
        sample(handle, prompt, EMPTY, Steps(2), seed=5, cfg_scale=1.0, weights=owner, step_callback=stop)
    assert owner.memory.events == ["QwenImageTextEncoder", "/QwenImageTextEncoder", "QwenImageDiT", "/QwenImageDiT"]


def test_a_mask_needs_a_picture_without_noise(handle, weights, prompt):
    latents, mask = torch.ones(1, 16, 1, 8, 8), torch.ones(1, 64, 64)
    with pytest.raises(ValueError, match="add_noise is off"):
        sample(handle, prompt, latents, Sigmas((0.5, 0.2, 0.0), adds_noise=False), seed=5, cfg_scale=1.0,
               noise_mask=mask, weights=weights)
    with pytest.raises(ValueError, match="the latent is empty"):
        sample(handle, prompt, EMPTY, Steps(2), seed=5, cfg_scale=1.0, noise_mask=mask, weights=weights)
