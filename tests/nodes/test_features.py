"""The nodes that add to a conditioning: what Denoise gets of them, in either order, and what is refused."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from diffsynth_backend.configs import demo_model as sizes
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE
from diffsynth_backend.pipelines.qwen_image import MAX_LAYERS
from tests.helpers.models_folder import CONTROLNET, DIT, FILES, OTHER_DIT, TEXT_ENCODER, VAE
from tests.helpers.pack import submodule
from tests.nodes.wiring import STEPS, denoise

EMPTY = torch.zeros(1, 16, 1, 4, 4)
PROMPTS = {"positive": "a red circle", "negative": "a dog"}
LEFT = (torch.arange(32) < 16).float().expand(1, 32, 32)


@pytest.fixture(scope="module", autouse=True)
def _as_comfyui_does():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def plain(run, pipeline, conditioning) -> Tensor:
    return denoise(run, pipeline, conditioning, EMPTY)


def pictures(count: int = 1, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, size, size, channels, generator=torch.Generator().manual_seed(seed))


def inputs_of(conditioning) -> dict:
    shared, positive, negative = conditioning.bundle.dicts()
    return {**shared, **{f"+{name}": value for name, value in positive.items()},
            **{f"-{name}": value for name, value in negative.items()}}


# ---- Edit Images ----------------------------------------------------------------------------------------------------

def edit(run, pipeline, *batches: Tensor, **changes):
    inputs = {"images": {f"image{i}": batch for i, batch in enumerate(batches)}, "variant": "Edit-2511",
              "auto_resize": False, "rope_interpolation": False, **changes}
    return run("EditImages", pipeline=pipeline, **inputs)


@pytest.mark.parametrize("variant", ["Edit-2511", "Edit-2509", "Edit"])
def test_pictures_before_the_prompt_or_behind_it(run, pipeline, conditioning, plain, variant):
    given = {"variant": variant, "rope_interpolation": variant == "Edit"}
    before = run("PromptEncode", pipeline=pipeline, **PROMPTS,
                 conditioning=edit(run, pipeline, pictures(), **given))
    prompt = run("PromptEncode", pipeline=pipeline, **PROMPTS)
    behind = edit(run, pipeline, pictures(), **given, conditioning=prompt)
    ours, theirs = inputs_of(before), inputs_of(behind)
    assert ours.keys() == theirs.keys() and torch.equal(ours["edit_latents"][0], theirs["edit_latents"][0])
    assert torch.equal(ours["+prompt_emb"], theirs["+prompt_emb"])
    assert ours["+prompt_emb"].shape != inputs_of(prompt)["+prompt_emb"].shape, "the text encoder sees the picture"
    assert ours["zero_cond_t"] is (variant == "Edit-2511")
    drawn = denoise(run, pipeline, before, EMPTY)
    assert torch.equal(drawn, denoise(run, pipeline, behind, EMPTY)) and not torch.allclose(drawn, plain, atol=1e-2)


def test_batches_are_several_pictures_in_order(run, pipeline):
    given = inputs_of(edit(run, pipeline, pictures(2), pictures(1, 48)))
    assert [tuple(latents.shape[2:]) for latents in given["edit_latents"]] == [(4, 4), (4, 4), (6, 6)]


def test_pictures_that_do_not_fit_the_variant(run, pipeline):
    with pytest.raises(ValueError, match="2 pictures for Edit, which takes one"):
        edit(run, pipeline, pictures(2), variant="Edit")
    with pytest.raises(ValueError, match="9 pictures to edit by, at most 8"):
        edit(run, pipeline, pictures(5), pictures(4))
    with pytest.raises(ValueError, match="multiples of 16"):
        edit(run, pipeline, pictures(1, 40))


def test_a_second_one_is_refused(run, pipeline):
    with pytest.raises(ValueError, match="has edit_image, .*already.*leave one of the two nodes out"):
        edit(run, pipeline, pictures(), conditioning=edit(run, pipeline, pictures()))


def test_pictures_need_an_autoencoder(run, load):
    with pytest.raises(ValueError, match=r"(?s)qwen_image_vae to the Model Loader, such as demo/vae"):
        edit(run, load(TEXT_ENCODER, DIT, node_id="no vae"), pictures())


# ---- Inpaint --------------------------------------------------------------------------------------------------------

def test_what_the_mask_leaves_alone_stays(run, pipeline, conditioning):
    start = torch.randn(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    masked = run("Inpaint", conditioning=conditioning, mask=LEFT, blur={"blur": "off"})
    drawn = denoise(run, pipeline, masked, start)
    assert torch.allclose(drawn[..., 3], start[..., 3], atol=1e-4)
    assert not torch.allclose(drawn[..., :2], start[..., :2], atol=1e-1)
    native = {"samples": start, "noise_mask": LEFT[None]}
    assert torch.equal(drawn, denoise(run, pipeline, conditioning, None, latent=native))
    blurred = run("Inpaint", conditioning=conditioning, mask=LEFT[0], blur={"blur": "on", "size": 1, "sigma": 1.0})
    assert not torch.allclose(denoise(run, pipeline, blurred, start), drawn, atol=1e-3)


def test_masks_that_have_no_meaning(run, pipeline, conditioning):
    masked = run("Inpaint", conditioning=conditioning, mask=LEFT, blur={"blur": "off"})
    with pytest.raises(ValueError, match="the latent is empty"):
        denoise(run, pipeline, masked, EMPTY)
    with pytest.raises(ValueError, match=r"both the conditioning \(Inpaint\) and the latent"):
        denoise(run, pipeline, masked, None, latent={"samples": EMPTY + 1, "noise_mask": LEFT[None]})
    with pytest.raises(ValueError, match="mask is a batch of 2, and one is taken"):
        run("Inpaint", conditioning=conditioning, mask=LEFT.expand(2, -1, -1), blur={"blur": "off"})


# ---- ControlNet -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def controlled(run):
    """The demo's loader with an extra model, as its page offers it."""
    def load(*extras: str, node_id: str = "controlled"):
        configs = {f"extra{i}": run("ModelConfig", model=name) for i, name in enumerate(extras)}
        return run("ModelLoader", node_id=node_id, dtype="automatic", model={"model": "demo"}, extras=configs)
    return load


