"""Memory of a device and time of a training step of a whole decoder, on one to thousands of
devices: as ``trainer=ddp``, ``trainer=fsdp`` and, with that, expert parallelism lay it out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from routerlab.analysis.expert_parallel.layer import BYTES, LayerCost
from routerlab.analysis.expert_parallel.machines import Machine, ModelShape
from routerlab.analysis.expert_parallel.methods import Knobs, check_group, simulate_layer
from routerlab.core.checks import choice, within
from routerlab.core.config import ConfigError

STRATEGIES = ("ddp", "fsdp")
# Bytes a parameter under bf16-mixed: float32 weights and gradients, AdamW's two moments, the
# bfloat16 copy that products read, and the buckets in which DDP reduces gradients.
_WEIGHT, _GRADIENT, _MOMENTS, _COPY, _BUCKET = 4, 4, 8, 2, 4
_STATE = _WEIGHT + _GRADIENT + _MOMENTS
_LOGIT = 10  # bytes: bfloat16, float32 log-probabilities, and their gradient
_USABLE = 0.9  # share of a device's memory: the rest is the allocator's and the communicators'


@dataclass(frozen=True)
class Setup:
    """A training step: each device has ``tokens`` in sequences of ``seq_len``."""

    devices: int
    strategy: str = "ddp"
    group: int = 1  # devices of an expert-parallel group; 1: every device has all experts
    method: str = "ep"  # of `METHODS`, within a group
    tokens: int = 16384
    seq_len: int = 4096
    checkpointing: bool = False


@dataclass(frozen=True)
class StepCost:
    """Bytes of the fullest device, by what they hold, and seconds of a step."""

    state_bytes: int  # weights, gradients, optimizer
    working_bytes: int  # copies, buckets, gathered weights, moved experts
    activation_bytes: int
    fits: bool
    compute_seconds: float  # all that is no communication, of the slowest device
    exchange_seconds: float  # tokens and moved experts
    exposed_seconds: float  # of gradients and gathered weights, what no compute hides
    seconds: float
    efficiency: float  # one device's time with even loads and no communication, over this one
    mfu: float  # useful FLOPs over the peak

    @property
    def memory_bytes(self) -> int:
        """In all."""
        return self.state_bytes + self.working_bytes + self.activation_bytes


def simulate_model(
    model: ModelShape,
    setup: Setup,
    machine: Machine,
    loads_of: Callable[[int], Sequence[int]],
    knobs: Knobs | None = None,
) -> StepCost:
    """The cost of one optimizer step of one micro-batch a device, under bf16-mixed and AdamW.

    Args:
        loads_of: a number of assignments -> loads [E] that add up to it; every layer of every
            group has these.

    Raises:
        ValueError: an unknown name, a number out of its range, or a group that does not divide
            devices and experts.
    """
    choice("strategy", setup.strategy, STRATEGIES)
    for name in ("devices", "tokens", "seq_len"):
        within(name, getattr(setup, name), 1)
    check_group(setup.devices, setup.group, model.num_experts)
    if setup.group > 1 and setup.strategy != "fsdp":
        raise ConfigError(
            f"strategy={setup.strategy}: expert parallelism (group={setup.group}) needs fsdp"
        )
    knobs = Knobs() if knobs is None else knobs
    assignments = setup.tokens * setup.group * model.top_k
    loads = loads_of(assignments)
    costs = [
        simulate_layer(loads, model.layer, setup.group, machine, knobs, training=training)
        for training in (True, False)
    ]
    choice("method", setup.method, tuple(costs[0]))
    layer, again = (cost[setup.method] for cost in costs)
    compute, exchange = _layers_seconds(model, setup, machine, layer, again)
    forward = 2 * _flops_each(model, setup.seq_len, model.matrix_parameters) * setup.tokens
    compute += (4 if setup.checkpointing else 3) * forward / machine.flops_rate
    state, working = _parameter_bytes(model, setup, layer, knobs)
    compute += state / _STATE * (2 * _STATE - _GRADIENT) / machine.memory_rate  # AdamW
    exposed = _exposed_seconds(model, setup, machine, compute)
    activations = _activation_bytes(model, setup, layer.max_load)
    seconds = compute + exchange + exposed
    per_token = _flops_each(model, setup.seq_len, model.active_matrix_parameters)
    useful = 6 * per_token * setup.tokens
    return StepCost(
        state_bytes=round(state),
        working_bytes=round(working),
        activation_bytes=activations,
        fits=state + working + activations <= _USABLE * machine.memory,
        compute_seconds=compute,
        exchange_seconds=exchange,
        exposed_seconds=exposed,
        seconds=seconds,
        efficiency=_alone(model, setup, machine) / seconds,
        mfu=useful / machine.flops / seconds,
    )


def _alone(model: ModelShape, setup: Setup, machine: Machine) -> float:
    """Seconds of the same tokens on one device without communication, with even loads."""
    per_expert, rest = divmod(setup.tokens * model.top_k, model.num_experts)
    even = [per_expert + (i < rest) for i in range(model.num_experts)]
    layers = [
        simulate_layer(even, model.layer, 1, machine, Knobs(extra=0), training=training)["ep"]
        for training in (True, False)
    ]
    compute, _ = _layers_seconds(model, setup, machine, *layers)
    forward = 2 * _flops_each(model, setup.seq_len, model.matrix_parameters) * setup.tokens
    return compute + (4 if setup.checkpointing else 3) * forward / machine.flops_rate


def _layers_seconds(
    model: ModelShape, setup: Setup, machine: Machine, layer: LayerCost, again: LayerCost
) -> tuple[float, float]:
    """Seconds of all layers' experts, and of their exchanges; again, if they are recomputed."""
    costs = [layer, again] if setup.checkpointing else [layer]
    exchange = sum(cost.exchange_seconds for cost in costs)
    whole = sum(cost.seconds for cost in costs)
    if setup.group == 1:
        whole -= len(costs) * machine.layer_overhead  # no counts to exchange
    return model.num_layers * (whole - exchange), model.num_layers * exchange


