"""Qwen-Image on CUDA cards of several sizes, beside what the machine gives: see `streaming`.

Notable: one large card plays the smaller ones, whose size torch's allocator is then held to. The weights are random
bits of the true shapes in RAM, since zeros would let the card clock higher. A step is the positive and the negative
pass; ours walks them together and makes the modulation once, the others do what their packages do.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core.device import GIB
from diffsynth_backend.core.loader.model import build_on_meta
from diffsynth_backend.core.vram import Loop, Residency, enable_vram_management
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.core.vram.timestep_table import Schedule
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT

from .harness import STEPS, Case, Entered, Setup, Step, installed, measure, plain, ratios, say, table

BF16 = torch.bfloat16
COPY_MIB = (1, 8, 64, 512)
MATMULS = ((8192, 8192, 8192), (6989, 3072, 12288))  # the second: Qwen-Image's MLP at 1328 × 1328
LIMITS = (6, 8, 12, 16, 24, 32)  # GiB
LATENTS, PROMPT = (1, 16, 166, 166), (1, 100, 3584)


def cuda(setup: Setup) -> None:
    """Ceilings of the machine, and Qwen-Image at 1328 × 1328 with guidance on cards of several sizes."""
    if not torch.cuda.is_available():
        say("cuda: skipped, there is no CUDA device here")
        return
    setup = replace(setup, device=torch.device("cuda"))
    ceilings(setup)
    dit_steps(setup)


def synchronized(setup: Setup, step: Step) -> Step:
    def run() -> None:
        step()
        torch.cuda.synchronize(setup.device)

    return run


def ceilings(setup: Setup) -> None:
    cases, amounts = {}, {}
    for mib in COPY_MIB:
        target = torch.empty(mib << 20, dtype=torch.uint8, device=setup.device)
        for kind in ("pinned", "pageable"):
            host = torch.zeros(mib << 20, dtype=torch.uint8, pin_memory=kind == "pinned")
            name = f"GB/s to the device, {kind}, {mib} MiB"
            cases[name], amounts[name] = partial(target.copy_, host, non_blocking=True), target.nbytes / 1e9
    for m, k, n in MATMULS:
        name = f"TFLOP/s of a bf16 product {m} × {k} × {n}"
        left, right = (torch.randn(shape, dtype=BF16, device=setup.device) for shape in ((m, k), (k, n)))
        cases[name], amounts[name] = partial(torch.matmul, left, right), 2 * m * k * n / 1e12
    seconds = measure({name: Case(plain(synchronized(setup, step))) for name, step in cases.items()}, setup.turns, 10)
    table("ceilings", [(name, [amounts[name] / took for took in seconds[name]], None) for name in cases], digits=1)


def dit_steps(setup: Setup) -> None:
    """A step is the positive and the negative pass. Ours may take no more of the card than its limit."""
    layout = build_on_meta(QwenImageDiT).state_dict()
    noise = torch.randn(max(tensor.numel() for tensor in layout.values())).mul(0.02).to(BF16)
    weights = {name: noise[:tensor.numel()].view(tensor.shape).clone() for name, tensor in layout.items()}
    peaks: dict[str, int] = {}
    cases = {"resident": resident_dit(setup, weights), **installed(PEERS, setup, weights)}
    cases |= {f"ours, {limit} GiB": streamed_dit(setup, weights, limit) for limit in LIMITS}
    seconds = measure({name: Case(noting_peak(setup, name, case.enter, peaks)) for name, case in cases.items()},
                      setup.turns)
    table("Qwen-Image at 1328 × 1328, two sides: step / resident step", [
        (f"{name}; at most {peaks[name] / GIB:.1f} GiB reserved", ratios(taken, seconds["resident"]), None)
        for name, taken in seconds.items()])


def noting_peak(setup: Setup, name: str, enter: Entered, peaks: dict[str, int]) -> Entered:
    """And beginning with an empty card."""

    @contextmanager
    def entered() -> Iterator[Step]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)
        with enter() as step:
            yield step
        peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_reserved(setup.device))

    return entered


def build_dit(weights: Mapping[str, Tensor]) -> nn.Module:
    model = build_on_meta(QwenImageDiT).eval()
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def two_sides(setup: Setup, dit: nn.Module, timestep: Tensor) -> list[Step]:
    latents, prompt = (torch.zeros(shape, dtype=BF16, device=setup.device) for shape in (LATENTS, PROMPT))
    return [partial(dit, latents, timestep, prompt)] * 2


def in_turn(setup: Setup, dit: nn.Module) -> Entered:
    """Passes one after the other, as models make them that know nothing of each other."""
    passes = two_sides(setup, dit, torch.full((1,), 500.0, device=setup.device))
    return plain(synchronized(setup, lambda: [one() for one in passes]))


def resident_dit(setup: Setup, weights: Mapping[str, Tensor]) -> Case:
    @contextmanager
    def enter() -> Iterator[Step]:
        with in_turn(setup, build_dit(weights).to(setup.device))() as step:
            yield step

    return Case(enter)


def streamed_dit(setup: Setup, weights: Mapping[str, Tensor], limit: float) -> Case:
    dit = enable_vram_management(build_dit(weights), module_map_of(QwenImageDiT),
                                 vram_preset("low", BF16, setup.device), limit)
    residency, timesteps = Residency([dit]), torch.linspace(1000, 100, 1 + STEPS + 1)
    loop = Loop(len(timesteps), 2, dit.activation_bytes(*LATENTS[:1], *LATENTS[2:], PROMPT[1], BF16),
                Schedule(tuple(timesteps), LATENTS[0], BF16))

    @contextmanager
    def enter() -> Iterator[Step]:
        total = torch.cuda.get_device_properties(setup.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / total), setup.device)
        coming = iter(timesteps)

        def step() -> None:
            timestep = next(coming)
            at_device = timestep.reshape(1).to(setup.device)
            residency.now_at(at_device, float(timestep))
            residency.with_room(partial(residency.run, two_sides(setup, dit, at_device)))

        try:
            with torch.no_grad(), residency.loop(loop):
                yield synchronized(setup, step)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, setup.device)

    return Case(enter)


def grouped_dit(setup: Setup, weights: Mapping[str, Tensor]) -> Case:
    from diffusers.hooks import apply_group_offloading

    dit = build_dit(weights)
    apply_group_offloading(dit, setup.device, offload_type="leaf_level", use_stream=True)
    return Case(in_turn(setup, dit))


def sequential_dit(setup: Setup, weights: Mapping[str, Tensor]) -> Case:
    from accelerate import cpu_offload

    return Case(in_turn(setup, cpu_offload(build_dit(weights), setup.device)))


PEERS = {"diffusers, group offloading by leaf with streams": grouped_dit,
         "accelerate, cpu_offload": sequential_dit}
