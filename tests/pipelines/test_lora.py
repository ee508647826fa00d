"""LoRAs on whole pipelines: equal latents wherever weights and adapters are, and stacks that come with a handle."""
from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core import ModelConfig
from diffsynth_backend.core.loader.file import MissingFile
from diffsynth_backend.core.vram import iter_managed
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.diffusion import Step
from diffsynth_backend.pipelines.handle import LoraChoice, ModelSource, PipelineHandle, VramChoice
from diffsynth_backend.pipelines.lora import check, schedule_hint
from diffsynth_backend.pipelines.owner import WeightsOwner
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.pipelines.steps import Steps, encode_prompts, sample
from diffsynth_backend.utils.lora.formats import LoraError
from tests.helpers.tiny import MODELS
from tests.helpers.vram_fields import cpu_fields

MIB = 1 / 1024  # GiB
LIMITS = {"none": 0, "little": 10 * MIB, "half": 14 * MIB, "all": None}
F32, FP8 = torch.float32, torch.float8_e4m3fn


def write_lora(path: Path, models: dict[str, nn.Module], kinds: tuple[str, ...] = ("lora",), seed: int = 0) -> Path:
    """Adapters of the kinds, in turn, on every linear layer of the models, which are named by their prefixes."""
    generator, tensors, index = torch.Generator().manual_seed(seed), {}, 0

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    for prefix, model in models.items():
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear):
                kind, index = kinds[index % len(kinds)], index + 1
                (out_features, in_features), layer = linear.weight.shape, f"{prefix}.{name}"
                if kind == "loha":
                    tensors |= {f"{layer}.hada_w{i}_{part}": 2 * random(*shape) for i in (1, 2)
                                for part, shape in (("a", (out_features, 2)), ("b", (2, in_features)))}
                elif kind == "lokr":
                    tensors |= {f"{layer}.lokr_w1": random(2, 2),
                                f"{layer}.lokr_w2": random(out_features // 2, in_features // 2)}
                else:
                    tensors |= {f"{layer}.lora_A.weight": random(4, in_features),
                                f"{layer}.lora_B.weight": random(out_features, 4)}
                if kind == "dora":
                    tensors[f"{layer}.dora_scale"] = 1 + random(out_features, 1)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def plain(tiny_files) -> QwenImagePipeline:
    return tiny_files.load()


@pytest.fixture(scope="module")
def lora_file(plain, tmp_path_factory) -> Path:
    """Every kind, on every linear layer of denoiser and text encoder."""
    return write_lora(tmp_path_factory.mktemp("lora") / "all.safetensors",
                      {"transformer": plain.dit, "text_encoder": plain.text_encoder}, ("lora", "dora", "loha", "lokr"))


def run(pipe: QwenImagePipeline, cfg_scale: float = 4.0) -> Tensor:
    """The latents of each step, one after the other."""
    seen = []

    def note(step: Step) -> None:
        seen.append(step.latents.clone())

    pipe("a red circle", "a blue square", height=64, width=48, seed=1, num_inference_steps=3, cfg_scale=cfg_scale,
         progress_bar_cmd=list, step_callback=note)
    return torch.stack(seen)


def load(tiny_files, preset: str, limit: float | None = None) -> QwenImagePipeline:
    fields = vram_preset(preset, F32, "cpu")
    fields.pop("computation_dtype"), fields.pop("computation_device")
    return tiny_files.load(vram_limit=limit, **fields)


def put(pipe: QwenImagePipeline, path: Path, strength: float = 0.8) -> None:
    pipe.load_lora(pipe.dit, str(path), alpha=strength)
    pipe.load_lora(pipe.text_encoder, ModelConfig(path=str(path)), alpha=strength)


@pytest.fixture(scope="module")
def expected(tiny_files, lora_file) -> dict[tuple[bool, bool], Tensor]:
    """Latents of the unmanaged pipeline, by whether the weights went through fp8 and whether there is a LoRA."""
    found = {}
    for through_fp8 in (False, True):
        pipe = tiny_files.load()
        if through_fp8:
            round_to_fp8(pipe, load(tiny_files, "fp8"))
        found[through_fp8, False] = run(pipe)
        put(pipe, lora_file)
        found[through_fp8, True] = run(pipe)
        pipe.clear_lora()
        assert torch.equal(run(pipe), found[through_fp8, False])
        assert (found[through_fp8, True] - found[through_fp8, False]).abs().max() > 0.1
    return found


@torch.no_grad()
def round_to_fp8(pipe: QwenImagePipeline, managed: QwenImagePipeline) -> None:
    """Give a pipeline the weights that the managed one computes with."""
    for (_, model), (_, other) in zip(pipe.named_models(), managed.named_models(), strict=True):
        stored = {slot.name for layer in iter_managed(other) for slot in layer.management.slots if not slot.is_buffer}
        for name, parameter in model.named_parameters():
            if name in stored:
                parameter.data = parameter.to(FP8).to(F32)


@pytest.mark.parametrize("preset, limit", [("balanced", None), ("fp8", None), *(
    (preset, limit) for preset in ("low", "disk") for limit in LIMITS.values())])
def test_same_latents_with_and_without_a_lora_under_every_preset(tiny_files, expected, lora_file, preset, limit):
    pipe, rounds = load(tiny_files, preset, limit), preset == "fp8"
    for with_lora in (False, True, False):
        if with_lora:
            put(pipe, lora_file)
        else:
            pipe.clear_lora()
        for _ in range(2):  # the second time, the order of the layers is known
            assert torch.equal(run(pipe), expected[rounds, with_lora])
        if limit:
            assert pipe.last_loop.traffic.peak_device_bytes <= limit * 2**30


@pytest.mark.parametrize("limit", [0, 10 * MIB])
def test_fp8_that_streams(tiny_files, expected, lora_file, limit):
    fields = cpu_fields(FP8, FP8, F32, F32)
    fields.pop("computation_dtype"), fields.pop("computation_device")
    pipe = tiny_files.load(vram_limit=limit, **fields)
    put(pipe, lora_file)
    assert torch.equal(run(pipe), expected[True, True])


@pytest.mark.parametrize("without", ["lock step", "table", "both"])
def test_byte_savers_change_nothing(tiny_files, expected, lora_file, without, monkeypatch):
    pipe = load(tiny_files, "disk", 0)
    put(pipe, lora_file)
    if without != "table":
        monkeypatch.setattr(pipe, "_run_sides", lambda passes: [run_one() for run_one in passes])
    if without != "lock step":
        monkeypatch.setattr("diffsynth_backend.core.vram.residency.has_timestep_call", lambda model: False)
    assert torch.equal(run(pipe), expected[False, True])


def test_fused_is_hot(tiny_files, expected, lora_file):
    pipe = tiny_files.load()
    before = {name: parameter.clone() for name, parameter in pipe.named_parameters()}
    for module in (pipe.dit, pipe.text_encoder):
        pipe.load_lora(module, str(lora_file), alpha=0.8, hotload=False)
    hot = expected[False, True]
    assert (run(pipe) - hot).norm() <= 1e-5 * hot.norm()
    pipe.clear_lora()
    assert all(torch.equal(parameter, before[name]) for name, parameter in pipe.named_parameters())


def test_one_of_several_is_taken_away(tiny_files, lora_file, plain, tmp_path):
    other = write_lora(tmp_path / "other.safetensors", {"dit": plain.dit}, seed=1)
    pipe = tiny_files.load()
    first = pipe.load_lora(pipe.dit, str(lora_file), alpha=0.5)
    alone = run(pipe)
    second = pipe.load_lora(pipe.dit, str(other), alpha=0.5)
    both = run(pipe)
    pipe.clear_lora(first)
    pipe.load_lora(pipe.dit, str(lora_file), alpha=0.5)
    assert torch.equal(run(pipe), both), "in either order"
    pipe.clear_lora(second)
    assert torch.equal(run(pipe), alone)
    with pytest.raises(ValueError, match="all.safetensors is not among"):
        pipe.clear_lora(first)


def test_a_state_dict_and_its_counts_in_the_log(tiny_files, caplog):
    caplog.set_level("INFO", logger="diffsynth_backend")
    pipe = tiny_files.load(models=("transformer",))
    pipe.load_lora(pipe.dit, state_dict={"img_in.lora_A.default.weight": torch.ones(1, 64), "x.diff": torch.ones(1),
                                         "img_in.lora_B.default.weight": torch.ones(128, 1)})
    assert "the LoRA's state dict: 2 of 3 keys used, on 1 layers of dit; 1 not used: x.diff" in caplog.messages


@pytest.mark.parametrize("arguments, error, message", [
    ({"module": None, "state_dict": {}}, TypeError, "such as pipe.dit"), ({}, ValueError, "either a file"),
    ({"lora_config": "a", "state_dict": {}}, ValueError, "either a file"),
    ({"lora_config": "/no/such.safetensors"}, MissingFile, "no/such"),
    ({"state_dict": {"a.lora_A": torch.ones(1, 1), "a.lora_B": torch.ones(1, 1)}}, LoraError, "fits a layer of dit"),
    ({"alpha": float("nan"), "state_dict": {"img_in.lora_A": torch.ones(1, 64), "img_in.lora_B": torch.ones(128, 1)}},
     ValueError, "finite")])
def test_what_cannot_be_loaded(plain, arguments, error, message):
    with pytest.raises(error, match=message):
        plain.load_lora(**{"module": plain.dit, **arguments})
    assert not plain._lora_stack.loras


def test_not_while_the_loop_runs(tiny_files, lora_file):
    pipe = tiny_files.load()

    def change(step: Step) -> None:
        pipe.load_lora(pipe.dit, str(lora_file))

    with pytest.raises(RuntimeError, match="while the loop runs"):
        pipe("a", height=64, width=48, num_inference_steps=2, progress_bar_cmd=list, step_callback=change)
    pipe.load_lora(pipe.dit, str(lora_file))


# ---- handles --------------------------------------------------------------------------------------------------------

@pytest.fixture
def handle(tiny_files) -> PipelineHandle:
    sources = tuple(ModelSource(model, (tiny_files.file(model),)) for model in MODELS)
    vram = VramChoice("low", 12 * MIB).settings(F32, "cpu", 24)
    return PipelineHandle("qwen-image", sources, tiny_files.tokenizer, F32, "cpu", vram, slot="1")


@pytest.fixture
def owner() -> WeightsOwner:
    return WeightsOwner(reserved=0)


def draw(owner: WeightsOwner, handle: PipelineHandle) -> Tensor:
    prompts = encode_prompts(handle, "a red circle", "", owner)
    return sample(handle, prompts, torch.zeros(1, 16, 8, 6), Steps(2), 1, 4.0, weights=owner)


def test_a_handle_with_loras_is_a_value(handle):
    choice = LoraChoice("a", "/x/a.safetensors", 0.5)
    with_lora = handle.with_lora(choice)
    assert pickle.loads(pickle.dumps(with_lora)) == with_lora != handle and hash(with_lora) != hash(handle)
    assert with_lora.weights == handle.weights and with_lora.models == handle.models
    assert with_lora.with_lora(choice).loras == (choice, choice)
    with pytest.raises(ValueError, match="64 LoRAs"):
        dataclasses.replace(handle, loras=(choice,) * 64).with_lora(choice)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 101, "1"])
