"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build`."""

import re
import shutil
from pathlib import Path
from typing import Any

import invdiff

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "invdiff"
author = "The invdiff authors"
copyright = author
version = release = invdiff.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
]
TABLES = {
    "exactness": "exactness",
    "mixtures": "mixtures",
    "fields": "fields",
    "discrete": "discrete",
    "gb1": "gb1",
    "dna": "dna",
    "infill": "infill",
    "calibration": "calibration",
    "calibration_300": "calibration",
    "decoded_28": "decoded",
    "decoded_28_published": "decoded",
    "decoded_64": "decoded",
    "ensembles": "ensembles",
    "phase_modes": "phase_modes",
    "operators_h100": "operators",
    "burgers_control": "burgers_control",
    "burgers_simulate": "burgers_simulate",
    "burgers_solver": "burgers_solver",
    "imaging_64": "imaging",
    "imaging_256": "imaging",
    "imaging_300": "imaging",
}
"""Tables, and the module of `invdiff.bench` that writes each."""
exclude_patterns = ["_build", "generated", *(f"{name}_table.md" for name in TABLES)]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
default_role = "autolink"  # single backticks link where the name can be found, and are plain where not

autosummary_generate = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
python_use_unqualified_type_names = True

# No inventories of other projects are fetched, so that the pages build without a network; their names stay plain.
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # single backticks in docstrings
    ("py:class", r"[A-Z]\w*"),  # forward references to names imported for type checkers only
    ("py:class", r"invdiff\..*\.[A-Z]"),  # type variables
    ("py:.*", r"(torch|numpy|np|xarray|xr|matplotlib|jaxtyping|pathlib|collections|typing|abc|nn|functools)(\..*)?"),
    (
        "py:.*",
        r"(Tensor|Module|Path|FilePath|Figure|Any|Self|Callable|Sequence|Mapping|Iterable|Literal|optional|.*\[.*)",
    ),
]

html_theme = "pydata_sphinx_theme"
html_title = f"invdiff {release}"
html_static_path = ["_static"] if (HERE / "_static").is_dir() else []
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False, "use_edit_page_button": False}
PAGES = (
    "index",
    "quickstart",
    "samplers",
    "priors",
    "exactness",
    "mixtures",
    "fields",
    "discrete",
    "sequences",
    "decoded",
    "calibration",
    "imaging",
    "burgers",
    "contracts",
    "changelog",
)
html_sidebars = {page: [] for page in PAGES}  # only the reference has pages below its own
html_show_sourcelink = False


def write_includes() -> None:
    """Collect the measured tables and the model cards in docs/generated, or a line that says that there is none."""
    generated = HERE / "generated"
    generated.mkdir(exist_ok=True)
    for name, module in TABLES.items():
        table = HERE / f"{name}_table.md"
        none = f"The table has not been measured in this checkout: run `python -m invdiff.bench.{module}`.\n"
        (generated / table.name).write_text(table.read_text("utf-8") if table.is_file() else none, "utf-8")
    cards = []
    for path in sorted((ROOT / "priors").glob("*/README.md")):
        pictures = generated / path.parent.name
        pictures.mkdir(exist_ok=True)
        for picture in path.parent.glob("*.png"):
            shutil.copy(picture, pictures)
        cards.append(re.sub(r"\]\(([^/)]+\.png)\)", rf"](generated/{path.parent.name}/\1)", path.read_text("utf-8")))
    text = "\n\n".join(re.sub(r"^#", "##", card, flags=re.MULTILINE) for card in cards)
    (generated / "model_cards.md").write_text(text or "This checkout holds no trained prior.\n", "utf-8")


def plain_text_mathematics(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Take stars and bars in docstrings as text, and indented formulas of modules as literal blocks."""
    out: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith("    ")
        if what == "module" and indented and not literal and (not out or not out[-1].strip()):
            out += ["::", ""]
            literal = True
        elif line.strip() and not indented:
            literal = False
        if not literal:
            parts = re.split(r"(``[^`]*``|:[a-z]+:`[^`]*`|`[^`]*`)", line)
            parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
            line = "".join(parts)
        out.append(line)
    lines[:] = out


def setup(app: Any) -> None:
    """Write the included pages, and read docstrings before numpydoc does."""
    write_includes()
    app.connect("autodoc-process-docstring", plain_text_mathematics, priority=400)
