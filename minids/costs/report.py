"""Lay out the counts as the rows of one printed table."""

from dataclasses import replace

from minids.config import ModelArgs
from minids.costs import bill, flops
from minids.costs.cache import cache_bytes_per_token, fp8_cache_bytes_per_layer
from minids.costs.drafts import drafting
from minids.costs.parameters import DTYPE_BYTES, count_parameters, stored_elements

BLANK = ("",) * 4  # an empty row of the table


def section(title: str, columns: tuple, rows: list) -> list:
    """Return a blank row, a heading with column titles, and the rows, indented and filled up."""
    def fill(cells: tuple) -> tuple:
        return (*cells, *BLANK[len(cells):])
    return [BLANK, fill((title, *columns)),
            *("  " + row if isinstance(row, str) else fill(("  " + row[0], *row[1:]))
              for row in rows)]


def scaled(amount: float, unit: str, step: int = 1000) -> str:
    """Return an amount with a prefixed unit: 70272 bytes -> '70.27 KB', by 1024 '68.62 KiB'."""
    prefixes = ["", "K", "M", "G", "T", "P"]
    while amount >= step and len(prefixes) > 1:
        amount, prefixes = amount / step, prefixes[1:]
    return f"{amount:.2f} {prefixes[0]}{'i' if prefixes[0] and step == 1024 else ''}{unit}"


def parameter_rows(args: ModelArgs) -> list:
    """Return the rows of the model's parameters by part."""
    count = count_parameters(args)
    parts = [(part.replace("_", " "), n, count.active_parts[part],
              f"{count.active_parts[part] / count.active:.1%}")
             for part, n in count.parts.items() if n]
    mtp = [("",), ("MTP modules", count.mtp),
           ("MTP as stored, with copies of both", count.mtp_stored),
           ("main model and MTP as stored", count.total + count.mtp_stored)]
    return section("Parameters", ("total", "active", "of the active"), [
        *parts, ("",), ("all", count.total, count.active, "100.0%"),
        ("all without embedding", "", count.active_without_embedding),
        ("all without embedding and head", "", count.active_without_both),
        *(mtp if args.n_mtp_layers else [])])


def checkpoint_rows(args: ModelArgs) -> list:
    """Return the rows of a checkpoint in the released format."""
    stored = stored_elements(args)
    what = {"F8_E4M3": "F8_E4M3: most matrices", "BF16": "BF16: embedding, head, gates, norms",
            "F32": f"F32: {stored.scales:,} scales, gate biases"}
    rows = [(what[dtype], n, scaled(DTYPE_BYTES[dtype] * n, "B"))
            for dtype, n in stored.elements.items()]
    return section("Checkpoint in FP8" + ", MTP included" * (args.n_mtp_layers > 0),
                   ("numbers", "size"), [*rows, ("all", stored.total, scaled(stored.bytes, "B"))])


def flops_rows(args: ModelArgs, seq_len: int) -> list:
    """Return the rows of FLOPs per token: of the model, and of attention as the context grows."""
    forms = {"mha": "dense, naive", "mqa": "dense, absorbed", "dsa": "DSA"}
    longest = max(args.max_seq_len, seq_len)
    contexts = sorted({seq_len, *(2 ** n for n in range(11, 18, 2) if 2 ** n <= longest)})
    used = tuple(forms[form] for form in flops.attention_flops(args, seq_len))
    growth = [(f"{context:,} keys, all layers", *flops.attention_flops(args, context).values())
              for context in contexts]
    each = ("one key in one layer" + "; DSA: the indexer" * args.has_indexer,
            *(count for count in flops.pair_flops(args).values() if count))
    return [
        *section(f"FLOPs per token, {seq_len:,} tokens", ("causal", "non-causal"), [
            (name, round(f(args, seq_len)), round(f(args, seq_len, causal=False)))
            for name, f in [("training", flops.flops_per_token),
                            ("forward", flops.forward_flops_per_token)]]),
        *section("FLOPs of attention, one query", used, [each, *growth])]


