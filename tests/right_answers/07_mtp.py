"""Right answers to the exercises of notebook 07, unlike the reference."""


def verified(drafts, own):
    """By slices."""
    stand = next((i for i, d in enumerate(drafts) if d != own[i]), len(drafts))
    return own[:stand + 1]


def faithful(write):
    """A model of five tokens, four guessers, seven more."""
    def model(text):
        return (text[-1] * 2 + len(text)) % 5

    wanted = [3, 1]
    for _ in range(7):
        wanted.append(model(wanted))
    for guess in (model, lambda text: 9, lambda text: model(text) if text[-1] % 2 else 9,
                  lambda text: 9 if len(text) == 6 else model(text)):
        if list(write(model, guess, [3, 1], 7)) != wanted:
            return False
    return True


def module_pairs(tokens, k):
    """By zip."""
    return list(zip(range(len(tokens)), tokens[k:], tokens[k + 1:], strict=False))
