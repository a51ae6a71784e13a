"""Wrong answers to the exercises of notebook 07; a docstring says what is wrong."""


def module_pairs(tokens, k):
    """The target is off by one: the module predicts the token that it embeds."""
    return [(i, tokens[i + k], tokens[i + k]) for i in range(len(tokens) - k - 1)]


def module_pairs(tokens, k):
    """Always embeds the next token, as the first module does."""
    return [(i, tokens[i + 1], tokens[i + k + 1]) for i in range(len(tokens) - k - 1)]


def module_pairs(tokens, k):
    """Always predicts the token after the next one."""
    return [(i, tokens[i + k], tokens[i + 2]) for i in range(len(tokens) - k - 1)]


def module_pairs(tokens, k):
    """Modules counted from 0: the embedding and the target come one token too early."""
    return [(i, tokens[i + k - 1], tokens[i + k]) for i in range(len(tokens) - k)]


def module_pairs(tokens, k):
    """The position is that of the embedded token."""
    return [(i + k, tokens[i + k], tokens[i + k + 1]) for i in range(len(tokens) - k - 1)]


def module_pairs(tokens, k):
    """Rolled tokens: the end of the text predicts its beginning."""
    n = len(tokens)
    return [(i, tokens[(i + k) % n], tokens[(i + k + 1) % n]) for i in range(n)]


def module_pairs(tokens, k):
    """The last pair that the text allows is lost."""
    return [(i, tokens[i + k], tokens[i + k + 1]) for i in range(len(tokens) - k - 2)]


def replacement(p, q):
    """Drawn from the model's probabilities as they are."""
    return list(p)


def replacement(p, q):
    """Drawn from |p - q|: what the guesser has too much of comes back."""
    gap = [abs(a - b) for a, b in zip(p, q, strict=True)]
    return [g / sum(gap) for g in gap]


def replacement(p, q):
    """The rest of p over q is not scaled to 1."""
    return [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]


def replacement(p, q):
    """The difference the wrong way round."""
    more = [max(b - a, 0.0) for a, b in zip(p, q, strict=True)]
    return [m / sum(more) for m in more]


def replacement(p, q):
    """All on the token where p has most more than q."""
    more = [a - b for a, b in zip(p, q, strict=True)]
    return [float(i == more.index(max(more))) for i in range(len(more))]


def replacement(p, q):
    """A softmax over the differences."""
    import math
    powers = [math.exp(a - b) for a, b in zip(p, q, strict=True)]
    return [x / sum(powers) for x in powers]


def verified(drafts, own):
    """Drafts accepted unverified."""
    return drafts + own[-1:]


def verified(drafts, own):
    """Every draft that the model would have said stands, also behind a wrong one."""
    return [d for d, o in zip(drafts, own, strict=False) if d == o] + own[-1:]


def verified(drafts, own):
    """The model's own choice is left out."""
    passed = 0
    while passed < len(drafts) and drafts[passed] == own[passed]:
        passed += 1
    return drafts[:passed]


def verified(drafts, own):
    """The wrong draft itself is written, and then the model goes on."""
    for place, draft in enumerate(drafts):
        if draft != own[place]:
            return drafts[:place + 1]
    return drafts + own[-1:]


def verified(drafts, own):
    """One off: a draft is compared with the choice after it."""
    passed = 0
    while passed < len(drafts) and drafts[passed] == own[passed + 1]:
        passed += 1
    return drafts[:passed] + [own[passed]]


def verified(drafts, own):
    """The model's whole row, as if all drafts were right."""
    return own


def faithful(write):
    """The length."""
    return len(write(counting, counting, [0], 9)) == 10


def faithful(write):
    """A perfect guesser only."""
    return write(counting, counting, [0], 9) == list(range(10))


def faithful(write):
    """A guesser that is always wrong: what goes wrong after a right draft is missed."""
    return write(counting, lambda text: -1, [0], 9) == list(range(10))


