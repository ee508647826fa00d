"""The LoRA nodes' execute(): strengths that do not add up, files that change, weights that stay, hints."""
from __future__ import annotations

import gc
import logging
import pickle

import pytest
import torch

from diffsynth_backend.models.dinov3_image_encoder import DINOv3ImageEncoder
from diffsynth_backend.models.qwen_image_image2lora import QwenImageImage2LoRAModel
from diffsynth_backend.models.siglip2_image_encoder import Siglip2ImageEncoder
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from tests.helpers.models_folder import FILES, LIGHTNING_LORA, LORA, VAE, save_lora
from tests.helpers.pack import submodule
from tests.nodes.wiring import STEPS, denoise

EMPTY = torch.zeros(1, 16, 1, 4, 4)


@pytest.fixture(scope="module", autouse=True)
def _as_comfyui_does():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def owner(pack):
    return submodule("diffsynth_backend.pipelines.owner").owner


@pytest.fixture(scope="module")
def draw(run, conditioning):
    def draw(pipeline, **changes):
        return denoise(run, pipeline, conditioning, EMPTY, **changes)
    return draw


def with_lora(run, pipeline, strength: float = 1.0, lora: str = LORA, **options):
    return run("LoraLoader", pipeline=pipeline, lora=lora, strength=strength, **options)


def test_the_pipeline_stays_a_value(run, pipeline):
    loaded = with_lora(run, pipeline, 0.5)
    assert pickle.loads(pickle.dumps(loaded)) == loaded and hash(loaded) and loaded.weights == pipeline.weights
    assert pipeline.loras == () and [(choice.title, choice.strength) for choice in loaded.loras] == [(LORA, 0.5)]


def test_what_fits_and_what_does_not_is_said(run, pipeline):
    text = with_lora(run, pipeline, 0.5, whole=True).ui.value
    for part in ("tiny.safetensors", "dit", "transformer_blocks.99", "strength 0.5"):
        assert part in text


def test_strengths_do_not_add_up_and_leave_no_trace(run, draw, pipeline):
    without = draw(pipeline)
    fresh = draw(with_lora(run, pipeline, 1.0))
    half = draw(with_lora(run, pipeline, 0.5))
    assert torch.equal(draw(with_lora(run, pipeline, 1.0)), fresh)
    assert torch.equal(draw(with_lora(run, pipeline, 0.0)), without) and torch.equal(draw(pipeline), without)
    assert len({tuple(picture.flatten().tolist()) for picture in (without, fresh, half)}) == 3


def test_a_stack_is_that_many_loaders_in_any_order(run, draw, pipeline):
    def stack(*choices):
        return run("LoraStack", pipeline=pipeline, count={"count": str(len(choices)), **{
            name: value for i, choice in enumerate(choices, 1)
            for name, value in zip((f"lora_{i}", f"strength_{i}"), choice)}})
    choices = (LORA, 0.7), (LIGHTNING_LORA, -0.4)
    in_a_row = with_lora(run, with_lora(run, pipeline, 0.7), -0.4, LIGHTNING_LORA)
    assert stack(*choices) == in_a_row
    expected = draw(in_a_row)
    assert torch.equal(draw(stack(*reversed(choices))), expected)
    assert not torch.equal(draw(stack(choices[0])), expected)


def test_a_replaced_file_is_noticed(run, nodes, host, draw, pipeline):
    path = host.models / "loras/replaced.safetensors"
    inputs = {"pipeline": None, "lora": "loras/replaced.safetensors", "strength": 1.0}
    stack = {"pipeline": None, "count": {"count": "2", "lora_1": LORA, "strength_1": 1.0, "lora_2": inputs["lora"],
                                         "strength_2": 1.0}}
    assert nodes["LoraLoader"].fingerprint_inputs(**inputs) is None, "not there: the run says so"
    states, pictures = [], []
    for scale in (0.3, 0.6):
        save_lora(path, seed=int(10 * scale), scale=scale)
        states += [nodes["LoraLoader"].fingerprint_inputs(**inputs), nodes["LoraStack"].fingerprint_inputs(**stack)[1]]
        pictures.append(draw(with_lora(run, pipeline, lora=inputs["lora"])))
    path.unlink()
    assert states[0] == states[1] != states[2] == states[3]
    assert not torch.equal(*pictures)


def test_files_that_cannot_be_used(run, nodes, load, pipeline, host):
    save_lora(host.models / "loras/other.safetensors")
    with pytest.raises(ValueError, match="none of its 6 keys fits a layer of vae"):
        with_lora(run, load(VAE, node_id="vae alone"), lora="loras/other.safetensors")
    (host.models / "loras/other.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)model.safetensors of https://huggingface.co/DiffSynth-Studio"):
        with_lora(run, pipeline, lora="qwen-image-eligen")
    assert nodes["LoraLoader"].validate_inputs("loras/gone.safetensors").startswith("'loras/gone.safetensors' is not")
    assert nodes["LoraLoader"].validate_inputs(LORA) is nodes["LoraLoader"].validate_inputs("qwen-image-eligen") is True


# ---- weights --------------------------------------------------------------------------------------------------------

def loaded(owner, handle) -> bool:
    gc.collect()
    return handle.weights in owner.loaded()


