"""Render README.md from nbs/index.ipynb; with `--check`, only tell whether the two agree."""

import argparse
import re
import sys
from pathlib import Path, PurePosixPath

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
index, readme = root / "nbs/index.ipynb", root / "README.md"
notice = "<!-- Rendered from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"
directive = re.compile(r"^\s*#\s*\|")
link = re.compile(r"""(\]\(|\b(?:src|href)=["'])([^)"'\s]+)""")


def visible(cell: nbformat.NotebookNode) -> bool:
    "Whether the cell is shown: it isn't empty and its directives don't hide it."
    lines = cell.source.splitlines()
    hidden = any(re.match(r"^\s*#\s*\|\s*(hide|include:\s*false)\b", line) for line in lines)
    return bool(cell.source.strip()) and not hidden


def from_root(target: str) -> str:
    "A link target of the notebook, seen from the root: `00_core.ipynb` is `nbs/00_core.ipynb` there."
    if re.match(r"[a-z]+:|#|/", target):
        return target
    parts = []
    for part in PurePosixPath("nbs", target).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def outside_code(text: str, change) -> str:
    "`text` with `change` applied to what is not a fenced code block."
    parts = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def render(path: Path) -> str:
    "The notebook as Markdown, its links as they are seen from the root."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [cell for cell in nb.cells if visible(cell)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in cell.source.splitlines() if not directive.match(line))
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    nb.metadata.language_info = {"name": "python"}
    body, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        sys.exit(f"{path.name} holds a figure as a cell's output: save it under nbs/images/ and show it by its path.")
    relative = outside_code(body, lambda part: link.sub(lambda m: m[1] + from_root(m[2]), part))
    return notice + re.sub(r"\n{3,}", "\n\n", relative).strip() + "\n"


def missing(text: str) -> list[str]:
    "The files that the README links to and that are not there."
    found = []
    outside_code(text, lambda part: found.extend(m[2] for m in link.finditer(part)) or part)
    paths = [target.partition("#")[0] for target in found if not re.match(r"[a-z]+:|#|/", target)]
    return sorted({path for path in paths if not (root / path).exists()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where README.md differs")
    check = parser.parse_args().check
    text = render(index)
    if not check:
        readme.write_text(text, encoding="utf-8")
    if absent := missing(text):
        sys.exit(f"nbs/index.ipynb links to what is not there: {', '.join(absent)}.")
    if check and (not readme.exists() or readme.read_text(encoding="utf-8") != text):
        sys.exit("README.md differs from nbs/index.ipynb: run `python tools/readme.py` and commit both.")


if __name__ == "__main__":
    main()
