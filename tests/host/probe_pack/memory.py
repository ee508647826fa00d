"""Our adapters under ComfyUI's real memory manager, on a card that is only imagined: sizes and a free-memory figure.

Notable: the manager frees nothing for a CPU, so the card is torch's meta device and nothing is really moved.
"""
import gc
from contextlib import contextmanager

import comfy.model_management as manager
import torch

GB = 10**9
CARD = torch.device("meta")
CAPACITY = 10 * GB


def adapters(adapter_class):
    """A factory of adapters for models of a given size, and what is on the card."""
    made = []

    class Imagined(adapter_class):
        resident, moves = False, 0

        def loaded_size(self):
            return self._size if self.resident else 0

        def _move(self, device):
            self.moves += self.resident != (device == CARD)
            self.resident = device == CARD

    def make(model, size):
        adapter = Imagined(model, CARD, torch.float32, None)
        adapter._size = size
        model.adapter = adapter
        made.append(adapter)
        return adapter

    def used():
        return sum(adapter.loaded_size() for adapter in made)

    return make, used


@contextmanager
def imagined_card(used):
    real = manager.get_free_memory
    manager.get_free_memory = lambda device=None, torch_free_too=False: (
        (CAPACITY - used(), 0) if torch_free_too else CAPACITY - used())
    try:
        yield
    finally:
        manager.get_free_memory = real


def scenario(adapter_class):
    make, used = adapters(adapter_class)
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    a, b = make(first, 6 * GB), make(second, 6 * GB)
    seen = {}
    with imagined_card(used):
        manager.load_models_gpu([a], memory_required=GB)
        seen["loaded"] = [a.resident, b.resident]
        manager.load_models_gpu([b], memory_required=GB)
        seen["one makes room for the other"] = [a.resident, b.resident]
        moves = b.moves
        manager.load_models_gpu([b], memory_required=GB)
        seen["loading again moves nothing"] = b.moves == moves and b.resident
        b.in_use = True
        manager.load_models_gpu([a], memory_required=GB)
        seen["what is at work stays"] = b.resident
        b.in_use = False
        manager.load_models_gpu([b, a], memory_required=GB)
        manager.free_memory(1e30, CARD)
        seen["unload request"] = [a.resident, b.resident]
        manager.load_models_gpu([a], memory_required=GB)
        del first, second
        gone = [a, b]
        seen["models are not kept alive"] = [adapter.model is None for adapter in gone]
        del a, b, gone
        gc.collect()
        manager.cleanup_models()
        seen["entries left"] = sum(entry.device == CARD for entry in manager.current_loaded_models)
    return seen
