"""Settings: presets are the published models, and every mistake is told in one useful line."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields, replace

import pytest

from minids.base.command_line import flag_of, parse
from minids.base.fields import bounds, option
from minids.config import ModelArgs
from minids.runs.settings import TRAIN_PRESETS, TrainArgs

NAMES = ("vocab_size dim n_layers n_dense_layers inter_dim moe_inter_dim n_routed_experts "
         "n_shared_experts n_activated_experts n_expert_groups n_limited_groups score_func "
         "route_scale gate_bias n_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
         "qk_rope_head_dim v_head_dim rope_theta norm_eps n_mtp_layers max_seq_len "
         "index_n_heads index_head_dim index_topk").split()
DENSE = (0, 32, 128)  # no indexer; the other two then have no meaning
# As published: V2 (arXiv 2405.04434) section 3.1 and appendix B, V3 (arXiv 2412.19437) section
# 4.2, and the configuration files of the released weights.
PUBLISHED = {
    "v2-lite": (102400, 2048, 27, 1, 10944, 1408, 64, 2, 6, 1, 1, "softmax", 1.0, False, 16, 0,
                512, 128, 64, 128, 10000.0, 1e-6, 0, 163840, *DENSE),
    "v2": (102400, 5120, 60, 1, 12288, 1536, 160, 2, 6, 8, 3, "softmax", 16.0, False, 128, 1536,
           512, 128, 64, 128, 10000.0, 1e-6, 0, 163840, *DENSE),
    "v3": (129280, 7168, 61, 3, 18432, 2048, 256, 1, 8, 8, 4, "sigmoid", 2.5, True, 128, 1536,
           512, 128, 64, 128, 10000.0, 1e-6, 1, 163840, *DENSE),
    "v3.2": (129280, 7168, 61, 3, 18432, 2048, 256, 1, 8, 8, 4, "sigmoid", 2.5, True, 128, 1536,
             512, 128, 64, 128, 10000.0, 1e-6, 1, 163840, 64, 128, 2048),
    "moonlight": (163840, 2048, 27, 1, 11264, 1408, 64, 2, 6, 1, 1, "sigmoid", 2.446, True, 16, 0,
                  512, 128, 64, 128, 50000.0, 1e-5, 0, 8192, *DENSE),
    "kimi-k2": (163840, 7168, 61, 1, 18432, 2048, 384, 1, 8, 1, 1, "sigmoid", 2.827, True, 64,
                1536, 512, 128, 64, 128, 50000.0, 1e-6, 0, 131072, *DENSE),
}
# preset: (YaRN on, rope_factor, original_seq_len, mscale); the last three matter where it is on
STRETCHED = {"v2-lite": (True, 40.0, 4096, 0.707), "v2": (True, 40.0, 4096, 0.707),
             "v3": (True, 40.0, 4096, 1.0), "v3.2": (True, 40.0, 4096, 1.0),
             "kimi-k2": (True, 32.0, 4096, 1.0),
             "moonlight": (False,)}


def deviations(args: ModelArgs, published: tuple) -> list[str]:
    """The fields in which a configuration is not the published one."""
    return [name for name, value in zip(NAMES, published, strict=True)
            if getattr(args, name) != value]


@pytest.mark.parametrize("name", ModelArgs.presets())
def test_every_preset_builds_and_survives_a_change(name):
    args = ModelArgs.preset(name)
    assert replace(args, n_mtp_layers=0).dim == args.dim
    assert all(type(getattr(args, f.name)) is f.type for f in fields(args))


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_presets_have_the_published_dimensions(name):
    args = ModelArgs.preset(name)
    assert deviations(args, PUBLISHED[name]) == []
    stretch = (args.yarn, args.rope_factor, args.original_seq_len, args.mscale)
    assert stretch[:len(STRETCHED[name])] == STRETCHED[name]


def test_every_released_preset_is_in_the_table_and_a_wrong_one_is_caught():
    own = {"tiny", "deep", "nano", "micro", "small"}
    assert set(PUBLISHED) == set(STRETCHED) == set(ModelArgs.presets()) - own
    wrong = replace(ModelArgs.preset("v3"), route_scale=1.0, n_limited_groups=3)
    assert deviations(wrong, PUBLISHED["v3"]) == ["n_limited_groups", "route_scale"]


def test_layers_and_yarn_follow_from_the_fields():
    args = ModelArgs.preset("v3")
    assert [args.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert not replace(args, n_routed_experts=0).is_moe_layer(60)
    assert args.qk_head_dim == 192
    lengths = (4095, 4096, 4097)  # on exactly above original_seq_len
    assert [replace(args, max_seq_len=n).yarn for n in lengths] == [False, False, True]


# changes to the default configuration, the field to blame, what the message must say is valid
MISTAKES = [
    (dict(qk_rope_head_dim=7), "qk_rope_head_dim", "even"),
    (dict(n_dense_layers=5), "n_dense_layers", "at most n_layers = 4"),
    (dict(n_layers=4.0), "n_layers", "of type int"),
    (dict(dim="wide"), "dim", "of type int"),
    (dict(dim=True), "dim", "of type int"),
    (dict(gate_bias=1), "gate_bias", "of type bool"),
    (dict(score_func="tanh"), "score_func", "one of sigmoid, softmax"),
    (dict(moe_inter_dim=0), "moe_inter_dim", "at least 1"),
    (dict(n_expert_groups=3), "n_expert_groups", "a divisor of n_routed_experts = 8"),
    (dict(n_expert_groups=0), "n_expert_groups", "a divisor of n_routed_experts = 8"),
    (dict(n_limited_groups=2), "n_limited_groups", "between 1 and n_expert_groups = 1"),
    (dict(n_activated_experts=9), "n_activated_experts", "between 1 and 8"),
    (dict(n_activated_experts=0), "n_activated_experts", "between 1 and 8"),
    # Two experts live in one of four groups: the third can never be chosen.
    (dict(n_expert_groups=4, n_activated_experts=3), "n_activated_experts", "between 1 and 2"),
    # V3 scores a group by its best two experts, so a group of one has no score.
    (dict(n_expert_groups=8, n_limited_groups=2), "n_expert_groups", "two experts or more"),
    (dict(index_n_heads=4, index_head_dim=8), "index_head_dim", "qk_rope_head_dim = 16 or more"),
    (dict(index_n_heads=4, index_head_dim=24, index_hadamard=True), "index_head_dim", "power of"),
]


TRAINING_MISTAKES = [
    (dict(constant_until=0.9, decay_until=0.5), "decay_until", "constant_until = 0.9 or more"),
    (dict(batch_size=8, grad_accum=3), "grad_accum", "a divisor of batch_size = 8"),
    (dict(batch_start=9), "batch_start", "at most batch_size = 8"),
    (dict(optimizer="sgd"), "optimizer", "one of adamw, muon"),
]


def says_all(message: str, field: str, value, valid: str) -> bool:
    """One line that names the field, its value and what is valid."""
    return message.startswith(f"{field} = {value!r} ") and valid in message and "\n" not in message


@pytest.mark.parametrize("changes, field, valid", MISTAKES)
def test_a_mistake_names_field_value_and_what_is_valid(changes, field, valid):
    with pytest.raises(ValueError) as caught:
        replace(ModelArgs(), **changes)
    value = changes.get(field, getattr(ModelArgs(), field))
    assert says_all(str(caught.value), field, value, valid)


@pytest.mark.parametrize("changes, field, valid", TRAINING_MISTAKES)
def test_a_mistake_in_training_settings_does_too(changes, field, valid):
    with pytest.raises(ValueError) as caught:
        TrainArgs(**changes)
    assert says_all(str(caught.value), field, changes[field], valid)


def test_every_preset_has_training_settings():
    assert set(TRAIN_PRESETS) <= set(ModelArgs.presets())
    for name in ModelArgs.presets():
        args = TrainArgs.for_preset(name, seed=7)
        assert (args.preset, args.seed) == (name, 7)
        assert replace(args, **TRAIN_PRESETS.get(name, {})) == args


def test_a_message_that_leaves_something_out_is_caught():
    told = "n_heads = 0 is not valid: it must be at least 1"
    assert says_all(told, "n_heads", 0, "at least 1")
    for wrong in ("n_heads is not valid", "n_heads = 0 is bad", "it must be at least 1",
                  told.replace(":", ":\n")):
        assert not says_all(wrong, "n_heads", 0, "at least 1")


def test_valid_corners_are_accepted():
    replace(ModelArgs(), n_expert_groups=4, n_limited_groups=2, n_activated_experts=4)
    replace(ModelArgs(), n_expert_groups=8, n_limited_groups=2, gate_bias=False)  # groups of one
    replace(ModelArgs(), n_routed_experts=0, n_activated_experts=9)  # dense: experts unread
    assert replace(ModelArgs(), rope_theta=50000).rope_theta == 50000.0  # an int is a float too


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        ModelArgs().dim = 3


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError) as caught:
        ModelArgs.preset("tinny")
    message = str(caught.value)
    assert "'tinny'" in message and "did you mean 'tiny'?" in message and "\n" not in message
    assert all(name in message for name in ModelArgs.presets())
    with pytest.raises(ValueError, match="preset 'qwertyuiop' is unknown: valid are"):
        ModelArgs.preset("qwertyuiop")


@dataclass
class Recipe:
    """How to bake."""

    minutes: int = option(40, "time in the oven, minutes")
    heat: float = option(180.0, "temperature, degrees; 100% is 250")
    tin: str = option("", "path of the tin")
    fan: bool = option(False, "whether the fan turns")
    grain: str = option("rye", "what the flour is made of", ("rye", "wheat"))


def test_parse_returns_only_the_flags_that_were_given():
    given = parse("x", "Bake.", Recipe, ModelArgs,
                  argv="--minutes 5 --fan --grain wheat --n-heads 2 --gate-bias off".split())
    assert given == [dict(minutes=5, fan=True, grain="wheat"), dict(n_heads=2, gate_bias=False)]
    assert parse("x", "Bake.", Recipe, argv=[]) == [{}]


@pytest.mark.parametrize("argv, words", [
    ("--minuts 5", ["unknown flag --minuts", "did you mean '--minutes'?"]),
    ("--n-head 2", ["unknown flag --n-head", "did you mean '--n-heads'?"]),
    ("--min 5", ["unknown flag --min"]),  # an abbreviation is a guess
    ("--zzzzz", ["unknown flag --zzzzz", "--help lists them all"]),
    ("--minutes soon", ["--minutes", "'soon'", "int"]),
    ("--minutes", ["--minutes", "expected one argument"]),
    ("--grain oats", ["--grain", "'oats'", "rye", "wheat"]),
    ("--fan perhaps", ["--fan", "'perhaps' is neither true nor false"]),
])
def test_a_wrong_flag_is_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("bakery", "Bake.", Recipe, ModelArgs, argv=argv.split())
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("python -m bakery: ") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_the_stages_of_sparse_attention_are_the_papers():
    """V3.2 (arXiv 2512.02556) section 2.1.1: learning rates, steps, and the tokens they make."""
    warm, sparse = (TrainArgs.for_preset("v3.2", from_run="x", dsa=s) for s in ("warmup", "sparse"))
    tokens = [args.steps * args.batch_size * args.seq_len for args in (warm, sparse)]
    assert tokens == [2_097_152_000, 943_718_400_000]
    assert (warm.indexer_lr, sparse.indexer_lr, sparse.lr) == (1e-3, 7.3e-6, 7.3e-6)
    assert warm.warmup_steps == 0 and warm.constant_until == 1.0  # one rate is all that is stated
    assert TrainArgs.for_preset("v3", from_run="x", dsa="warmup").indexer_lr == 1e-3
    assert TrainArgs.for_preset("v3").indexer_lr == TrainArgs.indexer_lr  # no stage without --from


def test_a_run_after_another_keeps_its_settings_but_for_the_stages():
    before = vars(TrainArgs.for_preset("tiny", batch_size=6, lr=1.0, steps=7, seed=3))
    before = {k: v for k, v in before.items() if k not in ("preset", "dsa", "from_run")}
    after = TrainArgs.for_preset("tiny", before, from_run="x", muon_lr=2.0)
    assert (after.batch_size, after.seed, after.muon_lr) == (6, 3, 2.0)
    assert (after.lr, after.steps) == (5e-4, 200) and after.warmup_steps == 0
    # The dense model that a sparse one is compared with learns by the same settings.
    sparse = TrainArgs.for_preset("tiny", before, from_run="x", muon_lr=2.0, dsa="sparse")
    assert replace(sparse, dsa="") == after


def test_stages_need_a_model_to_begin_with():
    for dsa in ("warmup", "sparse"):
        with pytest.raises(ValueError, match=f"dsa = '{dsa}' is not valid: .*--from"):
            TrainArgs(dsa=dsa)
    with pytest.raises(ValueError, match="dsa = 'warm' .* one of , warmup, sparse"):
        TrainArgs(dsa="warm", from_run="x")


TINY = TrainArgs.for_preset("tiny")


def undocumented(text: str, cls) -> list[str]:
    """Fields whose meaning (with unit) or default a help text lacks."""
    entries, flag = {}, ""  # flag -> its words, which start on its own line or on the next
    for line in text.splitlines():
        words = line.split()
        flag = words[0] if words and words[0].startswith("--") else flag if words else ""
        entries[flag] = f"{entries.get(flag, '')} {' '.join(words)}"
    faults = []
    for f in fields(cls):
        told = entries.get(flag_of(f), "")
        default = f.default if f.default != "" else "none"
        if cls is TrainArgs and getattr(TINY, f.name) != f.default:
            default = f"{default}; tiny: {getattr(TINY, f.name)}"
        valid = f"; {bounds(f)}" if bounds(f) else ""
        if f"{f.metadata['help']}{valid} [{default}]" not in told:
            faults.append(f.name)
    return faults


def test_help_opens_with_the_docstring_and_shows_unit_and_default_of_every_flag(
        capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    with pytest.raises(SystemExit) as caught:
        parse("bakery", "Bake bread.\n\n    python -m bakery", Recipe, ModelArgs, TrainArgs,
              argv=["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Bake bread.\n\n    python -m bakery\n" in text and "How to bake:" in text
    assert [undocumented(text, cls) for cls in (Recipe, ModelArgs, TrainArgs)] == [[], [], []]
    assert undocumented(text.replace("[40]", ""), Recipe) == ["minutes"]
    assert undocumented(text.replace(", degrees", ""), Recipe) == ["heat"]


PROGRAM = """
from minids.config import ModelArgs
from minids.base.command_line import run_program
run_program("bakery", lambda: {body})
"""


@pytest.mark.parametrize("body, status, err", [
    ("ModelArgs(n_heads=0)", 2,
     "python -m bakery: n_heads = 0 is not valid: it must be at least 1\n"),
    ("ModelArgs.preset('v33')", 2, "python -m bakery: preset 'v33' is unknown: did you mean"),
    ("open('/no/such/file')", 2, "python -m bakery: [Errno 2] No such file or directory"),
    ("None", 0, ""),
    ("3", 3, ""),
])
def test_a_program_ends_with_one_line_and_a_status(body, status, err):
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True,
                         text=True)
    assert run.returncode == status and run.stdout == ""
    assert run.stderr.startswith(err) and run.stderr.count("\n") == bool(err)


def test_a_bug_of_ours_keeps_its_traceback():
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(body="1 / 0")], capture_output=True,
                         text=True)
    assert run.returncode == 1 and "ZeroDivisionError" in run.stderr
