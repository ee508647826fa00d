"""Clean pictures as further tokens, layers and their positions: against diffusers, and against a plain forward pass."""
from __future__ import annotations

import pytest
import torch

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models import qwen_image_dit
from diffsynth_backend.models.qwen_image_dit import Grid, QwenImageDiT, image_rotations, text_rotations
from tests.helpers.denoiser import (
    LAYERED,
    SIZES,
    TOLERANCE,
    centred,
    diffusers_forward,
    grid_positions,
    make_pair,
    pack,
    picture_positions,
    plain_forward,
    text_positions,
)

TIMESTEP = torch.tensor([612.5])
CPU = torch.device("cpu")

# Sides in latent pixels: equal, larger, smaller, and odd ones in tokens.
CONDITIONS = pytest.mark.parametrize("sizes", [[(6, 10)], [(12, 8)], [(2, 4), (6, 10), (14, 6)]])


def noise_and_conditions(sizes: list[tuple[int, int]], batch: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.randn(batch, 16, 6, 10), [torch.randn(1, 16, *size) for size in sizes]


# ---- conditions -----------------------------------------------------------------------------------------------------

@CONDITIONS
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_conditions_equal_diffusers(randomized, relative_error, sizes, zero_cond_t, batch):
    ours, theirs = make_pair(randomized, zero_cond_t=zero_cond_t)
    latents, conditions = noise_and_conditions(sizes, batch)
    prompt_emb, timestep = torch.randn(batch, 7, 24), torch.tensor([612.5, 40.0])[:batch]
    error = relative_error(ours(latents, timestep, prompt_emb, conditions=conditions, zero_cond_t=zero_cond_t),
                           diffusers_forward(theirs, latents, timestep, prompt_emb, conditions=conditions))
    assert error <= TOLERANCE


def test_conditions_with_a_padded_prompt_equal_diffusers(randomized, relative_error):
    ours, theirs = make_pair(randomized, zero_cond_t=True)
    latents, conditions = noise_and_conditions([(4, 4)], batch=2)
    prompt_emb, mask = torch.randn(2, 7, 24), torch.arange(7) < torch.tensor([[7], [4]])
    error = relative_error(ours(latents, TIMESTEP.expand(2), prompt_emb, mask, conditions=conditions, zero_cond_t=True),
                           diffusers_forward(theirs, latents, TIMESTEP.expand(2), prompt_emb, mask, conditions))
    assert error <= TOLERANCE


def test_each_of_what_the_variants_change_matters(randomized, relative_error):
    """So that equality with diffusers is not for want of an effect."""
    ours, _ = make_pair(randomized)
    latents, conditions = noise_and_conditions([(12, 8), (2, 4)])
    prompt_emb = torch.randn(1, 7, 24)

    def run(*args, **options):
        return ours(latents, TIMESTEP, prompt_emb, conditions=conditions if not args else args[0], **options)

    plain = run()
    for other in (run([]), run(conditions[::-1]), run(zero_cond_t=True), run(interpolate_rope=True)):
        assert relative_error(other, plain) > 100 * TOLERANCE


def test_zero_cond_t_without_conditions_changes_nothing(randomized):
    ours, _ = make_pair(randomized)
    latents, prompt_emb = torch.randn(1, 16, 6, 10), torch.randn(1, 7, 24)
    assert torch.equal(ours(latents, TIMESTEP, prompt_emb, zero_cond_t=True), ours(latents, TIMESTEP, prompt_emb))


# ---- layers ---------------------------------------------------------------------------------------------------------

def test_layered_layout_is_the_published_checkpoint():
    with torch.device("meta"):
        model = QwenImageDiT(**LAYERED)
    layout = model.state_dict()
    assert hash_state_dict(layout) == "8dc8cda05de16c73afa755e2c1ce2839"
    assert (len(layout), sum(tensor.numel() for tensor in layout.values())) == (1934, 20430407232)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_layers_and_their_source_equal_diffusers(randomized, relative_error, layers, batch):
    ours, theirs = make_pair(randomized, **LAYERED)
    latents, source = torch.randn(batch, 16, layers, 6, 10), torch.randn(1, 16, 6, 10)
    prompt_emb, timestep = torch.randn(batch, 5, 24), TIMESTEP.expand(batch)
    error = relative_error(ours(latents, timestep, prompt_emb, conditions=[source]),
                           diffusers_forward(theirs, latents, timestep, prompt_emb, conditions=[source]))
    assert error <= TOLERANCE


@pytest.mark.parametrize("pictures", [1, 6])
def test_text_follows_layers_that_outnumber_the_tokens_of_a_side(randomized, relative_error, pictures):
    ours, theirs = make_pair(randomized, **LAYERED)
    latents, prompt_emb = torch.randn(1, 16, pictures, 2, 2), torch.randn(1, 5, 24)
    error = relative_error(ours(latents, TIMESTEP, prompt_emb),
                           diffusers_forward(theirs, latents, TIMESTEP, prompt_emb))
    assert error <= TOLERANCE


def test_layers_in_a_model_without_their_positions_equal_diffusers(randomized, relative_error):
    ours, theirs = make_pair(randomized)
    latents, source, prompt_emb = torch.randn(1, 16, 3, 6, 10), torch.randn(1, 16, 4, 4), torch.randn(1, 5, 24)
    error = relative_error(ours(latents, TIMESTEP, prompt_emb, conditions=[source]),
                           diffusers_forward(theirs, latents, TIMESTEP, prompt_emb, conditions=[source]))
    assert error <= TOLERANCE


def test_all_layers_are_noise_to_zero_cond_t(randomized, relative_error):
    """diffusers counts all layers but the first as conditions, which no published model was trained with."""
    ours, _ = make_pair(randomized)
    latents, source, prompt_emb = torch.randn(1, 16, 2, 6, 10), torch.randn(1, 16, 4, 4), torch.randn(1, 5, 24)
    image = torch.cat([pack(latents[:, :, 0]), pack(latents[:, :, 1]), pack(source)], dim=1)
    at = torch.tensor([612.5] * 30 + [0.0] * 4)
    positions = picture_positions([(3, 5), (3, 5), (2, 2)]), text_positions(2, [5])
    expected = plain_forward(ours, image, prompt_emb, at, positions, timestep=612.5)[:, :30]
    found = ours(latents, TIMESTEP, prompt_emb, conditions=[source], zero_cond_t=True)
    assert relative_error(torch.cat([pack(found[:, :, 0]), pack(found[:, :, 1])], dim=1), expected) <= TOLERANCE


# ---- positions of another size --------------------------------------------------------------------------------------

def sampled(length: int, of: int) -> torch.Tensor:
    return torch.stack([centred(of)[i * (of - 1) // max(length - 1, 1)] for i in range(length)])


@pytest.mark.parametrize("sizes", [[(4, 6)], [(14, 22)], [(2, 2)], [(6, 10)], [(6, 10), (12, 8)]])
def test_interpolated_conditions_lie_over_the_picture(randomized, relative_error, sizes):
    ours, _ = make_pair(randomized)
    latents, conditions = noise_and_conditions(sizes)
    prompt_emb = torch.randn(1, 7, 24)
    grids = [(height // 2, width // 2) for height, width in sizes]
    image = torch.cat([pack(latents), *map(pack, conditions)], dim=1)
    placed = [grid_positions(frame, *(centred(3), centred(5)) if grid == (3, 5) else (sampled(grid[0], 3),
                                                                                     sampled(grid[1], 5)))
              for frame, grid in enumerate(grids, 1)]
    positions = (torch.cat([picture_positions([(3, 5)]), *placed]),
                 text_positions(max(2, *(side // 2 for grid in grids for side in grid)), [7]))
    expected = plain_forward(ours, image, prompt_emb, torch.full((image.shape[1],), 612.5), positions, timestep=612.5)
    found = ours(latents, TIMESTEP, prompt_emb, conditions=conditions, interpolate_rope=True)
    assert relative_error(pack(found), expected[:, :15]) <= TOLERANCE


def test_interpolation_is_refused_by_the_layered_model(randomized):
    ours, _ = make_pair(randomized, **LAYERED)
    with pytest.raises(ValueError, match="interpolate_rope is not defined .* use_layer3d_rope"):
        ours(torch.randn(1, 16, 2, 4, 4), TIMESTEP, torch.randn(1, 5, 24), interpolate_rope=True)


# ---- the cache of rotations -----------------------------------------------------------------------------------------

def test_cached_rotations_of_variants_do_not_mix(randomized):
    """Each variant twice, in every order of two: none is served what another one left."""
    ours, layered = make_pair(randomized)[0], make_pair(randomized, **LAYERED)[0]
    latents, conditions = noise_and_conditions([(4, 6)])
    prompt_emb = torch.randn(1, 7, 24)
    variants = {"plain": (ours, {}), "interpolated": (ours, {"interpolate_rope": True}), "layered": (layered, {})}

    def run(name):
        model, options = variants[name]
        return model(latents, TIMESTEP, prompt_emb, conditions=conditions, **options)

    fresh = {}
    for name in variants:
        image_rotations.cache_clear(), text_rotations.cache_clear()
        fresh[name] = run(name)
    for first in variants:
        for second in variants:
            image_rotations.cache_clear(), text_rotations.cache_clear()
            assert torch.equal(run(first), fresh[first]) and torch.equal(run(second), fresh[second])


def test_cached_rotations_are_bounded_over_many_sizes():
    axes = SIZES["axes_dims_rope"]
    for size in range(1, 100):
        image_rotations((Grid(0, size, size),), axes, CPU)
        text_rotations(size, size, axes, CPU)
    assert image_rotations.cache_info().currsize <= 4
    assert text_rotations.cache_info().currsize <= 32


def test_a_picture_drawn_twice_uses_the_cache(randomized):
    ours, _ = make_pair(randomized)
    latents, conditions = noise_and_conditions([(4, 6)])
    for length in (7, 9):  # two sides of a step
        ours(latents, TIMESTEP, torch.randn(1, length, 24), conditions=conditions)
    hits = image_rotations.cache_info().hits
    for length in (7, 9):
        ours(latents, TIMESTEP, torch.randn(1, length, 24), conditions=conditions)
    assert image_rotations.cache_info().hits == hits + 2


# ---- memory ---------------------------------------------------------------------------------------------------------

def test_modulation_of_conditions_is_not_made_for_each_token(randomized, monkeypatch):
    ours, _ = make_pair(randomized)
    latents, conditions = noise_and_conditions([(4, 6)])
    seen, modulate = [], qwen_image_dit.modulate

    def note(x, shift, scale):
        seen.append(shift.shape)
        return modulate(x, shift, scale)

    monkeypatch.setattr(qwen_image_dit, "modulate", note)
    ours(latents, TIMESTEP, torch.randn(1, 7, 24), conditions=conditions, zero_cond_t=True)
    assert set(seen) == {(1, 1, 64)}


def test_the_estimate_counts_every_token():
    with torch.device("meta"):
        model = QwenImageDiT(**SIZES)
    plain = model.activation_bytes(1, 16, 24, 10, torch.bfloat16)
    assert plain == 24 * (8 * 12 + 10) * 64 * 2
    assert model.token_count(torch.empty(1, 16, 6, 10)) == 15
    assert model.activation_bytes(2, 16, 24, 10, torch.bfloat16, layers=4, condition_tokens=15) == (
        24 * 2 * (4 * 96 + 15 + 10) * 64 * 2)
