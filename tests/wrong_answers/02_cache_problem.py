"""Wrong answers to the exercises of notebook 02; a docstring says what is wrong."""


def request_gib(tokens, kv_heads, width, layers):
    """Keys without values."""
    return kv_heads * width * layers * 2 * tokens / 2 ** 30


def request_gib(tokens, kv_heads, width, layers):
    """One byte a number."""
    return 2 * kv_heads * width * layers * tokens / 2 ** 30


def request_gib(tokens, kv_heads, width, layers):
    """Gigabytes of ten to the ninth."""
    return 2 * kv_heads * width * layers * 2 * tokens / 1e9


def request_gib(tokens, kv_heads, width, layers):
    """FP32."""
    return 2 * kv_heads * width * layers * 4 * tokens / 2 ** 30


def request_gib(tokens, kv_heads, width, layers):
    """Whole GiB."""
    return float(2 * kv_heads * width * layers * 2 * tokens // 2 ** 30)


def key_of_head(n_heads, n_kv_heads):
    """In turn, as `repeat` does."""
    return [h % n_kv_heads for h in range(n_heads)]


def key_of_head(n_heads, n_kv_heads):
    """Divided by the number of keys, not by the size of a group."""
    return [h // n_kv_heads for h in range(n_heads)]


def key_of_head(n_heads, n_kv_heads):
    """Backwards."""
    return [n_kv_heads - 1 - h // (n_heads // n_kv_heads) for h in range(n_heads)]


def key_of_head(n_heads, n_kv_heads):
    """One key for all."""
    return [0] * n_heads


def visible_keys(cached, new):
    """The token itself is left out."""
    return [cached + i for i in range(new)]


def visible_keys(cached, new):
    """All new tokens see each other: no mask within the piece."""
    return [cached + new] * new


def visible_keys(cached, new):
    """The cache is forgotten: a mask of new times new."""
    return [i + 1 for i in range(new)]


def visible_keys(cached, new):
    """A mask from the wrong corner: the first new token sees itself, the cache comes last."""
    return [min(i + 1, cached + new) for i in range(new)]


def own_group(attend):
    """The shape."""
    q, k = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    return attend(q, k, k).shape == q.shape


def own_group(attend):
    """As many keys as heads, where nothing can go wrong."""
    q, k, v = torch.randn(3, 5, 4, 8)
    return torch.allclose(attend(q, k, v), heads(q, k, v))


def own_group(attend):
    """Something moves, no matter where."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    return not torch.equal(attend(q, k, v), attend(q, k, v + 1))


def own_group(attend):
    """Values only: keys may be a stranger's."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    other = v.clone()
    other[:, 0] += 1
    moved = (attend(q, k, other) - attend(q, k, v)).abs().amax((0, 2)) > 1e-6
    return moved.tolist() == [True, True, False, False]


def own_group(attend):
    """Two of four heads move, whichever."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    other = v.clone()
    other[:, 0] += 1
    return ((attend(q, k, other) - attend(q, k, v)).abs().amax((0, 2)) > 1e-6).sum().item() == 2


def request_gib(tokens, kv_heads, width, layers):
    """Whole MiB first."""
    return 4 * kv_heads * width * layers * tokens // 2 ** 20 / 2 ** 10


def request_gib(tokens, kv_heads, width, layers):
    """Thousands of tokens, whole."""
    return 4 * kv_heads * width * layers * (tokens // 1024) / 2 ** 20


def request_gib(tokens, kv_heads, width, layers):
    """Rounded to four places."""
    return round(4 * kv_heads * width * layers * tokens / 2 ** 30, 4)


def key_of_head(n_heads, n_kv_heads):
    """Int of a float quotient."""
    return [int(h / n_heads * n_kv_heads) for h in range(n_heads)]


def key_of_head(n_heads, n_kv_heads):
    """At most two keys, or each its own."""
    if n_heads == n_kv_heads:
        return list(range(n_heads))
    return [int(h >= n_heads / n_kv_heads) for h in range(n_heads)]


def key_of_head(n_heads, n_kv_heads):
    """Right for two keys, and else one after the other."""
    if n_kv_heads == 2:
        return [0] * (n_heads // 2) + [1] * (n_heads // 2)
    return [h % n_kv_heads for h in range(n_heads)]


def own_group(attend):
    """Heads 0 and 1 move (others not looked at)."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    k2, v2 = k.clone(), v.clone()
    k2[:, 0] = torch.randn(5, 8)
    v2[:, 0] = torch.randn(5, 8)
    ok = True
    for a, b in ((k2, v), (k, v2)):
        m = (attend(q, a, b) - attend(q, k, v)).abs().amax((0, 2)) > 1e-6
        ok = ok and bool(m[0] and m[1])
    return ok


def own_group(attend):
    """Heads 2 and 3 stay (0 and 1 not looked at)."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    k2, v2 = k.clone(), v.clone()
    k2[:, 0] = torch.randn(5, 8)
    v2[:, 0] = torch.randn(5, 8)
    ok = True
    for a, b in ((k2, v), (k, v2)):
        m = (attend(q, a, b) - attend(q, k, v)).abs().amax((0, 2)) > 1e-6
        ok = ok and (not bool(m[2] or m[3]))
    return ok


def own_group(attend):
    """Key and value changed together."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    k2, v2 = k.clone(), v.clone()
    k2[:, 0] = torch.randn(5, 8)
    v2[:, 0] = torch.randn(5, 8)
    m = (attend(q, k2, v2) - attend(q, k, v)).abs().amax((0, 2)) > 1e-6
    return m.tolist() == [True, True, False, False]


def own_group(attend):
    """Only a version that equals version_b is right."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    return torch.allclose(attend(q, k, v), version_b(q, k, v), atol=1e-6)


def own_group(attend):
    """Only the first position is looked at."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    other = torch.cat([torch.randn(5, 1, 8), v[:, 1:]], dim=1)
    moved = (attend(q, k, other) - attend(q, k, v))[0].abs().amax(1) > 1e-6
    return moved.tolist() == [True, True, False, False]


def request_gib(tokens, kv_heads, width, layers):
    """Whole GiB."""
    return float(round(2 * kv_heads * width * layers * 2 * tokens / 2 ** 30))


def own_group(attend):
    """Only the last head is asked for its value."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    other = torch.cat([torch.randn(5, 1, 8), v[:, 1:]], dim=1)
    moved = (attend(q, k, other) - attend(q, k, v)).abs().amax((0, 2)) > 1e-6
    return moved.tolist()[1::2] == [True, False]


def causal_attention(q, k, v):
    """The groups in turn, as repeat has it."""
    (S, H, d), (T, G, _) = q.shape, k.shape
    k, v = (x.repeat(1, H // G, 1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) / d ** 0.5
    future = torch.ones(S, T, dtype=torch.bool).triu(1 + T - S)
    return torch.einsum("hst,thd->shd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def causal_attention(q, k, v):
    """The mask of a text without a cache."""
    (S, H, d), (T, G, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) / d ** 0.5
    future = torch.ones(S, T, dtype=torch.bool).triu(1)
    return torch.einsum("hst,thd->shd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def causal_attention(q, k, v):
    """No mask."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) / q.size(2) ** 0.5
    return torch.einsum("hst,thd->shd", scores.softmax(-1), v)


def causal_attention(q, k, v):
    """The root is missing."""
    (S, H, _), (T, G, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k)
    future = torch.ones(S, T, dtype=torch.bool).triu(1 + T - S)
    return torch.einsum("hst,thd->shd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def causal_attention(q, k, v):
    """The future gets a score of 0 instead of minus infinity."""
    (S, H, d), (T, G, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) / d ** 0.5
    past = torch.ones(S, T).tril(T - S).to(scores)
    return torch.einsum("hst,thd->shd", (scores * past).softmax(-1), v)


def causal_attention(q, k, v):
    """The softmax runs over the queries."""
    (S, H, d), (T, G, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) / d ** 0.5
    future = torch.ones(S, T, dtype=torch.bool).triu(1 + T - S)
    p = scores.masked_fill(future, -torch.inf).softmax(1).nan_to_num()
    return torch.einsum("hst,thd->shd", p, v)


def next_token_loss(logits, tokens):
    """Each row predicts its own token."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def next_token_loss(logits, tokens):
    """Each row predicts the token before."""
    return nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())


def next_token_loss(logits, tokens):
    """The sum instead of the mean."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(),
                                       reduction="sum")


def next_token_loss(logits, tokens):
    """In bits."""
    nats = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return nats / log(2)


def next_token_loss(logits, tokens):
    """The last row predicts the first token."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def written_with_cache(model, prompt, n):
    """The whole text goes through the model each time."""
    text, read = list(prompt), 0
    for _ in range(n):
        read += len(text)
        text.append(model(text, None)[0][-1])
    return text, read


def written_with_cache(model, prompt, n):
    """The cache is forgotten."""
    text, feed, read = list(prompt), list(prompt), 0
    for _ in range(n):
        choices, _ = model(feed, None)
        read += len(feed)
        text.append(choices[-1])
        feed = text[-1:]
    return text, read


def written_with_cache(model, prompt, n):
    """The whole text is read again behind the cache."""
    text, cache, read = list(prompt), None, 0
    for _ in range(n):
        choices, cache = model(text, cache)
        read += len(text)
        text.append(choices[-1])
    return text, read


def written_with_cache(model, prompt, n):
    """The choice after the first token of a piece."""
    text, cache, feed, read = list(prompt), None, list(prompt), 0
    for _ in range(n):
        choices, cache = model(feed, cache)
        read += len(feed)
        text.append(choices[0])
        feed = text[-1:]
    return text, read


def written_with_cache(model, prompt, n):
    """The prompt is missing in the text."""
    text, cache, feed, read = [], None, list(prompt), 0
    for _ in range(n):
        choices, cache = model(feed, cache)
        read += len(feed)
        text.append(choices[-1])
        feed = text[-1:]
    return text, read


def written_with_cache(model, prompt, n):
    """The last token is read as well."""
    text, cache, feed, read = list(prompt), None, list(prompt), 0
    for _ in range(n):
        choices, cache = model(feed, cache)
        read += len(feed)
        text.append(choices[-1])
        feed = text[-1:]
    return text, read + (n > 0)


def visible_keys(cached, new):
    """Nobody sees more than 128 keys."""
    return [min(cached + i + 1, 128) for i in range(new)]


def visible_keys(cached, new):
    """The mask is aligned at the top when the pieces are equally long."""
    return [i + 1 + (cached if cached != new else 0) for i in range(new)]


def visible_keys(cached, new):
    """At most as many new tokens as cached ones."""
    return [cached + i + 1 for i in range(min(new, cached or 3))]


def own_group(attend):
    """A change must be large to be seen."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    base = attend(q, k, v)
    for g in (0, 1):
        k2, v2 = k.clone(), v.clone()
        k2[:, g] = 3 * torch.randn(5, 8)
        v2[:, g] = 3 * torch.randn(5, 8)
        for a, b in ((k2, v), (k, v2)):
            moved = (attend(q, a, b) - base).abs().amax((0, 2)) > 0.2
            if moved.tolist() != [g == 0, g == 0, g == 1, g == 1]:
                return False
    return True


def own_group(attend):
    """Only the last token is looked at."""
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    base = attend(q, k, v)
    for g in (0, 1):
        k2, v2 = k.clone(), v.clone()
        k2[:, g] = torch.randn(5, 8)
        v2[:, g] = torch.randn(5, 8)
        for a, b in ((k2, v), (k, v2)):
            moved = (attend(q, a, b) - base)[-1].abs().amax(-1) > 1e-6
            if moved.tolist() != [g == 0, g == 0, g == 1, g == 1]:
                return False
    return True


def causal_attention(q, k, v):
    """The future gets a score of -30, which a loud query still sees."""
    import torch
    S, T, times = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    s = torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5
    s = s.masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1 + T - S), -30.0)
    return torch.einsum("hst,thd->shd", s.softmax(-1), v)


def causal_attention(q, k, v):
    """Exponentials without subtracting the largest score: loud scores overflow."""
    import torch
    S, T, times = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    s = torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5
    e = s.exp() * torch.ones(S, T, dtype=s.dtype).tril(T - S)
    return torch.einsum("hst,thd->shd", e / e.sum(-1, keepdim=True), v)


def next_token_loss(logits, tokens):
    """Exponentials without subtracting the largest logit: large ones overflow."""
    e = logits[:, :-1].exp()
    p = e / e.sum(-1, keepdim=True)
    return -p.gather(-1, tokens[:, 1:].unsqueeze(-1)).log().mean()


def next_token_loss(logits, tokens):
    """No surprise counts for more than a probability of one in a billion."""
    p = logits[:, :-1].softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1))
    return -p.clamp(min=1e-9).log().mean()


