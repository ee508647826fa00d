"""The whole loop under the VRAM engine: equal latents whatever stays where, and as few bytes as possible."""
from __future__ import annotations

import logging
import threading

import psutil
import pytest
import torch
from torch import Tensor

from diffsynth_backend.core.vram import iter_managed
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.core.vram.timestep_table import Schedule, TimestepTable
from diffsynth_backend.diffusion import Step
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline

STEPS = 4
MIB = 1 / 1024  # GiB
LIMITS = {"none": 0, "little": 9 * MIB, "half": 14 * MIB, "all": None}


def run(pipe: QwenImagePipeline, cfg_scale: float = 4.0, steps: int = STEPS, on_step=lambda step: None) -> Tensor:
    """The latents of each step, one after the other."""
    seen = []

    def note(step: Step) -> None:
        seen.append(step.latents.clone())
        on_step(step)

    pipe("a red circle", "a blue square", height=64, width=48, seed=1, num_inference_steps=steps, cfg_scale=cfg_scale,
         progress_bar_cmd=list, step_callback=note)
    return torch.stack(seen)


def load(tiny_files, preset: str, limit: float | None = None, dtype=torch.float32) -> QwenImagePipeline:
    fields = vram_preset(preset, dtype, "cpu")
    fields.pop("computation_dtype"), fields.pop("computation_device")
    return tiny_files.load(vram_limit=limit, **fields)


@pytest.fixture(scope="module")
def expected(tiny_files) -> dict[float, Tensor]:
    """Latents of the unmanaged pipeline by guidance scale."""
    pipe = tiny_files.load()
    return {cfg_scale: run(pipe, cfg_scale) for cfg_scale in (1.0, 4.0)}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("preset", ["low", "disk"])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_same_latents_as_unmanaged(tiny_files, expected, preset, limit, cfg_scale):
    pipe = load(tiny_files, preset, limit)
    for _ in range(2):
        assert torch.equal(run(pipe, cfg_scale), expected[cfg_scale])
    if limit:
        assert pipe.last_loop.traffic.peak_device_bytes <= limit * 2**30


@pytest.mark.parametrize("without", ["lock step", "table", "both"])
def test_byte_savers_change_nothing(tiny_files, expected, without, monkeypatch):
    pipe = load(tiny_files, "disk", 0)
    if without != "table":
        monkeypatch.setattr(pipe, "_run_sides", lambda passes: [run_one() for run_one in passes])
    if without != "lock step":
        monkeypatch.setattr("diffsynth_backend.core.vram.residency.has_timestep_call", lambda model: False)
    assert torch.equal(run(pipe), expected[4.0])


def test_a_step_reads_two_thirds_of_the_denoiser_once_for_both_sides(tiny_files):
    """From disk, with guidance: what depends on the timestep alone passes by once for all steps."""
    pipe = load(tiny_files, "disk", 0)
    read = []
    run(pipe, on_step=lambda step: read.append(pipe.last_loop.traffic.read_bytes))
    whole = sum(layer.management.streamed_bytes(pipe._residencies["dit",]._stream.bus) // 2
                for layer in iter_managed(pipe.dit))  # bf16 on disk, float32 in the ring
    modulation = sum(p.numel() * 2 for name, p in pipe.dit.named_parameters()
                     if "_mod." in name or name.startswith(("time_text_embed", "norm_out")))
    total = sum(p.numel() * 2 for p in pipe.dit.parameters())
    assert pipe.last_loop.traffic.read_bytes == modulation + STEPS * (total - modulation)
    assert (total - modulation) / total <= 0.67
    assert pipe.last_loop.traffic.passes == STEPS + 1
    assert whole >= total


def test_the_limit_counts_table_ring_and_activations(tiny_files):
    pipe = load(tiny_files, "disk", 14 * MIB)
    run(pipe)
    plan, table = pipe.last_loop.plan, 4 * 6 * 2 * 6 * 128 * 4
    assert plan.activation_bytes == 2 * pipe.dit.activation_bytes(1, 8, 6, 256, torch.float32)
    assert plan.resident_bytes + plan.ring_bytes + plan.activation_bytes + table <= 14 * 2**20


def test_nothing_is_left_when_the_loop_is_interrupted(tiny_files, expected):
    pipe, threads = load(tiny_files, "disk", 9 * MIB), threading.active_count()

    def interrupt(step: Step) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, on_step=interrupt)
    assert threading.active_count() == threads
    assert {layer.state for layer in iter_managed(pipe.dit)} == {0}
    assert "modulation" not in vars(pipe.dit)
    assert torch.equal(run(pipe), expected[4.0])


def test_out_of_memory_in_a_step_is_survived(tiny_files, expected, monkeypatch):
    pipe, calls = load(tiny_files, "disk", 14 * MIB), []
    model_fn = pipe.model_fn

    def full_at_first(dit, latents, timestep, prompt_emb, prompt_emb_mask=None):
        calls.append(float(timestep))
        if len(calls) == 4:
            raise torch.OutOfMemoryError("the device is full")
        return model_fn(dit, latents, timestep, prompt_emb, prompt_emb_mask)

    pipe.model_fn = full_at_first
    assert torch.equal(run(pipe), expected[4.0])


def test_the_plan_and_what_was_moved_are_logged(tiny_files, caplog):
    caplog.set_level(logging.INFO, logger="diffsynth_backend")
    run(load(tiny_files, "disk", 14 * MIB))
    lines = [message for message in caplog.messages if message.startswith("QwenImageDiT: ")]
    assert len(lines) == 2 and "cross per step" in lines[0] and "read from disk" in lines[1]


# ---- the table ------------------------------------------------------------------------------------------------------

@pytest.fixture
def dit(tiny_files):
    return tiny_files.load(models=("transformer",)).dit


@torch.no_grad()
def test_the_table_gives_what_the_model_computes(dit):
    timesteps = tuple(torch.tensor([1000.0, 750.0, 20.0]))
    table = TimestepTable(dit)
    for call in table.calls(Schedule(timesteps, 2, torch.float32), torch.device("cpu")):
        call()
    computed, asked = [], torch.tensor([750.0]).expand(2)
    plain = dit.modulation(asked, torch.float32)
    table._compute = lambda timestep, dtype: computed.append((timestep.tolist(), dtype))
    with table.installed():
        found = dit.modulation(asked, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found.image + found.text, plain.image + plain.text))
        assert not computed
        for timestep, dtype in ((torch.tensor([751.0, 751.0]), torch.float32), (asked, torch.float16),
                                (torch.tensor([750.0]), torch.float32), (torch.tensor([750.0, 20.0]), torch.float32)):
            dit.modulation(timestep, dtype)
    assert computed == [([751.0, 751.0], torch.float32), ([750.0, 750.0], torch.float16),
                        ([750.0], torch.float32), ([750.0, 20.0], torch.float32)]
    assert table.nbytes == 3 * 2 * 4 * 128 * (6 * 2 * 6 + 2)
    assert "modulation" not in vars(dit)


# ---- many runs ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["low", "disk"])
def test_fifty_runs_do_not_grow(tiny_files, preset):
    pipe, after = load(tiny_files, preset, 9 * MIB), []
    for index in range(50):
        run(pipe, steps=1)
        if index in (9, 49):
            after.append(psutil.Process().memory_info().rss)
    # The C library keeps a little for each thread that has ended. A ring that leaked would be 47 MiB by now.
    assert after[1] - after[0] < 24 * 2**20
