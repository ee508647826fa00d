"""LoRAs, masks, edit images and ControlNets in a real ComfyUI: what is run again, and what comes out."""
from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.helpers.models_folder import CONTROLNET, FILES, LIGHTNING_LORA, LORA, save_lora
from tests.host.graphs import Graph, denoise, loader, node, text_to_image

PICTURE = {"picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0x3050ff)}
STACK = {"count": "2", "count__lora_1": LORA, "count__strength_1": 0.7, "count__lora_2": LIGHTNING_LORA,
         "count__strength_2": -0.4}


def shown(client, run, name: str = "show") -> np.ndarray:
    assert run.status == "success", run.error
    return np.asarray(Image.open(io.BytesIO(client.fetch(run.files(name)[0]))))


# ---- LoRA -----------------------------------------------------------------------------------------------------------

def with_lora(strength: float = 1.0, lora: str = LORA, **changes) -> Graph:
    return {**text_to_image(load="lora", **changes),
            "lora": node("LoraLoader", pipeline=["load", 0], lora=lora, strength=strength)}


def test_another_strength_is_run_again_and_adds_to_nothing(server, client):
    client.free()
    fresh = shown(client, client.run(with_lora(1.0, seed=400)))
    client.free()
    half = client.run(with_lora(0.5, seed=400))
    loads = server.log().count("Loaded model:")
    again = client.run(with_lora(1.0, seed=400))
    assert again.executed == ["lora", "denoise", "decode", "show"]
    assert server.log().count("Loaded model:") == loads, "a strength loads nothing"
    assert np.array_equal(shown(client, again), fresh) and not np.array_equal(shown(client, half), fresh)
    without = shown(client, client.run(text_to_image(seed=400)))
    assert not np.array_equal(without, fresh)
    assert np.array_equal(shown(client, client.run(with_lora(0.0, seed=400))), without)


def test_what_fits_is_said_also_when_it_is_cached(client):
    for seed in (410, 411):
        text = client.run(with_lora(0.25, seed=seed)).outputs["lora"]["text"][0]
        assert "tiny.safetensors" in text and "transformer_blocks.99" in text and "strength 0.25" in text


def test_a_replaced_file_is_run_again(server, client):
    path = server.base / "models/loras/replaced.safetensors"
    pictures = []
    try:
        for seed in (1, 2):
            save_lora(path, seed)
            run = client.run(with_lora(lora="loras/replaced.safetensors", seed=420))
            assert "lora" in run.executed
            pictures.append(shown(client, run))
        assert "lora" not in client.run(with_lora(lora="loras/replaced.safetensors", seed=421)).executed
        graph = {**text_to_image(load="lora", seed=420), "lora": node("LoraStack", pipeline=["load", 0], **{
            **STACK, "count__lora_2": "loras/replaced.safetensors"})}
        assert client.run(graph).status == "success"
        save_lora(path, 3)
        assert "lora" in client.run(graph).executed
    finally:
        path.unlink()
    assert not np.array_equal(*pictures)


def test_a_stack_draws_what_loaders_in_a_row_draw(client, probe):
    row = {**with_lora(0.7, seed=430),
           "second": node("LoraLoader", pipeline=["lora", 0], lora=LIGHTNING_LORA, strength=-0.4),
           "stack": node("LoraStack", pipeline=["load", 0], **STACK),
           "denoise2": denoise(load="stack", seed=430),
           "decode2": node("VaeDecode", pipeline=["load", 0], samples=["denoise2", 0], tiling="off")}
    row["denoise"] = denoise(load="second", seed=430)
    assert probe("ProbeDifference", row, a=["decode", 0], b=["decode2", 0])["difference"] == 0


def test_loras_keep_no_weights_when_everything_is_freed(client, probe):
    client.free()
    graph = with_lora(seed=440)
    assert client.run(graph).status == "success"
    assert probe("ProbeState", others=graph)["pipelines"] == 1
    client.free()
    assert probe("ProbeState")["pipelines"] == 0
    assert client.run(with_lora(seed=441)).status == "success"


def test_a_schedule_that_does_not_fit_is_said_below_denoise_and_logged(server, client):
    run = client.run(with_lora(lora=LIGHTNING_LORA, seed=450))
    [hint] = run.outputs["denoise"]["text"]
    assert "choose the Lightning schedule, set steps to 4 (now 3), set cfg to 1 (now 4)" in hint
    assert hint in server.log()
    quiet = client.run(with_lora(lora=LIGHTNING_LORA, seed=450, schedule="lightning", schedule__steps=4, cfg=1.0))
    assert quiet.status == "success" and "text" not in quiet.outputs.get("denoise", {})


# ---- masks ----------------------------------------------------------------------------------------------------------

MASK = {"all": node("SolidMask", value=0.0, width=64, height=64),
        "part": node("SolidMask", value=1.0, width=24, height=64),
        "mask": node("MaskComposite", destination=["all", 0], source=["part", 0], x=0, y=0, operation="add"),
        "kept": node("ImageCrop", image=["decode", 0], x=48, y=0, width=16, height=64)}
START = {"start": node("VaeEncode", pipeline=["load", 0], pixels=["picture", 0], tiling="off"),
         "through": node("VaeDecode", pipeline=["load", 0], samples=["start", 0], tiling="off"),
         "expected": node("ImageCrop", image=["through", 0], x=48, y=0, width=16, height=64)}


@pytest.mark.parametrize("native", [True, False])
def test_what_a_mask_leaves_alone_stays(probe, native):
    graph = {**text_to_image(seed=460), **PICTURE, **MASK, **START}
    if native:
        graph["masked"] = node("SetLatentNoiseMask", samples=["start", 0], mask=["mask", 0])
        graph["denoise"] = denoise(latent="masked", seed=460)
    else:
        graph["inpaint"] = node("Inpaint", conditioning=["prompt", 0], mask=["mask", 0], blur="off")
        graph["denoise"] = denoise(prompt="inpaint", latent="start", seed=460)
    # The autoencoder looks a little beyond what it decodes, so that what is redrawn is seen from beside it.
    assert probe("ProbeDifference", graph, a=["kept", 0], b=["expected", 0])["difference"] <= 0.1
    assert probe("ProbeDifference", graph, a=["decode", 0], b=["through", 0])["difference"] > 0.3


# ---- pictures that are drawn by -------------------------------------------------------------------------------------

EDIT = {"pipeline": ["load", 0], "images__image0": ["picture", 0], "variant": "Edit-2511", "auto_resize": False,
        "rope_interpolation": False}
PROMPT = {"pipeline": ["load", 0], "positive": "a red circle", "negative": ""}


def test_edit_images_before_the_prompt_or_behind_it(probe):
    graph = {**text_to_image(seed=470), **PICTURE,
             "first": node("EditImages", **EDIT),
             "then": node("PromptEncode", **PROMPT, conditioning=["first", 0]),
             "denoise": denoise(prompt="then", seed=470),
             "behind": node("EditImages", **EDIT, conditioning=["prompt", 0]),
             "denoise2": denoise(prompt="behind", seed=470),
             "decode2": node("VaeDecode", pipeline=["load", 0], samples=["denoise2", 0], tiling="off"),
             "denoise3": denoise(seed=470),
             "plain": node("VaeDecode", pipeline=["load", 0], samples=["denoise3", 0], tiling="off")}
    assert probe("ProbeDifference", graph, a=["decode", 0], b=["decode2", 0])["difference"] == 0
    assert probe("ProbeDifference", graph, a=["decode", 0], b=["plain", 0])["difference"] > 0.05


def controlled(**changes) -> Graph:
    return {**text_to_image(prompt="apply", **changes), **PICTURE,
            "control": node("Control", image=["picture", 0], net=0, scale=1.0, start_percent=0.0, end_percent=1.0),
            "apply": node("ControlNetApply", conditioning=["prompt", 0], controls__control0=["control", 0])}


def test_a_controlnet_as_a_config_and_as_an_extra_of_a_known_model(client):
    own = client.run({**controlled(seed=480), **loader(*FILES, CONTROLNET)})
    assert not np.array_equal(shown(client, own), shown(client, client.run(text_to_image(seed=480))))
    assert "QwenImageBlockWiseControlNet" in own.outputs["load"]["text"][0]
    known = {**controlled(seed=481), "net": node("ModelConfig", model=CONTROLNET),
             "load": node("ModelLoader", model="demo", extras__extra0=["net", 0], dtype="automatic")}
    run = client.run(known)
    assert run.status == "success", run.error
    assert "QwenImageBlockWiseControlNet" in run.outputs["load"]["text"][0]


def test_entities_and_a_context_picture(client):
    graph = {**text_to_image(seed=490, prompt="context"), **PICTURE, **MASK,
             "entity": node("Entity", prompt="a blue square", mask=["mask", 0]),
             "entities": node("Entities", conditioning=["prompt", 0], entities__entity0=["entity", 0],
                              on_negative=True),
             "context": node("InContextControl", conditioning=["entities", 0], image=["picture", 0])}
    drawn = shown(client, client.run(graph))
    assert not np.array_equal(drawn, shown(client, client.run(text_to_image(seed=490))))
