"""Wrapped models go back to directories of transformers, whole."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from routerlab.convert.certificate import ConversionFailed
from routerlab.convert.wrapped import export_wrapped
from tests.helpers.moe_models import FAMILIES, wrapped


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_tuned_router_is_all_that_differs(family: str, tmp_path: Path):
    backbone = wrapped(family, trainable="routers", trainable_layers=1)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    changed = [p for p in backbone.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(0.1)
    certificate = export_wrapped(backbone, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert sum(not torch.equal(after[k], before[k]) for k in before) == len(changed)
    assert (tmp_path / "out" / "certificate.json").is_file()
    assert certificate.failures == []


def test_a_bfloat16_model_is_written_as_it_is(tmp_path: Path):
    backbone = wrapped("olmoe", dtype="bfloat16", trainable="none")
    export_wrapped(backbone, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_tensor_that_comes_back_changed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = wrapped("olmoe")
    write = backbone.save_model

    def spoiled(folder: Path) -> None:
        write(folder)
        with torch.no_grad():
            backbone.model.lm_head.weight[0, 0] += 1

    monkeypatch.setattr(backbone, "save_model", spoiled)
    with pytest.raises(ConversionFailed, match="lm_head.weight: was written with other values"):
        export_wrapped(backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()
