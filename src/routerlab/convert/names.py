"""The links between a decoder's tensors and a checkpoint's, for each family."""

from collections.abc import Collection

from routerlab.convert import links
from routerlab.convert.families import Anatomy, Family
from routerlab.convert.links import Link


def all_links(family: Family, anatomy: Anatomy, keys: Collection[str] | None = None) -> list[Link]:
    """Every tensor of the decoder and of the family's checkpoint, each in one link.

    ``keys`` are those of a checkpoint to be read, which may stack its experts or not, and has one
    of two names for Ernie's bias; None: one to be written, in the form of the hub, an expert a key.
    """
    a, found = anatomy.arguments, []
    found.append(links.renamed("norm.weight", "model.norm.weight"))
    embedding = ("embed_tokens.weight", "model.embed_tokens.weight")
    if not a["tie_embeddings"]:
        found.append(links.renamed("lm_head.weight", "lm_head.weight"))
    elif keys is not None and "lm_head.weight" in keys:
        embedding = (*embedding, "lm_head.weight")
    found.append(links.renamed(*embedding))
    for i, num_experts in enumerate(a["num_experts"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        found += _attention(family, anatomy, ours, theirs)
        if num_experts:
            found += _mixture(family, anatomy, ours, theirs, num_experts, keys)
        else:
            found += _dense(f"{ours}.mlp", f"{theirs}.mlp")
    return found


def _attention(family: Family, anatomy: Anatomy, ours: str, theirs: str) -> list[Link]:
    names = ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj"]
    turned = ["self_attn.q_proj", "self_attn.k_proj"]
    if anatomy.arguments["qk_norm"]:
        names += ["self_attn.q_norm", "self_attn.k_norm"]
    if not family.interleaved:
        names, turned = names + turned, []
    head_dim = anatomy.arguments["head_dim"]
    return [
        *(links.renamed(f"{ours}.{name}.weight", f"{theirs}.{name}.weight") for name in names),
        *(
            links.interleaved(f"{ours}.{name}.weight", f"{theirs}.{name}.weight", head_dim)
            for name in turned
        ),
    ]


def _dense(ours: str, theirs: str) -> list[Link]:
    gate, up = f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"
    return [
        links.gate_and_up(f"{ours}.gate_up_proj.weight", gate, up),
        links.renamed(f"{ours}.down_proj.weight", f"{theirs}.down_proj.weight"),
    ]


def _mixture(
    family: Family,
    anatomy: Anatomy,
    ours: str,
    theirs: str,
    num_experts: int,
    keys: Collection[str] | None,
) -> list[Link]:
    own = f"{ours}.moe"
    stacked = keys is not None and f"{theirs}.mlp.experts.gate_up_proj" in keys
    block = f"{theirs}.mlp" if stacked else f"{theirs}.{family.block}"
    found = [links.renamed(f"{own}.router.gate.weight", f"{block}.gate.weight")]
    gate_up, down = f"{own}.experts.gate_up_proj", f"{own}.experts.down_proj"
    if stacked:
        found.append(links.renamed(gate_up, f"{block}.experts.gate_up_proj"))
        found.append(links.renamed(down, f"{block}.experts.down_proj"))
    else:
        gates, ups, downs = (
            [f"{block}.experts.{e}.{name}.weight" for e in range(num_experts)]
            for name in family.experts
        )
        found.append(links.stacked_gate_and_up(gate_up, gates, ups))
        found.append(links.stacked(down, downs))
    if family.bias is not None:
        found.append(_bias(family, anatomy, own, block, num_experts, keys))
    has_shared = anatomy.arguments["num_shared_experts"] or family.empty_shared
    if family.shared is not None and has_shared:
        found += _shared(family, anatomy, f"{own}.shared_experts", block)
    return found


def _bias(
    family: Family,
    anatomy: Anatomy,
    own: str,
    block: str,
    num_experts: int,
    keys: Collection[str] | None,
) -> Link:
    ours, theirs = f"{own}.router.balancer.bias", f"{block}.{family.bias}"
    one_row = "moe_statics" in theirs  # Ernie's, whose module sits inside the gate
    if one_row and keys is not None and theirs not in keys:
        theirs = theirs.replace("moe_statics", "gate.moe_statics")
    if not anatomy.law.biased:
        return links.zeros(theirs, *([1] if one_row else []), num_experts)
    return links.one_row(ours, theirs) if one_row else links.renamed(ours, theirs)


def _shared(family: Family, anatomy: Anatomy, ours: str, block: str) -> list[Link]:
    """Shared experts. A gated one is ours when its gate is 0, so sigmoid(0) = 1/2, and its output
    is twice as large.
    """
    a, theirs = anatomy.arguments, f"{block}.{family.shared}"
    d_model, count = a["d_model"], a["num_shared_experts"]
    gate, up = f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"
    down, found = f"{theirs}.down_proj.weight", []
    if family.gated_shared:
        found.append(links.zeros(f"{block}.{family.shared}_gate.weight", 1, d_model))
    if not count:
        return [
            *found,
            *(links.zeros(name, 0, d_model) for name in (gate, up)),
            links.zeros(down, d_model, 0),
        ]
    found.append(links.gate_and_up(f"{ours}.gate_up_proj.weight", gate, up))
    join = links.doubled if family.gated_shared else links.renamed
    return [*found, join(f"{ours}.down_proj.weight", down)]
