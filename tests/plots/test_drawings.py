"""The drawings follow the settings; nothing in them overlaps, crosses a word or leaves the page."""

import json
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from itertools import combinations, product
from pathlib import Path

import pytest
from matplotlib.image import imread
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.transforms import Bbox

from minids import ModelArgs
from minids.plots import (
    drawing,
    drawn_attention,
    drawn_experts,
    drawn_model,
    drawn_training,
    drawn_work,
    style,
)

MODELS = {name: ModelArgs.preset(name) for name in ("tiny", "v2-lite", "v3", "v3.2")}
DRAWINGS = {
    "model": drawn_model.model_drawing, "attention": drawn_attention.attention_drawing,
    "mla": drawn_attention.mla_drawing,
    "dsa": drawn_attention.dsa_drawing, "moe": drawn_experts.moe_drawing,
    "mtp": drawn_work.mtp_drawing, "fp8": drawn_work.fp8_drawing,
    "tokens": drawn_work.tokens_drawing, "training": drawn_training.training_drawing,
    "ranks": drawn_training.ranks_drawing}
CASES = [*product(DRAWINGS, MODELS)]
PIXEL = 1.5  # at 100 dots per inch: a page is 800 pixels wide


def draw(name: str, model: str, **options):
    """Return one drawing of one model, which gets an indexer where the drawing needs one."""
    args = MODELS[model]
    if name == "dsa" and not args.has_indexer:
        args = replace(args, index_n_heads=4, index_head_dim=64)
    return DRAWINGS[name](args, **options)


def texts(figure) -> dict[str, Bbox]:
    """Return every text with the rectangle that it fills, in pixels."""
    figure.draw_without_rendering()
    return {f"{n} {text.get_text()!r}": text.get_window_extent()
            for n, text in enumerate(figure.axes[0].texts)}


def inside(box: Bbox, outer: Bbox, slack: float = PIXEL) -> bool:
    """Return whether a rectangle lies in another, up to some pixels."""
    return (box.x0 >= outer.x0 - slack and box.x1 <= outer.x1 + slack
            and box.y0 >= outer.y0 - slack and box.y1 <= outer.y1 + slack)


def shapes(figure, kind) -> list[Bbox]:
    """Return the rectangle of every patch of a kind, without its line's width."""
    return [patch.get_path().get_extents(patch.get_transform())
            for patch in figure.axes[0].patches if isinstance(patch, kind)]


def segments(figure) -> list[tuple]:
    """Return the straight parts of every arrow, in pixels."""
    found = []
    for patch in figure.axes[0].patches:
        if isinstance(patch, FancyArrowPatch):
            points = patch.get_transform().transform(patch._path_original.vertices)
            found += [*zip(points[:-1].tolist(), points[1:].tolist(), strict=True)]
    return found


def passes(part: tuple, box: Bbox) -> bool:
    """Return whether a level or upright line runs through a rectangle, more than at its edge."""
    (x0, y0), (x1, y1) = part
    return (min(x0, x1) < box.x1 - PIXEL and max(x0, x1) > box.x0 + PIXEL
            and min(y0, y1) < box.y1 - PIXEL and max(y0, y1) > box.y0 + PIXEL)


def faults(figure) -> list[str]:
    """Return what a reader would stumble over."""
    words, boxes, page = texts(figure), shapes(figure, FancyBboxPatch), figure.bbox
    circles, lines = shapes(figure, Circle), segments(figure)
    found = [f"{word} leaves the page" for word, box in words.items() if not inside(box, page, -6)]
    found += [f"{a} on {b}" for a, b in combinations(words, 2) if words[a].overlaps(words[b])]
    for word, box in words.items():
        found += [f"{word} crosses an edge" for edge in boxes
                  if box.overlaps(edge) and not inside(box, edge)]
        found += [f"{word} is crossed by a line" for part in lines if passes(part, box)]
    found += ["two boxes overlap" for a, b in combinations(boxes, 2)
              if inside(a, page) and a.padded(-PIXEL).overlaps(b.padded(-PIXEL))
              and not inside(a, b) and not inside(b, a) and not stacked(a, b)]
    found += ["a box leaves the page" for box in boxes if not inside(box, page, 0)]
    leaves = [box for box in boxes if any(inside(word, box) for word in words.values())
              and not any(inside(other, box) for other in boxes if other is not box)]
    found += [f"an arrow {part} runs through a box" for part, box in product(lines, leaves)
              if passes(part, box)]
    found += [f"an arrow {part} is neither level nor upright" for part in lines
              if min(abs(a - b) for a, b in zip(*part, strict=True)) > 0.01]
    found += [f"a circle lies on {word}" for circle, (word, box) in product(circles, words.items())
              if circle.overlaps(box) and not inside(box, circle)]
    return found