def test_a_strength_that_no_handle_has(strength):
    with pytest.raises(ValueError, match="the strength of a must be a number"):
        LoraChoice("a", "/x/a.safetensors", strength)


def test_handles_share_weights_and_keep_their_loras_apart(owner, handle, lora_file):
    strong, weak = (handle.with_lora(LoraChoice("a", str(lora_file), strength)) for strength in (1.0, 0.3))
    pipe = owner.get(handle)
    first = {name: draw(owner, one) for name, one in (("none", handle), ("strong", strong), ("weak", weak))}
    again = {name: draw(owner, one) for name, one in (("weak", weak), ("none", handle), ("strong", strong))}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["none"], first["weak"]) and not torch.equal(first["strong"], first["weak"])
    assert owner.get(strong) is pipe and len(owner.loaded()) == 1
    zero = handle.with_lora(LoraChoice("a", str(lora_file), 0))
    assert torch.equal(draw(owner, zero), first["none"])


def test_the_order_in_a_handle_has_no_effect(owner, handle, lora_file, plain, tmp_path):
    other = LoraChoice("b", str(write_lora(tmp_path / "b.safetensors", {"transformer": plain.dit}, seed=1)), 0.7)
    choice = LoraChoice("a", str(lora_file), 0.4)
    assert torch.equal(draw(owner, handle.with_lora(choice).with_lora(other)),
                       draw(owner, handle.with_lora(other).with_lora(choice)))


