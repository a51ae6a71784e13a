"""Right answers to the exercises of notebook 02, unlike the reference."""


def own_group(attend):
    """Eight heads and four keys, one after the other."""
    q, k, v = torch.randn(6, 8, 4), torch.randn(6, 4, 4), torch.randn(6, 4, 4)
    before = attend(q, k, v)
    for n in range(4):
        for which in (0, 1):
            new = [k.clone(), v.clone()]
            new[which][:, n] = torch.randn(6, 4)
            moved = (attend(q, *new) - before).abs().amax(dim=(0, 2)) > 1e-5
            if moved.tolist() != [h // 2 == n for h in range(8)]:
                return False
    return True


def own_group(attend):
    """Six heads and three keys, in FP64."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(7, n, 8, dtype=torch.float64) for n in (6, 3, 3))
    before = attend(q, k, v)
    for n in range(3):
        mine = [h // 2 == n for h in range(6)]
        for i in (1, 2):
            given = [q, k.clone(), v.clone()]
            given[i][:, n] = torch.randn(7, 8, dtype=torch.float64)
            after = attend(*given)
            if [not torch.allclose(after[:, h], before[:, h]) for h in range(6)] != mine:
                return False
    return True


def key_of_head(n_heads, n_kv_heads):
    """Head times keys over heads."""
    return [h * n_kv_heads // n_heads for h in range(n_heads)]


def visible_keys(cached, new):
    """From the mask."""
    import torch
    mask = torch.ones(new, cached + new).tril(cached)
    return mask.sum(1).long().tolist()


def causal_attention(q, k, v):
    """Query by query, over the keys that it sees."""
    out = torch.empty_like(q)
    each, past = q.size(1) // k.size(1), k.size(0) - q.size(0)
    for s in range(q.size(0)):
        for h in range(q.size(1)):
            keys, values = k[:past + s + 1, h // each], v[:past + s + 1, h // each]
            out[s, h] = torch.softmax(keys @ q[s, h] / q.size(2) ** 0.5, 0) @ values
    return out


def causal_attention(q, k, v):
    """By torch's own attention."""
    at = torch.arange(len(k))
    seen = at <= at[-len(q):, None]
    heads = [x.transpose(0, 1) for x in (q, *(t.repeat_interleave(q.size(1) // k.size(1), 1)
                                              for t in (k, v)))]
    return torch.nn.functional.scaled_dot_product_attention(*heads, seen).transpose(0, 1)


def next_token_loss(logits, tokens):
    """With log-softmax and gather."""
    logp = logits[:, :-1].log_softmax(-1)
    return -logp.gather(-1, tokens[:, 1:, None]).mean()


def next_token_loss(logits, tokens):
    """Classes in the second axis, as cross_entropy wants them."""
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2)[..., :-1], tokens[..., 1:])


def written_with_cache(model, prompt, n):
    """The prompt first, then a loop over single tokens."""
    if n == 0:
        return list(prompt), 0
    choices, cache = model(prompt, None)
    new = [choices[-1]]
    while len(new) < n:
        [choice], cache = model(new[-1:], cache)
        new.append(choice)
    return [*prompt, *new], len(prompt) + len(new) - 1


def written_with_cache(model, prompt, n):
    """Token by token, the prompt as well."""
    text, cache, choice, read = list(prompt), None, [], 0
    while len(text) < len(prompt) + n:
        while read < len(text):
            choice, cache = model([text[read]], cache)
            read += 1
        text.append(choice[-1])
    return text, read


def causal_attention(q, k, v):
    """Loops over tokens and heads, with the past cut off by slices."""
    import torch
    (S, H, d), (T, G, _) = q.shape, k.shape
    rows = []
    for s in range(S):
        seen = T - S + s + 1
        heads = []
        for h in range(H):
            g = h * G // H
            p = (k[:seen, g] @ q[s, h] / d ** 0.5).softmax(0)
            heads.append(p @ v[:seen, g])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def causal_attention(q, k, v):
    """PyTorch's own attention with a mask of where one may look."""
    import torch
    import torch.nn.functional as F
    S, T, times = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    seen = torch.arange(T)[None] <= torch.arange(T - S, T)[:, None]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1)


def next_token_loss(logits, tokens):
    """Classes moved to the second place, as PyTorch's loss wants them."""
    import torch.nn.functional as F
    return F.cross_entropy(logits[:, :-1].movedim(-1, 1), tokens[:, 1:])


def next_token_loss(logits, tokens):
    """log-sum-exp less the target's logit, the mean of the sequences' means."""
    kept = logits[:, :-1]
    hit = kept.gather(2, tokens[:, 1:, None]).squeeze(2)
    return (kept.logsumexp(-1) - hit).mean(1).mean()


def written_with_cache(model, prompt, n):
    """The prompt is read token by token."""
    if n == 0:
        return [*prompt], 0
    text, cache, read = [*prompt], None, 0
    while len(text) < len(prompt) + n:
        choice, cache = model([text[read]], cache)
        read += 1
        if read >= len(prompt):
            text.append(choice[0])
    return text, read


def written_with_cache(model, prompt, n):
    """Recursive, the prompt first."""
    def more(new, cache, left):
        if not left:
            return [], 0
        choices, cache = model(new, cache)
        rest, read = more([choices[-1]], cache, left - 1)
        return [choices[-1], *rest], read + len(new)
    written, read = more(list(prompt), None, n)
    return list(prompt) + written, read
