"""The nodes' execute(), wired by hand with tiny models: what goes over the wires, and what is refused."""
from __future__ import annotations

import dataclasses
import logging
import pickle

import pytest
import torch

from tests.helpers.models_folder import DIT, FILES, VAE
from tests.helpers.pack import submodule
from tests.nodes.wiring import STEPS, denoise


@pytest.fixture(scope="module", autouse=True)
def _as_comfyui_does():
    with torch.inference_mode():
        yield


def test_the_pipeline_is_a_value(pipeline):
    assert pickle.loads(pickle.dumps(pipeline)) == pipeline and hash(pipeline) == hash(dataclasses.replace(pipeline))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipeline.device = "cuda"
    assert pipeline.slot == "1"
    assert pipeline.tokenizer.endswith("tokenizer") and pipeline.torch_dtype == torch.float32


def test_the_loader_says_what_it_found(load, pipeline):
    text = load(*FILES, whole=True).ui.value
    for part in ("Qwen-Image", "float32", "cpu", "tiny_dit.safetensors", "3.7 million", "MiB", "tokenizer"):
        assert part in text


def vram_config(run, preset: str, limit: float | str = "automatic", **fields: str):
    known = {"vram_limit": limit} if isinstance(limit, str) else {"vram_limit": "GiB", "gib": limit}
    return run("VramConfig", preset=preset, vram_limit=known, **fields)


def loader_lines(load, **inputs) -> list[str]:
    return load(*FILES, node_id="lines", whole=True, **inputs).ui.value.splitlines()


def test_without_a_vram_config_the_loader_decides_and_says_why(load, caplog):
    caplog.set_level(logging.INFO)
    lines = loader_lines(load)
    [decision] = [line for line in lines if line.startswith("auto: ")]
    assert decision.startswith("auto: full, because 30.1 MiB of weights fit ")
    assert any(decision in message for message in caplog.messages)
    assert not any("cross per step" in line for line in lines), "nothing moves"


def test_auto_as_a_choice_is_the_same_value(run, load, pipeline):
    assert load(*FILES, vram=vram_config(run, "auto")) == pipeline
    assert load(*FILES, node_id="custom", vram=vram_config(run, "custom")).weights == pipeline.weights


@pytest.mark.parametrize("available, limit, preset", [(0, "automatic", "disk"), (0, 4.0, "disk"), (2**40, 4.0, "low"),
                                                      (2**40, "none", "full")])
def test_auto_looks_at_the_ram_and_the_limit(run, load, host, monkeypatch, available, limit, preset):
    owner = submodule("diffsynth_backend.pipelines.owner").owner
    owner.free_all()
    monkeypatch.setattr(owner, "_available", lambda: available)
    lines = loader_lines(load, vram=vram_config(run, "auto", limit))
    assert [line.split(",")[0] for line in lines if line.startswith("auto: ")] == [f"auto: {preset}"]


def test_auto_looks_at_the_card(load, host, monkeypatch):
    """There is none here, so that only the decision is asked for."""
    loading = submodule("nodes.loading")
    for total, available, preset in ((16.0, 0, "full"), (0.5, 2**40, "low"), (0.5, 0, "disk")):
        monkeypatch.setattr(host, "device_gib", lambda device, total=total: total)
        monkeypatch.setattr(loading.owner, "_available", lambda available=available: available)
        models = dataclasses.replace(load(*FILES), device="cuda:0", slot="card")
        assert loading._decide(models, loading.VramChoice("auto")).preset == preset


def test_the_plan_is_for_the_known_models_size_or_a_typical_one(run, load):
    lines = loader_lines(load, vram=vram_config(run, "disk", 0.5))
    assert [line.split(":")[0] for line in lines if "cross per step" in line] == \
        ["text_encoder", "dit at 1328×1328", "vae"]
    known = run("ModelLoader", node_id="lines", whole=True, dtype="automatic", model={"model": "demo"},
                vram=vram_config(run, "disk", 0.5)).ui.value
    assert "dit at 128×128: " in known and "limit: 0.5 GiB of cpu" in known


