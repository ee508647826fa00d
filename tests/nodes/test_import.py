"""Importing the pack: quick, and without touching a device or the network."""
from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.helpers.pack import ROOT

# What ComfyUI has imported long before it comes to packs is imported first; processor time, since a busy machine
# makes the wall clock mean little.
SCRIPT = """
import json, socket, sys, time
import torch, numpy, PIL.Image, safetensors, safetensors.torch, tqdm, psutil, einops
def refuse(*_, **__): raise AssertionError("the network is touched")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from tests.helpers.fake_host import FakeHost
from tests.helpers.pack import load_pack, submodule
before, began = set(sys.modules), time.process_time()
pack = load_pack(FakeHost(Path.cwd() / "nowhere"))
for node in submodule("nodes").NODES:
    node.define_schema()
seconds = time.process_time() - began
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "cuda": torch.cuda.is_initialized(), "new": sorted(new)}))
"""


def test_importing_is_quick_and_touches_nothing():
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["seconds"] < 0.3, result
    assert not result["cuda"]
    heavy = {"transformers", "huggingface_hub", "diffusers", "modelscope", "modelscope_hub", "tokenizers", "requests"}
    assert not heavy & set(result["new"]), result["new"]
