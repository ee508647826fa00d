"""Trains the demo model: `python -m diffsynth_backend.demo.train WORKDIR`.

The committed weights come from several runs on two cores, hours in all, under earlier versions of this recipe; a run of
the present one from nothing has not been made.

The stages run in this order, each resumed from its checkpoint in WORKDIR; vae and dit do not depend on each other:
code       the linear code that the latents shall be
vae        encoder and decoder of that code, on drawn scenes and confetti
latents    a pool of scenes in that code
tokenizer  a byte-level BPE vocabulary in the files that Qwen2's tokenizer reads
dit        text encoder and denoiser together, by flow matching
export     bf16 safetensors beside this file, under the published key names
"""
from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..configs import demo_model as sizes
from ..models.qwen_image_dit import QwenImageDiT
from ..models.qwen_image_text_encoder import QwenImageTextEncoder
from ..models.qwen_image_vae import (
    LATENTS_STD,
    AttentionBlock,
    CausalConv3d,
    QwenImageVAE,
    ResidualBlock,
    denormalize_latents,
    normalize_latents,
)
from ..pipelines.qwen_image_prompts import TEXT_TEMPLATE, TextPrompts
from .latent_code import LatentCode, fit_latent_code
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZE,
    Scene,
    confetti,
    draw,
    nominal_mask,
    plain_prompt,
    sample_scene,
    write_prompt,
)

logger = logging.getLogger(__name__)

LATENT_NOISE = 0.1  # standard deviation, in units of the normalised latents
LAYOUT_WEIGHT = 0.5  # of naming against drawing, whose error is about 0.7
TEXT_LENGTH = 72  # tokens of the longest prompt in its template


class Average:
    """Exponential moving average of a model's parameters: what is exported."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for key, value in model.state_dict().items():
            self.values[key].lerp_(value, 1 - decay)


class Run:
    """A model in training: optimisers, warm-up and cosine decay, average, checkpoint, log.

    `matrices` are parameters that Muon takes (Jordan et al. 2024: twice as fast for transformers); AdamW has the rest.
    """

    def __init__(self, name: str, model: nn.Module, workdir: Path, steps: int, rate: float, decay: float,
                 matrices: Iterable[nn.Parameter] = ()) -> None:
        self.name, self.model, self.steps, self.rate = name, model, steps, rate
        self.path = workdir / f"{name}.pt"
        matrices = list(matrices)
        known = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in known]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.01,
                                                    adjust_lr_fn="match_rms_adamw"))
        self.average = Average(model, decay)
        self.step = 0
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        saved = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.average.values, self.step = saved["average"], saved["step"]

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "average": self.average.values, "step": self.step,
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, partial)
        partial.replace(self.path)

    def train(self, losses_of) -> None:
        """Minimise the sum of the dict that `losses_of(step)` returns until `steps` is reached."""
        began, first = time.monotonic(), self.step
        while self.step < self.steps:
            warm_up = min(1.0, (self.step + 1) / 200)
            cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            losses = losses_of(self.step)
            self.model.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = self.rate * warm_up * max(cosine, 0.01)
                optimizer.step()
            self.average.update(self.model, self.step)
            self.step += 1
            if self.step % 50 == 0:
                pace = (time.monotonic() - began) / (self.step - first)
                shown = " ".join(f"{k} {v.item():.4f}" for k, v in losses.items())
                logger.info("%s %d/%d %.2f s/step %s", self.name, self.step, self.steps, pace, shown)
            if self.step % 200 == 0 or self.step == self.steps:
                self.save()


def averaged(name: str, model: nn.Module, workdir: Path) -> nn.Module:
    """`model` with the averaged weights of a finished run."""
    model.load_state_dict(torch.load(workdir / f"{name}.pt", weights_only=True)["average"])
    return model.eval()


# ---- autoencoder ----------------------------------------------------------------------------------------------------

# 2×2 averages and differences (Haar): what halving the resolution should keep.
HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))


@torch.no_grad()
def init_vae(vae: QwenImageVAE) -> None:
    """Begin as a network that passes colours and edges on, its residual branches at half strength.

    With torch's own initialisation the colours need thousands of steps to find a way through the normalisations; with
    silent branches and plain averages, details do.
    """
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(0.5)
            if isinstance(module.conv_shortcut, CausalConv3d):
                add_orthogonal(module.conv_shortcut, keep=0.0)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            add_haar(module, keep=0.5)
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            add_orthogonal(module, keep=0.5)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in, vae.quant_conv, vae.post_quant_conv):
        add_orthogonal(conv, keep=0.5 if conv.kernel_size[-1] == 3 else 0.0)
        nn.init.normal_(conv.bias, std=0.5)


def orthogonal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))


def add_orthogonal(conv: nn.Conv2d | nn.Conv3d, keep: float) -> None:
    """`keep` of the random weights, and an orthogonal map between the channels where the tap is the pixel itself."""
    conv.weight.mul_(keep)
    nn.init.zeros_(conv.bias)
    taps = conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight  # a single frame sees the last
    middle = taps.shape[-1] // 2
    taps[:, :, middle, middle] += orthogonal(*taps.shape[:2])


def add_haar(conv: nn.Conv2d, keep: float) -> None:
    """`keep` of the random weights, and averages in every second channel, differences in the others."""
    conv.weight.mul_(keep)
    nn.init.zeros_(conv.bias)
    kernels = torch.tensor(HAAR).view(4, 2, 2) / 4
    mix = orthogonal(*conv.weight.shape[:2])
    for channel in range(len(mix)):
        kernel = kernels[0] * 1.4 if channel % 2 == 0 else kernels[1 + channel // 2 % 3] * 2.8
        conv.weight[channel, :, :2, :2] += mix[channel, :, None, None] * kernel


def encoder_losses(vae: QwenImageVAE, code: LatentCode, pictures: Tensor) -> dict[str, Tensor]:
    """The encoder learns the code; its log-variance learns what noise the decoder forgives."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = vae.moments(pictures)
    noise = log_variance.float() - 2 * math.log(LATENT_NOISE) - 2 * torch.tensor(LATENTS_STD).log()[:, None, None]
    return {"code": F.mse_loss(normalize_latents(mean.float()), code.encode(pictures)),
            "noise": 1e-3 * noise.square().mean()}


