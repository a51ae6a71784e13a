"""A conversation of `minids.generate`: what each turn asks the engine for."""

from types import SimpleNamespace

from minids import generate
from minids.generate import GenerateArgs
from minids.tokenizer import Tokenizer


def test_each_turn_has_its_own_seed_and_the_room_that_is_left(capsys):
    tokenizer, asked = Tokenizer.open("bytes"), []

    def stream(request):
        asked.append(request)
        yield from (SimpleNamespace(id=token) for token in tokenizer.encode("yes"))

    engine, run = SimpleNamespace(max_len=9, stream=stream), SimpleNamespace(tokenizer=tokenizer)
    args = GenerateArgs(run="r", seed=5, max_new_tokens=4)
    for turn, size, room in ((0, 3, 4), (2, 8, 1)):
        assert generate.reply(run, [1] * size, engine, "direct", args, turn) == "yes"
        assert (asked[-1].seed, asked[-1].max_tokens) == (5 + turn, room)
    assert generate.reply(run, [1] * 9, engine, "direct", args, 3) is None and len(asked) == 2
    assert capsys.readouterr().out == "yes\n" * 2
