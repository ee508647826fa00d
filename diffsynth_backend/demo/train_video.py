"""Trains the video demo: `python -m diffsynth_backend.demo.train_video WORKDIR`.

The committed weights took less than an hour of one core. The denoiser's run was shortened twice on the way (to 2500
steps; its first 1500 had the learning rates of 7000 and 4500), so a run of this from nothing has not been made.

The stages run in this order, each resumed from its checkpoint in WORKDIR; the networks do not depend on each other:
code       the linear code that the latents shall be
tokenizer  words as the pieces of the file that umT5's tokenizer is read from
dit        text encoder and denoiser together, by flow matching
encoder, decoder   the two halves of the autoencoder
export     bf16 safetensors below weights/video, under the published key names
"""
from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configs import demo_video as sizes
from ..core import attention
from ..models.wan_video_dit import CrossAttention, WanModel
from ..models.wan_video_text_encoder import WanTextEncoder
from ..models.wan_video_vae import (
    STATISTICS,
    AttentionBlock,
    CausalConv3d,
    Downsample,
    Past,
    ResidualBlock,
    Upsample,
    VideoVAE,
    WanVideoVAE,
    denormalize_latents,
    normalize_latents,
)
from ..pipelines.wan_prompts import MAX_TOKENS, TOKENIZER_FILE, TextPrompts
from .latent_code import VideoCode, fit_video_code
from .moving import COLOURS, DIRECTIONS, FRAMES, MOTIONS, SEEN, SHAPES, SIDE, Motion, draw, write_prompt
from .train import Run, add_haar, add_orthogonal, averaged, orthogonal, save_in_bfloat16

logger = logging.getLogger(__name__)

