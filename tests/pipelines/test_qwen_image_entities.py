"""Entities: their prompts as embeddings, their masks as regions, and what is refused."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsynth_backend.pipelines.qwen_image_entities import (
    MAX_ENTITIES,
    QwenImageUnit_EntityChecker,
    QwenImageUnit_EntityControl,
    QwenImageUnit_EntityRegions,
    entity_regions,
)

HEIGHT, WIDTH = 64, 96
ROWS, COLUMNS = HEIGHT // 8, WIDTH // 8
PROMPTS = ["a red circle", "a blue square on a table"]


def picture(seed: int = 0, mode: str = "RGB", height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    channels = () if mode == "L" else (len(mode),)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8))


def box(left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("RGB", (WIDTH, HEIGHT))
    mask.paste((255, 255, 255), (left, top, right, bottom))
    return mask


MASKS = [box(0, 0, 48, 64), box(40, 16, 96, 48)]
GIVEN = {"eligen_entity_prompts": PROMPTS, "eligen_entity_masks": MASKS}


UNITS = [QwenImageUnit_EntityControl(), QwenImageUnit_EntityRegions()]
CHECKED = [QwenImageUnit_EntityChecker(), *UNITS]


@pytest.fixture
def process(pipe):
    """The units on the three dicts, with the global prompts encoded."""
    def run(**shared):
        sides = [{"prompt_emb": pipe.prompts.embed(pipe.text_encoder, [text])[0]} for text in ("a picture", "blurred")]
        size = {"height": HEIGHT, "width": WIDTH}
        return pipe.run_units({**size, **shared}, *sides, units=CHECKED)
    return run


def regions_of(boxes: list[tuple[int, int, int, int]]) -> Tensor:
    """In latents."""
    regions = torch.zeros(len(boxes), ROWS, COLUMNS, dtype=torch.bool)
    for region, (left, top, right, bottom) in zip(regions, boxes):
        region[top:bottom, left:right] = True
    return regions


# ---- what the unit makes --------------------------------------------------------------------------------------------

def test_prompts_are_embedded_like_plain_ones_and_masks_lie_on_the_latent_grid(process, theirs, relative_error):
    _, posi, _ = process(**GIVEN)
    assert len(posi["entity_prompt_emb"]) == 2
    for prompt, embedding in zip(PROMPTS, posi["entity_prompt_emb"]):
        assert relative_error(embedding, theirs._get_qwen_prompt_embeds([prompt])[0]) <= 1e-5
    assert torch.equal(posi["entity_masks"].masks, regions_of([(0, 0, 6, 8), (5, 2, 12, 6)]))


def test_the_negative_side_has_no_entities_unless_wanted(process):
    shared, _, nega = process(**GIVEN)
    assert set(nega) == {"prompt_emb"}
    assert not {"entity_prompt_emb", "entity_masks"} & set(shared)


def test_on_the_negative_side_the_negative_prompt_stands_for_each_entity(process):
    _, posi, nega = process(**GIVEN, eligen_enable_on_negative=True)
    assert len(nega["entity_prompt_emb"]) == 2
    assert all(embedding is nega["prompt_emb"] for embedding in nega["entity_prompt_emb"])
    assert nega["entity_masks"] is posi["entity_masks"]


def test_embeddings_have_the_pipelines_dtype(pipe, process):
    pipe.torch_dtype = torch.bfloat16
    assert {embedding.dtype for embedding in process(**GIVEN)[1]["entity_prompt_emb"]} == {torch.bfloat16}


@pytest.mark.parametrize("shared", [{}, {"eligen_entity_prompts": [], "eligen_entity_masks": []},
                                    {"eligen_entity_prompts": None, "eligen_enable_on_negative": False}])
def test_without_entities_nothing_is_done(pipe, process, monkeypatch, shared):
    monkeypatch.setattr(type(pipe), "load_models_to_device", lambda *_: pytest.fail("onloaded"))
    _, posi, nega = process(**shared)
    assert set(posi) == set(nega) == {"prompt_emb"}


def test_the_unit_writes_nothing_into_the_dicts_of_a_graph(pipe):
    dicts = {"height": HEIGHT, "width": WIDTH, "eligen_enable_on_negative": True, **GIVEN}, {}, \
        {"prompt_emb": torch.zeros(1, 3, 64)}
    before = [dict(side) for side in dicts]
    pipe.run_units(*dicts, units=UNITS)
    assert list(dicts) == before


class Asked(dict):
    """Notes the keys that are looked up."""

    def __init__(self, values: dict, keys: set[str]) -> None:
        super().__init__(values)
        self.keys_asked = keys

    def get(self, key: str, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str):
        self.keys_asked.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: type(unit).__name__)
def test_units_declare_what_they_read_and_write(pipe, unit):
    asked, side = set(), {"prompt_emb": torch.zeros(1, 3, 64), "entity_prompt_emb": (torch.zeros(1, 2, 64),) * 2}
    if "entity_prompt_emb" in unit.output_params:
        del side["entity_prompt_emb"]
    shared = {"height": HEIGHT, "width": WIDTH, "eligen_enable_on_negative": True, **GIVEN}
    dicts = [Asked(values, asked) for values in (shared, side, side)]
    before = [set(side) for side in dicts]
    after = unit.process(pipe, *dicts)
    assert asked == unit.reads()
    assert [set(new) - old for new, old in zip(after, before)] == [set(), *[set(unit.output_params)] * 2]


# ---- regions --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mask", [picture(1), picture(2, "L"), picture(3, "L", 100, 60), picture(4, "L", 5, 7),
                                  picture(5, "RGBA", 33, 201), picture(6).quantize(16)],
                         ids=["RGB", "L", "another size", "tiny", "wide RGBA", "palette"])
def test_regions_are_the_published_ones(mask):
    """The nearest pixel of each latent, where the mean of the colours is above the middle.

    In none of the sizes is the middle of a latent on the border between two pixels by a fraction that rounds.
    """
    nearest = mask.convert("RGB").resize((COLUMNS, ROWS), Image.Resampling.NEAREST)
    expected = torch.from_numpy(np.asarray(nearest, dtype=np.float32)).mean(dim=-1) / 127.5 - 1 > 0
    assert torch.equal(entity_regions(["x"], [mask], ROWS, COLUMNS)[0], expected)


@pytest.mark.parametrize("colours", [False, True])
def test_a_tensor_is_the_mask_it_holds(colours):
    tensor = torch.from_numpy(np.asarray(picture(2, "L"), dtype=np.float32) / 255)
    tensor = tensor[..., None].expand(-1, -1, 3) if colours else tensor
    assert torch.equal(entity_regions(["x"], [tensor], ROWS, COLUMNS),
                       entity_regions(["x"], [picture(2, "L")], ROWS, COLUMNS))


# ---- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shared, error, message", [
    ({"eligen_entity_prompts": PROMPTS}, ValueError, "there are 2 eligen_entity_prompts and 0 eligen_entity_masks"),
    ({"eligen_entity_masks": MASKS}, ValueError, "there are 0 eligen_entity_prompts and 2 eligen_entity_masks"),
    ({**GIVEN, "eligen_entity_masks": MASKS[:1]}, ValueError, "there are 2 eligen_entity_prompts and 1"),
    ({**GIVEN, "eligen_entity_prompts": "a red circle"}, TypeError,
     "eligen_entity_prompts must be a list with one entry for each entity, got str"),
    ({**GIVEN, "eligen_entity_masks": MASKS[0]}, TypeError, "eligen_entity_masks must be a list .* got Image"),
    ({**GIVEN, "eligen_entity_prompts": ["a", None]}, TypeError, "a prompt must be a text, got NoneType"),
    ({**GIVEN, "eligen_entity_masks": [MASKS[0], "mask.png"]}, TypeError,
     r"eligen_entity_masks\[1\] must be a PIL image or a tensor"),
    ({"eligen_entity_prompts": ["x"] * (MAX_ENTITIES + 1), "eligen_entity_masks": MASKS[:1] * (MAX_ENTITIES + 1)},
     ValueError, "65 entities are given, at most 64 are taken"),
    ({"eligen_enable_on_negative": True}, ValueError,
     "eligen_enable_on_negative is set and there are no eligen_entity_prompts"),
])
def test_entities_that_cannot_be_honoured_raise_before_a_model_runs(pipe, process, monkeypatch, shared, error, message):
    monkeypatch.setattr(type(pipe), "load_models_to_device", lambda *_: pytest.fail("onloaded"))
    with pytest.raises(error, match=message):
        process(**shared)


def test_a_mask_of_which_nothing_is_left_is_named(process):
    with pytest.raises(ValueError, match=r"the mask of entity 1 \('a blue square on a table'\) is empty on the grid of "
                                         "12×8 latents"):
        process(**{**GIVEN, "eligen_entity_masks": [MASKS[0], box(1, 1, 3, 3)]})


def test_a_missing_text_encoder_is_named(pipe):
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="needs text_encoder, which is not loaded"):
        QwenImageUnit_EntityControl().process(pipe, {"height": HEIGHT, "width": WIDTH, **GIVEN}, {}, {})