def control(run, **changes):
    inputs = {"image": pictures(), "net": 0, "scale": 1.0, "start_percent": 0.0, "end_percent": 1.0, **changes}
    return run("Control", **inputs)


def applied(run, conditioning, *controls):
    return run("ControlNetApply", conditioning=conditioning,
               controls={f"control{i}": given for i, given in enumerate(controls)})


def test_a_picture_controls_as_long_and_as_strongly_as_said(run, controlled):
    pipeline = controlled(CONTROLNET)
    prompt = run("PromptEncode", pipeline=pipeline, **PROMPTS)

    def draw(*controls):
        conditioning = applied(run, prompt, *controls) if controls else prompt
        return denoise(run, pipeline, conditioning, EMPTY, schedule=STEPS | {"steps": 3})

    without, full = draw(), draw(control(run))
    assert torch.equal(draw(control(run, scale=0.0)), without)
    late = draw(control(run, start_percent=0.5))
    drawn = [without, full, late, draw(control(run, end_percent=0.4)), draw(control(run, scale=0.5)),
             draw(control(run), control(run, image=pictures(seed=1)))]
    assert len({tuple(picture.flatten().tolist()) for picture in drawn}) == len(drawn)
    assert torch.equal(draw(control(run, start_percent=0.4)), late), "of three steps the middle one is at 0.5"
    assert not torch.equal(draw(control(run, start_percent=0.6)), late)


