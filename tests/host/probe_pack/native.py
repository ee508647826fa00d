"""ComfyUI's own schedule and attention, for nodes of ours to be held against."""
import json

import comfy.ldm.modules.attention as attention
from comfy.model_base import ModelType, model_sampling
from comfy.supported_models import QwenImage

calls = []


class Sampling:
    """As much of a MODEL as native schedulers look at: Qwen-Image's sampling settings, as ComfyUI has them."""

    def get_model_object(self, name):
        assert name == "model_sampling"
        return model_sampling(QwenImage({"image_model": "qwen_image"}), ModelType.FLUX)


class ProbeSampling:
    """A MODEL for native schedulers, without weights."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "probe"

    def make(self):
        return (Sampling(),)


class ProbeAttention:
    """How often ComfyUI's attention was called since this was last asked; at first it begins to count."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "count", True, "probe"
    IS_CHANGED = classmethod(lambda cls: float("nan"))

    def count(self):
        if not hasattr(attention, "uncounted"):
            attention.uncounted = attention.optimized_attention
            attention.optimized_attention = self._counted
        counted = len(calls)
        calls.clear()
        return {"ui": {"text": [json.dumps(counted)]}}

    @staticmethod
    def _counted(*args, **kwargs):
        calls.append(1)
        return attention.uncounted(*args, **kwargs)