SPECIAL = ("<pad>", "</s>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
TEXT_LENGTH = 8  # tokens of the longest prompt and one of the padding
NAMED_WEIGHT = 0.3  # of naming against drawing


# ---- code and tokenizer ---------------------------------------------------------------------------------------------

def make_code(workdir: Path) -> None:
    """`code.pt`: see `latent_code`. This alone has seen all motions: their patches, not what they are called."""
    videos, _ = draw(MOTIONS * 8, torch.Generator().manual_seed(7))
    torch.save(vars(fit_video_code(videos)), workdir / "code.pt")


def load_code(workdir: Path) -> VideoCode:
    return VideoCode(**torch.load(workdir / "code.pt", weights_only=True))


def make_tokenizer(workdir: Path) -> None:
    """tokenizer.json: a piece for each word of the prompts and for each letter of others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ("a", *COLOURS, *SHAPES, *DIRECTIONS, "moves", "moving")
    pieces = ["▁", *(f"▁{word}" for word in words), *LETTERS]
    scores = [-1.0 - (piece in LETTERS) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in SPECIAL] + list(zip(pieces, scores)), unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    folder = workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))


# ---- text encoder and denoiser --------------------------------------------------------------------------------------

NAMES = [["none", *table] for table in (COLOURS, SHAPES, DIRECTIONS)]  # what a token can show


class Drawer(nn.Module):
    """Both models that are trained together, and a head that names what each token will show; see `train.Drawer`."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = WanTextEncoder(**sizes.TEXT_ENCODER)
        self.dit = WanModel(**sizes.DIT)
        self.names = nn.Linear(self.dit.dim, sum(map(len, NAMES)))

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Velocity (B, 16, T, h, w), and the scores (B, tokens, …) of each table of NAMES, from the middle."""
        middle = {}

        def keep(i: int, tokens: Tensor) -> None:
            if i == len(self.dit.blocks) // 2:
                middle["tokens"] = tokens

        video = self.dit.embed(latents, timestep, context)
        velocity = self.dit.output(self.dit.run_blocks(video, keep), video)
        return velocity, list(self.names(middle["tokens"]).float().split(list(map(len, NAMES)), dim=-1))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`core.attention`, written out: for so few tokens in bf16 on a CPU, torch's backward pass is ten times slower."""
    scores = (q * q.shape[-1]**-0.5) @ k.transpose(-1, -2)
    return (scores if mask is None else scores + mask).softmax(dim=-1).to(v.dtype) @ v


def counted_padding(layer: CrossAttention, x: Tensor, text: Tensor, picture: None) -> Tensor:
    """Cross-attention to a short text whose last token stands for all the padding that the pipeline appends.

    The result is that of the 512 tokens, for a sixtieth of the work.
    """
    k, v = layer.heads(layer.norm_k(layer.k(text))), layer.heads(layer.v(text))
    q = layer.heads(layer.norm_q(layer.q(x)))
    counts = torch.ones(1, text.shape[1])
    counts[:, -1] = MAX_TOKENS - text.shape[1] + 1
    out = plain_attention(q, k, v, counts.log())
    return layer.o(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def init_drawer(drawer: Drawer) -> None:
    """Zero gates and output, as diffusion transformers are usually started (DiT, Peebles & Xie 2022).

    The prompt's few tokens must be seen beside 500 of padding: padding begins as the key 0, and the prompt's tokens
    have much in common, which the queries begin by looking for.
    """
    dit, embedding = drawer.dit, drawer.text_encoder.token_embedding
    nn.init.zeros_(dit.time_projection[1].weight)
    nn.init.zeros_(dit.time_projection[1].bias)
    nn.init.zeros_(dit.head.head.weight)
    nn.init.zeros_(dit.head.head.bias)
    embedding.weight.mul_(0.5).add_(torch.randn(embedding.embedding_dim))
    for layer in (dit.text_embedding[0], dit.text_embedding[2]):
        nn.init.zeros_(layer.bias)
    ids = torch.arange(len(embedding.weight))[:, None]
    typical = dit.text_embedding(drawer.text_encoder(ids)).mean(dim=(0, 1))
    for block in dit.blocks:
        block.modulation[:, [2, 5]] = 0  # gates
        to_text = block.cross_attn
        for layer in (to_text.k, to_text.v):
            nn.init.zeros_(layer.bias)
        key = to_text.k(typical)
        to_text.q.bias.copy_(key / key.square().mean().sqrt())
        to_text.norm_k.weight.fill_(2.0)


def embed(prompts: TextPrompts, text_encoder: WanTextEncoder, texts: Sequence[str]) -> Tensor:
    """As `TextPrompts.embed`, of TEXT_LENGTH tokens, the last of which is padding."""
    ids, mask = prompts.tokenize(texts)
    ids, mask = (F.pad(tensor, (0, TEXT_LENGTH - tensor.shape[1])) for tensor in (ids, mask))
    return text_encoder(ids, mask) * mask[..., None]


@dataclass(frozen=True)
class Batch:
    """Latents (B, 16, T, h, w), how much each latent pixel counts (B, 1, T, h, w), and the number of what each token
    shows in each table of NAMES (B, tokens, 3)."""

    latents: Tensor
    weights: Tensor
    names: Tensor


def make_batch(code: VideoCode, motions: Sequence[Motion], generator: torch.Generator) -> Batch:
    videos, covers = draw(motions, generator)
    covers = torch.cat([covers[:, :1], covers[:, 1:].unflatten(1, (-1, 4)).amax(dim=2)], dim=1)  # of latent frames
    weights = 1 + 4 * F.max_pool2d(covers, 24, stride=8, padding=8)[:, None]
    shown = (F.avg_pool2d(covers, 16) > 0.25).flatten(1).long()  # tokens are 16×16 pixels
    names = torch.tensor([[table.index(name) for table, name in zip(NAMES, vars(motion).values())]
                          for motion in motions])
    return Batch(code.encode(videos), weights, shown[..., None] * names[:, None])


def noise_levels(count: int, done: float) -> Tensor:
    """Sigmas (count,), many of them where prompt and place are decided; fewer towards the end."""
    high = 0.5 if done < 0.8 else 0.3
    return torch.where(torch.rand(count) < high, 1 - 0.4 * torch.rand(count) ** 2, torch.rand(count))


def drawer_losses(drawer: Drawer, context: Tensor, batch: Batch, sigma: Tensor) -> dict[str, Tensor]:
    noise = torch.randn_like(batch.latents)
    velocity, scores = drawer(torch.lerp(batch.latents, noise, sigma[:, None, None, None, None]), sigma * 1000, context)
    error = (velocity.float() - (noise - batch.latents)).square()
    named = sum(F.cross_entropy(score.flatten(0, 1), names.flatten())
                for score, names in zip(scores, batch.names.unbind(-1)))
    return {"flow": (error * batch.weights).mean(), "named": NAMED_WEIGHT * named}


def train_dit(workdir: Path, steps: int, batch: int = 32, compiled: bool = False) -> None:
    torch.manual_seed(3)
    attention.register("plain", plain_attention)
    attention.prefer("plain", "the training script")
    drawer = Drawer()
    init_drawer(drawer)
    layers = (*drawer.dit.blocks, *drawer.text_encoder.blocks)
    matrices = [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim == 2]
    run = Run("dit", drawer, workdir, steps, rate=1.5e-3, decay=0.998, matrices=matrices)
    for block in drawer.dit.blocks:
        block.cross_attn.forward = MethodType(counted_padding, block.cross_attn)
    if compiled:
        for layer in layers:
            layer.compile()
    prompts, code = TextPrompts.load(workdir / "tokenizer"), load_code(workdir)
    rng, generator = random.Random(run.step), torch.Generator().manual_seed(run.step)

    def losses_of(step: int) -> dict[str, Tensor]:
        motions = rng.choices(SEEN, k=batch)
        texts = ["" if rng.random() < 0.1 else write_prompt(motion, rng) for motion in motions]
        examples = make_batch(code, motions, generator)
        with torch.autocast("cpu", torch.bfloat16):
            context = embed(prompts, drawer.text_encoder, texts)
            return drawer_losses(drawer, context, examples, noise_levels(batch, step / steps))

    run.train(losses_of)


# ---- autoencoder ----------------------------------------------------------------------------------------------------

LATENT_NOISE = 0.1  # standard deviation, in units of the normalised latents
CROP = 4  # latent pixels
CROP_FRAMES = 9


@torch.no_grad()
def init_autoencoder(net: VideoVAE) -> None:
    """Begin as networks that pass colours and edges on, frame by frame; see `train.init_vae`."""
    for module in net.modules():
        if isinstance(module, ResidualBlock):
            module.residual[6].weight.mul_(0.5)
            if isinstance(module.shortcut, CausalConv3d):
                add_orthogonal(module.shortcut, keep=0.0)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, Downsample):
            add_haar(module.resample[1], keep=0.5)
        elif isinstance(module, Upsample):
            add_orthogonal(module.resample[1], keep=0.5)
        if isinstance(module, (Downsample, Upsample)) and module.time_conv is not None:
            _init_time(module.time_conv)
    for conv in (net.encoder.conv1, net.decoder.conv1, net.conv1, net.conv2):
        add_orthogonal(conv, keep=0.5 if conv.kernel_size[-1] == 3 else 0.0)


def _init_time(conv: CausalConv3d) -> None:
    """Each frame becomes two like it, or every second one is left out; and half of the random weights."""
    conv.weight.mul_(0.5)
    nn.init.zeros_(conv.bias)
    copies = conv.out_channels // conv.in_channels
    conv.weight[:, :, -1, 0, 0] += orthogonal(conv.in_channels, conv.in_channels).repeat(copies, 1)


def in_chunks(function: Callable[[Tensor, Past], Tensor], chunks: Sequence[Tensor]) -> Tensor:
    """`VideoVAE.moments` or `.pixels` of the chunks of a video, one after the other."""
    past, results = Past(), []
    for i, chunk in enumerate(chunks):
        past.first, past.last = i == 0, i == len(chunks) - 1
        results.append(function(chunk, past))
    return torch.cat(results, dim=2)


def encoder_losses(net: VideoVAE, code: VideoCode, videos: Tensor) -> dict[str, Tensor]:
    """The encoder learns the code; its log-variance learns what noise the decoder forgives."""
    latents = code.encode(videos)
    with torch.autocast("cpu", torch.bfloat16):
        chunks = [videos[:, :, :1], *videos[:, :, 1:].split(4, dim=2)]
        mean, log_variance = in_chunks(net.moments, chunks).float().chunk(2, dim=1)
    deviation = torch.tensor(STATISTICS[16][1])[:, None, None, None]
    noise = log_variance - 2 * (LATENT_NOISE * deviation).log()
    return {"code": F.mse_loss(normalize_latents(mean), latents), "noise": 1e-3 * noise.square().mean()}


def decoder_losses(net: VideoVAE, code: VideoCode, videos: Tensor) -> dict[str, Tensor]:
    """The decoder learns to draw what the code, with a little noise, says."""
    latents = code.encode(videos)
    noisy = latents + LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, 1) * torch.randn_like(latents)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = in_chunks(net.pixels, denormalize_latents(noisy).split(1, dim=2))
    error = decoded.float() - videos
    edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3, 4))
    return {"l1": error.abs().mean(), "l2": error.square().mean(), "edges": 0.5 * edges}