def test_nothing_is_done_where_nothing_changes(owner, handle, lora_file, monkeypatch):
    with_lora = handle.with_lora(LoraChoice("a", str(lora_file), 0.4))
    with owner.use(with_lora) as pipe:
        monkeypatch.setattr(pipe, "set_loras", lambda files: pytest.fail("put again"))
    with owner.use(dataclasses.replace(with_lora, slot="2")):
        pass


def test_a_rewritten_file_is_seen(owner, handle, plain, tmp_path):
    path = tmp_path / "a.safetensors"
    with_lora = handle.with_lora(LoraChoice("a", str(write_lora(path, {"dit": plain.dit}))))
    before = draw(owner, with_lora)
    write_lora(path, {"dit": plain.dit}, ("dora",), seed=1)
    assert not torch.equal(draw(owner, with_lora), before)


def test_a_lora_that_does_not_fit_stops_its_handle_alone(owner, handle, lora_file, tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"single_blocks.0.lora_A.weight": torch.ones(1, 2), "single_blocks.0.lora_B.weight": torch.ones(2, 1)},
              path)
    good, bad = (handle.with_lora(LoraChoice("a", str(file))) for file in (lora_file, path))
    expected = draw(owner, good)
    with pytest.raises(LoraError, match=r"flux.safetensors: none of its 2 keys .* single_blocks.0.lora_A.weight"):
        draw(owner, bad)
    assert torch.equal(draw(owner, good), expected)
    path.unlink()
    with pytest.raises(MissingFile):
        draw(owner, bad)


