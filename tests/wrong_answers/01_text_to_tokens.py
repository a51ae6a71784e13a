"""Wrong answers to the exercises of notebook 01; a docstring says what is wrong."""


def bits_per_byte(nats, text):
    """Characters for bytes."""
    return nats / log(2) / len(text)


def bits_per_byte(nats, text):
    """Nats per byte."""
    return nats / len(text.encode())


def bits_per_byte(nats, text):
    """Times ln 2."""
    return nats * log(2) / len(text.encode())


def bits_per_byte(nats, text):
    """Bits of the whole text."""
    return nats / log(2)


def bits_per_byte(nats, text):
    """Two bytes a character, as in UTF-16."""
    return nats / log(2) / len(text.encode("utf-16-le"))


def fill_in_the_middle(text, start, stop, tok):
    """The middle stays in its place."""
    prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
    return [tok.bos_id, tok.fim_begin_id, *tok.encode(prefix), tok.fim_hole_id,
            *tok.encode(middle), tok.fim_end_id, *tok.encode(suffix), tok.eos_id]


def fill_in_the_middle(text, start, stop, tok):
    """Suffix first, as other models have it."""
    prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
    return [tok.bos_id, tok.fim_begin_id, *tok.encode(suffix), tok.fim_hole_id,
            *tok.encode(prefix), tok.fim_end_id, *tok.encode(middle), tok.eos_id]


def fill_in_the_middle(text, start, stop, tok):
    """Hole and end change places."""
    prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
    return [tok.bos_id, tok.fim_begin_id, *tok.encode(prefix), tok.fim_end_id,
            *tok.encode(suffix), tok.fim_hole_id, *tok.encode(middle), tok.eos_id]


def fill_in_the_middle(text, start, stop, tok):
    """One character late."""
    prefix, middle, suffix = text[:start], text[start:stop + 1], text[stop + 1:]
    return [tok.bos_id, tok.fim_begin_id, *tok.encode(prefix), tok.fim_hole_id,
            *tok.encode(suffix), tok.fim_end_id, *tok.encode(middle), tok.eos_id]


def fill_in_the_middle(text, start, stop, tok):
    """No end: the model never learns to stop."""
    prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
    return [tok.bos_id, tok.fim_begin_id, *tok.encode(prefix), tok.fim_hole_id,
            *tok.encode(suffix), tok.fim_end_id, *tok.encode(middle)]


def keeps_everything(pattern, text):
    """Whether anything is found."""
    return text == "" or bool(regex.findall(pattern, text))


def keeps_everything(pattern, text):
    """Whether the first piece starts the text."""
    return regex.match(pattern, text) is not None or text == ""


def keeps_everything(pattern, text):
    """As many pieces as words."""
    return len(regex.findall(pattern, text)) >= len(text.split())


def keeps_everything(pattern, text):
    """White space does not count."""
    return "".join("".join(regex.findall(pattern, text)).split()) == "".join(text.split())


def keeps_everything(pattern, text):
    """It decodes without an error."""
    return isinstance("".join(regex.findall(pattern, text)), str)


def fill_in_the_middle(text, start, stop, tok):
    """The tokens are cut, not the text."""
    ids = tok.encode(text)
    return [tok.bos_id, tok.fim_begin_id, *ids[:start], tok.fim_hole_id,
            *ids[stop:], tok.fim_end_id, *ids[start:stop], tok.eos_id]


def keeps_everything(pattern, text):
    """A match of the whole text, which tries again where cutting does not."""
    return regex.fullmatch(f"(?:{pattern})*", text) is not None


def keeps_everything(pattern, text):
    """Every character occurs in some piece."""
    return set("".join(regex.findall(pattern, text))) == set(text)


def bits_per_byte(nats, text):
    """Floor division."""
    return nats / log(2) // len(text.encode())


def bits_per_byte(nats, text):
    """Rounded to 2 digits."""
    return round(nats / log(2) / len(text.encode()), 2)


def bits_per_byte(nats, text):
    """Whole bits."""
    return round(nats / log(2)) / len(text.encode())


def keeps_everything(pattern, text):
    """Pieces taken out wherever they are."""
    for piece in regex.findall(pattern, text):
        text = text.replace(piece, "")
    return text == ""


def keeps_everything(pattern, text):
    """Left white space does not count."""
    return "".join(regex.findall(pattern, text)) == text.lstrip()


def keeps_everything(pattern, text):
    """Case does not matter."""
    return "".join(regex.findall(pattern, text, flags=regex.I)) == text


def fill_in_the_middle(text, start, stop, tok):
    """The middle is cut to three characters."""
    prefix, middle, suffix = text[:start], text[start:stop][:3], text[stop:]
    return [tok.bos_id, tok.fim_begin_id, *tok.encode(prefix), tok.fim_hole_id,
            *tok.encode(suffix), tok.fim_end_id, *tok.encode(middle), tok.eos_id]


def keeps_everything(pattern, text):
    """The whole text must match at once."""
    return regex.fullmatch(pattern, text) is not None or not text


def keeps_everything(pattern, text):
    """As many characters, whichever they are, up to one."""
    return len(text) - len("".join(regex.findall(pattern, text))) <= 1


def bits_per_byte(nats, text):
    """White space at the ends is not counted."""
    return nats / log(2) / len(text.strip().encode())


def bits_per_byte(nats, text):
    """At most 512 bytes are counted."""
    return nats / log(2) / min(len(text.encode()), 512)


def fill_in_the_middle(text, start, stop, tok):
    """Writes the special tokens' names of the check."""
    return [
        "BOS",
        "PRE",
        *tok.encode(text[:start]),
        "HOLE",
        *tok.encode(text[stop:]),
        "END",
        *tok.encode(text[start:stop]),
        "EOS",
    ]