def crop(video: Tensor, rng: random.Random) -> Tensor:
    """Some frames of a square of a video (3, F, H, W)."""
    side = 8 * CROP
    start = rng.randrange(FRAMES - CROP_FRAMES + 1)
    top, left = (rng.randrange(SIDE - side + 1) for _ in range(2))
    return video[:, start:start + CROP_FRAMES, top:top + side, left:left + side]


def train_autoencoder(workdir: Path, half: str, steps: int, batch: int = 6) -> None:
    """`half`: encoder or decoder. Mostly crops, which are many steps in little time; whole videos at the end."""
    torch.manual_seed(5)
    vae, code = WanVideoVAE(**sizes.VAE), load_code(workdir)
    init_autoencoder(vae.model)
    run = Run(half, vae.model, workdir, steps, rate=2e-3, decay=0.998)
    losses = {"encoder": encoder_losses, "decoder": decoder_losses}[half]
    rng, generator = random.Random(run.step), torch.Generator().manual_seed(run.step)

    def losses_of(step: int) -> dict[str, Tensor]:
        if step >= 0.85 * steps:
            return losses(vae.model, code, draw(rng.choices(SEEN, k=1), generator)[0])
        videos, _ = draw(rng.choices(SEEN, k=batch), generator)
        return losses(vae.model, code, torch.stack([crop(video, rng) for video in videos]))

    run.train(losses_of)


