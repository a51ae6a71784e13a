"""The instances of `kinds`: FIELD.md's own (`listed`) and others of their kind."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial

from kinds import Case, Ended, run, works
from kinds_cases import (
    GRPO,
    HOME,
    QUESTIONS,
    SFT,
    SMALL,
    TALK,
    TRAIN,
    absent,
    again,
    ask,
    beside,
    deaf,
    edit,
    lines,
    located,
    paid,
    put,
    quoted,
    refused_beside,
    resumed,
    sampled,
    signalled,
    tables,
    talk,
    texts,
)


def rewards() -> Iterator[Case]:
    yield paid("5", "−5", False, True)
    yield paid("2", "1/2", False, True)
    for expected, reply, right in (
            ("-5", "−5", True), ("5", "–5", False), ("3", "1e3", False), ("50", "50%", False),
            ("30", "10:30", False), ("1000", "1,000", True), ("0.5", "1/2", True),
            ("6", "5 or 6", False), ("3", "2^3", False), ("0.5", ".50", True),
            ("5", "\\boxed{5}", True), ("2", "\\frac{1}{2}", False), ("5", "not 5", False),
            ("5", "5.", True), ("5", "٥", False), ("72", "$72", True), ("3", "x=3", True)):
        yield paid(expected, reply, right)


def temperatures() -> Iterator[Case]:
    greedy = "generate --run nano --max-new-tokens 8 --prompt cat --temperature"

    def as_greedy(end: Ended) -> bool:
        return end.status == 0 and end.out == run(f"{greedy} 0", end.folder).out
    yield Case("temperatures", f"{greedy} 1e-39", as_greedy, listed=True)
    yield sampled(float("nan"), 1.0, True)
    yield sampled(float("-inf"), 1.0, True)
    for value in ("1e-45", "1e-20", "1e-7", "5e-324", "1e-300"):
        yield Case("temperatures", f"{greedy} {value}", as_greedy)
    yield Case("temperatures", f"solve --run sft --problems 2 {SMALL[:11]} --temperature 1e-40",
               works())
    for value, temperature in ((float("nan"), 0.0), (float("-inf"), 0.0), (float("inf"), 1.0)):
        yield sampled(value, temperature)


def one_line() -> Iterator[Case]:
    """Mistakes that ended in a traceback, or in a line that names no field and no file."""
    run_, out = "--run nano", "--out made"
    for words, right, *more in (
            ("generate --run nano --threads 100000", "threads = 100000", True),
            ("generate --run nano --threads 1000", "threads = 1000", True),
            ("solve --run sft --threads 100000", "threads", True),
            ("evaluate --run nano --seq-len 9999", "seq_len = 9999", True),
            (f"{TRAIN} --steps 1 {out} --seed 99999999999999999999", "seed", True),
            (f"{TRAIN} --steps 1 --out tok/meta.json", "tok/meta.json", True),
            ("distill --teacher sft --corpus texts", "texts", True),
            ("lab.recall --out talk.jsonl", "talk.jsonl", True),
            ("lab.claims --what balance --preset nope", "nope", True),
            ("train --threads 65 --out made", "threads"), ("r1 --threads 5000", "threads"),
            ("distill --teacher sft --corpus c.jsonl --threads -4", "threads = -4"),
            ("lab.claims --what fp8 --threads 900", "threads"),
            ("evaluate --run nano --seq-len 257", "seq_len = 257"),
            ("evaluate --run hf --seq-len 300", "seq_len = 300"),
            (f"evaluate {run_} --selections --seq-len 4000", "seq_len"),
            (f"generate {run_} --seed 18446744073709551616", "seed"),
            (f"generate {run_} --seed -1", "seed"),
            ("solve --run sft --seed 4294967296", "seed"),
            ("distill --teacher sft --corpus c.jsonl --draws 99999999999999999999", "draws"),
            (f"{SFT} --seed 9999999999999 --steps 1 {out}", "seed"),
            ("r1 --seed 1e3", "--seed"), (f"generate {run_} --max-new-tokens 999999", "999999"),
            (f"generate {run_} --top-k 99999999999999999999999", "top_k"),
            ("distill --teacher sft --corpus texts/00.txt/c.jsonl", "texts/00.txt"),
            ("distill --teacher sft --corpus nano", "corpus"),
            ("tokenizer --data text:texts --vocab-size 300 --out talk.jsonl", "talk.jsonl"),
            ("hf --run nano --out talk.jsonl/x", "talk.jsonl"),
            ("hf --run nano --out /proc/no/x", "out = '/proc/no/x'"),
            (f"{TRAIN} --steps 1 --out /proc/no/x", "out = '/proc/no/x'"),
            ("lab.recall --out /proc/no/x", "out = "), ("lab.course --out talk.jsonl", "talk"),
            (f"{SFT} --steps 1 --out talk.jsonl/a/b", "talk.jsonl"),
            ("generate --run $'no\\nsuch'", "no"), ("generate --run 'no\nsuch'", "no"),
            (f"{TRAIN} --tokenizer 'no\nsuch' {out}", "no"),
            (f"{TRAIN} --data 'text:no\nsuch' {out}", "data"),
            (f"generate --run {'x' * 300}", "xxx"), (f"{TRAIN} --out {'x' * 300}", "out = "),
            (f"{TRAIN} --batch-size 1000000000000 --steps 1 {out}", ""),
            (f"{TRAIN} --n-layers 1000000 {out}", "n_layers"),
            (f"generate {run_} --max-new-tokens 1e3", "--max-new-tokens"),
            ("lab.bench --what nothing", "nothing"), ("r1 --preset v3", "v3"),
            ("solve --run sft --problems 1000000000000", "problems"),
            ("solve --run sft --task 'jsonl:texts'", "texts"),
            ("solve --run sft --task calculator:99", "calculator:99"),
            (f"{GRPO} --group 1 {out}", "group"),
            (f"{GRPO} --questions 1000000000000 --steps 1 {out}", "questions"),
            ("tokenizer --data text:texts --vocab-size 99999999999 --out made", "vocab_size", True),
    ):
        yield Case("one line", words, (right,), (), bool(more))
    damage = put("nano/checkpoints/step_000003/manifest.json", "[" * 100_000)
    for words, right, before, hook, listed in (
            (f"{TRAIN} --steps 1 {out}", "pip install matplotlib", (), absent("matplotlib"), True),
            ("solve --run sft --task gsm8k", "", (), absent("datasets"), True),
            (f"{TRAIN} --data text:rows.parquet {out}", "pip install pyarrow",
             (put("rows.parquet", b"PAR1"),), absent("pyarrow", "pyarrow.parquet"), True),
            (f"{TRAIN} --data hf:a/b {out}", "", (), absent("datasets", "huggingface_hub"), False),
            ("generate --run nano", "manifest.json", (damage,), None, True),
            ("generate --run hf", "config.json", (put("hf/config.json", "[" * 99_999),), None, 0),
            ("generate --run nano", "config.json", (put("nano/config.json", "[" * 9999),), None, 0),
            ("generate --run nano", "meta.json", (put("nano/tokenizer/meta.json", "{"),), None, 0),
            ("generate --run hf", "model.safetensors", (put("hf/model.safetensors", b"\xff" * 99),),
             None, True),
            ("generate --run hf", "model.safetensors", (put("hf/model.safetensors", b""),), None,
             False),
            ("generate --run hf", "tokenizer", (put("hf/tokenizer.json", "[]"),), None, False)):
        yield Case("one line", words, (right,), before, bool(listed), hook)


def full_disk() -> Iterator[Case]:
    """A disk that takes no more: the file, or the folder it is in, is named."""
    def small(size: int = 40_000) -> Callable[[], None]:
        import resource
        return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))

    def printed() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    for words, name, hook, listed in (
            (f"{TRAIN} --steps 1 --out made", "made", small(), True),
            (f"{TRAIN} --steps 1 --out made", "made", small(9_000), False),
            (f"{TRAIN} --steps 1 --out made", "made", small(1_000), False),
            (f"{SFT} --steps 1 --out made", "made", small(), False),
            (f"{GRPO} --steps 1 --out made", "made", small(), False),
            ("hf --run nano --out made", "made", small(), True),
            ("tokenizer --out made --data text:texts --vocab-size 300", "made", small(500), False),
            ("lab.course --out made", "made", small(5000), False),
            ("generate --run nano --max-new-tokens 9", "output", printed, False),
            ("evaluate --run nano", "output", printed, False),
            ("solve --run sft --problems 2", "output", printed, False),
            ("costs", "output", printed, False)):
        yield Case("full disk", words, (name,), (), listed, hook)


def silent() -> Iterator[Case]:
    """Runs whose files were changed, or which began wrongly: results would be wrong in silence."""
    yield resumed(3, "grpo", GRPO, True)
    yield resumed(2, "sft", SFT, False)
    yield resumed(3, "train", f"{TRAIN} --save-every 2", False)
    yield resumed(3, "more", TRAIN.replace("--preset nano", "--from nano").replace(
        "--tokenizer tok ", ""), False)
    yield resumed(2, "warm", TRAIN.replace("--preset nano", "--from nano --dsa warmup").replace(
        "--tokenizer tok ", ""), False)
    yield resumed(4, "both", f"{GRPO} --mode both --updates 2", False)
    more = f"train --resume --out nano --steps 5 {SMALL}"
    for change, listed in (
            (lambda n: [n[0], b"x" + n[1], *n[2:]], True),
            (lambda n: [n[0].replace(b'"step"', b'"stop"'), *n[1:]], True),
            (lambda n: [n[0], bytes([n[1][9] ^ 128]).join((n[1][:9], n[1][10:])), n[2]], True),
            (lambda n: [n[0].replace(b"loss\": ", b"loss\": 1"), *n[1:]], False),
            (lambda n: n[1:], False),
            (lambda n: [n[1], n[0], n[2]], False), (lambda n: [n[0], *n], False),
            (lambda n: [*n[:2], b"[1, 2]\n"], False), (lambda n: [b"\xef\xbb\xbf", *n], False),
            (lambda n: [], False), (lambda n: [*n[:2], n[2][:9] + b"\n"], False)):
        yield Case("metrics", more, ("metrics.jsonl",), (lines("nano/metrics.jsonl", change),),
                   listed)
    file = "nano/config.json"
    for words, change, listed in (
            ("generate --run nano", edit(file, model__rope_theta=14000.0), True),
            ("generate --run nano", put(file, ""), True),
            ("generate --run nano", put(file, "[]"), True),
            (f"{SFT} --out made", edit(file, model__rope_theta=...), True),
            ("generate --run nano", edit(file, model__colour="red"), True),
            ("generate --run nano", edit(file, model__n_heads=8), True),
            (f"{SFT} --out made", edit(file, model__route_scale=2.0), False),
            ("evaluate --run nano", edit(file, model__n_activated_experts=1), False),
            ("hf --run nano --out made", edit(file, model__norm_eps=0.1), False),
            ("generate --run nano", edit(file, model__score_func="softmax"), False),
            ("generate --run nano/checkpoints/step_000003", edit(file, model__mscale=2.0), False),
            ("evaluate --run nano", edit(file, train__data="text:other"), False),
            (more, edit(file, train__lr=1.0), False), (more, edit(file, train__beta1=0.5), False),
            (f"{TRAIN} --from nano --out made".replace("--preset nano", "").replace(
                "--tokenizer tok", ""), edit(file, model__rope_factor=2.0), False),
            ("generate --run nano", put(file, b"\xff\xfe"), False),
            (f"grpo --resume --out sft --steps 9 {SMALL}", edit("sft/config.json", seal=1), False)):
        yield Case("config", words, ("config.json",), (change,), bool(listed))
    for line, right, listed in (
            (talk(reasoning_content="one and two"), works(), True), (talk(tool_calls=[]), 0, True),
            (talk(reasoning="one and two"), 0, False), (talk(thinking="hm"), 0, False),
            (talk(name="Bo"), 0, False), (talk(thought="a", reasoning_content="b"), 0, False),
            (talk(thought=3), 0, False), (talk(content=None), 0, False),
            (talk(content=["3"]), 0, False), (talk(role="teacher"), 0, False)):
        yield Case("conversations", TALK, right or ("talk.jsonl", "line 2"),
                   (put("talk.jsonl", talk() + line),), listed)
    for first, second, listed in ((TRAIN, TRAIN, True), (SFT, SFT, False), (GRPO, SFT, False),
                                  (SFT, f"{TRAIN} --resume", False)):
        yield Case("lock", f"{second} --out made --steps 3", refused_beside, (beside(first),),
                   listed)


def stuck() -> Iterator[Case]:
    """Programs that were killed, or told to stop, and begin again."""
    tokenizer, export = (HOME[0].replace("--out tok", "--out made"), "hf --run nano --out made")
    train, sft = f"{TRAIN} --out made --steps 2", f"{SFT} --out made --steps 2"
    yield again(train, " --resume", "os.rename", 1, True)
    yield again(tokenizer, "", "os.rename", 1, True)
    yield again(sft, " --resume", "os.rename", 1, True)
    for number in (2, 3, 5, 8):
        yield again(train, " --resume", "os.rename", number)
        yield again(sft, " --resume", "os.rename", number)
    yield again(tokenizer, "", "os.rename", 2)
    yield again(export, " --overwrite", "os.rename", 1)
    yield again(f"{GRPO} --out made --steps 2", " --resume", "os.rename", 4)
    yield again(train, " --resume", "os.mkdir", 3)
    for number, status in ((signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        yield signalled(number, status, TRAIN, number == signal.SIGHUP)
        yield signalled(number, status, SFT)
    yield signalled(signal.SIGHUP, 129, GRPO)
    yield deaf(TRAIN, ("out",), True)
    yield deaf(SFT, ("out",))
    yield deaf(TRAIN, ("out", "err"))
    for name, listed in (("a b", True), ("$(touch x)", True), ("it's", False), ("a;b", False),
                         ("a&b", False), ("~", False), ("*", False)):
        yield quoted(name, TRAIN, listed)
    yield quoted("a b", SFT)
    for words, right, listed in (
            (f"{SFT} --out made --max-new-tokens 10000", "max_new_tokens", True),
            (f"train --resume --out nano --steps 2 {SMALL}", "steps", True),
            (f"sft --resume --out sft --steps 1 {SMALL}", "steps", False),
            (f"{GRPO} --out made --max-new-tokens 9999", "max_new_tokens", False),
            (f"{TRAIN} --out made --prompt '{'long ' * 300}'", "prompt", False),
            (f"{SFT} --out made --seq-len 9999", "seq_len", False),
            (f"train --resume --out nano --steps 9 --batch-size 3 {SMALL}", "batch_size", False),
            (f"{TRAIN} --out made --eval-tokens 64 --seq-len 250 --data text:texts/00.txt",
             "seq_len", False)):
        yield Case("told late", words, (right,), (), listed)


def files() -> Iterator[Case]:
    """Files as other programs write them."""
    odd = "\u2028 \u0085 \x1c 3"
    solve = "solve --run sft --task jsonl:ask.jsonl --problems 2 --max-new-tokens 4 --threads 1"
    text = f"{TRAIN} --out made --steps 1".replace("text:texts", "text:rows.jsonl")
    rows = "".join(json.dumps(dict(text=t), ensure_ascii=False) + "\n" for t in texts())
    for words, name, content, right, listed in (
            (TALK, "talk.jsonl", talk(content=odd), works(), True),
            (solve, "ask.jsonl", QUESTIONS + ask(odd, "3"), works(), True),
            (text, "rows.jsonl", rows.replace("cat", odd.replace("\x1c", "")), works(), False),
            (TALK, "talk.jsonl", "\ufeff" + talk(), works(), True),
            (solve, "ask.jsonl", "\ufeff" + QUESTIONS, works(), True),
            (text, "rows.jsonl", "\ufeff" + rows, works(), True),
            (TALK, "talk.jsonl", talk().replace("\n", "\r\n"), works(), False),
            (solve, "ask.jsonl", QUESTIONS.replace("\n", "\r\n"), works(), False),
            (text, "rows.jsonl", rows.replace("\n", "\r\n").rstrip(), works(), False)):
        yield Case("jsonl", words, right, (put(name, content),), listed)
    for words, name, good in ((TALK, "talk.jsonl", talk()), (text, "rows.jsonl", rows),
                              (solve, "ask.jsonl", QUESTIONS)):
        for bad in (b'{"a": "\xff"}', b"[" * 99_999, b'{"messages": 3, "text": 3}', b"9" * 9999,
                    b"[null]", b'{"text": ["a"], "messages": {}}'):
            where = f"line {good.count(chr(10)) + 1}" if bad[1:2] != b'"' else ""
            yield Case("jsonl", words, (name, where),
                       (put(name, good.encode() + bad + b"\n"),), bad[:1] == b"[")
    parquet = f"{TRAIN} --out made --steps 1".replace("text:texts", "text:rows.parquet")
    for make, right, listed in (
            ("pa.table(dict(text=pa.array(found).dictionary_encode()))", works(), True),
            ("pa.table(dict(text=pa.array(found, pa.large_string())))", works(), False),
            ("pa.table(dict(text=pa.array(found, pa.large_string()).dictionary_encode()))",
             works(), False),
            ("pa.table(dict(text=pa.chunked_array([found[:9], found[9:]]), n=range(90)))",
             works(), False),
            ("pa.table(dict(text=pa.array([None, *found])))", works(), False),
            ("pa.table(dict(text=pa.array([[t] for t in found])))", ("rows.parquet",), False),
            ("pa.table(dict(text=pa.array(range(99))))", ("rows.parquet",), False),
            ("pa.table(dict(text=pa.array([t.encode() for t in found])))", ("rows.parquet",), 0)):
        yield tables(make, parquet, right, bool(listed))
    file, show = "hf/config.json", "hf --folder hf"
    for words, change, right, listed in (
            (show, edit(file, n_group=None), works(), True),
            ("generate --run hf", edit(file, eos_token_id=[1, 2]), works(), True),
            (show, edit(file, num_nextn_predict_layers=0), works(), True),
            (show, edit(file, topk_group=None), works(), False),
            (show, edit(file, n_group=None, topk_group=None), works(), False),
            (show, edit(file, rope_scaling=None), works(), False),
            (show, edit(file, torch_dtype="float32", dtype="float32"), works(), False),
            (show, edit(file, transformers_version=None, pad_token_id=None), works(), False),
            (show, edit(file, rope_theta=10000), works(), False),
            (show, edit(file, attention_bias=None), works(), False),
            (show, edit(file, hidden_act="gelu"), ("hidden_act",), False),
            (show, edit(file, attention_bias=True), ("attention_bias",), False),
            (show, edit(file, hidden_size="64"), ("hidden_size",), False),
            ("generate --run hf", edit(file, eos_token_id="1"), ("eos_token_id",), False)):
        yield Case("hf spellings", words, right, (change,), listed)
    for words, change, right, listed in (
            ("generate --run hf", edit(file, num_hidden_layers=10**6), file, True),
            ("generate --run hf", edit(file, n_routed_experts=10**9), file, True),
            ("generate --run hf", edit(file, vocab_size=10**12), "", False),
            ("generate --run hf", edit(file, hidden_size=2**40), "", False),
            ("generate --run hf", edit(file, num_attention_heads=2**31), "", False),
            ("generate --run nano", edit("nano/config.json", model__n_layers=10**6), "config", 0),
            ("generate --run nano", lines("nano/tokenizer/ranks.tiktoken", lambda n: [
                *n[:-1], n[-1].split()[0] + b" 1000000000\n"]), "tokenizer", True),
            ("generate --run hf", put("hf/model.safetensors", (2**60).to_bytes(8, "little") * 9),
             "model.safetensors", False),
            ("train --preset v3 --data text:texts --out made", lambda: None, "GiB", False),
            ("lab.bench --what train --preset v3", lambda: None, "GiB", True)):
        yield Case("sizes", words, (right,), (change,), bool(listed))
    yield tables("pa.table(dict(text=['x' * 65_536] * 99_999))", parquet, ("rows.parquet",), True)
    for name, target, listed in (("tokenizer_config.json", "/etc/passwd", True),
                                 ("tokenizer.json", "/etc/hostname", False),
                                 ("generation_config.json", "/etc/passwd", False),
                                 ("config.json", "../nano/config.json", False),
                                 ("special_tokens_map.json", "/etc/passwd", False)):
        yield Case("links", "hf --folder hf --out made", lambda end: end.status == 2 and len(
            end.err.splitlines()) == 1 or not end.status and not any(
                b"root:" in f.read_bytes() for f in (end.folder / "made").iterdir()),
            (partial(shutil.move, f"hf/{name}", "old")
             if name != "special_tokens_map.json" else (lambda: None),
             partial(os.symlink, target, f"hf/{name}")), listed)
    yield located(f"{TRAIN} --out made --steps 2", True)
    yield located(f"{SFT} --out made --steps 1")
    yield located("generate --run nano --max-new-tokens 8 --prompt 'héllo 日本'")
    yield located(f"{TRAIN} --out wörld --steps 1 --prompt 日本")
    for bad in ("hello", 3, None, ["user"], [], True):
        yield Case("messages", TALK, ("talk.jsonl", "line 1"), (put("talk.jsonl", json.dumps(
            dict(messages=[bad, {"role": "assistant", "content": "3"}])) + "\n"),), bad == "hello")


def cases() -> list[Case]:
    """Return all instances."""
    parts = silent, rewards, temperatures, stuck, files, one_line, full_disk
    return [case for part in parts for case in part()]
