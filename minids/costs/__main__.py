"""Count the parameters, FLOPs, cache and memory of a model, and the bill of its training.

    python -m minids.costs --preset v3
    python -m minids.costs --preset v3.2 --seq-len 131072
    python -m minids.costs --preset v3 --tokens 1e12 --gpus 512 --gpu-memory 141 --gpu-price 3.5
    python -m minids.costs --preset v3.2 --prompt-tokens 100000 --output-tokens 2000
    python -m minids.costs --preset v3 --n-routed-experts 384 --n-expert-groups 1 \\
        --n-limited-groups 1

Training is sharded like V3's where that fits the GPUs, else in the first way that does; a flag
fixes any part of it, such as --pipeline. `training_memory` lists what the memory leaves out, and
`minids.costs.flops` what the FLOPs leave out.
"""

from dataclasses import dataclass, replace

from minids.base.command_line import parse, run_program
from minids.base.fields import Settings, option
from minids.base.tables import format_table
from minids.config import ModelArgs
from minids.costs import report
from minids.costs.bill import V3_TOKENS, Prices, Rental, choose_sharding, plan
from minids.costs.flops import flops_per_token
from minids.costs.memory import Sharding


@dataclass(frozen=True)
class CostArgs(Settings):
    """Model, hardware and prices."""

    preset: str = option("v3", "model: " + ", ".join(ModelArgs.presets()))
    seq_len: int = option(0, "context, tokens; 0: the trained one, before YaRN stretches it", low=0)
    n_groups: int = option(8, "key/value heads of the GQA that the cache is compared with", low=1)
    acceptance: float = option(0.85, "share of the MTP module's drafts that are accepted; V3: 0.85 "
                                     "to 0.9", low=0, high=1)
    tokens: float = option(V3_TOKENS, "tokens to train on; V3 had 14.8e12", above=0)
    prompt_tokens: int = option(0, "an API workload to price: tokens of all prompts", low=0)
    cached_tokens: int = option(0, "of these, tokens that the service has in its cache", low=0)
    output_tokens: int = option(0, "the same workload: tokens of all replies", low=0)


def main(argv: list[str] | None = None) -> None:
    """Print the table of one configuration."""
    given, rented, spread, price, changes = parse(
        "minids.costs", __doc__, CostArgs, Rental, Sharding, Prices, ModelArgs, argv=argv)
    settings, rental, prices = CostArgs(**given), Rental(**rented), Prices(**price)
    args = replace(ModelArgs.preset(settings.preset), **changes)
    seq_len = settings.seq_len or min(args.max_seq_len, args.original_seq_len)
    sharding = choose_sharding(args, spread.pop("gpus", Sharding.gpus), rental, spread)
    run = plan(args, settings.tokens, rental, sharding, seq_len)
    changed = "".join(f", {name} = {value}" for name, value in changes.items())
    rows = [settings.preset + changed, *report.parameter_rows(args),
            *report.checkpoint_rows(args), *report.flops_rows(args, seq_len),
            *report.cache_rows(args, seq_len, settings.n_groups)]
    if args.n_mtp_layers:
        rows += report.drafting_rows(args, settings.acceptance)
    rows += report.memory_rows(run, rental)
    rows += report.bill_rows(run, rental, settings.tokens, flops_per_token(args, seq_len))
    if args == ModelArgs.preset("v3"):
        rows += report.paper_rows(args)
    workload = settings.prompt_tokens, settings.cached_tokens, settings.output_tokens
    if any(workload):
        rows += report.price_rows(workload, prices)
    print(format_table(rows))


if __name__ == "__main__":
    run_program("minids.costs", main)
