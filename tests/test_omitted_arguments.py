"""Defaults of arguments: what a caller leaves out cuts and adds nothing, or is a paper's number."""

import importlib
import inspect

import pytest

NEUTRAL = {
    "apply.compile.Compiled": dict(sequences=0, dynamic=False),
    "apply.compile.compile_blocks": dict(sequences=0),
    "base.command_line.run_program": dict(lasting=False),
    "base.files.holding": dict(timeout=-1),  # wait as long as it takes
    "base.files.read_jsonl": dict(skip_blank=False),
    "costs.__main__.scaled": dict(step=1000),
    "costs.cards.card": dict(measured=False),
    "costs.decoding.drafting": dict(drafts=1, batch=1, call=0, row=0),
    "costs.flops.forward_flops_per_token": dict(causal=True),
    "costs.flops.flops_per_token": dict(causal=True),
    "fp8.quantize_activation": dict(ue8m0=False, least=1e-4),
    "fp8.quantize_weight": dict(ue8m0=False),
    "hf.names.to_hf": dict(first_expert=0),
    "hf.reading.read_model": dict(first_expert=0, keep_fp8=False),
    "hf.writing.save_hf": dict(overwrite=False, shard_bytes=5 * 10 ** 9, chat=False),
    "infer.batch.Batch": dict(chunk=0, drafts=0),
    "infer.decoding.new_cache": dict(mtp=False),
    "infer.engine.Engine": dict(rows=16, max_len=0, queue=64, chunk=0, drafts=0),
    "infer.generation.generate": dict(temperature=0.0, top_k=0, top_p=1.0, seed=0, speculative=0),
    "infer.decoding.Session.steps": dict(drafts=0),
    "infer.sampling.Sampler": dict(temperature=0.0, top_k=0, top_p=1.0, batch=0),
    "infer.slots.Slots": dict(drafts=0),
    "infer.validation.random_scores": dict(seed=0),
    "kernels.fp8.blocks_in_one_pass": dict(ue8m0=False),
    "kernels.fp8.tiles_in_one_pass": dict(ue8m0=False, least=1e-4),
    "kernels.indexer.best_in_pieces": dict(fp8=False),
    "kernels.indexer.best_tokens": dict(fp8=False),
    "model.initial.initial_weights": dict(threads=1),
    "model.objective.prediction_loss": dict(depth=0),
    "model.transformer.Transformer.context": dict(absorbed=False),
    "model.transformer.Transformer.forward": dict(absorbed=False),
    "model.transformer.Transformer.hidden": dict(absorbed=False),
    "parallel.model.ParallelModel.step": dict(separate=False, begin_id=0),
    "parallel.ranks.Ranks.shards": dict(experts=False),
    "parallel.serving.SpreadModel.hidden": dict(absorbed=False),
    "parallel.sharding.shard": dict(keep=False),
    "rl.rollout.log_probs": dict(temperature=1.0, keep_routing=True, keep_mask=True),
    "runs.checkpoints.save_checkpoint": dict(keep_last=3),
    "runs.device.check_memory": dict(each=16, ranks=1, whole=False),
    "runs.learner.Learner.save": dict(beside=False),
    "runs.open.open_model": dict(keep_fp8=False),
    "runs.optimizers.batch_size_at": dict(parts=0),
    "text.loaders.open_data": dict(seed=0, fim_rate=0.0, workers=0, rank=0, world=1),
    "text.packing.encode_documents": dict(first=0, fim_rate=0.0, seed=0, workers=1),
    "text.token_cache.cached_tokens": dict(fim_rate=0.0, seed=0, workers=1),
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
