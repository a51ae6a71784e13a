"""Right answers to the exercises of notebook 13, unlike the reference."""


def sieve(replies, answers, longest):
    """Question by question."""
    first = {}
    for place, (question, thought, answer) in enumerate(replies):
        if answers[question] == answer and len(thought) <= longest:
            first.setdefault(question, place)
    return sorted(first.values())


def questions_apart(split):
    """Shuffled replies of thirty questions."""
    import random
    replies = [(question, str(i)) for question in range(30) for i in range(5)]
    random.Random(1).shuffle(replies)
    first, second = split(replies, 0.2)
    return bool(first) and bool(second) and {q for q, _ in first}.isdisjoint(q for q, _ in second)


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """One over the other."""
    with_thought = prompt * prompt_price + (answer + thought) * output_price
    return with_thought / (prompt * prompt_price + answer * output_price)
