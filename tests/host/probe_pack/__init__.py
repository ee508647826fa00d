"""A pack for tests alone: nodes that look into the server, and that make it fail where a test wants it to."""
import gc
import json
import sys
import time

from comfy.model_management import processing_interrupted

from .native import ProbeAttention, ProbeSampling

HIDDEN_TOKENIZERS = {}


def module_of_pack(name):
    """A module of the pack under test: its name begins with the path of a folder."""
    return next(module for key, module in sys.modules.items() if key.endswith(f"custom_nodes/diffsynth_backend.{name}"))


def text(value):
    return {"ui": {"text": [json.dumps(value)]}}


class ProbeState:
    """How many pipelines are alive, and how many of their layers are on duty."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "look", True, "probe"
    IS_CHANGED = classmethod(lambda cls: float("nan"))

    def look(self):
        pipeline_class = module_of_pack("diffsynth_backend.diffusion.base_pipeline").BasePipeline
        gc_was_needed = gc.collect()
        alive = [thing for thing in gc.get_objects() if isinstance(thing, pipeline_class)]
        states = [layer.state for pipe in alive for layer in pipe.modules() if hasattr(type(layer), "state")]
        return text({"pipelines": len(alive), "layers": len(states), "onloaded": sum(map(bool, states)),
                     "collected": gc_was_needed})


class ProbeFailure:
    """From now on: the n-th call of the denoiser fails, once; ComfyUI's own tokenizers are hidden."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"fail_in_call": ("INT", {"default": 0}),
                                                        "hide_tokenizers": ("BOOLEAN", {"default": False})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "prepare", True, "probe"
    IS_CHANGED = classmethod(lambda cls, **_: float("nan"))

    def prepare(self, fail_in_call, hide_tokenizers):
        if fail_in_call:
            self._fail_once(fail_in_call)
        tokenizers = module_of_pack("nodes.host").NATIVE_TOKENIZERS
        source, target = (tokenizers, HIDDEN_TOKENIZERS) if hide_tokenizers else (HIDDEN_TOKENIZERS, tokenizers)
        target.update(source)
        source.clear()
        return text("ready")

    @staticmethod
    def _fail_once(call):
        dit = module_of_pack("diffsynth_backend.models.qwen_image_dit").QwenImageDiT
        forward, calls = dit.forward, []

        def failing(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                dit.forward = forward
                raise RuntimeError("the test pulled the plug")
            return forward(self, *args, **kwargs)

        dit.forward = failing


class ProbeLoad:
    """From now on: the n-th tensor that is read waits, once, until somebody interrupts."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"wait_at": ("INT", {"default": 1})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "prepare", True, "probe"
    IS_CHANGED = classmethod(lambda cls, **_: float("nan"))

    def prepare(self, wait_at):
        progress = module_of_pack("nodes.host").LoadProgress
        told, calls = progress.__call__, []

        def waiting(self, step):
            calls.append(1)
            if len(calls) == wait_at:
                progress.__call__ = told
                until = time.monotonic() + 20
                while not processing_interrupted() and time.monotonic() < until:
                    time.sleep(0.002)
            return told(self, step)

        progress.__call__ = waiting
        return text("ready")


class ProbeDifference:
    """The largest difference between two pictures, and the shape of the first."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("IMAGE",), "b": ("IMAGE",)}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "compare", True, "probe"

    def compare(self, a, b):
        return text({"shape": list(a.shape), "difference": float((a - b).abs().max())})


class ProbeLatent:
    """A latent's shape and dtype."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"latent": ("LATENT",)}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "look", True, "probe"

    def look(self, latent):
        samples = latent["samples"]
        return text({"shape": list(samples.shape), "dtype": str(samples.dtype), "device": str(samples.device)})


class ProbeMemory:
    """What becomes of our models under ComfyUI's memory manager."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "play", True, "probe"

    def play(self):
        from .memory import scenario

        return text(scenario(module_of_pack("nodes.memory").ModelAdapter))


class ProbeRename:
    """From now on a node of the pack has had another name before, and its inputs others."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "register", True, "probe"

    async def register(self):
        from comfy_api.v0_0_2 import io

        renamed = io.NodeReplace(
            new_node_id="DiffSynthBackend_EmptyLatent", old_node_id="DiffSynthBackend_OldLatent",
            old_widget_ids=["side"], input_mapping=[
                {"new_id": "width", "old_id": "side"}, {"new_id": "height", "old_id": "side"},
                {"new_id": "batch_size", "set_value": 2}])
        await module_of_pack("nodes.replacements").register([renamed])
        return text("registered")


NODE_CLASS_MAPPINGS = {cls.__name__: cls
                       for cls in (ProbeState, ProbeFailure, ProbeLoad, ProbeDifference, ProbeLatent, ProbeMemory,
                                   ProbeRename, ProbeAttention, ProbeSampling)}
