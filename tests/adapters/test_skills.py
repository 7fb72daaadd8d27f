"""Poly and MHR: tables of tasks, factors mixed by head, and adaptation to a new task."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.adapters.skills import SkillExperts, SkillLinear, TaskTable
from routerlab.adapters.state import RoutingState
from routerlab.core.routing import RoutingContext
from tests.helpers.language_models import VOCAB, tiny_llama
from tests.helpers.mixtures import finished, layers_of, mixture, records_of, stir

TASKS = 3


def config(**changes: Any) -> MixtureOfLoraConfig:
    sizes = {"num_experts": 4, "r": 2, "lora_alpha": 1.0, "num_tasks": TASKS, "router": None}
    return MixtureOfLoraConfig(experts="skills", **(sizes | changes))


def lone(d_in: int = 8, d_out: int = 12, **changes: Any) -> SkillLinear:
    base = nn.Linear(d_in, d_out).requires_grad_(False)
    layer = SkillLinear(base, d_in, d_out, "layers.00.up", "layers.00", RoutingState())
    layer = finished(layer, config(**changes))
    if layer.router is not None:
        nn.init.normal_(layer.router.task_logits)
    return layer.eval()


def call(layer: SkillLinear, x: Tensor, tasks: list[int] | None, seed: int = 0) -> Tensor:
    ids = None if tasks is None else torch.tensor(tasks)
    layer.state.current = RoutingContext(*x.shape[:2], task_ids=ids, seed=seed)
    return layer(x)


def sentences(num: int, width: int = 8) -> Tensor:
    return torch.randn(num, 5, width, dtype=torch.float64)


def gates(table: TaskTable, task: int, seed: int = 0) -> Tensor:
    return table.alphas(RoutingContext(1, 5, task_ids=torch.tensor([task]), seed=seed))[0]


def test_gates_by_hand() -> None:
    table = TaskTable(1, 1, 3).eval()
    with torch.no_grad():
        table.task_logits.copy_(torch.tensor([2.0, 0.0, -2.0]))
    expected = [0.587198, 0.333333, 0.079469]
    assert gates(table, 0)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_noise_is_relaxed_bernoulli(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TaskTable(1, 1, 2).train()
    nn.init.zeros_(table.task_logits)
    drawn = torch.tensor([[[0.9, 0.5]]])
    monkeypatch.setattr(torch, "rand", lambda *args, **options: drawn)
    assert gates(table, 0)[0].tolist() == pytest.approx([0.642857, 0.357143], abs=1e-6)


def test_noise_is_of_training_and_of_each_sequence() -> None:
    table, rows = TaskTable(TASKS, 2, 4), torch.zeros(4, dtype=torch.long)

    def drawn(seed: int, **blocks: int) -> Tensor:
        num = 2 * blocks.get("num_replicas", 2)
        return table.alphas(RoutingContext(num, 5, task_ids=rows[:num], seed=seed, **blocks))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(drawn(1)[0], drawn(1)[1])
    both = drawn(1, num_replicas=2)  # samples draw alike in one batch and one by one
    torch.testing.assert_close(both[2:], drawn(1, num_replicas=1, replica=1))
    torch.testing.assert_close(both.sum(-1), torch.ones(4, 2))
    table.noise = False
    assert torch.equal(drawn(1), drawn(2))
    table.noise = True
    table.eval()
    assert torch.equal(drawn(1), drawn(2))


def test_factors_by_hand() -> None:
    experts = SkillExperts(2, 2, 2, 1, 1.0, 2)
    with torch.no_grad():
        experts.lora_A.copy_(torch.tensor([[1.0, 3.0], [2.0, 4.0]])[:, :, None, None])
        experts.lora_B.copy_(torch.tensor([[1.0, -1.0], [10.0, 20.0]])[:, :, None, None])
    x = torch.ones(1, 1, 2)
    alphas = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
    assert experts(x, alphas)[0, 0].tolist() == pytest.approx([2.25, 67.5])
    rows = experts(torch.eye(2)[None], alphas)[0]
    torch.testing.assert_close(rows, torch.tensor([[0.75, 22.5], [1.5, 45.0]]))
    mean = experts(torch.eye(2)[None], torch.full((1, 2, 2), 0.5))[0]
    torch.testing.assert_close(mean, torch.tensor([[0.0, 30.0], [0.0, 45.0]]))


def test_factors_are_mixed_and_not_their_products() -> None:
    experts = SkillExperts(2, 1, 2, 1, 1.0, 1)
    with torch.no_grad():
        experts.lora_A.copy_(torch.eye(2)[None, :, :, None])
        experts.lora_B.copy_(torch.tensor([1.0, -1.0])[None, :, None, None])
    assert experts(torch.eye(2)[None], torch.full((1, 1, 2), 0.5)).abs().max() == 0


def naive(layer: Any, x: Tensor, tasks: list[int]) -> Tensor:
    """W x + s (x A) B with the factors of each sequence's task, block by block."""
    experts, rows = layer.experts, []
    for sentence, task in zip(x, tasks, strict=True):
        heads = list(enumerate(gates(layer.router, task)))
        a = [sum(w * experts.lora_A[q, i] for i, w in enumerate(ws)) for q, ws in heads]
        b = [sum(w * experts.lora_B[q, i] for i, w in enumerate(ws)) for q, ws in heads]
        rows.append(experts.scaling * sentence @ torch.cat(a) @ torch.cat(b, 1))
    return layer.base_layer(x) + torch.stack(rows)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_values_and_gradients(num_heads: int) -> None:
    layer, x = lone(num_heads=num_heads), sentences(4).requires_grad_()
    assert layer.experts.scaling == 0.5
    tasks, back = [2, 0, 2, 2], torch.randn(4, 5, 12, dtype=torch.float64)
    inputs = (x, layer.experts.lora_A, layer.experts.lora_B, layer.router.task_logits)
    got, expected = call(layer, x, tasks), naive(layer, x, tasks)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, back),
        torch.autograd.grad(expected, inputs, back),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_heads_with_equal_gates_are_poly() -> None:
    poly, mhr, x = lone(num_heads=1), lone(num_heads=4), sentences(2)
    with torch.no_grad():
        mhr.router.task_logits.copy_(poly.router.task_logits.expand(-1, 4, -1))
        a, b = poly.experts.lora_A[0], poly.experts.lora_B[0]  # [S I r], [S r O]
        mhr.experts.lora_A.copy_(a.unflatten(1, (4, -1)).transpose(0, 1))
        mhr.experts.lora_B.copy_(b.unflatten(2, (4, -1)).permute(2, 0, 1, 3))
        mhr.base_layer.load_state_dict(poly.base_layer.state_dict())
    torch.testing.assert_close(call(mhr, x, [0, 2]), call(poly, x, [0, 2]))