def cache_rows(args: ModelArgs, seq_len: int, n_groups: int) -> list:
    """Return the rows of the cache: per token, and of a long request."""
    length = max(seq_len, min(args.max_seq_len, 131072))
    cache, fp8 = cache_bytes_per_token(args, n_groups=n_groups), fp8_cache_bytes_per_layer(args)

    def row(label: str, size: int) -> tuple:
        return label, size, f"{size / cache['mla']:.2f}", scaled(size * length, "B", 1024)
    names = {"mla": "MLA", "mha": "MHA, as many heads", "mqa": "MQA", "indexer": "DSA's indexer",
             "gqa": f"GQA, {min(n_groups, args.n_heads)} groups"}
    layers = args.n_layers + args.n_mtp_layers
    rows = [row(f"{names[form]}, BF16", size) for form, size in cache.items()]
    if args.n_mtp_layers:
        rows.append(row(f"MLA, BF16, {layers} layers with MTP",
                        cache["mla"] // args.n_layers * layers))
    rows += [row(f"{names[form]}, FP8, {size} a layer", size * args.n_layers)
             for form, size in fp8.items()]
    return section("Cache", ("bytes per token", "times MLA", f"{length:,} tokens"), rows)


def drafting_rows(args: ModelArgs, acceptance: float) -> list:
    """Return the rows of what MTP drafts gain where reading weights takes all the time."""
    def row(batch: int, drafts: int) -> tuple:
        d = drafting(args, acceptance, drafts, batch)
        return (f"{drafts} draft{'s' * (drafts > 1)}, batch {batch}", f"{d.tokens:.2f}",
                f"{d.check / d.plain:.2f} + {d.draft / d.plain:.2f}", f"{d.speedup:.2f}")
    return section(f"Drafts, {acceptance:.0%} accepted",
                   ("tokens a pass", "weights read", "times as fast"),
                   [row(batch, drafts) for drafts in (1, 2) for batch in (1, 8, 64, 256)])


def memory_rows(run: bill.Plan, rental: bill.Rental) -> list:
    """Return the rows of a training run's memory, and whether it fits."""
    s, memory = run.sharding, run.memory
    state = [(name, scaled(getattr(memory, name), "B"))
             for name in ("weights", "gradients", "optimizer")]
    return section("Training memory of one GPU, without workspace", ("size",), [
        f"{s.gpus:,} {rental.gpu}: pipeline {s.pipeline}{' (DualPipe)' * s.dualpipe}, "
        f"expert-parallel {s.expert_parallel}, ZeRO {s.zero}, recompute {s.recompute}",
        f"fullest is rank {memory.rank}: {memory.holds}; {memory.parameters:,} parameters", *state,
        (f"activations, {s.micro_batch_tokens:,} tokens at a time",
         scaled(memory.activations, "B")),
        ("all", scaled(memory.total, "B"),
         "fits into" if run.fits else "does not fit into", f"{rental.gpu_memory:g} GB")])


def money_row(label: str, due: bill.Bill) -> tuple:
    """Return a row of GPU-hours, dollars and days."""
    return label, round(due.gpu_hours), round(due.dollars), f"{due.days:,.1f}"


def bill_rows(run: bill.Plan, rental: bill.Rental, tokens: float, work: float) -> list:
    """Return the rows of a training run's bill; `work` is its FLOPs per token."""
    each = replace(run.bill, gpu_hours=run.bill.gpu_hours * 1e12 / tokens)
    return section("Training bill", ("GPU-hours", "USD", "days"), [
        f"{scaled(work, 'FLOPs')} a token; {rental.mfu:.1%} of {rental.gpu_peak:g} TFLOPS; "
        f"{rental.gpu_price:g} USD an hour for each of {run.bill.gpus:,} {rental.gpu}",
        money_row(f"{tokens:,.0f} tokens", run.bill), money_row("each 1T of tokens", each)])


def paper_rows(args: ModelArgs) -> list:
    """Return the rows of V3's own bill (V3 table 1), and the MFU that it implies."""
    price, peak, hours = bill.Rental.gpu_price, bill.Rental.gpu_peak, bill.V3_GPU_HOURS
    rows = [money_row(name, bill.Bill(count, 2048, price))[:3]
            for name, count in (hours | {"all": sum(hours.values())}).items()]
    each = bill.Bill(hours["pre-training"] * 1e12 / bill.V3_TOKENS, 2048, price)
    rows += [money_row("pre-training, each 1T of tokens", each), "pre-training ran at"]
    for name, work in [("as counted here", flops.flops_per_token(args, 4096)),
                       ("at the paper's 250 GFLOPs", 250e9)]:
        got = bill.teraflops(work, bill.V3_TOKENS, hours["pre-training"])
        rows.append(f"  {got:.1f} TFLOPS, {got / peak:.1%} of the peak, {name}")
    return section("V3's bill as published", ("GPU-hours", "USD", "days"), rows)


def price_rows(workload: tuple[int, int, int], prices: bill.Prices) -> list:
    """Return the rows of an API workload, at the given prices or else at measured serving costs.

    workload: prompt tokens, how many of them are cached, output tokens
    """
    own = {"at the given prices": prices} if prices != bill.Prices() else {
        f"{name}, cost at position 128K": price for name, price in bill.SERVING_128K.items()}
    return section("API workload", ("USD",), [
        "{:,} prompt tokens, {:,} of them cached, {:,} output tokens".format(*workload),
        *((name, f"{bill.api_price(*workload, price):,.4f}") for name, price in own.items())])
