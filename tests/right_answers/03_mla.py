"""Right answers to the exercises of notebook 03, unlike the reference."""


def move_to_query(q, w_uk):
    """By matrix products."""
    return (q.transpose(0, 1) @ w_uk).transpose(0, 1)


def kept(h, wkv_a, rank, turn_key):
    """By slices."""
    row = torch.nn.functional.linear(h, wkv_a)
    return torch.cat((rms_norm(row[:, :rank]), turn_key(row[:, rank:])), dim=1)


def parts_alike(scores):
    """Every cut of eight numbers, two heads, no seed."""
    q, k = torch.randn(2, 8).double(), torch.randn(8).double()
    found = torch.stack([scores(q[:, :n], q[:, n:], k[:n].expand(2, n), k[n:])
                         for n in range(1, 8)])
    return bool((found - found[0]).abs().max() < 1e-9)


def parts_alike(scores):
    """One cut against another, five heads."""
    torch.manual_seed(1)
    q, k = torch.randn(5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    one, two = (scores(q[:, :n], q[:, n:], k[:n].expand(5, n), k[n:]) for n in (3, 10))
    return torch.allclose(one, two, atol=1e-12)


def attention_from_cache(q_c, q_r, latents, k_r, w_uk, scale):
    """One query and one key for both parts."""
    query = torch.cat([(q_c.unsqueeze(1) @ w_uk).squeeze(1), q_r], dim=-1)
    return (query * scale @ torch.cat([latents, k_r], dim=-1).T).softmax(dim=1)


def attention_from_cache(q_c, q_r, latents, k_r, w_uk, scale):
    """Head by head, the softmax by hand."""
    rows = []
    for i in range(len(q_c)):
        score = (latents @ (q_c[i] @ w_uk[i]) + k_r @ q_r[i]) * scale
        power = (score - score.max()).exp()
        rows.append(power / power.sum())
    return torch.stack(rows)


def output_from_cache(p, latents, w_uv, wo):
    """With matrix products alone."""
    return wo @ torch.cat([w @ (row @ latents) for row, w in zip(p, w_uv, strict=True)])


def output_from_cache(p, latents, w_uv, wo):
    """One einsum."""
    each = wo.unflatten(1, w_uv.shape[:2])
    return torch.einsum("ht,tc,hvc,dhv->d", p, latents, w_uv, each)


def decode_step(h, cache, w, args, turn):
    """Without the parts before it, head by head."""
    n, r, c, t = args.qk_nope_head_dim, args.qk_rope_head_dim, args.kv_lora_rank, len(cache)
    down = h @ w["wkv_a"].T
    latent = down[:c] * torch.rsqrt(down[:c].pow(2).mean() + 1e-6) * w["kv_norm"]
    rows = torch.vstack([cache, torch.cat([latent, turn(down[c:], t)])])
    out = []
    for q, up in zip((h @ w["wq"].T).chunk(args.n_heads), w["wkv_b"].chunk(args.n_heads),
                     strict=True):
        query = torch.cat([q[:n] @ up[:n], turn(q[n:], t)])
        p = (rows @ query / (n + r) ** 0.5).softmax(0)
        out.append(up[n:] @ (p @ rows[:, :c]))
    return w["wo"] @ torch.cat(out), rows


def decode_step(h, cache, w, args, turn):
    """With lists as results."""
    n, r, c = args.qk_nope_head_dim, args.qk_rope_head_dim, args.kv_lora_rank
    q = torch.nn.functional.linear(h, w["wq"]).view(args.n_heads, n + r)
    latent, key = torch.nn.functional.linear(h, w["wkv_a"]).tensor_split([c])
    row = torch.hstack([rms_norm(latent) * w["kv_norm"], turn(key, cache.size(0))])
    longer = torch.cat([cache, row.unsqueeze(0)], dim=0)
    up = w["wkv_b"].view(args.n_heads, n + args.v_head_dim, c)
    p = attention_from_cache(q[:, :n], turn(q[:, n:], cache.size(0)), longer[:, :c],
                             longer[:, c:], up[:, :n], (n + r) ** -0.5)
    return output_from_cache(p, longer[:, :c], up[:, n:], w["wo"]).tolist(), longer.tolist()


def attention_from_cache(q_c, q_r, latents, k_r, w_uk, scale):
    """Query and cache joined, one product; batched matrices move the query over."""
    import torch
    query = torch.cat([(q_c.unsqueeze(1) @ w_uk).squeeze(1), q_r], dim=1)
    return torch.softmax(scale * query @ torch.cat([latents, k_r], dim=1).T, dim=1)


def attention_from_cache(q_c, q_r, latents, k_r, w_uk, scale):
    """Head by head, token by token, with an own stable softmax."""
    import torch
    rows = []
    for h in range(q_c.shape[0]):
        moved = sum(q_c[h, n] * w_uk[h, n] for n in range(q_c.shape[1]))
        s = torch.stack([scale * (moved @ c + q_r[h] @ k)
                         for c, k in zip(latents, k_r, strict=True)])
        e = (s - s.max()).exp()
        rows.append(e / e.sum())
    return torch.stack(rows)


def output_from_cache(p, latents, w_uv, wo):
    """Adds up the heads' shares of the output."""
    v = w_uv.shape[1]
    return sum(wo[:, h * v:(h + 1) * v] @ (w_uv[h] @ (p[h] @ latents)) for h in range(len(p)))


def output_from_cache(p, latents, w_uv, wo):
    """wo moved over as well: (H, D, C)."""
    import torch
    H, v, _ = w_uv.shape
    joined = torch.einsum("dhv,hvc->hdc", wo.view(-1, H, v), w_uv)
    return torch.einsum("hdc,hc->d", joined, p @ latents)


def decode_step(h, cache, w, args, turn):
    """Cuts by slices and loops over heads; the cache is filled, not joined."""
    import torch
    t, C, r = cache.shape[0], args.kv_lora_rank, args.qk_rope_head_dim
    H, n, v = args.n_heads, args.qk_nope_head_dim, args.v_head_dim
    kv = h @ w["wkv_a"].T
    c = kv[:C]
    c = c / torch.sqrt((c * c).sum() / C + 1e-6) * w["kv_norm"]
    longer = cache.new_empty(t + 1, C + r)
    longer[:t], longer[t, :C], longer[t, C:] = cache, c, turn(kv[C:], t)
    latents, keys = longer[:, :C], longer[:, C:]
    q = (h @ w["wq"].T).reshape(H, n + r)
    out = []
    for head in range(H):
        block = w["wkv_b"][head * (n + v):(head + 1) * (n + v)]
        s = latents @ (q[head, :n] @ block[:n]) + keys @ turn(q[head, n:], t)
        out.append(block[n:] @ ((s / (n + r) ** 0.5).softmax(0) @ latents))
    return w["wo"] @ torch.cat(out), longer


def decode_step(h, cache, w, args, turn):
    """As step 1 and 2 of the notebook: keys and values of all tokens are expanded."""
    import torch
    latent, left_over = squeeze(h, w, args)
    row = torch.cat([latent, turn(left_over, cache.size(0))])
    longer = torch.cat([cache, row.unsqueeze(0)])
    c, k_r = longer.split([args.kv_lora_rank, args.qk_rope_head_dim], dim=-1)
    keys, values = expand(c, w, args)
    q = (w["wq"] @ h).unflatten(0, (args.n_heads, -1))
    q_c, q_r = q.split([args.qk_nope_head_dim, args.qk_rope_head_dim], dim=-1)
    s = torch.einsum("hn,thn->ht", q_c, keys) + turn(q_r, cache.size(0)) @ k_r.T
    p = (s * q.size(-1) ** -0.5).softmax(-1)
    return w["wo"] @ torch.einsum("ht,thv->hv", p, values).flatten(), longer
