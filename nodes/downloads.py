"""The node that downloads the files of known models and LoRAs."""
from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..diffsynth_backend.pipelines.known_files import known_sources
from . import types
from .downloading import download, missing_behind


class DownloadModels(io.ComfyNode):
    """A known model's files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_DownloadModels",
            display_name="Download Models (DiffSynth)",
            category=types.CATEGORY,
            description="Downloads the files of a known model, of one part of it, or of a known LoRA, as far as they "
                        "are not here. Only as the setting DiffSynth, Downloads allows, which is off at first.",
            search_aliases=["diffsynth", "download", "model manager", "huggingface", "modelscope", "get model",
                            "model download", "下载", "下载模型"],
            inputs=[
                io.Combo.Input("model", options=list(known_sources()), tooltip=(
                    "What to download, into models/diffsynth/<owner>/<name> (or DIFFSYNTH_MODEL_BASE_PATH). What is "
                    "there already is left alone, and what was interrupted is continued.")),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model: str) -> float:
        """While files are missing, a value that equals no other: there is something to do."""
        return float("nan") if missing_behind(model) else 0.0  # not math.nan, which would be found by its identity

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        return io.NodeOutput(ui=ui.PreviewText(download(model, cls.hidden.unique_id)))