def faithful(write):
    """The first token only."""
    return write(counting, lambda text: -1, [0], 9)[1] == 1


def faithful(write):
    """Good and bad guessers must give the same: they do, if the guess is written."""
    return write(counting, counting, [0], 9) == write(counting, counting, [0], 9)


def module_pairs(tokens, k):
    """Only every k-th position."""
    return [(i, tokens[i + k], tokens[i + k + 1]) for i in range(0, len(tokens) - k - 1, k)]


def module_pairs(tokens, k):
    """Pairs by dict from embedded token (duplicates lost)."""
    d = {}
    for i in range(len(tokens) - k - 1):
        d[tokens[i + k]] = (i, tokens[i + k], tokens[i + k + 1])
    return list(d.values())


def verified(drafts, own):
    """Token 0 ends it."""
    n = 0
    while n < len(drafts) and drafts[n] and drafts[n] == own[n]:
        n += 1
    return own[:n + 1]


def verified(drafts, own):
    """`drafts[n] in own`."""
    n = 0
    while n < len(drafts) and drafts[n] in own:
        n += 1
    return drafts[:n] + [own[n]]


def verified(drafts, own):
    """Mismatch found by .index of token."""
    for d, o in zip(drafts, own, strict=False):
        if d != o:
            n = drafts.index(d)
            return drafts[:n] + [own[n]]
    return own


def faithful(write):
    """Each token is what the model says, length not looked at."""
    for g in (counting, lambda t: -1, lambda t: t[-1] + 1 if len(t) % 2 else -1):
        text = write(counting, g, [0], 9)
        if any(counting(text[:i]) != text[i] for i in range(1, len(text))):
            return False
    return True


def verified(drafts, own):
    """Right, and cuts the caller's drafts."""
    passed = 0
    while passed < len(drafts) and drafts[passed] == own[passed]:
        passed += 1
    del drafts[passed:]
    drafts.append(own[passed])
    return list(drafts)


def replacement(p, q):
    """Divided by at least a quarter."""
    more = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    return [m / max(sum(more), 0.25) for m in more]


def faithful(write):
    """Only the length and the last token."""
    def model(text):
        return (7 * text[-1] + 3) % 11

    own = [1]
    for _ in range(11):
        own.append(model(own))
    guessers = [model, lambda text: -1, lambda text: model(text) if len(text) % 3 else -1]
    found = [write(model, guess, [1], 11) for guess in guessers]
    return all(len(text) == len(own) and text[-1] == own[-1] for text in found)


def faithful(write):
    """No perfect guesser."""
    def model(text):
        return (7 * text[-1] + 3) % 11

    own = [1]
    for _ in range(11):
        own.append(model(own))
    guessers = [lambda text: -1, lambda text: model(text) if len(text) % 3 else -1]
    return all(write(model, guess, [1], 11) == own for guess in guessers)


def faithful(write):
    """A model that says two tokens in turn: repeating them is right."""
    def model(text):
        return 3 - text[-1]

    own = [1, 2] * 4
    guessers = [model, lambda text: -1, lambda text: model(text) if len(text) % 3 else -1]
    return all(write(model, guess, [1], 7) == own for guess in guessers)


def faithful(write):
    """Only a perfect guesser."""
    def model(text):
        return (7 * text[-1] + 3) % 11

    own = [1]
    for _ in range(11):
        own.append(model(own))
    return write(model, model, [1], 11) == own


def mtp_objective(logits, tokens, weight):
    """Off by one: module 1 predicts the next token."""
    each = [F.cross_entropy(own, tokens[k:k + len(own)], reduction="sum") for k, own in
            enumerate(logits, 1)]
    return weight * sum(each) / (len(tokens) - 1) / len(each)


def mtp_objective(logits, tokens, weight):
    """Each module's mean over its own positions."""
    each = [F.cross_entropy(own, tokens[k + 1:]) for k, own in enumerate(logits, 1)]
    return weight * sum(each) / len(each)