def stacked(a: Bbox, b: Bbox) -> bool:
    """Return whether two boxes of one size lie as cards on a pile."""
    return a.size == pytest.approx(b.size) and max(abs(a.min - b.min)) < 12


@pytest.mark.parametrize("name, model", [
    pytest.param(*case, marks=() if case[1] in ("tiny", "v3") else pytest.mark.slow)
    for case in CASES])
def test_a_drawing_is_tidy_and_described(name, model):
    """Nothing overlaps; all texts have 8.5 points and more; there is an alt text."""
    figure = draw(name, model)
    assert faults(figure) == []
    assert min(text.get_fontsize() for text in figure.axes[0].texts) >= drawing.SMALL
    assert len(figure.get_label()) > 60 and figure.get_label().endswith(".")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if i % 2 else ())
                                  for i, name in enumerate(DRAWINGS)])
def test_a_picture_is_an_opaque_card_and_the_same_twice(name, tmp_path):
    """The same bytes in the notebook and on disk, with alt text; 1,200 dots wide."""
    for dark in (False, True) if name == "model" else (False,):
        options = dict(dark=True) if dark else {}
        picture, shown = draw(name, "v3.2", **options)._repr_png_()
        again = style.finish(draw(name, "v3.2", **options), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes() == picture
        assert shown == {"alt": again.get_label()}
        pixels = imread(BytesIO(picture))
        assert pixels.shape[1] == 1200 and pixels[0, 0, 3] == 1
        assert (pixels[0, 0, :3].mean() < 0.2) == dark


@pytest.mark.parametrize("dark, name", [(False, "model.png"), (True, "model_dark.png")])
def test_the_readme_s_drawing_is_this_one(dark, name, tmp_path):
    """Equal dots, but for the fonts' smoothing, which other versions of matplotlib do otherwise.

    The drawing of another model of the same size differs by 0.012 on average.
    """
    committed = imread(Path(__file__).parents[2] / "figures" / name)
    drawn_model.model_drawing(MODELS["v3"], dark=dark, path=tmp_path / "v3.png")
    drawn_model.model_drawing(MODELS["tiny"], dark=dark, path=tmp_path / "tiny.png")
    assert abs(committed - imread(tmp_path / "v3.png")).mean() < 0.005
    assert abs(committed - imread(tmp_path / "tiny.png")).mean() > 0.008  # wrong variant


@pytest.mark.parametrize("where", drawn_work.R1)
def test_every_stage_of_r1_can_be_highlighted(where):
    figure = drawn_work.r1_drawing(where)
    assert faults(figure) == []
    assert (f"Highlighted: {drawn_work.R1[where]}." in figure.get_label()) == bool(where)
    strong = [patch for patch in figure.axes[0].patches if patch.get_linewidth() == 2.2]
    assert bool(strong) == bool(where)


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="where = 'sft' is no stage: valid are zero, cold start"):
        drawn_work.r1_drawing("sft")


@pytest.mark.parametrize("where", [pytest.param(where, marks=pytest.mark.slow if i % 2 else ())
                                   for i, where in enumerate(drawn_model.PARTS)])
def test_every_part_can_be_highlighted(where):
    figure = drawn_model.model_drawing(MODELS["v3.2"], where)
    assert faults(figure) == []
    strong = [patch for patch in figure.axes[0].patches if patch.get_linewidth() == 2.2]
    assert bool(strong) == bool(where)
    title = drawn_model.PARTS[where].format(**drawn_model.facts(MODELS["v3.2"]))
    assert (f"Highlighted: {title}." in figure.get_label()) == bool(where)