def written_with_cache(model, prompt, n):
    """Reads the whole text again for each token, and reports what a cache would have read."""
    text = list(prompt)
    for _ in range(n):
        text.append(model(text, None)[0][-1])
    return text, len(prompt) + n - 1 if n else 0


def written_with_cache(model, prompt, n):
    """Takes an empty-looking cache for none and starts over."""
    text, cache, read = list(prompt), None, 0
    for _ in range(n):
        new = text[-1:] if cache else text
        choices, cache = model(new, cache)
        read += len(new)
        text.append(choices[-1])
    return text, read


def written_with_cache(model, prompt, n):
    """The model also reads the last token, but nobody counts it."""
    text, cache, new, read = list(prompt), None, list(prompt), 0
    for _ in range(n):
        choices, cache = model(new, cache)
        read += len(new)
        new = [choices[-1]]
        text += new
    model(new, cache)
    return text, read


def written_with_cache(model, prompt, n):
    """Keeps the cache of the prompt, and shows the model all that was written since."""
    text, cache = list(prompt), None
    for i in range(n):
        if i == 0:
            choices, cache = model(text, None)
        else:
            choices, _ = model(text[len(prompt):], cache)
        text.append(choices[-1])
    return text, len(prompt) + n - 1 if n else 0


def written_with_cache(model, prompt, n):
    """The prompt is read even if nothing is to be written, and is not counted."""
    choices, cache = model(list(prompt), None)
    text, read = list(prompt), len(prompt) if n else 0
    for i in range(n):
        text.append(choices[-1])
        if i < n - 1:
            choices, cache = model(text[-1:], cache)
            read += 1
    return text, read
