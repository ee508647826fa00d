"""Trains the demo model's small additions: `python -m diffsynth_backend.demo.train_features NAME WORKDIR`.

lora        a LoRA that draws blueprints: white things on navy, whatever the colours asked for
entities    a LoRA (EliGen) that draws each entity in the region of its mask
controlnet  a blockwise ControlNet that draws what outlines show

Notable: the demo model itself stays as it is. What the additions mean is in `examine_features`. Each takes three to
fifteen minutes of a core, begins from its checkpoint in WORKDIR if there is one, and is written to the demo's weights.
"""
from __future__ import annotations

import argparse
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..configs import demo_model as sizes
from ..models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from ..models.qwen_image_dit import Entities
from ..pipelines.qwen_image import QwenImagePipeline
from ..pipelines.qwen_image_entities import entity_regions
from .examine import load_demo
from .examine_features import (
    CONTROLNET,
    LORAS,
    REGION,
    blueprint,
    box,
    colour_prompt,
    ground_prompt,
    named,
    outline,
    placeless_prompt,
)
from .scenes import PLACES, Scene, draw, is_held_out, plain_prompt, sample_scene
from .train import Run, averaged, embed, flow_loss, thing_weight, training_prompt

RANK = 8
STREAM = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")  # of the picture's tokens
TEXT_STREAM = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2")


