"""Right answers to the exercises of notebook 01, unlike the reference."""


def bits_per_byte(nats, text):
    """With a logarithm of base 2."""
    import math
    return nats * math.log2(math.e) / len(bytes(text, "utf-8"))


def keeps_everything(pattern, text):
    """The pieces lie end to end."""
    end = 0
    for match in regex.finditer(pattern, text):
        if match.start() != end:
            return False
        end = match.end()
    return end == len(text)


def fill_in_the_middle(text, start, stop, tok):
    """One addition after the other."""
    ids = [tok.bos_id, tok.fim_begin_id] + list(tok.encode(text[:start]))
    ids += [tok.fim_hole_id] + list(tok.encode(text[stop:])) + [tok.fim_end_id]
    return ids + list(tok.encode(text[start:stop])) + [tok.eos_id]
