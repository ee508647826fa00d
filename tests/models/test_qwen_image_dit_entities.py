"""Prompts for regions (EliGen) against a plain forward pass with one dense mask, written out from what is published."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth_backend.core.attention.groups import region_groups
from diffsynth_backend.models import qwen_image_dit
from diffsynth_backend.models.qwen_image_dit import Entities, QwenImageDiT, Regions
from tests.helpers.denoiser import TOLERANCE, make_pair, pack, picture_positions, plain_forward, text_positions

TIMESTEP = torch.tensor([500.0])
LENGTHS = (4, 6, 3)  # of the entities' prompts
GLOBAL = 7


@pytest.fixture
def ours(randomized) -> QwenImageDiT:
    return make_pair(randomized)[0]


@pytest.fixture
def masks() -> Tensor:
    """On 8 × 12 latents: two that overlap, the second not along the tokens' borders, and a single latent pixel."""
    masks = torch.zeros(3, 8, 12, dtype=torch.bool)
    masks[0, 0:4, 0:6] = masks[1, 3:7, 3:9] = masks[2, 7, 11] = True
    return masks


def tokens_in(mask: Tensor) -> Tensor:
    """Any latent pixel of its 2 × 2 puts a token into a region."""
    return torch.stack([mask[row:row + 2, column:column + 2].any() for row in range(0, mask.shape[0], 2)
                        for column in range(0, mask.shape[1], 2)])


def dense(regions: list[Tensor], more: int = 0) -> Tensor:
    """Who sees whom, bool: entities' prompts, the global prompt, the image, and what all see."""
    lengths = [*LENGTHS[:len(regions)], GLOBAL]
    text, image = sum(lengths), len(regions[0])
    visible = torch.zeros(text + image, text + image + more, dtype=torch.bool)
    visible[text:, text:text + image] = True
    visible[:, text + image:] = True
    start = 0
    for length, region in zip(lengths, [*regions, torch.ones(image, dtype=torch.bool)]):
        prompt = slice(start, start + length)
        visible[prompt, prompt] = True
        visible[prompt, text:text + image] = region
        visible[text:, prompt] = region[:, None]
        start += length
    return visible


