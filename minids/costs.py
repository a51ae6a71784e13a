"""Costs: what a configuration weighs and what one token costs, by arithmetic alone.

    python -m minids.costs --preset v3
    python -m minids.costs --preset tiny --seq-len 256
    python -m minids.costs --preset v3 --n-routed-experts 384 --n-expert-groups 1 \\
        --n-limited-groups 1

Nothing is built and torch is not imported, so that the 671B model is counted in a blink on any
machine. The counts are exact and include norm weights and the gates' selection biases; the FLOPs
follow the usual rule of two per weight and token forward and twice that backward.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1 and table 1 for the cache, DeepSeek-V3
(arXiv 2412.19437) sections 2 and 4.2 for the shapes, and "Insights into DeepSeek-V3"
(arXiv 2505.09343) tables 1 and 2, whose cache bytes and FLOPs per token come out here.
Simplified: FLOPs leave out softmax, norms as such, the MTP modules and recomputation.
"""

from dataclasses import dataclass, replace

from minids.config import ModelArgs, check_types, option, parse, require, run_program


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, and how many of them one token meets.

    parts: part -> parameters of the main model, without MTP; the parts add up to `total`
    active_parts: part -> those that one token meets; they add up to `active`
    mtp: parameters that only the MTP modules have; embedding and head are the main model's
    mtp_stored: the same as a released checkpoint stores it, with its copies of both
    """

    parts: dict[str, int]
    active_parts: dict[str, int]
    mtp: int
    mtp_stored: int

    @property
    def total(self) -> int:
        """The main model, with norms and gate biases."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """What one token meets, embedding and head included."""
        return sum(self.active_parts.values())

    @property
    def active_without_embedding(self) -> int:
        """The head counted (it is multiplied), the embedding not (it is looked up)."""
        return self.active - self.active_parts["embedding"]

    @property
    def active_without_both(self) -> int:
        """The blocks and the final norm."""
        return self.active_without_embedding - self.active_parts["head"]


def attention_parameters(args: ModelArgs) -> int:
    """Parameters of one MLA layer, the norms on its latents included (V3 equations 1 to 11)."""
    query_width = args.n_heads * args.qk_head_dim
    wq = args.dim * query_width
    if args.q_lora_rank:
        wq = args.q_lora_rank * (args.dim + 1 + query_width)  # wq_a, q_norm, wq_b
    wkv_a = args.dim * (args.kv_lora_rank + args.qk_rope_head_dim)
    wkv_b = args.kv_lora_rank * args.n_heads * (args.qk_nope_head_dim + args.v_head_dim)
    wo = args.n_heads * args.v_head_dim * args.dim
    return wq + wkv_a + args.kv_lora_rank + wkv_b + wo


def block_parts(args: ModelArgs, layer: int, n_routed: int) -> dict[str, int]:
    """Parameters of block `layer` by part, with `n_routed` routed experts counted in it."""
    parts = {"attention": attention_parameters(args), "norms": 2 * args.dim}
    if not args.is_moe_layer(layer):
        return parts | {"dense_ffn": 3 * args.dim * args.inter_dim}
    expert = 3 * args.dim * args.moe_inter_dim
    gate = args.n_routed_experts * (args.dim + args.gate_bias)
    return parts | {"routed_experts": n_routed * expert,
                    "shared_experts": args.n_shared_experts * expert, "gate": gate}


def model_parts(args: ModelArgs, n_routed: int) -> dict[str, int]:
    """Parameters of the main model by part, with `n_routed` routed experts counted in a layer."""
    table = args.vocab_size * args.dim
    parts = dict(embedding=table, head=table, attention=0, dense_ffn=0, routed_experts=0,
                 shared_experts=0, gate=0, norms=args.dim)  # the final norm
    for layer in range(args.n_layers):
        for part, count in block_parts(args, layer, n_routed).items():
            parts[part] += count
    return parts


def count_parameters(args: ModelArgs) -> ParameterCount:
    """Count the parameters of a configuration.

    For the preset "v3": total 671,026,419,200, active 37,552,297,472.
    """
    block = block_parts(args, args.n_layers, args.n_routed_experts)
    eh_proj, norms = 2 * args.dim * args.dim, 3 * args.dim  # enorm, hnorm, norm
    mtp = args.n_mtp_layers * (sum(block.values()) + eh_proj + norms)
    copies = args.n_mtp_layers * 2 * args.vocab_size * args.dim
    return ParameterCount(parts=model_parts(args, args.n_routed_experts),
                          active_parts=model_parts(args, args.n_activated_experts),
                          mtp=mtp, mtp_stored=mtp + copies)


def forward_flops_per_token(args: ModelArgs, seq_len: int, causal: bool = True) -> float:
    """Floating-point operations of one forward pass of the main model, per token.

    seq_len: context, tokens
    causal: count the keys that a token may see, (seq_len + 1) / 2 on average; else all of them
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    scores_and_values = args.n_heads * (args.qk_head_dim + args.v_head_dim)
    attention = 2 * keys * scores_and_values * args.n_layers
    return 2 * count_parameters(args).active_without_embedding + attention


