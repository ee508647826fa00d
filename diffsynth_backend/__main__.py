"""Command line: `python -m diffsynth_backend generate --prompt "a red circle on a white background"`.

Draws with the embedded demo model unless real files are named. Prints the path of the picture on standard output.
`inspect FILE…` says what model files are, `convert IN OUT.safetensors` turns pickles into files that run no code.
"""
from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from .core.vram.presets import AUTO, VRAM_CHOICES, VRAM_PRESETS

logger = logging.getLogger(__name__)

VRAM_NAMES = (*VRAM_PRESETS, AUTO)  # `custom` has fields, and there are no options for those
DTYPES = ("bfloat16", "float16", "float32")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m diffsynth_backend", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="draw a picture from a prompt", epilog=_preset_help(),
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.set_defaults(run=run_generate)
    _add_picture_options(generate.add_argument_group("picture"))
    _add_model_options(generate.add_argument_group("model"))
    _add_memory_options(generate.add_argument_group("memory and speed"))
    _add_file_commands(commands)
    return top


def _add_file_commands(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser("inspect", help="say what model files are: hash, model, tensors, dtypes, size")
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("files", nargs="+", metavar="FILE", help="model file, its shards, or a folder")
    inspect.add_argument("--registry", metavar="JSON", help="a registry file with models of your own")
    convert = commands.add_parser("convert", help="write model files (.bin, .pth, .ckpt …) as one safetensors file")
    convert.set_defaults(run=run_convert)
    convert.add_argument("files", nargs="+", metavar="IN", help="model file, all its shards, or a folder")
    convert.add_argument("output", metavar="OUT.safetensors", help="file to write; must not exist")


def _preset_help() -> str:
    rows = "\n".join(f"  {name:<9} {VRAM_CHOICES[name]}" for name in VRAM_NAMES)
    return f"VRAM presets:\n{rows}"


def _add_picture_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", required=True, help="what to draw")
    group.add_argument("--negative-prompt", default="", help="what to keep away from")
    group.add_argument("--output", type=Path, default=Path("output.png"), help="file to write (default: %(default)s)")
    group.add_argument("--width", type=int,
                       help="pixels, rounded up to a multiple of 16 (default: the model's own size)")
    group.add_argument("--height", type=int, help="as --width")
    group.add_argument("--steps", type=int, help="denoising steps (default: the model's own number)")
    group.add_argument("--cfg", type=float, help="guidance scale; 1 turns guidance off (default: the model's own)")
    group.add_argument("--cfg-norm", action="store_true", help="norm-preserving guidance, as diffusers does it")
    group.add_argument("--seed", type=int, help="the same seed draws the same picture (default: another one each time)")
    group.add_argument("--input-image", type=Path, help="start from this picture, resized to width × height")
    group.add_argument("--denoise", type=float, default=1.0, help="how much of the input image to change, above 0 to 1")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="demo",
                       help="a known set of files: demo, qwen-image …; a wrong name lists all (default: %(default)s)")
    group.add_argument("--files", nargs="+", action="append", metavar="FILE",
                       help="instead of the known files: all files of one model (its shards); repeat for each model")
    group.add_argument("--tokenizer", type=Path, help="folder with the tokenizer's files")


def _add_memory_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--vram", default=AUTO, choices=VRAM_NAMES, help="preset, see below (default: %(default)s)")
    group.add_argument("--vram-limit", type=float, metavar="GIB",
                       help="what of the device is for us: weights that stay, the buffer that the others pass through, "
                            "and the loop's computation; 0 keeps no weights there (default: all but a tenth, at least "
                            "1.5 GiB; on a CPU no limit)")
    group.add_argument("--ram-limit", type=float, metavar="GIB",
                       help="with --vram disk or auto: RAM in which layers may wait that would be read from disk in "
                            "each step (default: none)")
    group.add_argument("--device", help="where to compute: cuda, cuda:1, mps, cpu … (default: the best there is)")
    group.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="what to compute in (default: %(default)s)")
    group.add_argument("--tiled", action="store_true", help="run the autoencoder tile by tile: less memory")


def run_generate(args: argparse.Namespace) -> None:
    """Load, draw, save; the picture's path goes to standard output."""
    from PIL import Image

    pipe, preset = _load_pipeline(args)
    height, width = pipe.check_resize_height_width(_given(args.height, preset.height), _given(args.width, preset.width))
    cfg_scale = _given(args.cfg, preset.cfg_scale)
    _log_plan(pipe, width, height, cfg_scale)
    image = None
    if args.input_image:
        image = Image.open(args.input_image).convert("RGB").resize((width, height), Image.LANCZOS)
    picture = pipe(args.prompt, negative_prompt=args.negative_prompt, width=width, height=height, seed=args.seed,
                   num_inference_steps=_given(args.steps, preset.steps), cfg_scale=cfg_scale, cfg_norm=args.cfg_norm,
                   input_image=image, denoising_strength=args.denoise, tiled=args.tiled)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    sys.stdout.write(f"{args.output}\n")


