"""The embedded tokenizer means the same tokens in every version of transformers."""
from __future__ import annotations

import json

from diffsynth_backend.configs.demo_model import TEXT_ENCODER
from diffsynth_backend.pipelines.presets import DEMO_WEIGHTS
from diffsynth_backend.pipelines.qwen_image_prompts import VISION_START, load_tokenizer

FOLDER = DEMO_WEIGHTS / "tokenizer"


def test_added_tokens_follow_the_vocabulary_without_a_gap():
    """Transformers 4 keeps the ids that the file names; transformers 5 counts on from the vocabulary."""
    vocabulary = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    added = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    first = max(vocabulary.values()) + 1
    assert list(map(int, added)) == list(range(first, first + len(added)))
    named = {entry["content"]: int(index) for index, entry in added.items()}
    assert load_tokenizer(FOLDER).get_added_vocab() == named
    assert named[VISION_START] == TEXT_ENCODER["first_vision_token"]