def decoder_losses(vae: QwenImageVAE, code: LatentCode, pictures: Tensor) -> dict[str, Tensor]:
    """The decoder learns to draw what the code, with a little noise, says."""
    latents = code.encode(pictures)
    noisy = latents + LATENT_NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = vae.decode(denormalize_latents(noisy))
    error = decoded.float() - pictures
    edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
    return {"l1": error.abs().mean(), "l2": error.square().mean(), "edges": 0.5 * edges}


def crop(pictures: Tensor, top: int, left: int, size: int = 64) -> Tensor:
    return pictures[..., top:top + size, left:left + size]


def random_crop(pictures: Tensor, rng: random.Random) -> Tensor:
    """The same random square of each picture (B, C, H, W)."""
    return crop(pictures, rng.randint(0, SIZE - 64), rng.randint(0, SIZE - 64))


def crop_around_things(pictures: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
    """A square of each picture that shows one of its things: where the decoder has something to learn."""
    squares = []
    for picture, scene in zip(pictures, scenes):
        centre = PLACES[rng.choice(scene.things).place][0]
        left, top = (min(max(at - 32 + rng.randint(-20, 20), 0), SIZE - 64) for at in centre)
        squares.append(crop(picture, top, left))
    return torch.stack(squares)


def train_vae(workdir: Path, steps: int, compiled: bool = False) -> None:
    torch.manual_seed(0)
    vae, code = QwenImageVAE(**sizes.VAE), LatentCode(**torch.load(workdir / "code.pt", weights_only=True))
    init_vae(vae)
    run = Run("vae", vae, workdir, steps, rate=5e-4, decay=0.998)
    if compiled:
        vae.moments, vae.decode = torch.compile(vae.moments), torch.compile(vae.decode)
    rng, generator = random.Random(run.step), torch.Generator().manual_seed(run.step)

    def losses_of(step: int) -> dict[str, Tensor]:
        """First crops (more steps in the same time), then whole pictures, then the decoder alone, around things."""
        done, scenes = step / steps, [sample_scene(rng) for _ in range(6)]
        pictures = draw(scenes, generator)
        if done >= 0.44:
            near = torch.cat([crop_around_things(pictures, scenes, rng) for _ in range(3)])
            return decoder_losses(vae, code, near.contiguous(memory_format=torch.channels_last))
        pictures = torch.cat([pictures, confetti(6, generator)])
        if done < 0.27:
            pictures = torch.cat([random_crop(pictures, rng), random_crop(pictures, rng)])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        return decoder_losses(vae, code, pictures) | encoder_losses(vae, code, pictures)

    run.train(losses_of)


# ---- code and latents -----------------------------------------------------------------------------------------------

def make_code(workdir: Path) -> None:
    """`code.pt`: see `latent_code`."""
    rng, generator = random.Random(7), torch.Generator().manual_seed(7)
    code = fit_latent_code(draw([sample_scene(rng) for _ in range(1500)], generator))
    torch.save(vars(code), workdir / "code.pt")


def encode_pool(workdir: Path, count: int) -> None:
    """`latents.pt`: normalised latents (count, 16, 16, 16), bf16, of scenes that `pool_scenes` repeats."""
    code = LatentCode(**torch.load(workdir / "code.pt", weights_only=True))
    scenes, generator = pool_scenes(count), torch.Generator().manual_seed(1)
    latents = [code.encode(draw(scenes[start:start + 100], generator)).bfloat16() for start in range(0, count, 100)]
    torch.save(torch.cat(latents), workdir / "latents.pt")


def pool_scenes(count: int) -> list[Scene]:
    rng = random.Random(1)
    return [sample_scene(rng) for _ in range(count)]


# ---- tokenizer ------------------------------------------------------------------------------------------------------

# The vision tokens in the order of `QwenImageTextEncoder`'s ids. This tower is untrained: it is seen to run, no more.
SPECIAL_TOKENS = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad",
                  "video_pad")