def test_a_limit_that_is_too_low_for_a_typical_picture_is_said_and_loads(run, load):
    assert loader_lines(load, vram=vram_config(run, "disk", 0.01))[-1].startswith("1328×1328 does not fit: vram_limit")


def test_fields_of_custom(run, load):
    fields = {f"{state}_{part}": "disk" for state in ("offload", "onload") for part in ("dtype", "device")}
    handle = load(*FILES, node_id="custom", vram=vram_config(run, "custom", 0.5, **fields))
    assert handle.vram.offload_device == handle.vram.onload_dtype == "disk" and handle.vram.preparing_device is None
    assert handle.vram.vram_limit == 0.5


def test_denoise_says_what_was_streamed(run, load, pipeline, conditioning):
    streamed = load(*FILES, node_id="streamed", vram=vram_config(run, "disk", 0.0))
    inputs = {"conditioning": conditioning, "latent": {"samples": torch.zeros(1, 16, 1, 4, 4)}, "seed": 1, "cfg": 4.0,
              "schedule": STEPS, "cfg_norm": False}
    output = run("Denoise", whole=True, pipeline=streamed, **inputs)
    assert "GiB read from disk" in output.ui.value and "\n" not in output.ui.value
    plain = run("Denoise", whole=True, pipeline=pipeline, **inputs)
    assert plain.ui is None and torch.equal(plain.args[0]["samples"], output.args[0]["samples"])


def test_from_a_prompt_to_a_picture(run, pipeline, conditioning, host):
    empty = run("EmptyLatent", width=64, height=48, batch_size=2)["samples"]
    assert empty.shape == (2, 16, 1, 6, 8) and empty.dtype == torch.float32
    before = len(host.steps)
    samples = denoise(run, pipeline, conditioning, empty)
    assert host.steps[before:] == [0, 1]
    assert samples.shape == (2, 16, 1, 6, 8) and samples.dtype == torch.float32
    image = run("VaeDecode", pipeline=pipeline, samples={"samples": samples}, tiling={"tiling": "off"})
    assert image.shape == (2, 48, 64, 3) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1
    encoded = run("VaeEncode", pipeline=pipeline, pixels=image, tiling={"tiling": "off"})["samples"]
    assert encoded.shape == samples.shape


def test_latents_with_and_without_a_frame_axis_are_the_same(run, pipeline, conditioning):
    five = denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4))
    assert torch.equal(five, denoise(run, pipeline, conditioning, torch.zeros(1, 16, 4, 4)))


def test_denoise_one_ignores_what_the_latent_holds(run, pipeline, conditioning):
    zeros = denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4))
    assert torch.equal(zeros, denoise(run, pipeline, conditioning, torch.full((1, 16, 1, 4, 4), 3.0)))
    partly = STEPS | {"denoise": 0.5}
    assert not torch.equal(denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4), schedule=partly),
                           denoise(run, pipeline, conditioning, torch.full((1, 16, 1, 4, 4), 3.0), schedule=partly))


def test_a_picture_of_a_batch_can_be_drawn_alone(run, pipeline, conditioning):
    batch = denoise(run, pipeline, conditioning, torch.zeros(3, 16, 1, 4, 4))
    alone = denoise(run, pipeline, conditioning, None,
                    latent={"samples": torch.zeros(1, 16, 1, 4, 4), "batch_index": [2]})
    assert torch.allclose(batch[2:], alone, atol=1e-4)
    assert not torch.allclose(batch[:1], batch[1:2], atol=1e-2)


