"""The program `python -m minids.costs`: published figures are printed, mistakes are named."""

import re
import subprocess
import sys

import pytest

from minids import ModelArgs
from minids.base.tables import format_table
from minids.costs.__main__ import main, scaled


def printed(capsys, *argv: str) -> str:
    main(list(argv))
    return capsys.readouterr().out


# What the papers, the hub and the exact arithmetic say, as the program must print it.
FIGURES = {
    "v3": """671,026,419,200 37,552,297,472 36,625,618,432 35,698,939,392 11,610,068,224
        13,463,426,304 684,489,845,504 684,531,386,000 680,571,043,840 3,918,786,560 41,555,600
        41,540,496 250,463,511,552 250.46 81,920 278,528 70,272 3,997,696 56.89 656 2,048
        2,668,230 54.3 2,664,000 119,000 5,000 2,788,000 5,328,000 238,000 10,000 5,576,000
        180,000 3.7 385.8 39.0% 3,273,261,056""",
    "v3.2": """671,877,944,064 38,403,822,336 37,477,143,296 685,355,329,792 685,396,921,376
        851,524,864 16,384 70,272 15,616 656 132""",
    "v2": "235,741,434,880 21,375,800,320 20,851,512,320 69,120",
    "v2-lite": "15,706,484,224 2,661,150,208 2,451,435,008 31,104",
    "moonlight": "15,960,110,208 2,914,776,192 2,579,231,872",
    "kimi-k2": "1,026,408,232,448 32,861,500,928 31,687,095,808",
}


@pytest.mark.parametrize("name", FIGURES)
def test_published_figures_are_printed(name, capsys):
    words = printed(capsys, "--preset", name).replace(";", " ").split()
    assert [figure for figure in FIGURES[name].split() if figure not in words] == []


def test_long_request_is_printed_in_gib(capsys):
    assert 576 * 2 * 62 * 131_072 / 2 ** 30 == pytest.approx(8.72, abs=0.005)
    row, = (line for line in printed(capsys, "--preset", "v3").splitlines() if "62 layers" in line)
    assert row.split()[-3:] == ["1.02", "8.72", "GiB"]


def test_flags_change_the_plan(capsys):
    text = printed(capsys, "--preset", "v3.2", "--seq-len", "131072", "--gpus", "8", "--gpu", "X9",
                   "--gpu-memory", "141", "--gpu-price", "3.5", "--mfu", "0.3", "--tokens", "1e9")
    for words in ("FLOPs per token, 131,072 tokens", "8 X9: pipeline", "does not fit into",
                  "141 GB", "30.0% of 989.5 TFLOPS", "3.5 USD an hour", "1,000,000,000 tokens"):
        assert words in text
    assert "as published" not in text and "API workload" not in text


def test_workload_is_priced_at_given_prices_or_at_the_measured_cost(capsys):
    workload = ["--prompt-tokens", "1000000", "--cached-tokens", "500000", "--output-tokens", "10"]
    text = printed(capsys, "--preset", "v3.2", *workload)
    assert "DSA (V3.2-Exp), cost at position 128K" in text and "0.1900" in text
    text = printed(capsys, "--preset", "v3.2", *workload, "--prompt-price", "3")
    assert "at the given prices" in text and "1.5000" in text and "V3.2-Exp" not in text


@pytest.mark.parametrize("name", ModelArgs.presets())
def test_every_preset_has_a_table_that_fits_the_page(name, capsys):
    lines = printed(capsys, "--preset", name).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)
    assert any("  indexer" in line for line in lines) == ModelArgs.preset(name).has_indexer


def test_table_is_aligned_and_exact():
    table = format_table([("a", "total", "active"), ("long label", 1234567, ""), ("b", 1, 22)])
    assert table.splitlines() == ["a               total  active",
                                  "long label  1,234,567",
                                  "b                   1      22"]
    noted = format_table([("a", 1), "a line that is longer than the table", ("b", 2000)])
    assert noted.splitlines() == ["a      1", "a line that is longer than the table", "b  2,000"]
    with pytest.raises(ValueError):
        format_table([("a", 1), ("b",)])


def test_attention_has_a_column_for_each_form_and_a_row_for_each_context(capsys):
    lines = printed(capsys, "--preset", "v3.2").splitlines()
    head, = (line for line in lines if line.startswith("FLOPs of attention"))
    assert " ".join(head.split()[-5:]) == "dense, naive dense, absorbed DSA"
    assert [line.split()[0] for line in lines if "keys, all layers" in line] == [
        "2,048", "4,096", "8,192", "32,768", "131,072"]


@pytest.mark.parametrize("amount, step, text", [
    (640, 1000, "640.00 B"), (70_272, 1000, "70.27 KB"), (9_361_686_528, 1024, "8.72 GiB"),
    (1, 1024, "1.00 B"), (2e21, 1000, "2000000.00 PB"), (999, 1000, "999.00 B"),
    (1000, 1000, "1.00 KB"), (1000, 1024, "1000.00 B"), (1024, 1024, "1.00 KiB"),
    (1e15, 1000, "1.00 PB")])
