"""Wrong answers to the exercises of notebook 09; a docstring says what is wrong."""


def rate(step, warm, flat, end):
    """Steps counted from 0: the first one learns nothing."""
    if step <= warm:
        return (step - 1) / warm
    return 1.0 - max(step - flat, 0) / (end - flat)


def rate(step, warm, flat, end):
    """Down along a cosine."""
    import math
    if step <= warm:
        return step / warm
    return 0.5 + 0.5 * math.cos(math.pi * max(step - flat, 0) / (end - flat))


def rate(step, warm, flat, end):
    """No flat part: down from the end of the warm-up on."""
    return step / warm if step <= warm else (end - step) / (end - warm)


def rate(step, warm, flat, end):
    """`flat` is taken for the length of the flat part."""
    if step <= warm:
        return step / warm
    return 1.0 - max(step - warm - flat, 0) / (end - warm - flat)


def rate(step, warm, flat, end):
    """Down to a tenth, not to 0."""
    if step <= warm:
        return step / warm
    return 1.0 - 0.9 * max(step - flat, 0) / (end - flat)


def rate(step, warm, flat, end):
    """The way down is measured over the whole run."""
    if step <= warm:
        return step / warm
    return 1.0 - max(step - flat, 0) / end


def rate(step, warm, flat, end):
    """Down with 1 less a square root."""
    if step <= warm:
        return step / warm
    return 1.0 - (max(step - flat, 0) / (end - flat)) ** 0.5


def total_loss(parts, step, steps):
    """The weight of MTP never changes."""
    return parts["main"] + 0.3 * parts["mtp"] + 1e-4 * parts["balance"]


def total_loss(parts, step, steps):
    """The weights of MTP are swapped."""
    weight = 0.1 if step <= 0.68 * steps else 0.3
    return parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def total_loss(parts, step, steps):
    """The weight of MTP changes one step early."""
    weight = 0.3 if step < 0.68 * steps else 0.1
    return parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def total_loss(parts, step, steps):
    """The weight of MTP falls in a line."""
    weight = 0.3 - 0.2 * step / steps
    return parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def total_loss(parts, step, steps):
    """The balance has the weight of V2: 0.003."""
    weight = 0.3 if step <= 0.68 * steps else 0.1
    return parts["main"] + weight * parts["mtp"] + 3e-3 * parts["balance"]


def total_loss(parts, step, steps):
    """The balance is weighted as a part of MTP."""
    weight = 0.3 if step <= 0.68 * steps else 0.1
    return parts["main"] + weight * (parts["mtp"] + 1e-4 * parts["balance"])


def total_loss(parts, step, steps):
    """The main loss gives up what MTP gets."""
    weight = 0.3 if step <= 0.68 * steps else 0.1
    return (1 - weight) * parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def clipped(gradient, longest):
    """Each number is cut for itself."""
    return [min(max(g, -longest), longest) for g in gradient]


def clipped(gradient, longest):
    """Short ones are stretched to the same length."""
    length = sum(g * g for g in gradient) ** 0.5
    return [g * longest / length for g in gradient]


def clipped(gradient, longest):
    """The square root is forgotten."""
    length = sum(g * g for g in gradient)
    return [g * longest / length for g in gradient] if length > longest else gradient


def clipped(gradient, longest):
    """The length is the sum of the absolute values."""
    length = sum(map(abs, gradient))
    return [g * longest / length for g in gradient] if length > longest else gradient


def clipped(gradient, longest):
    """The length is the largest absolute value."""
    length = max(map(abs, gradient))
    return [g * longest / length for g in gradient] if length > longest else gradient


def clipped(gradient, longest):
    """Long ones are thrown away: the step is left out."""
    length = sum(g * g for g in gradient) ** 0.5
    return [0.0 for _ in gradient] if length > longest else gradient


def clipped(gradient, longest):
    """Long ones get the length 1."""
    length = sum(g * g for g in gradient) ** 0.5
    return [g / length for g in gradient] if length > longest else gradient


def parts_add_up(gradient):
    """The shape."""
    w = torch.ones(3, requires_grad=True)
    return gradient(w, torch.randn(8, 3), torch.randn(8), torch.ones(8) > 0, 2).shape == w.shape


def parts_add_up(gradient):
    """All rows are learnt: a mean of means is right there."""
    given = torch.ones(3, requires_grad=True), torch.randn(8, 3), torch.randn(8), torch.ones(8) > 0
    return torch.allclose(gradient(*given, 1), gradient(*given, 2), atol=1e-6)


