"""What others put into the denoiser's blocks, and how training runs them: corrections, cached tokens, checkpointing."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth_backend.models import qwen_image_dit
from diffsynth_backend.models.qwen_image_dit import Entities, QwenImageDiT, Regions
from tests.helpers.denoiser import TOLERANCE, make_pair, pack, picture_positions, plain_forward, text_positions

TIMESTEP = torch.tensor([500.0])
POSITIONS = picture_positions([(3, 5), (2, 4)]), text_positions(2, [7])


@pytest.fixture
def ours(randomized) -> QwenImageDiT:
    return make_pair(randomized)[0]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents of 15 tokens, a condition of 8, a prompt of 7."""
    return torch.randn(2, 16, 6, 10), torch.randn(1, 16, 4, 8), torch.randn(2, 7, 24)


def plainly(model: QwenImageDiT, inputs: tuple[Tensor, Tensor, Tensor], **options: object) -> Tensor:
    latents, condition, prompt_emb = inputs
    image = torch.cat([pack(latents), pack(condition).expand(2, -1, -1)], dim=1)
    return plain_forward(model, image, prompt_emb, torch.full((23,), 500.0), POSITIONS, **options)[:, :15]


# ---- corrections ----------------------------------------------------------------------------------------------------

def test_corrections_are_added_to_the_noise_after_each_block(ours, inputs, relative_error):
    latents, condition, prompt_emb = inputs
    net, seen = torch.randn(2, 64, 64) / 8, []

    def correction(i: int, tokens: Tensor) -> Tensor:
        seen.append((i, tokens.shape))
        return tokens @ net[i]

    def on_all(i: int, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :15] @ net[i], torch.zeros(2, 8, 64)], dim=1)

    found = ours(latents, TIMESTEP.expand(2), prompt_emb, conditions=[condition], after_block=correction)
    assert seen == [(0, (2, 15, 64)), (1, (2, 15, 64))]
    assert relative_error(pack(found), plainly(ours, inputs, after_block=on_all)) <= TOLERANCE
    assert relative_error(pack(found), plainly(ours, inputs)) > 100 * TOLERANCE


def test_no_correction_is_none(ours, inputs):
    latents, condition, prompt_emb = inputs
    found = ours(latents, TIMESTEP.expand(2), prompt_emb, conditions=[condition], after_block=lambda i, tokens: None)
    assert torch.equal(found, ours(latents, TIMESTEP.expand(2), prompt_emb, conditions=[condition]))


# ---- cached tokens --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_tokens_are_seen_by_all(ours, inputs, relative_error, batch, padded):
    latents, condition, prompt_emb = inputs
    cache = [(torch.randn(batch, 2, 6, 32), torch.randn(batch, 2, 6, 32)) for _ in range(2)]
    mask, visible = None, None
    if padded:
        mask = (torch.arange(7) < 4).expand(2, 7)
        visible = torch.cat([mask[0], torch.ones(15 + 8 + 6, dtype=torch.bool)]).expand(7 + 23, -1)
    found = ours(latents, TIMESTEP.expand(2), prompt_emb, mask, conditions=[condition], kv_cache=cache)
    assert relative_error(pack(found), plainly(ours, inputs, visible=visible, more=cache)) <= TOLERANCE
    assert relative_error(pack(found), plainly(ours, inputs, visible=None if visible is None else visible[:, :-6])) > (
        100 * TOLERANCE)


def test_blocks_without_cached_tokens_run_as_before(ours, inputs, relative_error):
    latents, condition, prompt_emb = inputs
    cached = torch.randn(1, 2, 6, 32), torch.randn(1, 2, 6, 32)
    nothing = torch.zeros(1, 2, 0, 32), torch.zeros(1, 2, 0, 32)

    def run(cache):
        return ours(latents, TIMESTEP.expand(2), prompt_emb, conditions=[condition], kv_cache=cache)

    wanted = run(None)
    assert torch.equal(run([None, None]), wanted)
    assert relative_error(run([nothing, nothing]), wanted) <= TOLERANCE
    assert torch.equal(run([cached, nothing]), run([cached, None]))


def test_the_cache_is_for_all_blocks(ours, inputs):
    latents, _, prompt_emb = inputs
    with pytest.raises(ValueError, match="zip"):
        ours(latents, TIMESTEP.expand(2), prompt_emb, kv_cache=[None])


# ---- gradient checkpointing -----------------------------------------------------------------------------------------

def gradients(model: QwenImageDiT, inputs: tuple[Tensor, Tensor, Tensor], **options: bool) -> dict[str, Tensor]:
    """Of the inputs and of all weights, by name, with everything on that a block may be given."""
    latents, condition, prompt_emb = (tensor.clone().requires_grad_() for tensor in inputs)
    model.requires_grad_(True).zero_grad()
    entities = Entities((torch.full((1, 3, 24), 0.5),), Regions(torch.arange(60).view(1, 6, 10) < 20))
    out = model(latents, TIMESTEP.expand(2), prompt_emb, conditions=[condition], zero_cond_t=True, entities=entities,
                after_block=lambda i, tokens: 0.1 * tokens, **options)
    out.square().sum().backward()
    named = {"latents": latents, "condition": condition, "prompt_emb": prompt_emb, **dict(model.named_parameters())}
    return {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


@pytest.mark.parametrize("switch", ["use_gradient_checkpointing", "use_gradient_checkpointing_offload"])
def test_checkpointing_gives_the_same_gradients(ours, inputs, switch):
    wanted, found = gradients(ours, inputs), gradients(ours, inputs, **{switch: True})
    assert found.keys() == wanted.keys() and len(wanted) > 60
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("switch, runs", [(None, 2), ("use_gradient_checkpointing", 4),
                                          ("use_gradient_checkpointing_offload", 4)])
def test_checkpointing_computes_blocks_again(ours, inputs, monkeypatch, switch, runs):
    """The one thing that it is for: what blocks hold for the backward pass is not kept but made again."""
    count, attend = [], qwen_image_dit.Sight.attend
    monkeypatch.setattr(qwen_image_dit.Sight, "attend", lambda self, *qkv: (count.append(0), attend(self, *qkv))[1])
    gradients(ours, inputs, **({} if switch is None else {switch: True}))
    assert len(count) == runs


def test_offload_keeps_what_blocks_start_from_off_the_device(ours, inputs, monkeypatch):
    """Here there is only one device: what is saved passes through the hooks that would copy it."""
    saved = []

    class Noting(torch.autograd.graph.save_on_cpu):
        def __init__(self) -> None:
            super().__init__()
            pack_hook = self.pack_hook
            self.pack_hook = lambda tensor: (saved.append(tensor.shape), pack_hook(tensor))[1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Noting)
    gradients(ours, inputs, use_gradient_checkpointing=True)
    assert not saved
    gradients(ours, inputs, use_gradient_checkpointing_offload=True)
    assert saved.count((2, 23, 64)) >= 2  # the image tokens before each block