def test_controls_and_entities_are_checked_once(run, controlled, load, monkeypatch):
    checked = []
    for module, name in (("control", "check_controls"), ("entities", "check_entities")):
        module = submodule(f"diffsynth_backend.pipelines.qwen_image_{module}")
        check = getattr(module, name)
        monkeypatch.setattr(module, name, lambda given, *others, check=check, name=name: (
            checked.append(name) if given else None, check(given, *others)))
    pipeline = controlled(CONTROLNET)
    conditioned = applied(run, run("PromptEncode", pipeline=pipeline, **PROMPTS), control(run))
    assert checked == ["check_controls"]
    denoise(run, pipeline, conditioned, EMPTY)
    denoise(run, pipeline, conditioned, EMPTY, seed=2)
    given = {"entity0": run("Entity", prompt="a circle", mask=LEFT)}
    conditioned = run("Entities", conditioning=run("PromptEncode", pipeline=pipeline, **PROMPTS), entities=given,
                      on_negative=True)
    denoise(run, pipeline, conditioned, EMPTY)
    assert checked == ["check_controls", "check_entities"]
    mine, other = (load(TEXT_ENCODER, dit, VAE, CONTROLNET, node_id=dit) for dit in (DIT, OTHER_DIT))
    conditioned = applied(run, run("PromptEncode", pipeline=mine, **PROMPTS), control(run))
    for pipeline in (mine, other, other):
        denoise(run, pipeline, conditioned, EMPTY)
    assert checked[2:] == ["check_controls"] * 2, "by the models that it was given to, and by others"


def test_controls_are_what_the_backend_calls_them(run):
    given = control(run, net=2, scale=0.5, start_percent=0.25, end_percent=0.75, mask=LEFT)
    assert (given.controlnet_id, given.scale, given.start, given.end) == (2, 0.5, 0.75, 0.25)
    assert given.image.shape == (32, 32, 3) and torch.equal(given.inpaint_mask, LEFT[0])
    assert dataclasses.is_dataclass(given) and given.__dataclass_params__.frozen


def test_a_controlnet_that_is_not_loaded_is_named(run, conditioning, controlled, load):
    with pytest.raises(ValueError, match=r"(?s)a qwen_image_blockwise_controlnet to the Model Loader, such as .*"
                                         "qwen-image/controlnet-canny"):
        applied(run, conditioning, control(run))
    encoder = load(TEXT_ENCODER, node_id="encoder")
    elsewhere = applied(run, run("PromptEncode", pipeline=encoder, **PROMPTS), control(run))
    with pytest.raises(ValueError, match="qwen-image/controlnet-depth"):
        denoise(run, load(*FILES, node_id="without"), elsewhere, EMPTY)
    denoise(run, load(*FILES, CONTROLNET, node_id="with"), elsewhere, EMPTY)


@pytest.mark.parametrize("changes, words", [
    ({"net": 1}, r"controlnet_id 1, and 1 ControlNet\(s\) are loaded"), ({"mask": LEFT}, "not for inpainting")])
def test_a_net_that_does_not_fit(run, controlled, changes, words):
    pipeline = controlled(CONTROLNET)
    with pytest.raises(ValueError, match=words):
        applied(run, run("PromptEncode", pipeline=pipeline, **PROMPTS), control(run, **changes))


def test_controls_without_meaning(run):
    with pytest.raises(ValueError, match="must not end before it starts"):
        control(run, start_percent=0.8, end_percent=0.2)
    with pytest.raises(ValueError, match="image is a batch of 2"):
        control(run, image=pictures(2))


# ---- In-Context Control, Entities -----------------------------------------------------------------------------------

def test_a_context_picture_is_drawn_by(run, pipeline, conditioning, plain):
    given = run("InContextControl", conditioning=conditioning, image=pictures(size=20))
    assert not torch.allclose(denoise(run, pipeline, given, EMPTY), plain, atol=1e-2)


def entities(run, conditioning, *prompts: str, on_negative: bool = False, mask: Tensor = LEFT):
    return run("Entities", conditioning=conditioning, on_negative=on_negative, entities={
        f"entity{i}": run("Entity", prompt=prompt, mask=mask) for i, prompt in enumerate(prompts)})


