"""What holds for the project as a whole: imports, what ships, versions, and that what a reader runs does run."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image, ImageDraw

import condgan
from condgan.vocab import ICLEVR_OBJECTS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "condgan"

# Imports go one way: a module uses only modules of the groups above its own.
GROUPS = (
    ("vocab", "derived", "building", "fields", "files", "losses", "images", "ranks"),
    ("precision", "allocator", "devices", "remote"),
    ("hub",),
    ("layers", "flow", "light", "configs", "correction"),
    ("functional", "requests"),
    ("canvas", "classifier", "counter", "presets"),
    ("results",),
    ("drawing", "parts"),
    ("onnx",),
    ("models",),
    ("datasets", "metrics", "layout", "shards", "calibration", "export"),
    ("scenes", "report", "features", "batches"),
    ("measures", "realism"),
    ("prepare", "render", "training", "evaluation"),
    ("checkpoints", "runlog"),
    ("runs", "arguments"),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {module: level for level, group in enumerate(GROUPS) for module in group}


def modules() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our own, wherever it stands; ``__init__`` for the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                if package == "condgan":
                    yield node.lineno, module or "__init__"
        elif isinstance(node, ast.ImportFrom):
            package, _, module = (node.module or "").partition(".")
            if node.level:  # relative: `from . import x`, `from .x import y`
                package, module = "condgan", node.module or ""
            if package != "condgan":
                continue
            for alias in node.names:
                name = module or (alias.name if alias.name in LEVEL else "__init__")
                if alias.name != "__version__":
                    yield node.lineno, name


def imports_to_the_right(module: str, source: str) -> list[str]:
    return [
        f"condgan/{module}.py:{line} imports condgan.{used}"
        for line, used in imports(source)
        if LEVEL[used] >= LEVEL[module] and LEVEL[module] < LEVEL["__init__"]
    ]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from condgan.vocab import Vocabulary", False),
        ("from condgan import vocab, hub", False),
        ("from condgan import __version__", False),
        ("def f():\n    from torchvision import models", False),
        ("import condgan.training", True),
        ("from condgan import vocab, cli", True),
        ("from condgan import IterativeGenerator", True),
        ("import condgan", True),
        ("def f():\n    from condgan.cli import main", True),
        ("if TYPE_CHECKING:\n    from condgan.runs import train", True),
        ("from condgan.datasets import SceneDataset", True),  # of its own group
        ("from .runs import train", True),
        ("from . import cli", True),
    ],
)
def test_the_import_check_sees_what_it_should(source: str, wrong: bool) -> None:
    assert bool(imports_to_the_right("metrics", source)) == wrong


def test_every_module_has_its_group() -> None:
    assert set(modules()) <= set(LEVEL), "a new module needs a place in GROUPS"
    page = (PACKAGE.parent / "docs" / "style.md").read_text()
    groups = re.search(r"^`vocab .*?`cli`$", page, re.DOTALL | re.MULTILINE)
    assert groups, "the groups stand in docs/style.md"
    assert set(re.findall(r"\w+", groups[0])) == set(modules()) - {"__init__", "__main__"}


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    assert imports_to_the_right(module, (PACKAGE / f"{module}.py").read_text()) == []


IMPORT_PROBE = """
import json, sys, time
asked = []

def watch(event, args):
    if event.startswith(("socket.connect", "socket.get")):
        asked.append(event)

sys.addaudithook(watch)
import torch
before = time.process_time()  # of this process: the machine may have other work
from condgan import *
seconds = time.process_time() - before
slow = [name for name in ("torchvision", "huggingface_hub") if name in sys.modules]
print(json.dumps({"seconds": seconds, "asked": asked, "slow": slow}))
"""


def test_import_is_quick_silent_and_local() -> None:
    seconds = []
    for _ in range(3):
        probe = subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, check=True)
        assert probe.stderr == ""
        assert probe.stdout.count("\n") == 1, "only the probe itself prints"
        report = json.loads(probe.stdout)
        assert report["asked"] == [], "importing must not use the network"
        assert report["slow"] == [], "slow libraries are imported where they are used"
        seconds.append(report["seconds"])
    assert min(seconds) < 0.3


LAZY_PROBE = """
import sys
import condgan
from condgan.cli import main
assert "torch" not in sys.modules, "what takes seconds is imported where Ctrl-C is caught"
assert set(condgan.__all__) <= set(dir(condgan))
assert condgan.functional.paste is condgan.models.paste
for name in condgan.__all__:
    assert getattr(condgan, name).__name__ == name