def test_scaled_amounts(amount, step, text):
    assert scaled(amount, "B", step) == text


def test_table_of_a_changed_preset(capsys):
    main(["--preset", "v3", "--n-layers", "62"])
    text = capsys.readouterr().out
    assert "v3, n_layers = 62" in text
    assert f"{671_026_419_200 + 11_507_286_272:,}" in text


@pytest.mark.parametrize("argv, complaint", [
    (["--preset", "v33"], "did you mean 'v3'?"),
    (["--seq-len", "-1"], "seq_len = -1 is not valid: it must be 0 or more"),
    (["--n-layers", "2"], "n_dense_layers = 3 is not valid"),
    (["--tokens", "0"], "tokens = 0.0 is not valid: it must be above 0"),
    (["--mfu", "39"], "mfu = 39.0 is not valid: it must be above 0 and at most 1"),
    (["--gpu-memory", "0"], "gpu_memory = 0.0 is not valid: it must be above 0"),
    (["--gpu-price", "-1"], "gpu_price = -1.0 is not valid: it must be 0 or more"),
    (["--output-price", "-1"], "output_price = -1.0 is not valid: it must be 0 or more"),
    (["--cached-tokens", "1"], "cached_tokens = 1 is not valid"),
    (["--gpus", "0"], "gpus = 0 is not valid: it must be at least 1"),
    (["--pipeline", "7"], "pipeline = 7 is not valid: it must be a divisor of 2048 GPUs"),
])
def test_bad_settings_are_named(argv, complaint, capsys):
    with pytest.raises(ValueError) as error:
        main(argv)
    assert complaint in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
@pytest.mark.parametrize("name, total", [
    ("v3", "671,026,419,200"), ("v3.2", "671,877,944,064"), ("kimi-k2", "1,026,408,232,448")])
def test_program_needs_neither_torch_nor_memory_nor_time(name, total):
    """Two gigabytes of address space and five seconds of a core for the largest models."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); "
            "resource.setrlimit(resource.RLIMIT_CPU, (5, 5)); "
            f"from minids.costs.__main__ import main; main(['--preset', '{name}']); "
            "sys.exit('torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert total in run.stdout


def test_every_part_of_the_memory_has_its_row(capsys):
    main(["--preset", "v3"])
    rows = capsys.readouterr().out.split("Training memory")[1].splitlines()
    for part in ("weights", "gradients", "optimizer", "activations, "):
        assert sum(row.strip().startswith(part) for row in rows) == 1, part


def test_models_without_modules_have_no_table_of_drafts(capsys):
    main(["--preset", "moonlight"])
    assert "Drafts" not in capsys.readouterr().out
    main(["--preset", "v3", "--acceptance", "0.9"])
    assert "Drafts, 90% accepted" in capsys.readouterr().out
    with pytest.raises(ValueError, match="acceptance = 1.5"):
        main(["--acceptance", "1.5"])


# Tables of which each row stands for a step of a loop or an entry of a list.
ROWS = {
    "Cache": """MLA, BF16 70,272 1.00 8.58 GiB
        MHA, as many heads, BF16 3,997,696 56.89 488.00 GiB
        GQA, 8 groups, BF16 249,856 3.56 30.50 GiB
        MQA, BF16 31,232 0.44 3.81 GiB
        MLA, BF16, 62 layers with MTP 71,424 1.02 8.72 GiB
        MLA, FP8, 656 a layer 40,016 0.57 4.88 GiB""",
    "Drafts": """1 draft, batch 1 1.85 1.54 + 0.05 1.16
        1 draft, batch 8 1.85 1.70 + 0.04 1.07
        1 draft, batch 64 1.85 1.13 + 0.02 1.61
        1 draft, batch 256 1.85 1.00 + 0.02 1.82
        2 drafts, batch 1 2.57 2.06 + 0.11 1.19
        2 drafts, batch 8 2.57 2.24 + 0.07 1.11
        2 drafts, batch 64 2.57 1.14 + 0.04 2.17
        2 drafts, batch 256 2.57 1.00 + 0.04 2.48""",
    "Training bill": """250.46 GFLOPs a token; 39.0% of 989.5 TFLOPS; 2 USD an hour for each of \
2,048 H800
        14,800,000,000,000 tokens 2,668,230 5,336,460 54.3
        each 1T of tokens 180,286 360,572 3.7""",
    "V3's bill": """pre-training 2,664,000 5,328,000
        context extension 119,000 238,000
        post-training 5,000 10,000
        all 2,788,000 5,576,000
        pre-training, each 1T of tokens 180,000 360,000 3.7
        pre-training ran at
        386.5 TFLOPS, 39.1% of the peak, as counted here
        385.8 TFLOPS, 39.0% of the peak, at the paper's 250 GFLOPs"""}


def test_every_row_of_v3s_tables_is_printed(capsys):
    tables = re.split(r"\n\n(?=\S)", printed(capsys, "--preset", "v3"))
    for title, wanted in ROWS.items():
        [rows] = (table.splitlines()[1:] for table in tables if table.startswith(title))
        assert [" ".join(row.split()) for row in rows] == [
            row.strip() for row in wanted.splitlines()], title