def mtp_objective(logits, tokens, weight):
    """The sum over modules instead of the mean."""
    each = [F.cross_entropy(own, tokens[k + 1:], reduction="sum") for k, own in
            enumerate(logits, 1)]
    return weight * sum(each) / (len(tokens) - 1)


def mtp_objective(logits, tokens, weight):
    """Divided by T + 1."""
    each = [F.cross_entropy(own, tokens[k + 1:], reduction="sum") for k, own in
            enumerate(logits, 1)]
    return weight * sum(each) / len(tokens) / len(each)


def mtp_objective(logits, tokens, weight):
    """The first module alone."""
    return weight * F.cross_entropy(logits[0], tokens[2:], reduction="sum") / (len(tokens) - 1)


def kept_or_replaced(p, q, draft, coin, point):
    """A rejected draft is replaced by a draw from p itself."""
    if coin * q[draft] < p[draft]:
        return draft
    reached = 0.0
    for token, share in enumerate(p):
        reached += share
        if point < reached:
            return token


def kept_or_replaced(p, q, draft, coin, point):
    """The ratio upside down."""
    if coin * p[draft] < q[draft]:
        return draft
    reached = 0.0
    for token, share in enumerate(replacement(p, q)):
        reached += share
        if point < reached:
            return token


def kept_or_replaced(p, q, draft, coin, point):
    """Accepts only where p is at least q."""
    if p[draft] >= q[draft]:
        return draft
    reached = 0.0
    for token, share in enumerate(replacement(p, q)):
        reached += share
        if point < reached:
            return token


def kept_or_replaced(p, q, draft, coin, point):
    """The replacement is always its likeliest token."""
    if coin * q[draft] < p[draft]:
        return draft
    rest = replacement(p, q)
    return rest.index(max(rest))


def kept_or_replaced(p, q, draft, coin, point):
    """Accepts with probability p."""
    if coin < p[draft]:
        return draft
    reached = 0.0
    for token, share in enumerate(replacement(p, q)):
        reached += share
        if point < reached:
            return token


def drafted_text(model, guess, text, n, depth):
    """All drafts are guessed from the same text."""
    written, passes = list(text), 0
    while len(written) < len(text) + n:
        drafts = [guess(written)] * depth
        own = [model(written + drafts[:i]) for i in range(depth + 1)]
        written += verified(drafts, own)
        passes += 1
    return written[:len(text) + n], passes


def drafted_text(model, guess, text, n, depth):
    """More tokens than asked for."""
    written, passes = list(text), 0
    while len(written) < len(text) + n:
        drafts = []
        for _ in range(depth):
            drafts.append(guess(written + drafts))
        own = [model(written + drafts[:i]) for i in range(depth + 1)]
        written += verified(drafts, own)
        passes += 1
    return written, passes


def drafted_text(model, guess, text, n, depth):
    """Without the model's own token at the end of a pass."""
    written, passes = list(text), 0
    while len(written) < len(text) + n:
        drafts = []
        for _ in range(depth):
            drafts.append(guess(written + drafts))
        own = [model(written + drafts[:i]) for i in range(depth + 1)]
        found = verified(drafts, own)
        written += found[:-1] or found
        passes += 1
    return written[:len(text) + n], passes


def drafted_text(model, guess, text, n, depth):
    """Every draft stands."""
    written, passes = list(text), 0
    while len(written) < len(text) + n:
        for _ in range(depth):
            written.append(guess(written))
        written.append(model(written))
        passes += 1
    return written[:len(text) + n], passes


def drafted_text(model, guess, text, n, depth):
    """A pass for each token."""
    written, passes = list(text), 0
    while len(written) < len(text) + n:
        written.append(model(written))
        passes += 1
    return written, passes


