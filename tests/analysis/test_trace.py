"""Traces on disk."""

from pathlib import Path

import pytest

from routerlab.analysis import trace
from tests.helpers.traces import random_sets, traced


def test_a_trace_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = traced(random_sets(64, 8, 2, seed=0), random_sets(64, 4, 1, seed=1))
    path = trace.save(tmp_path / "traces" / "one.safetensors", kept)
    found = trace.load(path)
    assert found.input_ids.equal(kept.input_ids)
    assert (found.domains, list(found.layers)) == (["all"], ["layers.00", "layers.01"])
    for name, layer in kept.layers.items():
        assert found.layers[name].token_indices.equal(layer.token_indices)
        assert found.layers[name].expert_indices.equal(layer.expert_indices)
        assert found.layers[name].num_experts == layer.num_experts
    assert [file.name for file in path.parent.iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize("bytes_left", [0, 5, 300, 2000])
def test_a_torn_file_is_refused(tmp_path: Path, bytes_left: int) -> None:
    path = trace.save(tmp_path / "one.safetensors", traced(random_sets(64, 8, 2, seed=0)))
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match="one.safetensors': not a routerlab trace"):
        trace.load(path)
