"""Wrong answers to the exercises of notebook 15; a docstring says what is wrong."""


def sequences_that_fit(memory, weights, per_token, tokens):
    """The weights are forgotten."""
    return memory // (per_token * tokens)


def sequences_that_fit(memory, weights, per_token, tokens):
    """Rounded up: the last one does not fit."""
    return max(0, -(-(memory - weights) // (per_token * tokens)))


def sequences_that_fit(memory, weights, per_token, tokens):
    """A negative number of sequences."""
    return (memory - weights) // (per_token * tokens)


def sequences_that_fit(memory, weights, per_token, tokens):
    """Rounded towards the nearest."""
    return max(0, round((memory - weights) / (per_token * tokens)))


def sequences_that_fit(memory, weights, per_token, tokens):
    """Tokens and not sequences."""
    return max(0, memory - weights) // per_token


def sequences_that_fit(memory, weights, per_token, tokens):
    """At least one, even where nothing fits."""
    return max(1, (memory - weights) // (per_token * tokens))


def tokens_to_read(prompts):
    """Only the prompt just before is compared."""
    found = []
    for i, prompt in enumerate(prompts):
        earlier, n = prompts[i - 1] if i else [], 0
        while n < min(len(prompt) - 1, len(earlier)) and prompt[n] == earlier[n]:
            n += 1
        found.append(len(prompt) - n)
    return found


def tokens_to_read(prompts):
    """Only the first prompt is kept, as if it alone were the system prompt."""
    found = []
    for prompt in prompts:
        n = 0
        while found and n < min(len(prompt) - 1, len(prompts[0])) and prompt[n] == prompts[0][n]:
            n += 1
        found.append(len(prompt) - n)
    return found


def tokens_to_read(prompts):
    """The last token is copied too: nothing is left to answer."""
    found = []
    for i, prompt in enumerate(prompts):
        shared = 0
        for earlier in prompts[:i]:
            n = 0
            while n < min(len(prompt), len(earlier)) and prompt[n] == earlier[n]:
                n += 1
            shared = max(shared, n)
        found.append(len(prompt) - shared)
    return found


def tokens_to_read(prompts):
    """Equal tokens are counted at any position, also behind a difference."""
    found = []
    for i, prompt in enumerate(prompts):
        shared = [sum(a == b for a, b in zip(prompt[:-1], earlier, strict=False))
                  for earlier in prompts[:i]]
        found.append(len(prompt) - max(shared, default=0))
    return found


def tokens_to_read(prompts):
    """Tokens that were seen anywhere are not read again."""
    seen, found = set(), []
    for prompt in prompts:
        found.append(1 + sum(token not in seen for token in prompt[:-1]))
        seen |= set(prompt)
    return found


def tokens_to_read(prompts):
    """The shortest shared beginning and not the longest."""
    found = []
    for i, prompt in enumerate(prompts):
        shared = []
        for earlier in prompts[:i]:
            n = 0
            while n < min(len(prompt) - 1, len(earlier)) and prompt[n] == earlier[n]:
                n += 1
            shared.append(n)
        found.append(len(prompt) - min(shared, default=0))
    return found


def tokens_to_read(prompts):
    """A beginning counts only if it is an earlier prompt as a whole."""
    found = []
    for i, prompt in enumerate(prompts):
        whole = [len(e) for e in prompts[:i] if prompt[:len(e)] == e and len(e) < len(prompt)]
        found.append(len(prompt) - max(whole, default=0))
    return found


def held_back(text, stops):
    """Only the last character is looked at."""
    return int(any(len(stop) > 1 and text.endswith(stop[0]) for stop in stops))


def held_back(text, stops):
    """The longest stop string is always held back."""
    return min(len(text), max((len(stop) - 1 for stop in stops), default=0))


def held_back(text, stops):
    """The shortest end that fits and not the longest."""
    found = [n for stop in stops for n in range(1, min(len(stop) - 1, len(text)) + 1)
             if text.endswith(stop[:n])]
    return min(found, default=0)


def held_back(text, stops):
    """Only the first stop string counts."""
    found = [n for stop in stops[:1] for n in range(1, min(len(stop) - 1, len(text)) + 1)
             if text.endswith(stop[:n])]
    return max(found, default=0)


def held_back(text, stops):
    """The end may stand anywhere in a stop string, not only at its start."""
    found = [n for stop in stops for n in range(1, min(len(stop) - 1, len(text)) + 1)
             if text[-n:] in stop]
    return max(found, default=0)


def held_back(text, stops):
    """Stops at the first length that does not fit, although a longer one may."""
    most = 0
    for stop in stops:
        n = 0
        while n < min(len(stop) - 1, len(text)) and text.endswith(stop[:n + 1]):
            n += 1
        most = max(most, n)
    return most


def same_in_any_company(serve, requests):
    """The batch is compared with itself."""
    return serve(requests) == serve(requests)


def same_in_any_company(serve, requests):
    """Only the first request is looked at."""
    return serve(requests)[0] == serve(requests[:1])[0]


def same_in_any_company(serve, requests):
    """Only the lengths are compared."""
    return [len(t) for t in serve(requests)] == [len(serve([r])[0]) for r in requests]


def same_in_any_company(serve, requests):
    """The reversed order is forgotten."""
    return serve(requests) == [serve([request])[0] for request in requests]


def same_in_any_company(serve, requests):
    """Only the two orders are compared, and nobody is asked alone."""
    return serve(requests) == serve(requests[::-1])[::-1]


def same_in_any_company(serve, requests):
    """Whose reply it is does not count."""
    return sorted(serve(requests)) == sorted(serve([request])[0] for request in requests)


def same_in_any_company(serve, requests):
    """Pairs only: a batch of three is never tried."""
    a, b = requests[:2]
    return serve([a, b]) == serve([a]) + serve([b]) and serve([b, a]) == serve([b]) + serve([a])


def sequences_that_fit(memory, weights, per_token, tokens):
    """A float quotient."""
    return max(0, int((memory - weights) / (per_token * tokens)))


def tokens_to_read(prompts):
    """Beginnings as texts: 1, 2 is 12."""
    out = []
    for i, p in enumerate(prompts):
        best = max(
            (
                n
                for n in range(len(p))
                if any(
                    "".join(map(str, o)).startswith("".join(map(str, p[:n]))) for o in prompts[:i]
                )
            ),
            default=0,
        )
        out.append(len(p) - best)
    return out


def tokens_to_read(prompts):
    """Token 0 is padding."""
    out = []
    for i, p in enumerate(prompts):
        best = 0
        for o in prompts[:i]:
            n = 0
            while n < min(len(p), len(o)) and p[n] and p[n] == o[n]:
                n += 1
            best = max(best, n)
        out.append(max(1, len(p) - best))
    return out


def held_back(text, stops):
    """Eight characters at most."""
    return max(
        (n for s in stops for n in range(1, min(len(s), 8) + 1) if text.endswith(s[:n])), default=0
    )


def held_back(text, stops):
    """Case does not matter."""
    return max(
        (n for s in stops for n in range(1, len(s) + 1) if text.lower().endswith(s[:n].lower())),
        default=0,
    )


def same_in_any_company(serve, requests):
    """Never alone."""
    return (
        list(serve(requests)) == list(serve(requests[::-1]))[::-1]
        and list(serve(requests[:2])) == list(serve(requests))[:2]
    )


def same_in_any_company(serve, requests):
    """Wants version_a's replies."""
    return (
        list(serve(requests)) == version_a(requests)
        and list(serve(requests[::-1])) == version_a(requests[::-1])
        and [serve([r])[0] for r in requests] == [version_a([r])[0] for r in requests]
    )
