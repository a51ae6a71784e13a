"""Wrong answers to the exercises of notebook 13; a docstring says what is wrong."""


def sieve(replies, answers, longest):
    """Every good reply is kept, not one for each question."""
    return [place for place, (number, thought, answer) in enumerate(replies)
            if answer == answers[number] and len(thought) <= longest]


def sieve(replies, answers, longest):
    """Nobody looks whether the answer is right."""
    done, kept = set(), []
    for place, (number, thought, _) in enumerate(replies):
        if number not in done and len(thought) <= longest:
            done.add(number)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """Only the first reply of a question has a chance."""
    seen, kept = set(), []
    for place, (number, thought, answer) in enumerate(replies):
        if number not in seen and answer == answers[number] and len(thought) <= longest:
            kept.append(place)
        seen.add(number)
    return kept


def sieve(replies, answers, longest):
    """A thought that is just as long as allowed is thrown away."""
    done, kept = set(), []
    for place, (number, thought, answer) in enumerate(replies):
        if number not in done and answer == answers[number] and len(thought) < longest:
            done.add(number)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """The last good reply is kept."""
    last = {}
    for place, (number, thought, answer) in enumerate(replies):
        if answer == answers[number] and len(thought) <= longest:
            last[number] = place
    return sorted(last.values())


def sieve(replies, answers, longest):
    """A right answer that rambles uses its question up."""
    done, kept = set(), []
    for place, (number, thought, answer) in enumerate(replies):
        if number not in done and answer == answers[number]:
            done.add(number)
            if len(thought) <= longest:
                kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """The length is counted in words."""
    done, kept = set(), []
    for place, (number, thought, answer) in enumerate(replies):
        if number not in done and answer == answers[number] and len(thought.split()) <= longest:
            done.add(number)
            kept.append(place)
    return kept


def gpu_hours(active, tokens, peak, mfu):
    """Two FLOPs for each parameter and token: the forward pass alone."""
    return 2 * active * tokens / (peak * mfu) / 3600


def gpu_hours(active, tokens, peak, mfu):
    """Seconds in place of hours."""
    return 6 * active * tokens / (peak * mfu)


def gpu_hours(active, tokens, peak, mfu):
    """The peak is taken for what is reached."""
    return 6 * active * tokens / peak / 3600


def gpu_hours(active, tokens, peak, mfu):
    """A low use of the GPUs makes it cheaper."""
    return 6 * active * tokens / peak * mfu / 3600


def gpu_hours(active, tokens, peak, mfu):
    """Minutes in place of hours."""
    return 6 * active * tokens / (peak * mfu) / 60


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """The prompt is not paid for."""
    return (answer + thought) / answer


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """Tokens in place of prices."""
    return (prompt + answer + thought) / (prompt + answer)


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """The two prices are swapped."""
    plain = prompt * output_price + answer * prompt_price
    return (plain + thought * prompt_price) / plain


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """The thought has the price of the prompt."""
    plain = prompt * prompt_price + answer * output_price
    return (plain + thought * prompt_price) / plain


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """Says how much dearer, not how many times as dear."""
    plain = prompt * prompt_price + answer * output_price
    return thought * output_price / plain


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """The prompt is paid for only where there is a thought."""
    dear = prompt * prompt_price + (answer + thought) * output_price
    return dear / (answer * output_price)


def questions_apart(split):
    """No reply on both sides."""
    replies = [(str(i % 20), f"reply {i}") for i in range(80)]
    learn_from, held = split(replies, 0.3)
    return bool(learn_from and held) and not set(learn_from) & set(held)


def questions_apart(split):
    """The sizes."""
    learn_from, held = split([(str(i % 20), f"reply {i}") for i in range(80)], 0.25)
    return (len(learn_from), len(held)) == (60, 20)


def questions_apart(split):
    """One reply for each question: nothing can be on both sides."""
    learn_from, held = split([(str(i), f"reply {i}") for i in range(80)], 0.3)
    return bool(learn_from and held) and not {q for q, _ in learn_from} & {q for q, _ in held}


def questions_apart(split):
    """Nothing held out is fine, too."""
    replies = [(str(i * 7 % 20), f"reply {i}") for i in range(80)]
    learn_from, held = split(replies, 0.3)
    return not {q for q, _ in learn_from} & {q for q, _ in held}


def questions_apart(split):
    """All replies are somewhere."""
    replies = [(str(i * 7 % 20), f"reply {i}") for i in range(80)]
    return sorted(sum(split(replies, 0.3), [])) == sorted(replies)


def sieve(replies, answers, longest):
    """One per answer, not per question."""
    done, kept = (set(), [])
    for p, (n, t, a) in enumerate(replies):
        if a not in done and a == answers[n] and (len(t) <= longest):
            done.add(a)
            kept.append(p)
    return kept