def test_regions_have_prompts_of_their_own(run, pipeline, conditioning, plain):
    drawn = [plain, *(denoise(run, pipeline, entities(run, conditioning, *prompts, on_negative=on_negative), EMPTY)
                      for prompts, on_negative in ((("a circle",), False), (("a circle",), True),
                                                   (("a circle", "a blue square"), False)))]
    assert len({tuple(picture.flatten().tolist()) for picture in drawn}) == len(drawn)


def test_a_region_of_nothing_is_refused(run, pipeline, conditioning):
    with pytest.raises(ValueError, match=r"mask of entity 1 \('b'\) is empty"):
        given = run("Entities", conditioning=conditioning, on_negative=False, entities={
            "entity0": run("Entity", prompt="a", mask=LEFT), "entity1": run("Entity", prompt="b", mask=LEFT * 0)})
        denoise(run, pipeline, given, EMPTY)


def test_any_order_makes_the_same_picture(run, pipeline, conditioning):
    def inpaint(given):
        return run("Inpaint", conditioning=given, mask=LEFT, blur={"blur": "off"})

    def context(given):
        return run("InContextControl", conditioning=given, image=pictures())

    start = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = [denoise(run, pipeline, given, start) for given in (
        inpaint(context(entities(run, conditioning, "a circle"))),
        entities(run, context(inpaint(conditioning)), "a circle"))]
    assert torch.equal(*drawn)


# ---- Layers ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def layered(load, monkeypatch, pipeline):
    """A pipeline that draws layers, which no file of the tests does: the tiny one with other models in it."""
    owner = submodule("diffsynth_backend.pipelines.owner").owner
    real = owner._build

    def build(handle):
        pipe = real(handle)
        torch.manual_seed(0)
        pipe.dit = QwenImageDiT(**sizes.DIT, use_layer3d_rope=True, use_additional_t_cond=True)
        pipe.vae = QwenImageVAE(**sizes.VAE, image_channels=4)
        return pipe.eval().requires_grad_(False)

    monkeypatch.setattr(owner, "_build", build)
    handle = dataclasses.replace(pipeline, slot="layered", device="cpu:0")
    yield handle
    owner.free("layered")


def test_a_picture_is_taken_apart(run, layered):
    prompt = run("PromptEncode", pipeline=layered, **PROMPTS)
    output = run("Layers", whole=True, conditioning=prompt, image=pictures(size=48), alpha=LEFT, layers=2)
    given, latent = output.args
    assert latent["samples"].shape == (1, 16, 3, 6, 6) and not latent["samples"].any()
    samples = denoise(run, layered, given, None, latent=latent)
    assert samples.shape == (1, 16, 3, 6, 6)
    image = run("VaeDecode", pipeline=layered, samples={"samples": samples}, tiling={"tiling": "off"})
    assert image.shape == (3, 48, 48, 4) and image.dtype == torch.float32
    opaque = run("Layers", conditioning=prompt, image=pictures(size=48), layers=2)
    assert not torch.equal(samples, denoise(run, layered, opaque, None, latent=latent))


def test_alpha_is_what_a_mask_is_not(pack):
    with_alpha = submodule("diffsynth_backend.pipelines.steps").with_alpha
    picture = pictures()[0]
    assert torch.equal(with_alpha(picture, LEFT[0]), torch.cat([picture, 1 - LEFT[0][..., None]], dim=-1))
    assert with_alpha(picture, None) is picture
    with pytest.raises(ValueError, match="leave out one of the two"):
        with_alpha(pictures(channels=4)[0], LEFT[0])


def test_layers_need_their_models(run, conditioning):
    with pytest.raises(ValueError, match="VAE of Qwen-Image-Layered"):
        run("Layers", conditioning=conditioning, image=pictures(), layers=3)


def test_the_bound_of_layers_is_the_backends(nodes):
    layers = next(entry for entry in nodes["Layers"].define_schema().inputs if entry.id == "layers")
    assert layers.options["max"] == MAX_LAYERS
