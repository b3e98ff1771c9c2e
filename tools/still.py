"""Take what only a running kernel can show out of the stored notebooks; `--check` only looks.

Widgets leave a view of a model that is gone, and sometimes a state without which code hosts refuse to render the page.
Beside them stands a picture, a player or text, and that is kept.
"""

import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
VIEW = "application/vnd.jupyter.widget-view+json"


def still(notebook: dict) -> dict:
    "The notebook without widgets."
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(VIEW, None)
    return notebook


def main(check: bool) -> None:
    "Mends every notebook under nbs/, or names those that need it and ends with code 1."
    alive = []
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        before = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(before, sort_keys=True)
        after = still(before)
        if json.dumps(after, sort_keys=True) != text:
            alive.append(str(path.relative_to(root)))
            if not check:
                path.write_text(json.dumps(after, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if check and alive:
        sys.exit(f"These notebooks store widgets: run `python tools/still.py` and commit {', '.join(alive)}")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