def test_given_sigmas_draw_what_steps_draw(run, pipeline, conditioning):
    scheduler = submodule("diffsynth_backend.diffusion").FlowMatchScheduler("Qwen-Image")
    scheduler.set_timesteps(2, dynamic_shift_len=4)
    sigmas = torch.cat([scheduler.sigmas, torch.zeros(1)])
    given = denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4),
                    schedule={"schedule": "sigmas", "sigmas": sigmas, "add_noise": True})
    assert torch.equal(given, denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4)))


def test_a_split_schedule_draws_the_same(run, pipeline, conditioning):
    def part(sigmas, samples, add_noise):
        return denoise(run, pipeline, conditioning, samples, schedule={
            "schedule": "sigmas", "sigmas": torch.tensor(sigmas), "add_noise": add_noise})
    whole = part([1.0, 0.7, 0.4, 0.0], torch.zeros(1, 16, 1, 4, 4), True)
    first = part([1.0, 0.7], torch.zeros(1, 16, 1, 4, 4), True)
    assert torch.allclose(part([0.7, 0.4, 0.0], first, False), whole, atol=1e-3)


def test_an_interrupt_leaves_nothing_onloaded(run, load, conditioning, host):
    choice = run("VramConfig", preset="low", vram_limit={"vram_limit": "none"}, offload_dtype="from preset")
    managed = load(*FILES, node_id="managed", vram=choice)
    owner = submodule("diffsynth_backend.pipelines.owner").owner
    host.interrupt_at = 0
    try:
        with pytest.raises(KeyboardInterrupt):
            denoise(run, managed, conditioning, torch.zeros(1, 16, 1, 4, 4))
    finally:
        host.interrupt_at = None
    states = submodule("diffsynth_backend.core.vram").iter_managed(owner.get(managed).dit)
    assert {layer.state for layer in states} == {0}
    denoise(run, managed, conditioning, torch.zeros(1, 16, 1, 4, 4))


def test_tiles(run, pipeline):
    samples = {"samples": torch.zeros(1, 16, 1, 24, 24)}
    tiled = run("VaeDecode", pipeline=pipeline, samples=samples,
                tiling={"tiling": "on", "tile_size": 128, "overlap": 64})
    assert tiled.shape == (1, 192, 192, 3)
    with pytest.raises(ValueError, match="must be smaller"):
        run("VaeDecode", pipeline=pipeline, samples=samples, tiling={"tiling": "on", "tile_size": 128, "overlap": 128})


@pytest.mark.parametrize("shape, words", [
    ((1, 4, 8, 8), "4 channels"), ((1, 16, 3, 8, 8), "3 frames.*VAE Encode turns a batch"), ((16, 8, 8), "shape"),
    ((1, 16, 7, 8), "multiples of 2"), ((0, 16, 8, 8), "not 0")])
def test_latents_of_another_kind_are_refused(run, pipeline, conditioning, shape, words):
    with pytest.raises(ValueError, match=words):
        denoise(run, pipeline, conditioning, torch.zeros(shape))


def test_what_the_noise_mask_leaves_alone_stays(run, pipeline, conditioning):
    start = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    result = denoise(run, pipeline, conditioning, None, latent={"samples": start, "noise_mask": mask})
    assert torch.allclose(result[..., 3], start[..., 3], atol=1e-4), "beside it the mask, made small, is not quite 0"
    assert not torch.allclose(result[..., :2], start[..., :2], atol=1e-1)


def test_a_noise_mask_over_nothing_is_refused(run, pipeline, conditioning):
    latent = {"samples": torch.zeros(1, 16, 1, 4, 4), "noise_mask": torch.ones(1, 1, 32, 32)}
    with pytest.raises(ValueError, match="the latent is empty"):
        denoise(run, pipeline, conditioning, None, latent=latent)


@pytest.mark.parametrize("schedule, template, mu", [
    ({"schedule": "lightning", "steps": 3, "denoise": 1.0}, "Qwen-Image-Lightning", None),
    ({"schedule": "fixed shift", "steps": 3, "denoise": 1.0, "mu": 0.916}, "Qwen-Image", 0.916)])