assert condgan.IterativeGenerator is condgan.models.IterativeGenerator
from condgan import Drawing, hub, runs
assert not hasattr(condgan, "missing")
"""


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    probe = subprocess.run([sys.executable, "-c", LAZY_PROBE], capture_output=True, text=True)
    assert (probe.returncode, probe.stderr) == (0, "")


def metadata() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def test_what_lies_in_the_package_ships() -> None:
    patterns = metadata()["options.package_data"]["condgan"].split()
    ships = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert PACKAGE / "py.typed" in data
    assert data == ships


def test_the_version_is_the_same_everywhere() -> None:
    version = metadata()["metadata"]["version"]
    assert condgan.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changes = re.findall(r"^## \[?(\d[^\] ]*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert changes[0] == version


def project_files() -> list[Path]:
    """Every file that is, or would be, under version control."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_path_of_one_machine() -> None:
    machine_path = re.compile(rb"(?<![\w.~})/-])/(?:work|root|home|Users)(?:/|\b)")
    found = []
    for path in project_files():
        content = path.read_bytes()
        if b"\0" not in content:
            lines = content.split(b"\n")
            found += [f"{path.name}:{i}: {line!r}" for i, line in enumerate(lines, 1) if machine_path.search(line)]
    assert found == []


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links of a page to a file that is not there, or to a heading that its page does not have."""
    broken = []
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{page.name}: {target}")
    return broken


def test_broken_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Other\n\n## The `z` of a turn, mapped\n")
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](other.md#the-z-of-a-turn-mapped) [b](#one) [c](other.md) [d](https://example.org/#x)\n")
    assert broken_links(page) == []
    page.write_text("# One\n[a](other.md#the-z) [b](#two) [c](none.md)\n")
    assert broken_links(page) == ["page.md: other.md#the-z", "page.md: #two", "page.md: none.md"]


def test_links_between_pages_lead_somewhere() -> None:
    pages = [page for page in project_files() if page.suffix == ".md" and PACKAGE not in page.parents]
    assert [link for page in pages for link in broken_links(page)] == []


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    public = [name for name in condgan.__all__ if not name.startswith("_")]
    assert [name for name in public if not re.search(rf"\b{name}\b", page)] == []


# What a reader runs: the Python blocks of a page in order, in one namespace, and its commands in order, in one folder.
# A comment on the line before a block says how: `<!-- slow -->` leaves it to the slow tests, `<!-- long -->` too, and
# a command that is still well after LONG_SECONDS, such as a training, is stopped.

PAGES = ("README.md", "docs/quickstart.md")
LONG_SECONDS = 60
FENCE = re.compile(r"^(?:<!-- (?P<pace>slow|long)\b[^\n]*-->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    pace: str
    code: str


def snippets(page: str) -> list[Snippet]:
    path = ROOT / page
    text = path.read_text() if path.exists() else ""
    return [
        Snippet(page, text.count("\n", 0, match.start("code")), match["language"], match["pace"] or "", match["code"])
        for match in FENCE.finditer(text)
    ]


def commands(snippet: Snippet) -> list[str]:
    """The commands of a shell block that are ours: `condgan ...` and `python examples/...`."""
    lines = re.sub(r"\\\n\s*", "", snippet.code).splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("condgan ", "python examples/"))]


def runs(language: str) -> list[object]:
    """One run a page of its quick blocks; one more of all its blocks, where some are not quick."""
    found: list[object] = []
    for page in PAGES:
        blocks = [snippet for snippet in snippets(page) if snippet.language == language]
        quick = [snippet for snippet in blocks if not snippet.pace]
        if quick:
            found.append(pytest.param(quick, id=page))
        if len(quick) < len(blocks):
            found.append(pytest.param(blocks, id=f"{page}, all", marks=pytest.mark.slow))
    return found


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted: ``iclevr/`` with a few scenes, ``photo.png``, ``examples/``."""
    colours = {"red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20), "cyan": (41, 208, 208)}
    names = [f"{colour} {shape}" for colour in colours for shape in ("cube", "sphere")]
    data = tmp_path / "iclevr"
    (data / "images").mkdir(parents=True)
    labels = {}
    for scene in range(96):  # more than the canvas of `compact` has components
        image = Image.new("RGB", (96, 72), (128, 128, 128))
        draw = ImageDraw.Draw(image)
        objects: list[str] = []
        for turn in range(3):
            name = names[(scene * 5 + turn * 3) % len(names)]
            objects.append(name)
            x, y = (48, 36) if turn == 0 else ((17 * scene + 40 * turn) % 80 + 8, (11 * scene + 23 * turn) % 56 + 8)
            shape = draw.rectangle if name.endswith("cube") else draw.ellipse
            shape((x - 6, y - 6, x + 6, y + 6), fill=colours[name.split()[0]])
            picture = f"CLEVR_train_{scene:06d}_{turn}.png"
            image.save(data / "images" / picture)
            labels[picture] = list(objects)
    (data / "train.json").write_text(json.dumps(labels))
    (data / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(ICLEVR_OBJECTS)}))
    for conditions in ("test.json", "new_test.json"):
        (data / conditions).write_text(json.dumps([["red cube"], ["blue sphere", "green cube"]]))
        (tmp_path / conditions).write_text((data / conditions).read_text())
    image.resize((64, 64)).save(tmp_path / "photo.png")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_has_snippets() -> None:
    found = snippets("README.md")
    assert [snippet for snippet in found if snippet.language == "python"], "README.md shows no Python"
    assert [command for snippet in found for command in commands(snippet)], "README.md shows no command"


@pytest.mark.parametrize("blocks", runs("python"))
def test_python_snippets_run(blocks: list[Snippet], reader: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        source = "\n" * block.line + block.code  # so that a traceback shows the page's own lines
        exec(compile(source, str(ROOT / block.page), "exec"), namespace)


def run_command(command: str, seconds: float, may_go_on: bool) -> None:
    python = shlex.quote(sys.executable)
    shell = f'condgan() {{ {python} -m condgan "$@"; }}; python() {{ {python} "$@"; }}; set -euo pipefail; {command}'
    process = subprocess.Popen(
        ["bash", "-c", shell],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        assert may_go_on, f"{command!r} did not end in {seconds} s:\n{output}"
    else:
        assert process.returncode == 0, f"{command!r} failed:\n{output}"


@pytest.mark.parametrize("blocks", runs("bash"))
def test_commands_run(blocks: list[Snippet], reader: Path) -> None:
    for block in blocks:
        for command in commands(block):
            long = block.pace == "long"
            run_command(command, seconds=LONG_SECONDS if long else 600, may_go_on=long)