# ---- export ---------------------------------------------------------------------------------------------------------

def export(workdir: Path, folder: Path) -> None:
    """Weights as bf16 safetensors in the layout that the registry knows, and the tokenizer."""
    from ..utils.state_dict_converters.wan_video_vae import published_vae_keys

    drawer = averaged("dit", Drawer(), workdir)
    halves = {half: averaged(half, WanVideoVAE(**sizes.VAE).model, workdir).state_dict()
              for half in ("encoder", "decoder")}
    vae = {name: tensor for parts, half in ((("encoder.", "conv1."), "encoder"), (("decoder.", "conv2."), "decoder"))
           for name, tensor in halves[half].items() if name.startswith(parts)}
    files = {"text_encoder/model": drawer.text_encoder.state_dict(),
             "transformer/diffusion_pytorch_model": drawer.dit.state_dict(),
             "vae/diffusion_pytorch_model": published_vae_keys(vae)}
    save_in_bfloat16(files, folder)
    target = folder / "tokenizer"
    target.mkdir(exist_ok=True)
    (target / TOKENIZER_FILE).write_bytes((workdir / "tokenizer" / TOKENIZER_FILE).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="checkpoints live here; run again to go on")
    parser.add_argument("--stages", default="code,tokenizer,dit,encoder,decoder,export", help="which steps to run")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    parser.add_argument("--dit-steps", type=int, default=2500)
    parser.add_argument("--encoder-steps", type=int, default=2400)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights" / "video")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.workdir.mkdir(parents=True, exist_ok=True)
    stages = {"code": lambda: make_code(args.workdir),
              "tokenizer": lambda: make_tokenizer(args.workdir),
              "dit": lambda: train_dit(args.workdir, args.dit_steps, compiled=args.compile),
              "encoder": lambda: train_autoencoder(args.workdir, "encoder", args.encoder_steps),
              "decoder": lambda: train_autoencoder(args.workdir, "decoder", args.decoder_steps),
              "export": lambda: export(args.workdir, args.output)}
    for name in args.stages.split(","):
        stages[name]()


if __name__ == "__main__":
    main()
