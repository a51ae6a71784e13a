"""Measure a model on text that it has not seen: bits per byte, and the balance of its experts.

    python -m minids.evaluate --run runs/tiny
    python -m minids.evaluate --run runs/tiny --data text:other_text
    python -m minids.evaluate --run DeepSeek-V2-Lite --data text:other_text   # a released model
    python -m minids.evaluate --run runs/tiny-warm --selections
    python -m minids.evaluate --run runs/tiny --drafts

Models with different tokenizers can be compared, because bits per byte knows no vocabulary.
--selections compares dense attention with ways of selecting k tokens, the indexer's among them.
--drafts measures how well the MTP modules predict what the model will say, by depth and kind of
text; the last row has the drafts for the model's own output.
"""

from dataclasses import dataclass

from minids.apply.fp8 import use_fp8
from minids.base.command_line import parse, run_program
from minids.base.fields import option, require
from minids.infer.validation import compare_selections, draft_table, evaluate, selection_table
from minids.parallel.layout import Spread
from minids.parallel.team import Team, one_first, speaking_first
from minids.runs.device import Machine
from minids.runs.open import Source
from minids.runs.together import opened
from minids.text.loaders import open_data


@dataclass(frozen=True)
class EvaluateArgs(Machine):
    """The run to evaluate, and the text and windows to evaluate it on."""

    run: str = option("runs/tiny", "run folder, one of its checkpoints, or a Hugging Face folder")
    data: str = option("", "text, as for minids.train; none: the run's own, or else pystdlib")
    seq_len: int = option(0, "tokens in a window; 0: as in training, or else at most 1024", low=0)
    batch_size: int = option(16, "windows at a time", low=1)
    max_tokens: int = option(0, "validation tokens, spread over the text; 0: all", low=0)
    selections: bool = option(False, "compare dense attention and ways of selecting k tokens")
    index_topk: int = option(0, "k of --selections; 0: the model's or an eighth of a window", low=0)
    drafts: bool = option(False, "measure how often the MTP modules predict the model's choice")
    fp8: bool = option(False, "products of linear layers and experts in FP8")


def main() -> None:
    with speaking_first():
        given, spread = parse("minids.evaluate", __doc__, EvaluateArgs, Spread)
        args, spread = EvaluateArgs(**given), Spread(**spread)
    with opened(args.run, args, spread) as (run, team):
        require(args, "selections", not args.selections or spread.pipeline == 1,
                "false with --pipeline: each layer's recall is on another rank")
        require(args, "fp8", not args.fp8 or not (team or spread.keep_fp8),
                "false with weights that stay in FP8, and over several ranks")
        report(run, args, team)


def report(run: Source, args: EvaluateArgs, team: Team | None) -> None:
    """Print what is measured; all ranks of a team call this."""
    # A Hugging Face folder does not say what its model was trained on.
    train = run.config.get("train") or {"data": "pystdlib",
                                        "seq_len": min(run.model.args.max_seq_len, 1024)}
    if args.fp8:
        use_fp8(run.model)
    limit = run.model.args.max_seq_len
    require(args, "seq_len", args.seq_len <= limit, f"at most {limit}, the model's max_seq_len")
    seq_len, max_tokens = args.seq_len or train["seq_len"], args.max_tokens or None
    data = one_first(team, lambda: open_data(args.data or train["data"], run.tokenizer, seq_len))
    text = data.valid, run.tokenizer.n_bytes, seq_len, args.batch_size
    print(f"{run.path} on {data.name}, {len(data.valid):,} validation tokens")
    if args.selections:
        model_k = run.model.args.index_topk if run.model.args.has_indexer else seq_len // 8
        k = args.index_topk or max(model_k, 1)
        print(selection_table(compare_selections(run.model, *text, k, max_tokens), k))
    elif args.drafts:
        if not run.model.mtp:
            raise ValueError(f"drafts = True is not valid: {args.run} has no MTP module")
        print(draft_table(run, data.valid, seq_len, args.batch_size, max_tokens))
    else:
        begin_id = run.tokenizer.bos_id if train.get("separate") else None
        measure = evaluate
        if team:
            from minids.parallel.serving import evaluate as measure
        result = measure(run.model, *text, max_tokens, begin_id)
        print(f"bits per byte    {result.bits_per_byte:.4f}")
        if result.max_vio:
            print("MaxVio by layer  " + " ".join(f"{v:.2f}" for v in result.max_vio))


if __name__ == "__main__":
    run_program("minids.evaluate", main)