def drafted_text(model, guess, text, n, depth):
    """The first pass is not counted."""
    written, passes = list(text), -1
    while len(written) < len(text) + n:
        drafts = []
        for _ in range(depth):
            drafts.append(guess(written + drafts))
        own = [model(written + drafts[:i]) for i in range(depth + 1)]
        written += verified(drafts, own)
        passes += 1
    return written[:len(text) + n], max(passes, 0)


def replacement(p, q):
    """A small number below the division."""
    x = [max(a - b, 0.0) for a, b in zip(p, q, strict=False)]
    return [v / (sum(x) + 1e-8) for v in x]


def faithful(write):
    """Only what is new is looked at, from the back."""
    def m(t):
        return (sum(t) * 7 + len(t)) % 10

    gs = (m, lambda t: -1, lambda t: m(t) if len(t) % 2 else -1)
    for g in gs:
        w = [1, 2]
        for _ in range(7):
            w = w + [m(w)]
        if write(m, g, [1, 2], 7)[-7:] != w[-7:]:
            return False
    return True


def faithful(write):
    """Compares the sets of tokens."""
    gs = (counting, lambda t: -1, lambda t: t[-1] + 1 if len(t) % 2 else -1)
    return all(
        set(write(counting, g, [0], 8)) == set(range(9)) and len(write(counting, g, [0], 8)) == 9
        for g in gs
    )


def mtp_objective(logits, tokens, weight):
    """Exponentials without subtracting the largest logit."""
    T, total = len(tokens) - 1, 0.0
    for k, x in enumerate(logits, 1):
        hit = x.gather(1, tokens[k + 1:, None]).squeeze(1)
        total = total + (x.exp().sum(-1).log() - hit).sum() / T
    return weight * total / len(logits)


def kept_or_replaced(p, q, draft, coin, point):
    """A coin of exactly p/q accepts: a draft that p never gives is kept at coin 0."""
    if coin <= min(1.0, p[draft] / q[draft]):
        return draft
    gap = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    so_far = 0.0
    for token, g in enumerate(gap):
        so_far += g / sum(gap)
        if point < so_far:
            return token
    return max(i for i, g in enumerate(gap) if g)


def kept_or_replaced(p, q, draft, coin, point):
    """A point of exactly 0 falls to the first token, even if its share is nothing."""
    if coin < p[draft] / q[draft]:
        return draft
    gap = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    so_far = 0.0
    for token, g in enumerate(gap):
        so_far += g / sum(gap)
        if point <= so_far:
            return token
    return max(i for i, g in enumerate(gap) if g)


def kept_or_replaced(p, q, draft, coin, point):
    """Replaced from p without the draft, not from what p has more than q."""
    if coin < p[draft] / q[draft]:
        return draft
    rest = [0.0 if i == draft else a for i, a in enumerate(p)]
    so_far = 0.0
    for token, share in enumerate(rest):
        so_far += share / sum(rest)
        if point < so_far:
            return token


def kept_or_replaced(p, q, draft, coin, point):
    """The shares lie side by side from the largest to the smallest."""
    if coin < p[draft] / q[draft]:
        return draft
    gap = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    so_far = 0.0
    for token in sorted(range(len(gap)), key=lambda i: -gap[i]):
        so_far += gap[token] / sum(gap)
        if point < so_far:
            return token


def kept_or_replaced(p, q, draft, coin, point):
    """Drafts are accepted with at least a probability of one in ten thousand."""
    if coin < max(p[draft] / q[draft], 1e-4):
        return draft
    gap = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    so_far = 0.0
    for token, g in enumerate(gap):
        so_far += g / sum(gap)
        if point < so_far:
            return token


def faithful(write):
    """Only an even number of tokens is asked for: two at a time then always fit."""
    def model(text):
        return (7 * text[-1] + 3) % 11

    own = [1]
    for _ in range(8):
        own.append(model(own))
    guessers = [model, lambda text: -1, lambda text: model(text) if len(text) % 3 else -1]
    return all(write(model, guess, [1], 8) == own for guess in guessers)