def expected(model: QwenImageDiT, pictures: list[Tensor], prompts: list[Tensor], visible: Tensor, drawn: int = 1,
             **options: object) -> Tensor:
    """The prediction for the first `drawn` pictures, as tokens; `prompts` in their order, the global one last."""
    sizes = [(picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
    first = max(side // 2 for size in sizes for side in size)
    image = torch.cat([pack(picture) for picture in pictures], dim=1)
    at = options.pop("at", torch.full((image.shape[1],), 500.0))
    positions = picture_positions(sizes), text_positions(first, [prompt.shape[1] for prompt in prompts])
    out = plain_forward(model, image, torch.cat(prompts, dim=1), at, positions, visible, **options)
    return out[:, :drawn * sizes[0][0] * sizes[0][1]]


def make_inputs(batch: int = 1) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Latents, entities' prompts, the global prompt."""
    return (torch.randn(batch, 16, 8, 12), tuple(torch.randn(1, length, 24) for length in LENGTHS),
            torch.randn(batch, GLOBAL, 24))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_entities_equal_the_dense_mask(ours, relative_error, masks, count):
    latents, embeddings, prompt = make_inputs()
    regions = [tokens_in(mask) for mask in masks[:count]]
    wanted = expected(ours, [latents], [*embeddings[:count], prompt], dense(regions))
    found = ours(latents, TIMESTEP, prompt, entities=Entities(embeddings[:count], Regions(masks[:count])))
    assert relative_error(pack(found), wanted) <= TOLERANCE
    assert relative_error(found, ours(latents, TIMESTEP, prompt)) > 100 * TOLERANCE


def test_a_condition_has_the_regions_in_the_same_place(ours, relative_error, masks):
    """Of the picture's size, as published masks repeat them; of twice the size, at twice the places."""
    latents, embeddings, prompt = make_inputs()
    conditions = [torch.randn(1, 16, 8, 12), torch.randn(1, 16, 16, 24)]
    regions = []
    for mask in masks:
        of_tokens = tokens_in(mask)
        twice = of_tokens.unflatten(0, (4, 6)).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
        regions.append(torch.cat([of_tokens, of_tokens, twice]))
    at = torch.tensor([500.0] * 24 + [0.0] * (24 + 96))
    wanted = expected(ours, [latents, *conditions], [*embeddings, prompt], dense(regions), at=at)
    found = ours(latents, TIMESTEP, prompt, conditions=conditions, zero_cond_t=True,
                 entities=Entities(embeddings, Regions(masks)))
    assert relative_error(pack(found), wanted) <= TOLERANCE


def test_entities_with_cached_tokens(ours, relative_error, masks):
    """Cached for one block only: the groups of the other one end with the image."""
    latents, embeddings, prompt = make_inputs()
    cached = torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)
    visible = dense([tokens_in(mask) for mask in masks], more=5)
    wanted = expected(ours, [latents], [*embeddings, prompt], visible, more=[cached, cached])
    entities = Entities(embeddings, Regions(masks))
    found = ours(latents, TIMESTEP, prompt, entities=entities, kv_cache=[cached, cached])
    assert relative_error(pack(found), wanted) <= TOLERANCE
    in_one = ours(latents, TIMESTEP, prompt, entities=entities, kv_cache=[cached, None])
    assert relative_error(in_one, found) > 100 * TOLERANCE


def test_a_batch_with_padded_prompts_equals_each_alone(ours, relative_error, masks):
    latents, embeddings, prompt = make_inputs(batch=2)
    mask, entities = torch.arange(GLOBAL) < torch.tensor([[GLOBAL], [4]]), Entities(embeddings, Regions(masks))
    both = ours(latents, TIMESTEP.expand(2), prompt, mask, entities=entities)
    for index, length in enumerate((GLOBAL, 4)):
        alone = ours(latents[index:index + 1], TIMESTEP, prompt[index:index + 1, :length], entities=entities)
        assert relative_error(both[index:index + 1], alone) <= TOLERANCE


def test_who_sees_whom_is_worked_out_once_for_each_kind_of_sequence(ours, masks, monkeypatch):
    made = []
    monkeypatch.setattr(qwen_image_dit, "region_groups", lambda *given: made.append(given) or region_groups(*given))
    latents, embeddings, prompt = make_inputs()
    cached = torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)
    entities, shorter = Entities(embeddings, Regions(masks)), prompt[:, :4]
    passes = [{"prompt_emb": prompt}, {"prompt_emb": shorter}, {"prompt_emb": prompt, "kv_cache": [cached, None]}]
    found = [ours(latents, TIMESTEP, **given, entities=entities) for given in passes * 3]
    assert len(made) == 3, "for both prompts, and with cached tokens"
    fresh = [ours(latents, TIMESTEP, **given, entities=Entities(embeddings, Regions(masks))) for given in passes]
    assert all(torch.equal(one, other) for one, other in zip(found, fresh * 3))


def test_every_layer_has_the_regions(ours, relative_error, masks):
    latents, embeddings, prompt = make_inputs()
    layers = [latents, torch.randn(1, 16, 8, 12)]
    regions = [tokens_in(mask).repeat(2) for mask in masks]
    wanted = expected(ours, layers, [*embeddings, prompt], dense(regions), drawn=2)
    found = ours(torch.stack(layers, dim=2), TIMESTEP, prompt, entities=Entities(embeddings, Regions(masks)))
    assert relative_error(torch.cat([pack(layer) for layer in found.unbind(2)], dim=1), wanted) <= TOLERANCE


def test_entities_can_be_trained(ours, masks):
    latents, embeddings, prompt = make_inputs()
    embeddings = tuple(embedding.requires_grad_() for embedding in embeddings)
    ours(latents, TIMESTEP, prompt, entities=Entities(embeddings, Regions(masks))).square().sum().backward()
    assert all(embedding.grad.abs().sum() > 0 for embedding in embeddings)
