"""Make the pictures of README.md, docs/results.md and docs/quickstart.md again: python docs/pictures/make.py."""

from pathlib import Path

from PIL import Image

from condgan import IterativeGenerator
from condgan.images import grid
from condgan.render import render_scene
from condgan.vocab import ICLEVR_OBJECTS

HERE = Path(__file__).parent
generator = IterativeGenerator.from_pretrained()


def save(sheet: Image.Image, name: str, scale: int) -> None:
    """Enlarge without smoothing, so that every pixel shows, and write."""
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(HERE / name, optimize=True)


scene = generator.generate(["red cube", "blue sphere", "green cylinder"], seed=7)
save(scene.grid(turns=True), "turns.png", 3)

# 64 draws, nothing selected: seeds 0 to 63, three objects each, every class in turn.
scenes = [[ICLEVR_OBJECTS[(i + 7 * turn) % 24] for turn in range(3)] for i in range(64)]
save(generator.generate(scenes, seed=0).grid(columns=16), "contact-sheet.png", 2)

# Every class alone, in four draws.
singles = [[name] for name in ICLEVR_OBJECTS for _ in range(4)]
save(generator.generate(singles, seed=0).grid(columns=16), "classes.png", 2)

# The turns of three rendered scenes.
rendered = [render_scene(scenes[i], seed=i).turns for i in range(3)]
grid([picture for turns in rendered for picture in turns], columns=3).save(HERE / "rendered.png", optimize=True)