def test_a_graph_loads_no_pickles(owner, handle, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"img_in.lora_A": torch.ones(1, 64), "img_in.lora_B": torch.ones(128, 1)}, path)
    with pytest.raises(LoraError, match="safetensors"):
        draw(owner, handle.with_lora(LoraChoice("a", str(path))))


def test_what_a_lora_would_change_in_words(plain, lora_file):
    text = check(plain, LoraChoice("a", str(lora_file), 0.5))
    layers = {name: sum(isinstance(module, nn.Linear) for module in model.modules())
              for name, model in (("dit", plain.dit), ("text_encoder", plain.text_encoder))}
    assert f"{layers['dit']} layers of dit" in text and f"{layers['text_encoder']} layers of text_encoder" in text
    assert text.startswith("all.safetensors: ") and text.endswith("; strength 0.5")


# ---- schedules ------------------------------------------------------------------------------------------------------

LIGHTNING = LoraChoice("Qwen-Image-Lightning-4steps-V1.0", "/x/Qwen-Image-Lightning-4steps-V1.0.safetensors")


@pytest.mark.parametrize("template, steps, cfg_scale, expected", [
    ("Qwen-Image-Lightning", 4, 1.0, None),
    ("Qwen-Image", 4, 1.0, "Qwen-Image-Lightning-4steps-V1.0 is a Lightning LoRA, made for few steps: choose the "
                           "Lightning schedule"),
    ("Qwen-Image-Lightning", 30, 4.0, "Qwen-Image-Lightning-4steps-V1.0 is a Lightning LoRA, made for few steps: set "
                                      "steps to 4 (now 30), set cfg to 1 (now 4)")])
def test_a_lightning_lora_wants_its_schedule(template, steps, cfg_scale, expected):
    loras = [LoraChoice("style", "/x/style.safetensors"), LIGHTNING]
    assert schedule_hint(loras, template, steps, cfg_scale) == expected


def test_a_lightning_schedule_wants_its_lora():
    ordinary = LoraChoice("style", "/x/style.safetensors")
    assert schedule_hint([ordinary], "Qwen-Image", 30, 4.0) is None
    for loras in ([], [ordinary], [dataclasses.replace(LIGHTNING, strength=0.0)]):
        assert "there is none" in schedule_hint(loras, "Qwen-Image-Lightning", 4, 1.0)


def test_a_renamed_lightning_lora_is_told_by_its_metadata(tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file({"a": torch.ones(1)}, path, {"ss_output_name": "Lightning-8steps"})
    assert "set steps to 8" in schedule_hint([LoraChoice("mine", str(path))], "Qwen-Image-Lightning", 4, 1.0)
