"""Defaults of arguments: what a caller leaves out cuts and adds nothing, or is a paper's number."""

import importlib
import inspect

import pytest

NEUTRAL = {
    "apply.compile.Compiled": dict(sequences=0, varied=0),
    "apply.compile.compile_blocks": dict(sequences=0),
    "base.command_line.run_program": dict(lasting=False),
    "base.fields.option": dict(folder=False, utf8=False),
    "base.files.holding": dict(timeout=-1),  # wait as long as it takes
    "base.files.read_jsonl": dict(skip_blank=False),
    "costs.__main__.scaled": dict(step=1000),
    "costs.cards.card": dict(measured=False),
    "costs.decoding.drafting": dict(drafts=1, batch=1, call=0, row=0),
    "costs.flops.flops_per_token": dict(causal=True),
    "costs.flops.forward_flops_per_token": dict(causal=True),
    "fp8.quantize_activation": dict(ue8m0=False, least=1e-4),
    "fp8.quantize_weight": dict(ue8m0=False),
    "hf.names.to_hf": dict(first_expert=0),
    "hf.reading.read_model": dict(first_expert=0, keep_fp8=False),
    "hf.writing.save_hf": dict(overwrite=False, shard_bytes=5 * 10 ** 9, chat=False),
    "infer.batch.Batch": dict(chunk=0, drafts=0),
    "infer.decoding.Session.steps": dict(drafts=0),
    "infer.decoding.new_cache": dict(mtp=False),
    "infer.engine.Engine": dict(rows=16, max_len=0, queue=64, chunk=0, drafts=0),
    "infer.generation.generate": dict(temperature=0.0, top_k=0, top_p=1.0, seed=0, speculative=0),
    "infer.sampling.Sampler": dict(temperature=0.0, top_k=0, top_p=1.0, batch=0),
    "infer.slots.Slots": dict(drafts=0),
    "infer.validation.random_scores": dict(seed=0),
    "kernels.fp8.blocks_in_one_pass": dict(ue8m0=False),
    "kernels.fp8.tiles_in_one_pass": dict(ue8m0=False, least=1e-4),
    "kernels.indexer.best_in_pieces": dict(fp8=False),
    "kernels.indexer.best_tokens": dict(fp8=False),
    "lab.bench_serving.arrivals": dict(seed=0),
    "lab.bench_serving.ask": dict(most=-1),  # read all
    "lab.bench_sparse.Layer.seconds": dict(times=1),
    "lab.bench_transformers.decode_transformers": dict(sample=False),
    "lab.checker.Copy": dict(memory=2 * 2 ** 30),
    "lab.compare.shown": dict(exact=False),
    "lab.formulas.plainer": dict(block=False),
    "lab.formulas.svg": dict(block=False),
    "lab.lesson.drawn": dict(count=30, seed=0),
    "lab.moving.control": dict(letters=0),
    "lab.moving.film": dict(seconds=0.2),
    "lab.timing.in_turn": dict(times=1),
    "model.initial.initial_weights": dict(threads=1),
    "model.objective.prediction_loss": dict(depth=0),
    "model.transformer.Transformer.context": dict(absorbed=False),
    "model.transformer.Transformer.forward": dict(absorbed=False),
    "model.transformer.Transformer.hidden": dict(absorbed=False),
    "parallel.model.ParallelModel.step": dict(separate=False, begin_id=0),
    "parallel.ranks.Ranks.shards": dict(experts=False),
    "parallel.serving.SpreadModel.hidden": dict(absorbed=False),
    "parallel.sharding.shard": dict(keep=False),
    "plots.drawing.Drawing": dict(dark=False),
    "plots.drawing.Drawing.arrow": dict(dashed=False, head=True),
    "plots.drawing.Drawing.box": dict(strong=False, dashed=False),
    "plots.drawing.Drawing.grid": dict(gap=1),
    "plots.drawing.Drawing.text": dict(size=9.5),
    "plots.drawn_attention.attention_drawing": dict(n_kv_heads=0),
    "plots.drawn_model.Parts.part": dict(dashed=False),
    "plots.drawn_model.model_drawing": dict(dark=False),
    "plots.drawn_training.ranks_drawing": dict(stages=0, expert_parallel=0, replicas=2),
    "plots.drawn_work.row": dict(strong=-1),
    "plots.drawn_work.tokens_drawing": dict(merges=4),
    "plots.scenes.gif": dict(milliseconds=120, dpi=80),
    "plots.scenes.token": dict(struck=False),
    "plots.style.heat_map": dict(first=0),
    "plots.style.lines": dict(size=0),
    "rl.examination.Asking": dict(max_new_tokens=64, temperature=0.0, top_p=1.0, seed=0),
    "rl.rollout.log_probs": dict(temperature=1.0, keep_routing=True, keep_mask=True),
    "runs.checkpoints.save_checkpoint": dict(keep_last=3),
    "runs.device.check_memory": dict(each=16, ranks=1, whole=False),
    "runs.learner.Learner.save": dict(beside=False),
    "runs.learner.Learner.speed_up": dict(fp8=False, plain=False),
    "runs.loggers.TensorBoard.add": dict(seconds=0.0),
    "runs.open.open_model": dict(keep_fp8=False),
    "runs.optimizers.batch_size_at": dict(parts=0),
    "runs.over_ranks.OverRanks.save": dict(beside=False),
    "runs.over_ranks.OverRanks.speed_up": dict(fp8=False, plain=False),
    "runs.over_ranks.TrainerOverRanks.sample": dict(count=1),
    "serve.app.Limits": dict(local=True, body=2 ** 20, seconds=600, slow=60),
    "serve.asked.Asked": dict(n=1, stream=False, include_usage=False, top_logprobs=-1,
                              experts=False),
    "serve.asked.Body.number": dict(whole=True),
    "text.loaders.PackedLoader": dict(seed=0, rank=0, world=1),
    "text.loaders.StreamLoader": dict(seed=0, fim_rate=0.0, rank=0, world=1, workers=1),
    "text.loaders.open_data": dict(seed=0, fim_rate=0.0, workers=0, rank=0, world=1),
    "text.packing.encode_documents": dict(first=0, fim_rate=0.0, seed=0, workers=1),
    "text.packing.pieces": dict(longest=2 ** 17),
    "text.token_cache.cached_tokens": dict(fim_rate=0.0, seed=0, workers=1),
    "text.tokenizer.ReleasedTokenizer.save_hf": dict(chat=False),
    "text.tokenizer.Tokenizer._number": dict(rows=0),
    "text.tokenizer.Tokenizer.save_hf": dict(chat=False),
    "train.Trainer.sample": dict(count=1),
}
PAPERS = {
    # V3, section 4.2; its loss of the indexer is added as it is
    "model.objective.objective": dict(mtp_weight=0.3, balance_weight=1e-4, indexer_weight=1.0),
    "fp8.limited_sum": dict(bits=14, promote=128),  # V3, section 3.3.2
    "costs.decoding.cache_bytes_per_token": dict(bytes_per_element=2, n_groups=8),  # BF16; GQA's
    "costs.bill.plan": dict(seq_len=4096),  # V3, section 4.2
    "dryrun.dry_run": dict(memory=80e9),  # an H800, bytes
    "runs.optimizers.orthogonalise": dict(steps=5),  # Muon, as published
    "runs.optimizers.Muon": dict(momentum=0.95, weight_decay=0.1),
}


@pytest.mark.parametrize("name, meant", (NEUTRAL | PAPERS).items())
def test_an_omitted_argument(name, meant):
    module, _, path = name.rpartition(".")
    if module[module.rfind(".") + 1:][:1].isupper():  # a method
        module, _, owner = module.rpartition(".")
        path = f"{owner}.{path}"
    found = importlib.import_module(f"minids.{module}")
    for part in path.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters.values()
    assert {p.name: p.default for p in parameters
            if isinstance(p.default, int | float)} == meant