class LowRank(nn.Module):
    """Additions B·A·x to some linear layers of every block of a denoiser, hooked onto them; zero in the beginning."""

    def __init__(self, dit: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.names = [f"transformer_blocks.{block}.{layer}" for block in range(len(dit.transformer_blocks))
                      for layer in layers]
        self.pairs = nn.ModuleList()
        for linear in map(dit.get_submodule, self.names):
            pair = nn.Sequential(nn.Linear(linear.in_features, RANK, bias=False),
                                 nn.Linear(RANK, linear.out_features, bias=False))
            nn.init.zeros_(pair[1].weight)
            linear.register_forward_hook(partial(self._add, pair))
            self.pairs.append(pair)

    @staticmethod
    def _add(pair: nn.Module, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + pair(inputs[0])

    def file(self) -> dict[str, Tensor]:
        """The weights under the names that LoRA files of this family have."""
        return {f"{name}.lora_{side}.default.weight": layer.weight
                for name, pair in zip(self.names, self.pairs) for side, layer in zip("AB", pair)}


@dataclass
class Pool:
    """Scenes of the training set; latents (N, 16, 16, 16) and weights (N, 16, 16) of each."""

    scenes: list[Scene]
    latents: Tensor
    weights: Tensor

    def by_places(self, things: int) -> list[list[int]]:
        """Scenes of so many things, those with equal places together."""
        found = defaultdict(list)
        for index, scene in enumerate(self.scenes):
            if len(scene.things) == things:
                found[tuple(thing.place for thing in scene.things)].append(index)
        return list(found.values())


@torch.no_grad()
def encoded(pipe: QwenImagePipeline, pictures: Callable[[int], Tensor], count: int) -> Tensor:
    """Latents of so many pictures (3, 128, 128) by their number."""
    batches = (range(start, min(start + 16, count)) for start in range(0, count, 16))
    return torch.cat([pipe.encode_image(torch.stack([*map(pictures, batch)]).to(pipe.torch_dtype)).float()
                      for batch in batches])


def training_scene(rng: random.Random) -> Scene:
    """With its things in the order of the places: fewer layouts that differ. Held out in neither order."""
    while True:
        scene = sample_scene(rng)
        scene = replace(scene, things=tuple(sorted(scene.things, key=lambda thing: list(PLACES).index(thing.place))))
        if not is_held_out(scene):
            return scene


def make_pool(pipe: QwenImagePipeline, count: int, shown_for: Callable[[Scene], Scene]) -> Pool:
    """Scenes, with the pictures of what is to be shown for them."""
    rng, generator = random.Random(11), torch.Generator().manual_seed(11)
    scenes = [training_scene(rng) for _ in range(count)]
    shown = [shown_for(scene) for scene in scenes]
    return Pool(scenes, encoded(pipe, lambda i: draw([shown[i]], generator)[0], count),
                torch.stack([thing_weight(scene) for scene in shown]))


@dataclass(frozen=True)
class Trainer:
    """The frozen demo model and the pool that an addition is trained on; float32 under autocast, as the model was."""

    pipe: QwenImagePipeline
    pool: Pool
    steps: int

    def loss(self, chosen: list[int], texts: list[str], step: int, **inputs: Any) -> Tensor:
        """Of the chosen scenes, drawn from these texts and what else the denoiser's forward takes."""
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                embedding, mask = embed(self.pipe.prompts, self.pipe.text_encoder, texts)
            return flow_loss(self.pool.latents[chosen], self.pool.weights[chosen], step / self.steps,
                             lambda mixed, timestep: self.pipe.dit(mixed, timestep, embedding, mask, **inputs))


def make_trainer(steps: int, pool: int, shown_for: Callable[[Scene], Scene] = lambda scene: scene) -> Trainer:
    pipe = load_demo()
    trainer = Trainer(pipe, make_pool(pipe, pool, shown_for), steps)
    for model in (pipe.dit, pipe.text_encoder):
        model.float().requires_grad_(False)
    return trainer


# ---- the additions --------------------------------------------------------------------------------------------------

def train_lora(workdir: Path, steps: int, pool: int, batch: int = 32) -> dict[str, Tensor]:
    trainer = make_trainer(steps, pool, blueprint)
    lora = LowRank(trainer.pipe.dit, STREAM + MLP)
    run = Run("lora", lora, workdir, steps, rate=3e-3, decay=0.99)
    rng, scenes = random.Random(run.step), trainer.pool.scenes

    def losses_of(step: int) -> dict[str, Tensor]:
        chosen = rng.sample(range(len(scenes)), batch)
        return {"flow": trainer.loss(chosen, [training_prompt(scenes[i], rng) for i in chosen], step)}

    run.train(losses_of)
    return averaged("lora", lora, workdir).file()


def train_entities(workdir: Path, steps: int, pool: int, batch: int = 16) -> dict[str, Tensor]:
    """Regions are of a whole batch, so a batch is of scenes with equal places: one of single things, one of pairs.

    A third one has no entities: the empty prompt, which guidance needs, and what the model could do before.
    """
    trainer = make_trainer(steps, pool)
    lora = LowRank(trainer.pipe.dit, STREAM + TEXT_STREAM)
    run = Run("entities", lora, workdir, steps, rate=3e-3, decay=0.99)
    rng, scenes = random.Random(run.step), trainer.pool.scenes
    layouts = {"one": trainer.pool.by_places(1), "two": trainer.pool.by_places(2)}

    def entities_of(chosen: list[int]) -> Entities:
        prompts = [[*map(named, scenes[i].things)] for i in chosen]
        regions = [box(thing, REGION).float() for thing in scenes[chosen[0]].things]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            embeddings = [trainer.pipe.prompts.embed(trainer.pipe.text_encoder, list(texts), "cpu")[0]
                          for texts in zip(*prompts)]
        return Entities(tuple(embeddings), entity_regions(prompts[0], regions, 16, 16))

    def losses_of(step: int) -> dict[str, Tensor]:
        losses = {}
        for name, same in layouts.items():
            chosen = rng.choices(rng.choice(same), k=batch)
            texts = [rng.choice((ground_prompt, ground_prompt, plain_prompt))(scenes[i]) for i in chosen]
            losses[name] = trainer.loss(chosen, texts, step, entities=entities_of(chosen))
        chosen = rng.sample(range(len(scenes)), batch // 2)
        losses["none"] = trainer.loss(chosen, [rng.choice(("", plain_prompt(scenes[i]))) for i in chosen], step)
        return losses

    run.train(losses_of)
    return averaged("entities", lora, workdir).file()


def train_controlnet(workdir: Path, steps: int, pool: int, batch: int = 32) -> dict[str, Tensor]:
    trainer = make_trainer(steps, pool)
    scenes, dit = trainer.pool.scenes, trainer.pipe.dit
    outlines = encoded(trainer.pipe, lambda i: outline(scenes[i]), pool)
    net = QwenImageBlockWiseControlNet(**sizes.CONTROLNET)
    net.init_weight()
    run = Run("controlnet", net, workdir, steps, rate=2e-3, decay=0.99)
    rng = random.Random(run.step)

    def text_of(scene: Scene) -> str:
        placeless = placeless_prompt if len(scene.things) > 1 else colour_prompt
        return rng.choice(("", plain_prompt(scene), *[placeless(scene)] * 6))

    def losses_of(step: int) -> dict[str, Tensor]:
        chosen = rng.sample(range(len(scenes)), batch)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = net.process_controlnet_conditioning(dit.patchify(outlines[chosen]))
        return {"flow": trainer.loss(chosen, [text_of(scenes[i]) for i in chosen], step,
                                     after_block=lambda block, image: net(image, tokens, block))}

    run.train(losses_of)
    return averaged("controlnet", net, workdir).state_dict()


# What trains, with how many steps, and where the result belongs.
TRAININGS = {"lora": (train_lora, 350, LORAS["blueprint"]), "entities": (train_entities, 1000, LORAS["entities"]),
             "controlnet": (train_controlnet, 700, CONTROLNET)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TRAININGS)
    parser.add_argument("workdir", type=Path, help="the checkpoint lives here; run again to go on")
    parser.add_argument("--steps", type=int, help="instead of those that the committed weights have had")
    parser.add_argument("--pool", type=int, default=3000, help="how many scenes are drawn and encoded")
    parser.add_argument("--output", type=Path, help="the file to write, instead of the demo's")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.workdir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    train, steps, path = TRAININGS[args.name]
    weights = train(args.workdir, args.steps or steps, args.pool)
    path = args.output or path
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().bfloat16().contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