def flops_per_token(args: ModelArgs, seq_len: int, causal: bool = True) -> float:
    """Training FLOPs per token: forward, and twice that backward (arguments as for forward)."""
    return 3 * forward_flops_per_token(args, seq_len, causal)


def cache_bytes_per_token(args: ModelArgs, bytes_per_element: int = 2) -> dict[str, int]:
    """Bytes of key-value cache per token over all layers, by form of attention.

    bytes_per_element: width of a stored number, bytes; BF16 is 2
    Returns "mla" (latent and shared rotated key) and "mha" (every head's key and value, of
    widths qk_nope_head_dim and v_head_dim). For "v3": 70272 and 3997696.
    """
    widths = {"mla": args.kv_lora_rank + args.qk_rope_head_dim,
              "mha": args.n_heads * (args.qk_nope_head_dim + args.v_head_dim)}
    return {form: width * args.n_layers * bytes_per_element for form, width in widths.items()}


@dataclass(frozen=True)
class CostArgs:
    """What to count."""

    preset: str = option("v3", "model: " + ", ".join(ModelArgs.presets()))
    seq_len: int = option(0, "context, tokens; 0 takes the trained one, before YaRN stretches it")

    def __post_init__(self):
        check_types(self)
        require(self, "seq_len", self.seq_len >= 0, "0 or more")


BLANK = ("", "", "")


def parameter_rows(count: ParameterCount) -> list[tuple]:
    """Table rows of a parameter count: label, total, active."""
    rows = [("parameters", "total", "active")]
    rows += [(part, n, count.active_parts[part]) for part, n in count.parts.items() if n]
    return rows + [
        ("all", count.total, count.active),
        ("all without embedding", "", count.active_without_embedding),
        ("all without embedding and head", "", count.active_without_both),
        BLANK,
        ("MTP modules", count.mtp, ""),
        ("MTP as stored, with copies of both", count.mtp_stored, ""),
        ("main model and MTP as stored", count.total + count.mtp_stored, "")]


def token_rows(args: ModelArgs, seq_len: int) -> list[tuple]:
    """Table rows of what one token costs: label, causal and non-causal FLOPs, cache bytes."""
    cache = cache_bytes_per_token(args)
    flops = [("training", flops_per_token), ("forward", forward_flops_per_token)]
    return [
        (f"FLOPs per token at {seq_len:,} tokens", "causal", "non-causal"),
        *[(name, round(f(args, seq_len)), round(f(args, seq_len, causal=False)))
          for name, f in flops],
        BLANK,
        ("cache in BF16, bytes per token", "MLA", "same-shape MHA"),
        ("all layers", cache["mla"], cache["mha"]),
        ("times MLA", "", f"{cache['mha'] / cache['mla']:.2f}")]


def format_table(rows: list) -> str:
    """Rows in aligned columns, the first to the left and the others to the right.

    A cell is text, or an integer that is shown with thousands separators.
    """
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table of one configuration."""
    given, changes = parse("minids.costs", __doc__, CostArgs, ModelArgs, argv=argv)
    settings = CostArgs(**given)
    args = replace(ModelArgs.preset(settings.preset), **changes)
    seq_len = settings.seq_len or min(args.max_seq_len, args.original_seq_len)
    changed = "".join(f", {name} = {value}" for name, value in changes.items())
    rows = [*parameter_rows(count_parameters(args)), BLANK, *token_rows(args, seq_len)]
    print(f"{settings.preset}{changed}\n\n{format_table(rows)}")


if __name__ == "__main__":
    run_program("minids.costs", main)