def test_matrices_are_those_that_v3_multiplies_in_fp8():
    """Embedding, head, gate, norms and attention's own products stay as they are (V3 3.3.1)."""
    figure = drawn_model.model_drawing(MODELS["v3"], "matrices")
    strong = [patch.get_path().get_extents(patch.get_transform())
              for patch in figure.axes[0].patches
              if isinstance(patch, FancyBboxPatch) and patch.get_linewidth() == 2.2]
    named = {word.split("'")[1] for word, box in texts(figure).items()
             if any(inside(box, edge) for edge in strong)}
    assert {"dense block  × 3", "MoE block  × 58", "MLA", "experts", "query", "latent", "output",
            "shared", "MTP module  × 1"} <= named
    assert not named & {"embedding", "RMSNorm", "head", "head (shared)", "gate", "128 heads"}


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="where = 'mlp' is no part: valid are tokens, attention"):
        drawn_model.model_drawing(MODELS["tiny"], "mlp")
    for model, where in [("tiny", "indexer"), ("v2-lite", "mtp")]:
        with pytest.raises(ValueError, match=f"where = '{where}': .* no such part"):
            drawn_model.model_drawing(MODELS[model], where)
    dense = replace(MODELS["tiny"], n_routed_experts=0)
    assert faults(drawn_model.model_drawing(dense)) == []
    with pytest.raises(ValueError, match="n_routed_experts = 0"):
        drawn_experts.moe_drawing(dense)
    with pytest.raises(ValueError, match="index_n_heads = 0"):
        drawn_attention.dsa_drawing(dense)
    with pytest.raises(ValueError, match="must divide n_routed_experts = 8"):
        drawn_training.ranks_drawing(MODELS["tiny"], expert_parallel=3)
    with pytest.raises(ValueError, match="stages = 5: at most n_layers = 4"):
        drawn_training.ranks_drawing(MODELS["tiny"], 5)


NUMBERS = {  # drawing -> for V3, texts that stand in it; for tiny, texts that stand there instead
    "model": (["MoE block  × 58", "dense block  × 3", "129,280 × 7,168", "512 cached", "64 cached",
               "256 routed, 8 active", "128 heads", "latent 1,536"],
              ["MoE block  × 3", "dense block  × 1", "4,096 × 256", "64 cached", "16 cached",
               "8 routed, 2 active", "4 heads", "from 256"]),
    "attention": (["16,384", "128 × 128"], ["128", "4 × 32"]),
    "mla": (["7,168", "1,536", "512", "64", "128 × (128 + 64)", "16,384 → 7,168"],
            ["256", "64", "16", "4 × (32 + 16)", "128 → 256"]),
    "dsa": (["128 × 192", "cached latents, 512 + 64 each"],
            ["4 × 48", "cached latents, 64 + 16 each"]),
    "mtp": (["61 blocks", "2 × 7,168 → 7,168"], ["4 blocks", "2 × 256 → 256"]),
    "fp8": (["tokens × 7,168", "56 per token", "56 × 16 = 896", "52 more"],
            ["tokens × 256", "2 per token", "2 × 1 = 2"]),
    "tokens": (["ids 0 to 255 are the bytes; the model's vocabulary has 129,280 rows"],
               ["ids 0 to 255 are the bytes; the model's vocabulary has 4,096 rows"]),
    "training": (["61 blocks", "129,280"], ["4 blocks", "4,096"]),
    "ranks": (["rank 64", "experts 253–256", "stage 16", "layers 4–7"],
              ["rank 8", "expert 8", "stage 4", "layer 4", "no experts"]),
    "moe": (["256 scores", "best 4 of 8 groups", "best 8 experts"], ["8 scores", "best 2 experts"])}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_come_from_the_settings(name):
    found = {model: {text.get_text() for text in draw(name, model).axes[0].texts}
             for model in ("v3", "tiny")}
    for wanted, model in zip(NUMBERS[name], ("v3", "tiny"), strict=True):
        assert set(wanted) <= found[model]
    # No text of one model but common words may stand in the other's drawing.
    assert not set(NUMBERS[name][0]) - set(NUMBERS[name][1]) & found["tiny"]


def stored(source: str) -> tuple[Path, bytes, str]:
    """Return the notebook, picture and alt text of the cell that ends with this call."""
    for path in sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and "".join(cell["source"]).endswith(source):
                output = cell["outputs"][0]
                return path, b64decode(output["data"]["image/png"]), (
                    output["metadata"]["image/png"]["alt"])
    raise LookupError(source)


@pytest.fixture(scope="module")
def other_title():
    """The title's pixels of a drawing that no notebook has."""
    return imread(BytesIO(drawn_model.model_drawing(MODELS["tiny"])._repr_png_()[0]))[:60]


@pytest.mark.parametrize("source, figure", [
    ('model_drawing(v3, "tokens")', lambda v3: drawn_model.model_drawing(v3, "tokens")),
    ('model_drawing(v3, "attention")', lambda v3: drawn_model.model_drawing(v3, "attention")),
    ('model_drawing(v3, "mla")', lambda v3: drawn_model.model_drawing(v3, "mla")),
    ('model_drawing(v3, "rope")', lambda v3: drawn_model.model_drawing(v3, "rope")),
    ("attention_drawing(v3)", drawn_attention.attention_drawing),
    ("mla_drawing(v3)", drawn_attention.mla_drawing),
    ("tokens_drawing(v3)", drawn_work.tokens_drawing),
    ('moe_drawing(ModelArgs.preset("v3"))', drawn_experts.moe_drawing),
    ('mtp_drawing(ModelArgs.preset("v3"))', drawn_work.mtp_drawing)])