def _flops_each(model: ModelShape, seq_len: int, parameters: int) -> int:
    """Half the FLOPs of a token's forward pass: its products, and causal attention."""
    width = model.num_heads * model.head_dim
    return parameters + model.num_layers * seq_len * width


def _parameter_bytes(
    model: ModelShape, setup: Setup, layer: LayerCost, knobs: Knobs
) -> tuple[int | float, int | float]:
    """Bytes of a device for parameters and their states, and for what works on them."""
    experts, others = float(model.expert_parameters), float(model.other_parameters)
    if setup.strategy == "ddp":
        bucket = _BUCKET if setup.devices > 1 else 0
        return _STATE * (experts + others), (_COPY + bucket) * (experts + others)
    # Two blocks are gathered at once, and embedding and head for the whole step.
    ends = (1 if model.tie_embeddings else 2) * model.vocab_size * model.d_model
    working = (_WEIGHT + _GRADIENT) * (ends + 2 * (others - ends) / model.num_layers)
    if setup.group == 1:
        working += (_COPY + _GRADIENT) * 2 * experts / model.num_layers
        return _STATE * (experts + others) / setup.devices, working
    own = experts / setup.group
    if setup.method == "replication":
        own += model.num_layers * knobs.extra * model.layer.weight_elements
    received = -(-layer.transfers // setup.group) * model.layer.weight_elements
    at_once = 1 if setup.checkpointing else model.num_layers
    working += _COPY * at_once * (own / model.num_layers + received)
    if received:  # own and received weights side by side, and the gradients of both
        working += (_WEIGHT + _GRADIENT) * (own / model.num_layers + received)
    return _STATE * (own + others / setup.devices), working


def _activation_bytes(model: ModelShape, setup: Setup, max_load: int) -> int:
    """Of what backward needs: as the decoder keeps it, its experts under ``dispatch=autograd``."""
    width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    stream = setup.tokens * (24 * model.d_model + 4 * width + 4 * kv_width)
    experts = max_load * (model.layer.token_elements - model.d_model) * BYTES
    full, layers = stream + experts, model.num_layers
    kept = full * layers
    if setup.checkpointing:
        kept = full + layers * setup.tokens * 4 * model.d_model
    return kept + setup.tokens * model.vocab_size * _LOGIT


def _exposed_seconds(model: ModelShape, setup: Setup, machine: Machine, compute: float) -> float:
    """Collectives over parameters, less the compute that they run beside: DDP's beside backward,
    FSDP's beside all; replicas of an expert-parallel group wait for theirs.
    """
    experts, others = float(model.expert_parameters), float(model.other_parameters)
    devices = setup.devices
    if setup.strategy == "ddp":  # a reduce-scatter and an all-gather
        busy = 2 * _ring(_GRADIENT * (experts + others), devices, 1, machine)
        return max(0.0, busy - compute * 2 / 3)
    waited, busy = 0.0, _ring((2 * _WEIGHT + _GRADIENT) * others, devices, 1, machine)
    if setup.group == 1:
        busy += _ring((2 * _COPY + _GRADIENT) * experts, devices, 1, machine)
    else:
        own = _GRADIENT * experts / setup.group
        waited = 2 * _ring(own, devices // setup.group, setup.group, machine)
    return waited + max(0.0, busy - compute)


def _ring(size: int | float, among: int, step: int, machine: Machine) -> float:
    """Seconds of an all-gather or reduce-scatter of ``size`` bytes among devices ``step`` apart:
    inside the nodes by their links, then between nodes, each device with its own part.
    """
    if among == 1:
        return 0.0
    inside = min(among, max(1, machine.devices_per_node // step))
    nodes = -(-among // inside)
    near = size * (inside - 1) / inside / machine.link_rate
    far = size / inside * (nodes - 1) / nodes / machine.network_rate
    return near + far + machine.exchange_latency * among.bit_length()
