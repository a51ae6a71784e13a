"""Write a handout of one page for each notebook, from the notebook itself.

It has the question, the steps, the displayed equations with numbers, what the parts take and return
with their shapes, the exercises and their points, and the summary. HTML that needs no network and
prints on one sheet of A4.
"""

import ast
import html
import json
import re
from pathlib import Path

from minids.base.files import write_whole
from minids.lab.exercises import code_cells, exercises
from minids.lab.formulas import Formulas

SHAPE = re.compile(r"\((?:\.\.|[A-Z])[\w .,/*+-]*\)")  # (N, D), (.., T, width)
DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.S)
EQUATIONS, PARTS = 9, 8  # on a page, at most
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
@page {{ size: A4; margin: 11mm 13mm }}
body {{ font: 12px/1.33 sans-serif; max-width: 184mm; margin: 0 auto; color: black;
  background: white }}
h1 {{ font-size: 19px; margin: 0 0 4px }} h2 {{ font-size: 13px; margin: 8px 0 2px }}
p, ol, ul {{ margin: 3px 0; padding-left: 0 }} ol, ul {{ padding-left: 18px }}
.two {{ columns: 2; column-gap: 7mm }} .two > div {{ break-inside: avoid }}
.equation {{ display: flex; justify-content: space-between; align-items: center; margin: 3px 0 }}
.equation svg {{ max-width: 76mm; max-height: 12mm }} code {{ font-size: 11px }}
.formula {{ fill: currentColor }} td, th {{ text-align: left; padding: 1px 8px 1px 0;
  font-weight: normal; vertical-align: top }}
</style></head><body>
<h1>{title}</h1>
{opening}
<div class="two">
{columns}
</div>
<h2>Exercises, {points} points</h2>
<table>{tasks}</table>
<h2>What to remember</h2>
{summary}
</body></html>
"""


def texts(nb: dict) -> list[str]:
    """Return the text of each markdown cell."""
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"]


def steps(nb: dict) -> list[str]:
    """Return the headings between the idea and the exercises: what one builds."""
    heads = [head for text in texts(nb) for head in re.findall(r"^##+ (.+)$", text, re.M)]
    end = heads.index("Two questions") if "Two questions" in heads else len(heads)
    return [head for head in heads[:end] if not head.startswith(("The idea", "The figure"))]


def parts(nb: dict) -> list[tuple[str, str]]:
    """Return the functions that say which shapes they take: head and first line of each."""
    found = {}
    for meta, text in code_cells(nb):
        for node in [] if meta or "%" in text[:1] else ast.parse(text).body:
            about = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if about and SHAPE.search(about.split("\n")[0]):
                arguments = ", ".join(argument.arg for argument in node.args.args)
                found[node.name] = f"{node.name}({arguments})", about.split("\n")[0]
    return [*found.values()][:PARTS]


def first_sentence(task: str) -> str:
    """Return a task's first sentences, up to what fits on two lines."""
    kept = ""
    for sentence in re.split(r"(?<=[.?:])\s+", " ".join(task.split())):
        if kept and len(kept) + len(sentence) > 170:
            break
        kept += f" {sentence}"
    return kept.strip()


def handout(path: Path) -> str:
    """Return a notebook's handout as HTML."""
    from nbconvert.filters.markdown_mistune import markdown2html_mistune
    nb, formulas = json.loads(path.read_bytes()), Formulas()

    def page(markdown: str) -> str:
        made = markdown2html_mistune(formulas.take(markdown)).strip()
        return re.sub(r"^<p>|</p>$", "", made) if made.count("<p>") == 1 else made

    cells, found = texts(nb), exercises(path)
    question, paper = (re.search(rf"\*\*{what}\*\*.+", cells[0])[0] for what in
                       ("The question.", "Paper."))
    equations = [formula for text in cells for formula in DISPLAY.findall(text)][:EQUATIONS]
    columns = ["<div><h2>Steps</h2><ul>", *(f"<li>{page(head)}</li>" for head in steps(nb)),
               "</ul></div>"]
    if equations:
        columns += ["<h2>Equations</h2>", *(
            f'<div class="equation">{page(f"$${formula}$$")}<span>({i})</span></div>'
            for i, formula in enumerate(equations, 1))]
    if shapes := parts(nb):
        columns += ["<h2>Shapes</h2>", *(
            f"<div><code>{html.escape(head)}</code><br>{html.escape(about)}</div>"
            for head, about in shapes)]
    tasks = "".join(f"<tr><td>{e.number}</td><td><code>{e.name}</code></td>"
                    f"<td>{page(first_sentence(e.task))}</td><td>{e.points}</td></tr>"
                    for e in found)
    summary = next(text for text in cells if text.startswith("## Summary"))
    filled = PAGE.format(title=html.escape(cells[0].splitlines()[0].lstrip("# ")),
                         opening=f"<p>{page(question)}</p><p>{page(paper)}</p>",
                         columns="\n".join(columns), points=sum(e.points for e in found),
                         tasks=tasks, summary=page(summary.split("\n", 1)[1].strip()))
    return formulas.put_back(filled)


def write_handouts(folder: Path, notebooks: list[Path]) -> None:
    """Write NOTEBOOK.html for each notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in notebooks:
        write_whole(folder / f"{path.stem}.html", handout(path).encode())