def test_weights_stay_while_any_handle_lives(run, load, owner):
    """The loader's output leaves the cache first, the LoRA's last; or the other way round."""
    choice = run("VramConfig", preset="low", vram_limit={"vram_limit": "none"})
    base = load(*FILES, node_id="tied", vram=choice)
    one, both = with_lora(run, base), None
    both = with_lora(run, one, 0.5)
    weights = base.weights
    del base, one
    assert loaded(owner, weights), "a pipeline with LoRAs is in use"
    del both
    assert not loaded(owner, weights)
    base = load(*FILES, node_id="tied", vram=choice)
    one = with_lora(run, base)
    pipe = id(owner.get(base))
    del one
    assert loaded(owner, weights) and id(owner.get(base)) == pipe
    del base
    assert not loaded(owner, weights)


def test_a_new_strength_loads_nothing_and_frees_nothing(run, owner, pipeline, draw):
    pipe = id(owner.get(pipeline))
    before = with_lora(run, pipeline, 0.5)
    after = with_lora(run, pipeline, 0.6)
    del before
    gc.collect()
    draw(after)
    assert id(owner.get(after)) == id(owner.get(pipeline)) == pipe


def test_another_model_in_the_slot_is_not_freed_by_an_old_handle(run, load, owner):
    old = with_lora(run, load(*FILES, node_id="changed"))
    new = load(VAE, node_id="changed", vram=run("VramConfig", preset="low", vram_limit={"vram_limit": "none"}))
    del old
    assert loaded(owner, new)


# ---- schedules ------------------------------------------------------------------------------------------------------

LIGHTNING = {"schedule": "lightning", "steps": 4, "denoise": 1.0}


@pytest.mark.parametrize("lora, schedule, cfg, words", [
    (LIGHTNING_LORA, STEPS, 4.0, ("choose the Lightning schedule", "set steps to 4", "set cfg to 1")),
    (LIGHTNING_LORA, LIGHTNING, 4.0, ("set cfg to 1",)), (LORA, LIGHTNING, 1.0, ("there is none",)),
    (LIGHTNING_LORA, LIGHTNING, 1.0, None), (LORA, STEPS, 4.0, None)])
def test_a_schedule_that_does_not_fit_is_said_and_logged(run, pipeline, conditioning, caplog, lora, schedule, cfg,
                                                         words):
    output = run("Denoise", whole=True, pipeline=with_lora(run, pipeline, lora=lora), conditioning=conditioning,
                 latent={"samples": EMPTY}, seed=1, cfg=cfg, schedule=schedule, cfg_norm=False)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if words is None:
        assert output.ui is None and not warnings
    else:
        assert warnings == [output.ui.value] and all(word in output.ui.value for word in words)


def test_what_authors_say_is_written_below(pack):
    settings = submodule("nodes.lora").author_settings
    assert settings("qwen-image-edit-2511-lightning") == [
        "Its authors use it with qwen-image-edit-2511 and, in Denoise, schedule lightning, steps 4, cfg 1"]
    assert "fixed shift, mu 0.916, steps 3" in settings("qwen-image-distill-dmd2")[0]
    assert settings("qwen-image-eligen") == settings(LORA) == []


# ---- image to LoRA --------------------------------------------------------------------------------------------------

@pytest.fixture
def writer(owner, monkeypatch, host):
    """A pipeline whose nets, which no file of the tests has, write LoRAs for the tiny denoiser."""
    def build(handle) -> QwenImagePipeline:
        torch.manual_seed(0)
        pipe = QwenImagePipeline(device="cpu", torch_dtype=torch.float32)
        pipe.siglip2_image_encoder = Siglip2ImageEncoder(hidden_size=8, num_layers=1, num_heads=2,
                                                         intermediate_size=12, image_size=384)
        pipe.dinov3_image_encoder = DINOv3ImageEncoder(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=12)
        pipe.image2lora_style = QwenImageImage2LoRAModel(num_blocks=6, use_residual=False, compress_dim=4, rank=2,
                                                         dim=128, image_dim=24)
        return pipe.eval().requires_grad_(False)

    handle = submodule("diffsynth_backend.pipelines.handle")
    source = handle.ModelSource("nets", (str(host.models / VAE),))
    monkeypatch.setattr(owner, "_build", build)
    yield handle.PipelineHandle("qwen-image", (source,), None, torch.float32, "cpu", slot="i2l")
    owner.free("i2l")


def test_pictures_become_a_lora_that_is_saved_and_draws(run, pipeline, draw, writer, host):
    draw(pipeline)  # loaded before the nets are, by the owner's own build
    output = run("ImageToLora", whole=True, pipeline=writer, images=torch.rand(2, 40, 48, 3),
                 filename_prefix="loras/style")
    lora = output.args[0]
    assert lora.file == str(host.models.parent / "output/loras/style_00001_.safetensors")
    assert output.ui.value == "saved as loras/style_00001_.safetensors in the output folder"
    applied = run("ApplyLora", whole=True, pipeline=pipeline, lora=lora, strength=5.0)
    assert "style_00001_.safetensors" in applied.ui.value and applied.args[0].loras[0].strength == 5.0
    assert not torch.equal(draw(applied.args[0]), draw(pipeline))


def test_nets_that_are_missing_are_named(run, pipeline):
    with pytest.raises(ValueError, match="image to LoRA needs one of image2lora_style"):
        run("ImageToLora", pipeline=pipeline, images=torch.rand(1, 32, 32, 3), filename_prefix="x")


def test_the_bias_of_the_general_nets_is_looked_for(run, pipeline, monkeypatch):
    monkeypatch.setattr(submodule("nodes.lora"), "needs_bias", lambda handle: True)
    with pytest.raises(FileNotFoundError, match="Qwen-Image-i2L-Bias.safetensors of https://huggingface.co"):
        run("ImageToLora", pipeline=pipeline, images=torch.rand(1, 32, 32, 3), filename_prefix="x")