def test_other_schedules_are_the_schedulers(run, pipeline, conditioning, schedule, template, mu):
    scheduler = submodule("diffsynth_backend.diffusion").FlowMatchScheduler(template)
    scheduler.set_timesteps(3, exponential_shift_mu=mu)
    sigmas = torch.cat([scheduler.sigmas, torch.zeros(1)])
    given = denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4),
                    schedule={"schedule": "sigmas", "sigmas": sigmas, "add_noise": True})
    drawn = denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4), schedule=schedule)
    assert torch.equal(drawn, given)
    assert not torch.equal(drawn, denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4),
                                          schedule=STEPS | {"steps": 3}))


@pytest.mark.parametrize("sigmas, words", [([], "no step"), ([0.5, 0.9, 0.0], "fall"), ([14.6, 7.0, 0.0], "fall"),
                                           ([0.5, 0.5], "final_sigma")])
def test_schedules_of_another_kind_are_refused(run, pipeline, conditioning, sigmas, words):
    with pytest.raises(ValueError, match=words):
        denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4),
                schedule={"schedule": "sigmas", "sigmas": torch.tensor(sigmas), "add_noise": True})


@pytest.mark.parametrize("shape, words", [((1, 30, 32, 3), "32×30"), ((1, 32, 32, 4), "alpha")])
def test_pictures_of_another_kind_are_refused(run, pipeline, shape, words):
    with pytest.raises(ValueError, match=words):
        run("VaeEncode", pipeline=pipeline, pixels=torch.zeros(shape), tiling={"tiling": "off"})


def test_a_missing_model_is_named(run, load, conditioning):
    only_dit = load(DIT, node_id="part")
    with pytest.raises(ValueError, match="qwen_image_vae.*Model Loader"):
        run("VaeDecode", pipeline=only_dit, samples={"samples": torch.zeros(1, 16, 1, 4, 4)}, tiling={"tiling": "off"})
    with pytest.raises(ValueError, match="qwen_image_text_encoder"):
        run("PromptEncode", pipeline=only_dit, positive="", negative="")
    assert denoise(run, only_dit, conditioning, torch.zeros(1, 16, 1, 4, 4)).shape == (1, 16, 1, 4, 4)


def test_files_that_do_not_belong_together_are_refused(load):
    with pytest.raises(ValueError, match="both a qwen_image_vae"):
        load(*FILES, VAE, node_id="double")


@pytest.mark.parametrize("inputs, words", [
    ({"preset": "full", "vram_limit": {"vram_limit": "GiB", "gib": 4.0}}, "as a whole"),
    ({"preset": "custom", "vram_limit": {"vram_limit": "GiB", "gib": 4.0}}, "as a whole"),
    ({"preset": "low", "vram_limit": {"vram_limit": "none"}, "onload_dtype": "disk"}, "onload")])
def test_vram_settings_without_meaning_are_refused(run, load, inputs, words):
    with pytest.raises(ValueError, match=words):
        load(VAE, node_id="vram", vram=run("VramConfig", **inputs))


def test_an_unknown_file_is_refused_before_the_run(nodes):
    assert nodes["ModelConfig"].validate_inputs(FILES[0]) is True
    assert nodes["ModelConfig"].validate_inputs("demo/vae") is True
    assert "press R" in nodes["ModelConfig"].validate_inputs("vae/gone.safetensors")


def test_a_choice_of_a_newer_version_is_named(run):
    with pytest.raises(ValueError, match="choose demo, qwen-image, .* or model configs"):
        run("ModelLoader", dtype="automatic")


def test_a_known_model_that_is_not_here_names_its_files(run):
    with pytest.raises(FileNotFoundError, match=r"(?s)transformer/diffusion_pytorch_model.*huggingface.co/Qwen"):
        run("ModelLoader", model={"model": "qwen-image"}, dtype="automatic")
