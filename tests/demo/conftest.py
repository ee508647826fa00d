"""The embedded demo model, loaded once for all tests of this folder."""
from __future__ import annotations

import pytest

from diffsynth_backend.demo.examine import load_demo
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline


@pytest.fixture(scope="session")
def demo() -> QwenImagePipeline:
    return load_demo()
