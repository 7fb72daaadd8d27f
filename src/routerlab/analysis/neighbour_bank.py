"""What a model did on its training samples: their routing, which it got right, who is like whom."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from routerlab.ops.entropy import entropy
from routerlab.ops.neighbours import Neighbourhood

_FORMAT = "routerlab neighbour bank 1"
# (batch) -> routing vectors [B, R] of its rows, and whether each is answered rightly [B]
Observe = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class NeighbourBank:
    """What manifold alignment (RoMA, arXiv 2511.07419) takes from the model before it is tuned.
    Sample i of the training data has row i.

    ``embeddings`` are of the prompts, and ``correct`` marks the samples that are answered rightly:
    the set S of equation 2. ``layers`` are the names and numbers of experts of the layers whose
    distributions make up a routing vector, R in all; ``token`` says at which prompt tokens.
    ``fingerprint`` says what the bank was made from.
    """

    embeddings: Float[Tensor, "n m"]
    routing: Float[Tensor, "n R"]
    correct: Bool[Tensor, "n"]
    layers: dict[str, int]
    token: str
    fingerprint: dict[str, Any]

    @classmethod
    @torch.inference_mode(False)
    def build(
        cls,
        observe: Observe,
        batches: Iterable[dict[str, Tensor]],
        embeddings: Float[Tensor, "n m"],
        *,
        layers: Mapping[str, int],
        token: str,
        fingerprint: Mapping[str, Any],
    ) -> "NeighbourBank":
        """Looks at every sample once: ``batches`` hold the numbers 0 to n - 1 in ``sample``.

        Raises ValueError if they do not.
        """
        count = len(embeddings)
        routing, correct = gather_samples(observe, batches, count)
        return cls(
            embeddings.detach().float().cpu().clone(),
            routing,
            correct,
            dict(layers),
            token,
            as_json(fingerprint),
        )

    def save(self, path: str | Path) -> None:
        """Writes the bank to one file, whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        header = {"layers": self.layers, "token": self.token, "fingerprint": self.fingerprint}
        tensors = {name: getattr(self, name) for name in ("embeddings", "routing", "correct")}
        fresh = path.with_name(f"{path.name}.part")
        about = {"format": _FORMAT, "header": json.dumps(header)}
        save_file({k: t.contiguous() for k, t in tensors.items()}, fresh, metadata=about)
        fresh.replace(path)

    @classmethod
    def load(
        cls, path: str | Path, fingerprint: Mapping[str, Any] | None = None
    ) -> "NeighbourBank":
        """Reads a bank.

        Raises ValueError for a file that is no bank, and, naming what differs, for a bank that was
        not made from ``fingerprint``.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads(about["header"])
            bank = cls(**tensors, **header)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"bank={str(path)!r}: not a readable neighbour bank") from error
        if about.get("format") != _FORMAT:
            raise ValueError(f"bank={str(path)!r}: is in the format {about.get('format')!r}")
        if fingerprint is not None and (differ := differences(bank.fingerprint, fingerprint)):
            raise ValueError(f"bank={str(path)!r}: was made from other {differ}")
        return bank

    @property
    def num_correct(self) -> int:
        """How many samples the model answers rightly."""
        return int(self.correct.sum())

    def mean_distance(
        self,
        routing: Float[Tensor, "n R"] | None = None,
        neighbourhood: Neighbourhood | None = None,
    ) -> float:
        """The mean of a sample's squared routing distances to its neighbours, over the samples that
        have any: how far from aligned ``routing`` (None: the bank's own) is. Who is a neighbour,
        and how much it counts, stays as the bank says.
        """
        routing = self.routing if routing is None else routing
        means = (neighbourhood or Neighbourhood()).means(self.embeddings, self.correct, routing)
        distances = means.distances(routing, torch.arange(len(routing)))
        return float(distances.double().sum() / (means.count > 0).sum().clamp(min=1))

    def similarity(self, routing: Float[Tensor, "n R"] | None = None) -> float:
        """How alike embeddings and ``routing`` (None: the bank's own) are as geometries, from 0 to
        1: `linear_cka`.
        """
        return linear_cka(self.embeddings, self.routing if routing is None else routing)

    def load_entropy(self, routing: Float[Tensor, "n R"] | None = None) -> float:
        """Entropy in nats of the mean distribution, as a mean over layers: it falls where aligning
        makes all samples use the same experts.
        """
        mean = (self.routing if routing is None else routing).double().mean(0)
        blocks = mean.split(list(self.layers.values()))
        return float(torch.stack([entropy(block) for block in blocks]).mean())


@torch.inference_mode(False)
@torch.no_grad()
def gather_samples(
    observe: Observe, batches: Iterable[dict[str, Tensor]], count: int
) -> tuple[Float[Tensor, "n R"], Bool[Tensor, "n"]]:
    """Routing vectors and right answers of samples 0 to ``count`` - 1, in this order, on the CPU in
    float32; without gradients.
    """
    numbers, vectors, right = [], [], []
    for batch in batches:
        found = observe(batch)
        numbers.append(batch["sample"].cpu())
        vectors.append(found[0].float().cpu())
        right.append(found[1].bool().cpu())
    seen = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long)
    order = seen.argsort()
    if not torch.equal(seen[order], torch.arange(count)):
        raise ValueError(
            f"batches: must hold each of the {count} samples once; found {len(seen)} rows with "
            f"{len(seen.unique())} different numbers"
        )
    return torch.cat(vectors)[order], torch.cat(right)[order]


def linear_cka(a: Float[Tensor, "n p"], b: Float[Tensor, "n q"]) -> float:
    r""":math:`\lVert A^T B \rVert_F^2 / (\lVert A^T A \rVert_F \lVert B^T B \rVert_F)` of centred
    columns (Kornblith et al., arXiv 1905.00414): 1 for equal geometries up to rotation and scale; 0
    where one of them is a point.
    """
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    size = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).square().sum() / size) if size > 0 else 0.0


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of all parameters and buffers of a model: what tells it from another."""
    digest = hashlib.blake2b(digest_size=8)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The entries in which two fingerprints differ, with both values; empty if they agree."""
    old, new = _entries(as_json(found)), _entries(as_json(wanted))
    return "; ".join(
        f"{name} ({_short(old.get(name))}, not {_short(new.get(name))})"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it comes back from a JSON file."""
    return json.loads(json.dumps(dict(value)))


def _entries(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All values that are no mappings, by their dotted names."""
    found = {}
    for name, value in node.items():
        here = f"{prefix}{name}"
        found |= _entries(value, f"{here}.") if isinstance(value, dict) else {here: value}
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