@pytest.mark.parametrize("num_heads", [1, 8])
def test_a_fresh_adapter_is_the_base_for_any_task(num_heads: int) -> None:
    base, ids = tiny_llama(), torch.randint(VOCAB, (3, 7))
    expected = base(ids).logits
    model: Any = get_peft_model(base, config(num_heads=num_heads, target_modules=["up_proj"]))
    for mode in (True, False):
        logits = model.train(mode)(ids, task_ids=torch.tensor([0, 1, 2])).logits
        assert torch.equal(logits, expected)


def test_tables_of_absent_tasks_get_no_gradient() -> None:
    layer, x = lone(num_heads=2, gate_noise=True).train(), sentences(3)
    call(layer, x, [2, 0, 2]).square().sum().backward()
    grad = layer.router.task_logits.grad
    assert grad[1].abs().max() == 0
    assert grad[[0, 2]].abs().min() > 0


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    layer, x = lone(), sentences(2)
    assert torch.equal(call(layer, x, [0, 1], seed=1), call(layer, x, [0, 1], seed=2))
    layer.train()
    assert not torch.equal(call(layer, x, [0, 1], seed=1), call(layer, x, [0, 1], seed=2))


def test_repeated_rows_equal_calls_one_by_one() -> None:
    layer, x = lone(num_heads=2), sentences(2)
    beams, alone = x.repeat_interleave(3, 0), [call(layer, x[i : i + 1], [i + 1]) for i in (0, 1)]
    expected = torch.cat(alone).repeat_interleave(3, 0)
    torch.testing.assert_close(call(layer, beams, [1, 1, 1, 2, 2, 2]), expected)


@pytest.mark.parametrize("task", [-1, TASKS])
def test_unknown_tasks_are_refused(task: int) -> None:
    with pytest.raises(ValueError, match=f"task {task} of 3 that the adapter knows"):
        call(lone(), sentences(2), [0, task])
    with pytest.raises(ValueError, match="route by task"):
        call(lone(), sentences(2), None)