def test_a_notebook_s_drawing_is_today_s(source, figure, other_title):
    """Its alt text is equal, and so are the pixels of its title, except where letters are smoothed:
    0.02 on average bounds that; another title differs by 0.06."""
    path, picture, alt = stored(source)
    drawn = figure(MODELS["v3"])
    assert drawn.get_label() == alt, path
    title = imread(BytesIO(drawn._repr_png_()[0]))[:60]
    assert abs(imread(BytesIO(picture))[:60] - title).mean() < 0.02, path
    assert abs(other_title - title).mean() > 0.03  # wrong variant


def test_attention_with_fewer_key_value_heads():
    figure = drawn_attention.attention_drawing(MODELS["v3"], n_kv_heads=1)
    assert faults(figure) == []
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words[0] == "MQA with 1 key/value head caches 256 numbers per token per layer"
    assert words.count("1 × 128") == 2 and figure.get_label().startswith("MQA from left")


@pytest.mark.parametrize("modules", [0, 2, 3])
def test_a_chain_of_mtp_modules(modules):
    figure = drawn_work.mtp_drawing(replace(MODELS["tiny"], n_mtp_layers=modules))
    assert faults(figure) == []
    words = [text.get_text() for text in figure.axes[0].texts]
    # Module k reads t_(1+k) first and predicts t_(2+k) first: t_6 only where there is a module.
    assert words.count("$t_2$") == (3 if modules else 2) and ("$t_6$" in words) == bool(modules)
    assert ("$t_7$" in words) == (modules > 1) == ("MTP module 2" in words)
    assert ("two are drawn" in figure.get_label()) == (modules > 2)


def test_merges_join_the_most_frequent_pair():
    figure = drawn_work.tokens_drawing(MODELS["tiny"], "aab aab", merges=2)
    assert faults(figure) == []
    words = [text.get_text() for text in figure.axes[0].texts]
    # aa and ab stand twice each; the first of equals is joined first, then aab.
    assert words[0] == "2 merges turn 7 bytes into 3 tokens"
    assert words.count("aa") == 2 and words.count("aab") == 2 and words.count("257") == 2
    assert drawn_work.joined([b"a", b"a", b"a"], (b"a", b"a")) == [b"aa", b"a"]


@pytest.mark.parametrize("options", [
    dict(stages=[range(1), range(1, 4)], expert_parallel=2, replicas=1),
    dict(stages=1, expert_parallel=4, replicas=3)])
def test_other_layouts_of_ranks(options):
    figure = drawn_training.ranks_drawing(MODELS["tiny"], **options)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert faults(figure) == [] and words[0].startswith("4 GPUs" if options["replicas"] == 1 else
                                                        "12 GPUs")
    assert ("layers 2–4" in words) == (options["stages"] != 1)


def test_the_experts_drawn_are_those_of_the_gate():
    for args in MODELS.values():
        scores, choice, weights = drawn_experts.route(args)
        best = sorted(range(len(choice)), key=lambda i: -choice[i])[:args.n_activated_experts]
        assert sorted(best) == [*weights] and len(scores) == args.n_routed_experts
        shares = [scores[i] for i in weights]
        if args.score_func == "sigmoid":
            shares = [args.route_scale * share / sum(shares) for share in shares]
        # Weights of the package's gate, in FP32; about 1e-7 of each.
        assert [*weights.values()] == pytest.approx(shares, rel=1e-5)


def test_faults_are_noticed():
    """Wrong variants: each of the things that `faults` looks for, made once."""
    page = drawing.Drawing(100, "a title")
    box = page.box(100, 60, 60, 30, "a name that is too long")
    assert [fault[-15:] for fault in faults(page.figure)] == ["crosses an edge"]
    page = drawing.Drawing(100, "a title")
    page.text(60, 24, "another")
    page.text(790, 80, "outside")
    page.text(300, 60, "crossed")
    page.arrow((250, 60), (400, 60))
    page.box(200, 80, 60, 30, "box")
    page.box(220, 70, 60, 40)
    page.arrow((150, 80), (260, 84))
    found = " / ".join(faults(page.figure))
    for fault in ["leaves the page", "0 'a title' on 1 'another'", "is crossed by a line",
                  "two boxes overlap", "runs through a box", "neither level nor upright"]:
        assert fault in found, fault
    assert box.left == (70, 60) and box.top == (100, 45)
