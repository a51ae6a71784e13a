"""Default settings of pre-training for each preset, and of the stages after it.

Numbers of a paper are marked with it; all others are ours. Papers count tokens, and these settings
steps: with a batch that grows, the shares of a run are those of its steps.
"""

SHORT_RUN = dict(steps=800, optimizer="muon", lr=1e-2, muon_lr=3e-3, warmup_steps=20,
                 constant_until=0.5, decay_until=1.0, final_lr=0.05, bias_speed=0.005)
# Found over seeds (figures/README.md, "The recipe"). AdamW trains embedding and head here, and a
# batch has few of their tokens: why a longer mean of the squares helps so much, perhaps.
TINY_RUN = SHORT_RUN | dict(decay="linear", beta1=0.8, beta2=0.99)
# Twenty tokens for each parameter that one token uses (`python -m minids.costs --what cards`). No
# ramp, whose first steps would have micro-batches too small for the card.
GPU_80GB_RUN = dict(steps=27_000, batch_size=256, grad_accum=32, seq_len=2048, optimizer="muon",
                    lr=1e-3, muon_lr=1e-3, warmup_steps=500, fim_rate=0.1, eval_every=500,
                    eval_tokens=262144, sample_every=500, save_every=500)
# V3 (arXiv 2412.19437) section 4.2: 14.8T tokens, of which the first 469B grow the batch from 3,072
# to 15,360 sequences of 4K; beside these its settings are the defaults. Not here: the last 167B
# tokens at 7.3e-6. Recomputing blocks is ours, here and below.
V3_RUN = dict(steps=240_000, batch_size=15_360, batch_start=3_072, batch_ramp_steps=12_400,
              seq_len=4096, fim_rate=0.1, recompute="blocks")
# V2 (arXiv 2405.04434) section 3.1.2: 8.1T tokens, 225B of them with a batch that grows; lr x 0.316
# after 60 and 90 % of the tokens. It balances experts by 0.003, devices by 0.05 and what is sent by
# 0.02; here are experts only, and per sequence, as the released config.json has it (seq_aux).
V2_RUN = dict(steps=218_000, batch_size=9_216, batch_start=2_304, batch_ramp_steps=9_500,
              seq_len=4096, lr=2.4e-4, decay="steps", constant_until=0.607, decay_until=0.902,
              balance_weight=0.003, recompute="blocks")
# V2-Lite, appendix B: 5.7T tokens, lr x 0.316 after 80 and 90 %. Ours: two sequences at a time on
# each of eight ranks.
V2_LITE_RUN = dict(steps=302_000, batch_size=4_608, grad_accum=288, seq_len=4096, lr=4.2e-4,
                   decay="steps", constant_until=0.8, decay_until=0.9, balance_weight=0.001,
                   recompute="blocks")
# Moonlight (arXiv 2502.16982) section 3.3: 5.2T tokens of 8K sequences, by Muon; lr falls from the
# end of warm-up on, and the biases move to the end. The batch doubles at 200B tokens; here it grows
# until 600B, which are as many steps. Not stated, and V3's here: the balance loss. Ours: two
# sequences at a time on each of eight ranks. The 500B tokens of cool-down are a stage, `CONTINUED`.
MOONLIGHT_RUN = dict(steps=161_000, batch_size=4_096, batch_start=2_048, batch_ramp_steps=23_800,
                     grad_accum=256, seq_len=8192, optimizer="muon", lr=4.2e-4, muon_lr=4.2e-4,
                     constant_until=0.0125, decay_until=1.0, bias_until=1.0, recompute="blocks")
# Kimi K2 (arXiv 2507.20534) section 2.5: 15.5T tokens, 67M in a batch, lr constant for 10T. It had
# QK-clip, which holds attention's logits down and is missing here. Not stated, and V3's here: the
# balance loss, the biases' speed.
KIMI_K2_RUN = dict(steps=231_000, batch_size=16_384, seq_len=4096, optimizer="muon", lr=2e-4,
                   muon_lr=2e-4, warmup_steps=500, constant_until=0.645, decay_until=1.0,
                   recompute="blocks")
TRAIN_PRESETS = {
    "tiny": TINY_RUN,
    "nano": SHORT_RUN | dict(
        steps=60, batch_size=4, seq_len=128, lr=5e-3, muon_lr=5e-3, warmup_steps=5, final_lr=0.1,
        bias_speed=0.01, eval_every=20, eval_tokens=8192, save_every=20),
    "micro": SHORT_RUN | dict(
        data="task:calculator", tokenizer="bytes", steps=600, batch_size=16, separate=True,
        lr=4e-3, muon_lr=4e-3, weight_decay=0.0, dtype="fp32", prompt="3*7+5-2*4+6-8"),
    "deep": TINY_RUN,
    "small": dict(steps=20000, batch_size=64, batch_start=16, batch_ramp_steps=1000, seq_len=2048,
                  optimizer="muon", lr=1e-3, muon_lr=1e-3, warmup_steps=500, fim_rate=0.1,
                  recompute="blocks", eval_every=500, eval_tokens=262144, sample_every=500,
                  save_every=500),
    "gpu-24gb": GPU_80GB_RUN | dict(steps=14_400, batch_size=128),
    "gpu-80gb": GPU_80GB_RUN,
    "v2-lite": V2_LITE_RUN,
    "v2": V2_RUN,
    "v3": V3_RUN,
    "v3.2": V3_RUN,  # without its indexers, which learn from a trained model: `WARMUP`
    "moonlight": MOONLIGHT_RUN,
    "kimi-k2": KIMI_K2_RUN,
}

# A run that begins with another one's weights: a constant learning rate, and the late MTP weight.
# V3.2 (section 2.1.1) states learning rates, steps and batch sizes only; the values for the small
# models were found by trial.
STAGE = dict(batch_start=0, batch_ramp_steps=0, warmup_steps=0, constant_until=1.0,
             decay_until=1.0, mtp_weight=0.1, indexer_lr=3e-3, steps=100)
V32_WARMUP = dict(indexer_lr=1e-3, steps=1000, batch_size=16, seq_len=131072)
V32_SPARSE = dict(lr=7.3e-6, indexer_lr=7.3e-6, steps=15_000, batch_size=480, seq_len=131072)
WARMUP = {"v3": V32_WARMUP, "v3.2": V32_WARMUP}
# For dense attention too: it trains the model that the sparse one is compared with.
CONTINUED = {"v3": V32_SPARSE, "v3.2": V32_SPARSE,
             "moonlight": dict(lr=1e-4, muon_lr=1e-4, warmup_steps=100, decay="linear",
                               constant_until=0.0, final_lr=0.0, bias_speed=0.0, steps=14_900),
             "tiny": dict(lr=5e-4, muon_lr=1.5e-4, indexer_lr=1e-3, steps=200),
             "nano": dict(lr=2.5e-4, muon_lr=2.5e-4, indexer_lr=1e-3, steps=60)}
# A longer context by --context (V3 section 4.3): a thousand steps at 32K, a thousand at 128K. Their
# batches, 1,920 and 480 sequences, follow from the run before (`TrainArgs.longer`); so would the
# rate, if our schedule for V3 ended at 7.3e-6. V2 (section 3.1.4) states steps and batch at 32K.
CONTEXT = {"v3": dict(lr=7.3e-6, steps=1000), "v3.2": dict(lr=7.3e-6, steps=1000),
           "v2": dict(batch_size=576, steps=1000), "v2-lite": dict(grad_accum=72, steps=1000)}
