"""What is expected next: by the last pass, by how blocks repeat, and never more than a ring of weights in vain."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from diffsynth_backend.core.vram.foresight import Foresight, Repetition


class Layers(dict):
    """Stand-ins for managed layers, by name; `stay` names those that stay on the device."""

    def __init__(self, *names: str, stay: tuple[str, ...] = ()) -> None:
        super().__init__({name: Layer(stays=name in stay) for name in names})

    @property
    def names(self) -> dict:
        return {layer: name for name, layer in self.items()}

    def known_after(self, *visited: str) -> Repetition:
        repetition = Repetition(self.names)
        for name in visited:
            repetition.visited(self[name])
        return repetition

    def chain(self, repetition: Repetition, name: str, most: int = 20) -> list[str]:
        """What is expected after a layer, and after that, and so on."""
        found, layer = [], self[name]
        while (layer := repetition.after(layer)) is not None and len(found) < most:
            found.append(self.names[layer])
        return found


class Layer(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


PARTS = ("up", "down.0", "down.2")
BLOCKS = ["0 table", *(f"0 blocks.{block}.{part}" for block in range(4) for part in PARTS), "0 end"]


class TestRepetition:
    def test_a_block_goes_on_like_the_one_before(self):
        layers = Layers(*BLOCKS)
        known = layers.known_after(*BLOCKS[:5])  # the first layer of the second block was the last
        assert layers.chain(known, BLOCKS[4]) == BLOCKS[5:13]

    @pytest.mark.parametrize("visits", range(1, 4))
    def test_nothing_is_expected_before_anything_repeats(self, visits):
        layers = Layers(*BLOCKS)
        known = layers.known_after(*BLOCKS[:visits + 1])
        assert layers.chain(known, BLOCKS[visits]) == []

    def test_the_order_is_that_of_visits_and_not_of_names(self):
        layers = Layers("0 a.0.x", "0 a.0.y", "0 a.1.x", "0 a.1.y", "0 a.2.x", "0 a.2.y")
        known = layers.known_after("0 a.0.y", "0 a.0.x", "0 a.1.y")
        assert layers.chain(known, "0 a.1.y") == ["0 a.1.x", "0 a.2.y", "0 a.2.x"]

    def test_a_row_of_layers(self):
        layers = Layers(*(f"0 {index}" for index in range(7)))
        assert layers.chain(layers.known_after("0 0", "0 1"), "0 1") == ["0 2", "0 3", "0 4", "0 5", "0 6"]

    def test_what_stays_on_the_device_is_not_read(self):
        layers = Layers(*BLOCKS, stay=("0 blocks.1.down.0", "0 blocks.2.up"))
        known = layers.known_after(*BLOCKS[:5])
        assert layers.chain(known, BLOCKS[4]) == [BLOCKS[6], *BLOCKS[8:13]]

    def test_a_second_model_of_the_same_kind(self):
        first, second = ([f"{model} {name[2:]}" for name in BLOCKS] for model in range(2))
        layers = Layers(*first, *second)
        known = layers.known_after(*first, second[0])
        assert layers.chain(known, second[0]) == second[1:]

    def test_layers_that_call_each_other_in_a_circle_end(self):
        layers = Layers("0 a", "0 b", stay=("0 a", "0 b"))
        assert layers.chain(layers.known_after("0 a", "0 b", "0 a"), "0 a") == []

    def test_layers_of_other_models_are_unknown(self):
        layers, foreign = Layers(*BLOCKS), Layer(stays=False)
        known = layers.known_after(*BLOCKS[:5])
        assert known.after(foreign) is None and known.after(None) is None
        known.visited(foreign)
        known.visited(layers[BLOCKS[5]])
        assert layers.chain(known, BLOCKS[5])[0] == BLOCKS[6]


class TestForesight:
    def test_a_known_order_and_the_beginning_of_the_passes_to_come(self):
        a, b = Layer(), Layer()
        foresight = Foresight([a, b], passes=2)
        foresight.begin_pass(is_counted=True, nothing_taken=True)
        assert [foresight.next_after(None) for _ in range(6)] == [a, b, a, b, None, None]

    def test_after_a_detour_it_goes_on_where_the_order_has_the_layer(self):
        a, b, c, new = Layer(), Layer(), Layer(), Layer()
        foresight = Foresight([a, b, c])
        foresight.begin_pass(is_counted=True, nothing_taken=True)
        foresight.go_on_from(new)
        assert foresight.next_after(new) is None
        foresight.go_on_from(b)
        assert foresight.next_after(b) is c and foresight.is_at_end

    def test_a_wrong_guess_ends_the_guessing_until_the_pass_is_known(self):
        layers = Layers(*BLOCKS)
        visited = [layers[name] for name in BLOCKS[:5]]
        foresight = Foresight(names=layers.names)
        for layer in visited:
            foresight.visited(layer)
        assert foresight.next_after(visited[-1]) is layers[BLOCKS[5]]
        foresight.was_wrong()
        assert foresight.next_after(visited[-1]) is None
        assert foresight.end_pass(visited) and not foresight.end_pass(visited)
        foresight.begin_pass(is_counted=False, nothing_taken=True)
        assert foresight.next_after(None) is visited[0]