def train_tokenizer(workdir: Path) -> None:
    """vocab.json, merges.txt, tokenizer_config.json as Qwen2's tokenizer reads them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(2)
    prompts = [write_prompt(sample_scene(rng), rng) for _ in range(20000)]
    special = [f"<|{name}|>" for name in SPECIAL_TOKENS]
    template = TEXT_TEMPLATE
    for token in special:
        template = template.replace(token, "")
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    size = sizes.TEXT_ENCODER["vocab_size"] - len(special)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(prompts + [template] * 200, trainer)
    folder = workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()  # no gap, which transformers 4 would keep and transformers 5 closes
    added = {str(first + i): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                             "single_word": False} for i, token in enumerate(special)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None, "add_bos_token": False,
              "add_prefix_space": False, "model_max_length": 1024, "errors": "replace", "split_special_tokens": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


# ---- text encoder and denoiser --------------------------------------------------------------------------------------

class Drawer(nn.Module):
    """Both models that the second stage trains, and a head that names what each image token will show.

    The head reads the denoiser's middle and is thrown away afterwards. The flow alone teaches slowly which colour goes
    with which shape and place, since most of its error is noise that nobody can foresee; naming has no such noise.
    (Representations aligned with an outer teacher do the same for large models: REPA, arXiv 2410.06940.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = QwenImageTextEncoder(**sizes.TEXT_ENCODER)
        self.dit = QwenImageDiT(**sizes.DIT)
        self.layout = nn.Linear(self.dit.img_in.out_features, len(SEEN_COLOURS) + len(SEEN_SHAPES))
        self.middle = None
        middle = self.dit.transformer_blocks[len(self.dit.transformer_blocks) // 2 - 1]
        middle.register_forward_hook(self._remember)

    def _remember(self, block: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        self.middle = outputs[0]

    def layout_loss(self, layout: Tensor) -> Tensor:
        """Cross-entropy of colour and of shape, of the last forward pass, against `layout` (B, tokens, 2)."""
        colour, shape = self.layout(self.middle).float().split([len(SEEN_COLOURS), len(SEEN_SHAPES)], dim=-1)
        return (F.cross_entropy(colour.flatten(0, 1), layout[..., 0].flatten())
                + F.cross_entropy(shape.flatten(0, 1), layout[..., 1].flatten()))


# What an image token can show: a thing's colour or the background's, and a thing's shape or none.
SEEN_COLOURS = [*COLOURS, *(f"{name} background" for name in BACKGROUNDS)]
SEEN_SHAPES = [*SHAPES, "none"]


def layout_of(scene: Scene) -> Tensor:
    """What each image token (64, of 16×16 pixels) of a scene shows: (64, 2), indices of colour and shape."""
    layout = torch.empty(8, 8, 2, dtype=torch.long)
    layout[..., 0] = SEEN_COLOURS.index(f"{scene.background} background")
    layout[..., 1] = SEEN_SHAPES.index("none")
    for thing in scene.things:
        disc = nominal_mask("circle", thing.place).float()  # the same tokens, whatever the shape
        covered = F.avg_pool2d(disc[None], 16)[0] > 0.25
        layout[covered] = torch.tensor([SEEN_COLOURS.index(thing.colour), SEEN_SHAPES.index(thing.shape)])
    return layout.flatten(0, 1)


def init_dit(dit: QwenImageDiT) -> None:
    """Zero gates and output, as diffusion transformers are usually started (DiT, Peebles & Xie 2022)."""
    for block in dit.transformer_blocks:
        for layer in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for layer in (dit.norm_out.linear, dit.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def embed(prompts: TextPrompts, text_encoder: QwenImageTextEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
    """As `TextPrompts.embed`, padded to TEXT_LENGTH: equal shapes in every step compile once."""
    ids, mask = prompts.tokenize(texts)
    ids, mask = (F.pad(t, (0, TEXT_LENGTH - t.shape[1])) for t in (ids, mask))
    hidden = text_encoder(input_ids=ids, attention_mask=mask)
    return hidden[:, prompts.prefix_length:], mask[:, prompts.prefix_length:]


def training_prompt(scene: Scene, rng: random.Random) -> str:
    """Mostly plain, which is learnt first; sometimes in other words, and sometimes nothing, for guidance."""
    kind = rng.random()
    return "" if kind < 0.1 else write_prompt(scene, rng) if kind < 0.3 else plain_prompt(scene)


def thing_weight(scene: Scene) -> Tensor:
    """How much each latent pixel (16, 16) counts: at least five times as much where things are, a twentieth of it.

    More where a thing has nearly the colour of its ground: what is wrong there is a small error, and as visible.
    """
    weight = torch.ones(16, 16)
    ground = torch.tensor(BACKGROUNDS[scene.background]) / 255
    for thing in scene.things:
        contrast = (torch.tensor(COLOURS[thing.colour]) / 255 - ground).norm()
        covered = nominal_mask("circle", thing.place).float()  # with the hole of a ring
        near = F.max_pool2d(covered[None], 24, stride=8, padding=8)[0]
        weight += near * 4 * float((1 / contrast**2).clamp(1, 4))
    return weight


def noise_levels(count: int, done: float) -> Tensor:
    """Sigmas (count,). Until most of the run is done, half of them where the layout is decided, by the prompt alone."""
    high = 0.5 if done < 0.8 else 0.15
    return torch.where(torch.rand(count) < high, 1 - 0.5 * torch.rand(count) ** 2, torch.rand(count))


def flow_loss(latents: Tensor, weights: Tensor, done: float, velocity_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Error of the velocities of latents (B, 16, 16, 16) mixed with noise, weighted (B, 16, 16); see `noise_levels`.

    `velocity_of` gets the mixed latents and their timesteps (B,), 0…1000.
    """
    noise = torch.randn_like(latents)
    sigma = noise_levels(len(latents), done)
    velocity = velocity_of(torch.lerp(latents, noise, sigma[:, None, None, None]), sigma * 1000)
    error = (velocity.float() - (noise - latents)).square().mean(dim=1)
    return (error * weights).mean()


def train_dit(workdir: Path, steps: int, batch: int = 64, compiled: bool = False) -> None:
    torch.manual_seed(3)
    drawer = Drawer()
    init_dit(drawer.dit)
    layers = (*drawer.dit.transformer_blocks, *drawer.text_encoder.model.language_model.layers)
    matrices = [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim == 2]
    run = Run("dit", drawer, workdir, steps, rate=1.5e-3, decay=0.999, matrices=matrices)
    if compiled:
        for layer in layers:
            layer.forward = torch.compile(layer.forward)
    prompts = TextPrompts.load(workdir / "tokenizer")
    pool = torch.load(workdir / "latents.pt", weights_only=True)
    scenes, rng = pool_scenes(len(pool)), random.Random(4 + run.step)
    weights = torch.stack([thing_weight(scene) for scene in scenes])
    layouts = torch.stack([layout_of(scene) for scene in scenes])
    by_things = [[i for i, scene in enumerate(scenes) if len(scene.things) == count] for count in (1, 2)]

    def losses_of(step: int) -> dict[str, Tensor]:
        chosen = [i for same in by_things for i in rng.sample(same, batch // 2)]  # two things are the harder half
        texts = [training_prompt(scenes[i], rng) for i in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            embedding, mask = embed(prompts, drawer.text_encoder, texts)
            flow = flow_loss(pool[chosen].float(), weights[chosen], step / steps,
                             lambda mixed, timestep: drawer.dit(mixed, timestep, embedding, mask))
            named = drawer.layout_loss(layouts[chosen])
        return {"flow": flow, "layout": LAYOUT_WEIGHT * named}

    run.train(losses_of)


# ---- export ---------------------------------------------------------------------------------------------------------

def save_in_bfloat16(files: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """State dicts by the paths of their files below the folder, without the suffix."""
    for name, state_dict in files.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().bfloat16().contiguous() for k, v in state_dict.items()}, path,
                  metadata={"format": "pt"})


def export(workdir: Path, folder: Path) -> None:
    """Weights as bf16 safetensors in the layout that the registry knows."""
    from ..utils.state_dict_converters.qwen_image_text_encoder import published_text_encoder_keys
    from ..utils.state_dict_converters.qwen_image_vae import repackaged_vae_keys

    drawer = averaged("dit", Drawer(), workdir)
    vae = averaged("vae", QwenImageVAE(**sizes.VAE), workdir)
    files = {"text_encoder/model": published_text_encoder_keys(drawer.text_encoder.state_dict()),
             "transformer/diffusion_pytorch_model": drawer.dit.state_dict(),
             "vae/diffusion_pytorch_model": repackaged_vae_keys(vae.state_dict())}
    save_in_bfloat16(files, folder)
    target = folder / "tokenizer"
    target.mkdir(exist_ok=True)
    for source in (workdir / "tokenizer").iterdir():
        (target / source.name).write_bytes(source.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="checkpoints live here; run again to go on")
    parser.add_argument("--stages", default="code,vae,latents,tokenizer,dit,export", help="which steps to run")
    parser.add_argument("--compile", action="store_true", help="torch.compile: twice as fast, needs a C++ compiler")
    parser.add_argument("--vae-steps", type=int, default=3600)
    parser.add_argument("--dit-steps", type=int, default=10000)
    parser.add_argument("--pool", type=int, default=40000, help="how many scenes are encoded for the denoiser")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.workdir.mkdir(parents=True, exist_ok=True)
    stages = {"code": lambda: make_code(args.workdir),
              "vae": lambda: train_vae(args.workdir, args.vae_steps, args.compile),
              "latents": lambda: encode_pool(args.workdir, args.pool),
              "tokenizer": lambda: train_tokenizer(args.workdir),
              "dit": lambda: train_dit(args.workdir, args.dit_steps, compiled=args.compile),
              "export": lambda: export(args.workdir, args.output)}
    for name in args.stages.split(","):
        stages[name]()


if __name__ == "__main__":
    main()