def test_records_are_of_the_task() -> None:
    model = mixture(
        tiny_llama(), experts="skills", router=None, num_tasks=2, num_experts=4,
        target_modules=["up_proj"],
    ).eval()  # fmt: skip
    ids, mask = torch.randint(2, VOCAB, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    model(input_ids=ids, attention_mask=mask, task_ids=torch.tensor([1, 0]))
    record = records_of(model)["layers.00.mlp.up_proj"]
    table = layers_of(model)["layers.00.mlp.up_proj"].router
    torch.testing.assert_close(record.router_probs[3], gates(table, 1)[0])
    assert record.tokens_per_expert.tolist() == [8, 8, 8, 8]  # not of padding


def trained(folder: Path, num_heads: int = 2, **changes: Any) -> Any:
    """A saved adapter of 3 tasks with tables that tell them apart."""
    made = config(num_heads=num_heads, target_modules=["up_proj", "down_proj"], **changes)
    model: Any = get_peft_model(tiny_llama(), made)
    stir(model)
    for name, parameter in model.named_parameters():
        if "task_logits" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.eval()


def adapted(folder: Path, adapt: str, **changes: Any) -> Any:
    made = {"experts": "skills", "router": None, "adapt": adapt, "adapt_from": str(folder)}
    return get_peft_model(tiny_llama(), MixtureOfLoraConfig(**made, **changes))


def learning(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def step(model: Any, **inputs: Any) -> set[str]:
    """The names of what one optimizer step of training moves, as what ends them."""
    ids = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=ids, labels=ids, **inputs).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return {name.removesuffix(".default").rpartition(".")[2] for name in moved}


@pytest.mark.parametrize(
    ("adapt", "moved"),
    [("full", {"lora_A", "lora_B", "task_logits"}), ("z", {"task_logits"})],
)
def test_adaptation_with_a_table(adapt: str, moved: set[str], tmp_path: Path) -> None:
    source = trained(tmp_path / "source")
    model = adapted(tmp_path / "source", adapt)
    for name, layer in layers_of(model).items():
        theirs = layers_of(source)[name]
        assert torch.equal(layer.experts.lora_A, theirs.experts.lora_A)
        assert torch.equal(layer.experts.lora_B, theirs.experts.lora_B)
        assert layer.router.task_logits.shape == (1, 2, 4)  # a row of its own, drawn anew
        assert layer.router.task_logits.abs().max() <= 1e-3
    if adapt == "z":
        assert {p.numel() for p in learning(model).values()} == {2 * 4}
    new = torch.zeros(2, dtype=torch.long)
    assert step(model, task_ids=new) == moved
    model.save_pretrained(tmp_path / "saved")
    again: Any = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "saved"), is_trainable=True)
    ids = torch.randint(VOCAB, (2, 6))
    expected = model.eval()(ids, task_ids=new).logits
    assert torch.equal(again.eval()(ids, task_ids=new).logits, expected)
    assert step(again, task_ids=new) == moved  # also after loading


@pytest.mark.parametrize("num_heads", [1, 4])
def test_the_mean_of_skills(num_heads: int, tmp_path: Path) -> None:
    source = trained(tmp_path / "source", num_heads=num_heads)
    model, ids = adapted(tmp_path / "source", "mu").eval(), torch.randint(VOCAB, (2, 6))
    for layer in layers_of(source).values():  # equal gates for all skills: the mean of factors
        nn.init.zeros_(layer.router.task_logits)
    tasks = torch.tensor([0, 2])
    expected = source(ids, task_ids=tasks).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids).logits, model(ids, task_ids=tasks).logits)
    assert all(layer.router is None for layer in layers_of(model).values())
    sizes = 2 * 2 * (32 + 48) * 2  # layers, linears, one LoRA of rank 2 each
    assert sum(p.numel() for p in learning(model).values()) == sizes
    assert step(model) == {"lora_A", "lora_B"}
    model.save_pretrained(tmp_path / "saved")
    again: Any = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_adaptation_takes_over_targets_and_base(tmp_path: Path) -> None:
    trained(tmp_path / "regex")
    made = config(target_modules=r".*\.mlp\.(up|down)_proj", exclude_modules=r".*layers\.1.*")
    model: Any = get_peft_model(tiny_llama(), made)
    model.save_pretrained(tmp_path / "regex")
    expected = ["layers.00.mlp.up_proj", "layers.00.mlp.down_proj"]
    assert sorted(layers_of(adapted(tmp_path / "regex", "z"))) == sorted(expected)
    other = MixtureOfLoraConfig(
        experts="skills", router=None, adapt="z", adapt_from=str(tmp_path / "regex")
    )
    with pytest.raises(ValueError, match="base model: .* load it on the base model"):
        get_peft_model(tiny_llama(seed=1), other)  # type: ignore[arg-type]


def test_skills_have_no_dropout() -> None:
    with pytest.raises(ValueError, match="lora_dropout=0.1: experts='skills' have no dropout"):
        config(lora_dropout=0.1)
