"""Mutants that no test can tell from the code, by reason: (file, line before, line after)."""

EQUIVALENT: dict[str, set[tuple[str, str, str]]] = {
    "any length does for a drawn name or a short digest": {
        ("minids/runs/loggers.py",
         '(folder / "id.txt").write_text(uuid.uuid4().hex[:8], "utf-8")',
         '(folder / "id.txt").write_text(uuid.uuid4().hex[:(9)], "utf-8")'),
        ("minids/serve/served.py",
         'questions, "fp_" + hashlib.sha256(head.numpy().tobytes()).hexdigest()[:12], queue)',
         'questions, "fp_" + hashlib.sha256(head.numpy().tobytes()).hexdigest()[:(13)], queue)'),
    },
    "both tensors are on one device": {
        ("minids/kernels/selected.py",
         "return on_hopper(q, latent) and is_tile(rank) and is_tile(latent.size(-1) - rank)",
         "return (on_hopper(latent, q)) and is_tile(rank) and is_tile(latent.size(-1) - rank)"),
    },
    "a square matrix is as tall as it is wide": {
        ("minids/runs/optimizers.py", "tall = x.size(-2) > x.size(-1)",
         "tall = (x.size(-2) >= x.size(-1))"),
    },
    "the third of four is the second from the end": {
        ("minids/lab/bench_decoding.py",
         "pairs = q[-2] * (q[-2] + 1) // 2 if q[-2] == k[-2] else q[-2] * k[-2]",
         "pairs = q[-2] * (q[(2)] + 1) // 2 if q[-2] == k[-2] else q[-2] * k[-2]"),
    },
    "a longer bound shows only slots that are masked": {
        ("minids/infer/speculative.py",
         "cache.truncate(lengths, longest if self.session.static else None)",
         "cache.truncate(lengths, longest if (not self.session.static) else None)"),
    },
    "lists of one length need no check of it": {
        ("minids/plots/scales.py",
         "for (left, name, colour), right, share in "
         "zip(zones, [*edges, bins[-1]], shares, strict=True):",
         "for (left, name, colour), right, share in "
         "zip(zones, [*edges, bins[-1]], shares, strict=(False)):"),
        ("minids/apply/precision.py", "parameters, copies = zip(*self.pairs, strict=True)",
         "parameters, copies = zip(*self.pairs, strict=(False))"),
        ("minids/parallel/parts.py", "for cut, want in zip(cuts, region, strict=True))] = data",
         "for cut, want in zip(cuts, region, strict=(False)))] = data"),
    },
    "only products of batch and length count": {
        ("minids/lab/bench_fp8.py",
         "yield experts_row(args, layers, leaves, s.batch_size, s.seq_len, s.device)",
         "yield (experts_row(args, layers, leaves, s.seq_len, s.batch_size, s.device))"),
    },
    "the only dimension is also the last one": {
        ("minids/kernels/experts.py",
         "share = weights.new_zeros(len(source)).scatter(0, slot.flatten(), "
         "weights.flatten())  # (M,)",
         "share = weights.new_zeros(len(source)).scatter((-1), slot.flatten(), "
         "weights.flatten())  # (M,)"),
        ("minids/kernels/fp8_layout.py",
         "ends, last = counts.cumsum(0), tiles.cumsum(0)  # (E,)",
         "ends, last = counts.cumsum((-1)), tiles.cumsum(0)  # (E,)"),
    },
    "tokens are not received, so nobody asks for their shape": {
        ("minids/parallel/pipeline.py",
         'tokens = torch.empty(rows, seq_len, dtype=torch.int64, device="meta")',
         "tokens = (torch.empty(seq_len, rows, dtype=torch.int64, device='meta'))"),
    },
    "the second of two dimensions is the last": {
        ("minids/kernels/experts.py", "parts = [part * own.unsqueeze(-1) for part, own",
         "parts = [part * own.unsqueeze((1)) for part, own"),
        ("minids/apply/fp8.py", "x1, x3 = up(x).chunk(2, dim=-1)",
         "x1, x3 = up(x).chunk(2, dim=(1))"),
    },
    "both lists have a number for each rank": {
        ("minids/parallel/measuring.py",
         "return first.nbytes * (len(others[1]) - 1) // len(others[1]) if others[1] else 0",
         "return first.nbytes * (len(others[1]) - 1) // len(others[(2)]) if others[1] else 0"),
    },
    "any number below 0 stands for no row": {
        ("minids/infer/batch.py", "row: int = -1", "row: int = -(2)"),
    },
    "a thread that nobody woke may look again at any time": {
        ("minids/infer/engine.py",
         "IDLE = 1.0  # seconds after which a worker that nobody woke looks whether to end",
         "IDLE = (0.5)  # seconds after which a worker that nobody woke looks whether to end"),
    },
    "no bin begins a thousandth below the edge of a zone": {
        ("minids/plots/scales.py",
         "inside = (bins[:-1] >= left * 0.999) & (bins[:-1] < right * 0.999)",
         "inside = ((bins[:-1] > left * 0.999)) & (bins[:-1] < right * 0.999)"),
    },
    "other seeds, and as many": {
        ("minids/grpo.py",
         "generator = torch.Generator(self.device).manual_seed(args.seed * 1_000_003 + number)",
         "generator = torch.Generator(self.device).manual_seed((args.seed * 1000003 - number))"),
    },
}