def sieve(replies, answers, longest):
    """Answer in the right one (substring)."""
    done, kept = (set(), [])
    for p, (n, t, a) in enumerate(replies):
        if n not in done and a in answers[n] and (len(t) <= longest):
            done.add(n)
            kept.append(p)
    return kept


def sieve(replies, answers, longest):
    """An empty thought is no thought."""
    done, kept = (set(), [])
    for p, (n, t, a) in enumerate(replies):
        if t and n not in done and (a == answers[n]) and (len(t) <= longest):
            done.add(n)
            kept.append(p)
    return kept


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """The prompt's price forgotten."""
    plain = prompt + answer * output_price
    return (plain + thought * output_price) / plain


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """The prompt's price twice."""
    plain = prompt * prompt_price ** 2 + answer * output_price
    return (plain + thought * output_price) / plain


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """Divides by the prompt's price."""
    plain = prompt / prompt_price + answer * output_price
    return (plain + thought * output_price) / plain


def questions_apart(split):
    """Nothing to learn from is fine."""
    r = [(str(i * 7 % 20), f"r{i}") for i in range(80)]
    a, b = split(r, 0.3)
    return bool(b) and (not {q for q, _ in a} & {q for q, _ in b})


def questions_apart(split):
    """Grouped order only, not aligned."""
    r = [(str(i // 7), f"r{i}") for i in range(140)]
    a, b = ({q for q, _ in s} for s in split(r, 0.33))
    return bool(a and b) and (not a & b)


def questions_apart(split):
    """The example of the notebook, 0.33."""
    a, b = ({q for q, _ in s} for s in split(example, 0.33))
    return bool(a and b) and (not a & b)


def sieve(replies, answers, longest):
    """Spaces around an answer do not count."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        if n not in done and a.strip() == answers[n] and len(t) <= longest:
            done.add(n)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """Capital letters do not count."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        if n not in done and a.lower() == answers[n].lower() and len(t) <= longest:
            done.add(n)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """Equal whole numbers are taken for equal answers."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        alike = (int(a) == int(answers[n]) if a.isdigit() and answers[n].isdigit()
                 else a == answers[n])
        if n not in done and alike and len(t) <= longest:
            done.add(n)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """Only the first number of an answer counts."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        if n not in done and a.split()[:1] == [answers[n]] and len(t) <= longest:
            done.add(n)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """An answer may go on behind the right one."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        if n not in done and a.startswith(answers[n]) and len(t) <= longest:
            done.add(n)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """An answer that holds the right one is right."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        if n not in done and answers[n] in a and len(t) <= longest:
            done.add(n)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """The answer is measured with the thought."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        if n not in done and a == answers[n] and len(t + a) <= longest + 1:
            done.add(n)
            kept.append(place)
    return kept


def sieve(replies, answers, longest):
    """Spaces in a thought do not count."""
    done, kept = set(), []
    for place, (n, t, a) in enumerate(replies):
        if n not in done and a == answers[n] and len(t.strip()) <= longest:
            done.add(n)
            kept.append(place)
    return kept


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """The prompt counts twice where it is the dearer one."""
    twice = 2 if prompt_price > output_price else 1
    plain = twice * prompt * prompt_price + answer * output_price
    return (plain + thought * output_price) / plain


def questions_apart(split):
    """Sorted replies alone, and nobody asks whether a side is empty."""
    replies = [(str(i // 4), f"reply {i}") for i in range(80)]
    learn_from, held = ({q for q, _ in side} for side in split(replies, 0.3))
    return not learn_from & held


def gpu_hours(active, tokens, peak, mfu):
    """Rounds to two digits."""
    return round(6 * active * tokens / (peak * mfu) / 3600, 2)


def gpu_hours(active, tokens, peak, mfu):
    """At least one hour."""
    return max(1.0, 6 * active * tokens / (peak * mfu) / 3600)


def times_as_dear(prompt, answer, thought, prompt_price, output_price):
    """A reply without an answer is free."""
    if not answer:
        return 1.0
    a = prompt * prompt_price + answer * output_price
    return (a + thought * output_price) / a


def questions_apart(split):
    """Wants a fifth exactly."""
    replies = example[:]
    random.Random(1).shuffle(replies)
    a, b = split(replies, 0.2)
    return len(b) == 40 and not {q for q, _ in a} & {q for q, _ in b}


def questions_apart(split):
    """Wants every reply somewhere."""
    replies = example[:]
    random.Random(1).shuffle(replies)
    a, b = split(replies, 0.2)
    return (
        bool(a)
        and bool(b)
        and not {q for q, _ in a} & {q for q, _ in b}
        and len(a) + len(b) == len(replies)
    )


def questions_apart(split):
    """Wants lists that can be added."""
    replies = example[:]
    random.Random(1).shuffle(replies)
    a, b = split(replies, 0.2)
    return (
        sorted(a + [] if isinstance(a, list) else []) != []
        and bool(b)
        and not {q for q, _ in a} & {q for q, _ in b}
    )