def run_inspect(args: argparse.Namespace) -> None:
    """A few lines for each model file or set of shards, on standard output. Raises ModelFileError for unknown ones."""
    from .core.loader.file import ModelFileError, check_model_files, group_files
    from .models.model_loader import use_registry_file

    if args.registry:
        use_registry_file(args.registry)
    unknown = [group[0] for group in group_files(check_model_files(args.files)) if not _inspect(group)]
    if unknown:
        raise ModelFileError(f"{len(unknown)} of the models are unknown: {', '.join(unknown)}. Get them in their "
                             "authors' layout, or name them in a registry file (--registry)")


def _inspect(files: list[str]) -> bool:
    """Print what the files of one model are; whether it is known."""
    from collections import Counter

    from .core.loader.file import hash_model_file, is_pickle, read_tensor_infos
    from .models.model_loader import find_models, nearest_known
    from .pipelines.handle import words

    infos = read_tensor_infos(files).values()
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    lines = [("hash", hash_model_file(files)),
             ("tensors", f"{len(infos)}: {', '.join(f'{count} {dtype}' for dtype, count in dtypes.most_common())}"),
             ("size", words(sum(info.nbytes for info in infos)))]
    if is_pickle(files[0]):
        lines.append(("format", "pickle; convert it: python -m diffsynth_backend convert IN OUT.safetensors"))
    models = find_models(files)
    if not models:
        lines += [("model", "unknown"), ("nearest", nearest_known(files) or "none")]
    lines += [("model", f"{model.name}{f', {model.remark}' if model.remark else ''}") for model in models]
    title = files[0] + (f" (and {len(files) - 1} more shards)" if len(files) > 1 else "")
    sys.stdout.write("\n".join([title, *(f"  {name:<8} {text}" for name, text in lines)]) + "\n")
    return bool(models)


def run_convert(args: argparse.Namespace) -> None:
    """Write the file; its path goes to standard output."""
    from tqdm import tqdm

    from .core.loader.convert import convert_to_safetensors

    with tqdm(unit="B", unit_scale=True, desc="convert", delay=1) as bar:
        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert_to_safetensors(args.files, args.output, show)
    sys.stdout.write(f"{args.output}\n")


def _given(value, default):
    """The option if it was given: 0 is a value too, and the pipeline says what is wrong with it."""
    return default if value is None else value


def _load_pipeline(args: argparse.Namespace):
    """The pipeline and the preset whose defaults it follows."""
    import torch

    from .core import ModelConfig
    from .core.device import available_device, check_available
    from .pipelines.families import family, pipeline_class
    from .pipelines.locate import model_preset

    preset = model_preset(args.model)
    if preset.frames > 1:
        raise ValueError(f"{args.model} makes videos, and this command draws pictures: use "
                         f"{family(preset.family).pipeline} of the library, or the nodes in ComfyUI")
    _check_limit(args)
    dtype = getattr(torch, args.dtype)
    device = check_available(args.device or available_device())
    configs = [ModelConfig(path=files) for files in args.files] if args.files else preset.model_configs()
    vram = _vram_settings(args, configs, dtype, device)
    tokenizer = ModelConfig(path=str(args.tokenizer)) if args.tokenizer else preset.tokenizer_config()
    pipe = pipeline_class(preset.family).from_pretrained(
        torch_dtype=dtype, device=device, model_configs=[replace(config, **vram.fields()) for config in configs],
        tokenizer_config=tokenizer, vram_limit=vram.vram_limit, ram_limit=vram.ram_limit)
    return pipe, preset


def _check_limit(args: argparse.Namespace) -> None:
    if args.vram_limit is not None and args.vram != AUTO and not VRAM_PRESETS[args.vram].dynamic:
        names = ", ".join([name for name, preset in VRAM_PRESETS.items() if preset.dynamic] + [AUTO])
        raise ValueError(f"--vram {args.vram} does not look at --vram-limit; presets that do: {names}")


def _vram_settings(args: argparse.Namespace, configs: list, dtype, device):
    """The settings that the options stand for on this machine. Downloads the files if it has to measure them."""
    from .core.device import GIB, memory_info
    from .pipelines.handle import AUTOMATIC, VramChoice, decide, weight_bytes_of

    _, total = memory_info(device)
    choice = VramChoice(args.vram, _given(args.vram_limit, AUTOMATIC), ram_limit=args.ram_limit)
    if choice.preset == AUTO:
        for config in configs:
            config.download_if_necessary()
        free_ram, _ = memory_info("cpu")
        decision = decide(sum(weight_bytes_of(config.path, dtype) for config in configs),
                          None if device.type == "cpu" else int(total * GIB), int(free_ram * GIB),
                          args.vram_limit, args.ram_limit)
        logger.info("%s", decision.describe())
        choice = choice.decided(decision)
    return choice.settings(dtype, str(device), total)


def _log_plan(pipe, width: int, height: int, cfg_scale: float) -> None:
    from .pipelines.report import plan_lines

    for line in plan_lines(pipe, width, height, cfg=cfg_scale != 1):
        logger.info("%s", line)


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status. Errors that name their cause are printed without a traceback."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        sys.stderr.write(f"error: {error}\nTry --vram low or --vram disk with a smaller --vram-limit, --tiled, or a "
                         "smaller picture.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