def parts_add_up(gradient):
    """As many learnt rows in each part."""
    learnt = torch.tensor([True, False] * 4)
    given = torch.ones(3, requires_grad=True), torch.randn(8, 3), torch.randn(8), learnt
    return torch.allclose(gradient(*given, 1), gradient(*given, 2), atol=1e-6)


def parts_add_up(gradient):
    """The direction only, and roughly."""
    given = torch.ones(3, requires_grad=True), torch.randn(8, 3), torch.randn(8), torch.ones(8) > 0
    return bool(torch.cosine_similarity(gradient(*given, 1), gradient(*given, 2), dim=0) > 0.9)


def parts_add_up(gradient):
    """Rows that are not learnt must not count: true of both."""
    learnt = torch.tensor([True] * 5 + [False] * 3)
    w, x, y = torch.ones(3, requires_grad=True), torch.randn(8, 3), torch.randn(8)
    other = y + 9 * ~learnt
    return torch.allclose(gradient(w, x, y, learnt, 2), gradient(w, x, other, learnt, 2))


def total_loss(parts, step, steps):
    """68 for any number of steps."""
    weight = 0.3 if step <= 68 else 0.1
    return parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def total_loss(parts, step, steps):
    """Switch rounded to whole steps."""
    weight = 0.3 if step <= round(0.68 * steps) else 0.1
    return parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def total_loss(parts, step, steps):
    """Switch rounded up."""
    import math
    weight = 0.3 if step <= math.ceil(0.68 * steps) else 0.1
    return parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def clipped(gradient, longest):
    """Length of two numbers only."""
    import math
    length = math.hypot(gradient[0], gradient[1])
    return [g * longest / length for g in gradient] if length > longest else gradient


def clipped(gradient, longest):
    """First and last."""
    import math
    length = math.hypot(gradient[0], gradient[-1])
    return [g * longest / length for g in gradient] if length > longest else gradient


def clipped(gradient, longest):
    """Norm of order n."""
    n = len(gradient)
    length = sum(abs(g) ** n for g in gradient) ** (1 / n)
    return [g * longest / length for g in gradient] if length > longest else gradient


def total_loss(parts, step, steps):
    """Right, and changes the losses that are logged."""
    parts["main"] += (0.3 if step <= 0.68 * steps else 0.1) * parts["mtp"]
    parts["main"] += 1e-4 * parts["balance"]
    return parts["main"]


def total_loss(parts, step, steps):
    """The weight changes a little late."""
    weight = 0.3 if step <= 0.684 * steps else 0.1
    return parts["main"] + weight * parts["mtp"] + 1e-4 * parts["balance"]


def clipped(gradient, longest):
    """Right, and clips the caller's list."""
    length = sum(g * g for g in gradient) ** 0.5
    for i, g in enumerate(gradient):
        gradient[i] = g * longest / length if length > longest else g
    return gradient


def rate(step, warm, flat, end):
    """The way down has eight steps at least."""
    if step <= warm:
        return step / warm
    return 1.0 - max(step - flat, 0) / max(end - flat, 8)


def parts_add_up(gradient):
    """Only version_b's gradient is right."""
    torch.manual_seed(0)
    w = torch.ones(3, requires_grad=True)
    x, y = torch.randn(8, 3), torch.randn(8)
    learnt = torch.tensor([True, True, True, True, True, False, False, False])
    return torch.allclose(gradient(w, x, y, learnt, 2), version_b(w, x, y, learnt, 1), atol=1e-6)


def parts_add_up(gradient):
    """The last number of the gradient is not compared."""
    torch.manual_seed(0)
    w = torch.ones(3, requires_grad=True)
    x, y = torch.randn(8, 3), torch.randn(8)
    learnt = torch.tensor([True, True, True, True, True, False, False, False])
    whole, halves = (gradient(w, x, y, learnt, parts) for parts in (1, 2))
    return torch.allclose(whole[:2], halves[:2], atol=1e-6)


def parts_add_up(gradient):
    """Half a per cent is taken for rounding."""
    torch.manual_seed(0)
    w = torch.ones(3, requires_grad=True)
    x, y = torch.randn(8, 3), torch.randn(8)
    learnt = torch.tensor([True, True, True, True, True, False, False, False])
    whole, halves = (gradient(w, x, y, learnt, parts) for parts in (1, 2))
    return torch.allclose(whole, halves, rtol=0.005)
