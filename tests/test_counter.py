"""counter.py: maxima of heat maps by a slow plain version, pairs by hand, and a shipped counter that can count."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from scenes import write_iclevr_layout
from torch import Tensor

from condgan import IterativeGenerator, ObjectCounter, ObjectCounterConfig
from condgan.counter import find_centres, match_places
from condgan.datasets import SceneDataset
from condgan.drawing import draw_turns
from condgan.functional import place_map, place_of_change
from condgan.images import from_uint8
from condgan.prepare import prepare

SMALL = ObjectCounterConfig(widths=(6, 8, 10), blocks=2, threshold=0.3, image_size=32)


def lively_counter(config: ObjectCounterConfig = SMALL) -> ObjectCounter:
    """A fresh counter whose heat differs from place to place, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        counter = ObjectCounter(config).eval()
        torch.nn.init.normal_(counter.head[-1].weight, std=0.5)
    return counter


@pytest.fixture(scope="module")
def counter() -> ObjectCounter:
    return lively_counter()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The network


@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 6, 8)])
@pytest.mark.parametrize(("n", "height", "width"), [(1, 64, 64), (2, 33, 50), (3, 9, 7)])
def test_any_size_of_picture_gives_half_the_size_of_heat(
    widths: tuple[int, ...], n: int, height: int, width: int
) -> None:
    counter = ObjectCounter(ObjectCounterConfig(widths=widths))
    assert counter(torch.zeros(n, 3, height, width)).shape == (n, 1, -(-height // 2), -(-width // 2))


def test_a_fresh_counter_is_as_unsure_as_in_the_paper(images: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heat = ObjectCounter()(images).sigmoid()
    assert abs(heat.mean().item() - 0.1) < 0.02


def test_every_parameter_gets_a_gradient(images: Tensor) -> None:
    counter = lively_counter().train()
    counter(images).square().mean().backward()
    for name, parameter in counter.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (16, 48)])
def test_places_are_pixels_of_the_picture_whatever_its_size(height: int, width: int) -> None:
    """Heat around one place of the picture that is seen is found at that place of the picture that was given."""
    counter = lively_counter()
    heat = -((torch.arange(16)[:, None] - 4).square() + (torch.arange(16) - 10).square()).float()
    seen: list[tuple[int, ...]] = []

    def forward(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return 5 + heat[None, None].expand(len(images), -1, -1, -1)

    counter.forward = forward  # type: ignore[method-assign]
    (found,) = counter.places(torch.zeros(1, 3, height, width))
    assert seen == [(1, 3, 32, 32)]
    x, y = (10.5 * width / 16 - 0.5, 4.5 * height / 16 - 0.5)  # the middle of cell (10, 4) of 16
    torch.testing.assert_close(found, torch.tensor([[x, y]]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)])
def test_pictures_of_another_shape_are_refused(counter: ObjectCounter, shape: tuple[int, ...]) -> None:
    for method in (counter, counter.places, counter.count):
        with pytest.raises(ValueError, match=rf"images must be \(N, 3, H, W\), got \({', '.join(map(str, shape))}\)"):
            method(torch.zeros(shape))


def test_pictures_of_bytes_are_refused(counter: ObjectCounter) -> None:
    with pytest.raises(ValueError, match=r"floating point in \[-1, 1\], got torch.uint8"):
        counter.count(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.01, -255.0])
def test_pictures_of_values_that_no_picture_has_are_refused(counter: ObjectCounter, value: float) -> None:
    with pytest.raises(ValueError, match=r"images must be finite and in \[-1, 1\], got"):
        counter.places(torch.full((1, 3, 8, 8), value))


def test_what_is_no_tensor_is_refused(counter: ObjectCounter) -> None:
    with pytest.raises(TypeError, match=r"images must be a tensor .* images\.load_image makes, got Image"):
        counter.count(Image.new("RGB", (64, 64)))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"widths": ()}, {"blocks": 0}, {"threshold": 0.0}, {"threshold": 1.0}])
def test_a_config_of_no_network_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        ObjectCounterConfig(**values)  # type: ignore[arg-type]


def test_what_was_saved_loads_bit_for_bit(counter: ObjectCounter, images: Tensor, tmp_path: Path) -> None:
    loaded = ObjectCounter.from_pretrained(counter.save_pretrained(tmp_path))
    assert loaded.config == SMALL
    assert not loaded.training
    assert torch.equal(loaded(images), counter(images))


# Places and counts


def plain_centres(logits: Tensor, threshold: float) -> list[list[tuple[float, float]]]:
    """What ``find_centres`` says, one cell after the other."""
    result = []
    for picture in logits[:, 0].tolist():
        height, width = len(picture), len(picture[0])
        peaks = []
        for j in range(height):
            for i in range(width):
                around = [
                    (x, y)
                    for y in range(j - 1, j + 2)
                    for x in range(i - 1, i + 2)
                    if 0 <= x < width and 0 <= y < height
                ]
                heat = [1 / (1 + math.exp(-picture[y][x])) for x, y in around]
                if (
                    picture[j][i] < max(picture[y][x] for x, y in around)
                    or 1 / (1 + math.exp(-picture[j][i])) <= threshold
                ):
                    continue
                x = sum(h * x for h, (x, _) in zip(heat, around, strict=True)) / sum(heat)
                y = sum(h * y for h, (_, y) in zip(heat, around, strict=True)) / sum(heat)
                peaks.append((picture[j][i], (2 * x + 0.5, 2 * y + 0.5)))
        result.append([place for _, place in sorted(peaks, reverse=True)])
    return result


def test_centres_are_those_of_the_plain_version() -> None:
    logits = torch.randn(4, 1, 9, 7, generator=torch.Generator().manual_seed(2)) * 2
    found = find_centres(logits, 0.6)
    wanted = plain_centres(logits, 0.6)
    assert [len(places) for places in found] == [len(places) for places in wanted]
    assert sum(map(len, wanted)) > 10
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torch.tensor(plain).view(-1, 2), rtol=0, atol=1e-4)


def blobs(places: list[tuple[float, float]], peak: float = 0.95) -> Tensor:
    """A heat map (1, 1, 32, 32) of logits with a Gaussian of one cell around each place in pixels."""
    cells = (torch.tensor(places) - 0.5) / 2
    return (place_map(cells, 32, sigma=1.0).amax(0, keepdim=True) * peak).clamp(1e-4).logit()


@pytest.mark.parametrize("place", [(30.5, 20.5), (31.0, 21.2), (0.5, 0.5), (62.5, 30.0), (44.1, 62.5)])
def test_the_centre_of_a_blob_is_found_to_a_part_of_a_cell(place: tuple[float, float]) -> None:
    (found,) = find_centres(blobs([place]), 0.5)
    assert found.shape == (1, 2)
    assert (found - torch.tensor(place)).abs().max() < 0.8  # pixels; a cell has 2


def test_two_objects_side_by_side_are_two() -> None:
    (found,) = find_centres(blobs([(20.5, 30.5), (26.5, 30.5), (50.5, 10.5)]), 0.5)
    assert match_places(found, torch.tensor([[20.5, 30.5], [26.5, 30.5], [50.5, 10.5]]), 1.0).shape == (3, 2)


def test_sure_neighbours_are_one_object() -> None:
    logits = torch.full((1, 1, 8, 8), -9.0)
    logits[0, 0, 3, 3:5] = torch.tensor([40.0, 41.0])  # a heat of 1 in float32, both of them
    assert len(find_centres(logits, 0.5)[0]) == 1


def test_heat_below_the_threshold_is_nothing_and_the_surest_comes_first() -> None:
    logits = torch.full((1, 1, 9, 9), -9.0)
    for (row, column), heat in {(1, 1): 0.6, (4, 7): 0.9, (7, 2): 0.29}.items():
        logits[0, 0, row, column] = torch.tensor(heat).logit()
    for threshold, wanted in ((0.2, [(7, 4), (1, 1), (2, 7)]), (0.3, [(7, 4), (1, 1)]), (0.7, [(7, 4)]), (0.95, [])):
        (found,) = find_centres(logits, threshold)
        assert ((found - 0.5) / 2).round().int().tolist() == [list(cell) for cell in wanted]


def test_a_batch_of_no_pictures_is_refused(counter: ObjectCounter, images: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size must be between 1 and"):
        counter.count(images, batch_size=0)


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_counts_are_numbers_of_places_whatever_the_batches(
    counter: ObjectCounter, images: Tensor, batch_size: int
) -> None:
    with torch.no_grad():
        wanted = find_centres(counter(images), SMALL.threshold)
    found = counter.places(images, batch_size)
    counts = counter.count(images.double(), batch_size)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [len(places) for places in wanted]
    assert counts.unique().numel() > 1, "the pictures differ for this counter"
    for ours, alone in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32 and not ours.requires_grad
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_counting_is_of_eval_mode_and_leaves_the_mode_alone(images: Tensor, training: bool) -> None:
    counter = lively_counter()
    wanted = counter.count(images)
    counter.train(training)
    before = {name: tensor.clone() for name, tensor in counter.state_dict().items()}
    assert torch.equal(counter.count(images), wanted)
    assert all(module.training == training for module in counter.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in counter.state_dict().items())


def test_no_pictures_have_no_places(counter: ObjectCounter) -> None:
    assert counter.places(torch.zeros(0, 3, 64, 64)) == []
    assert counter.count(torch.zeros(0, 3, 64, 64)).shape == (0,)


# Pairs


def test_pairs_are_one_to_one_and_the_nearest_first() -> None:
    found = torch.tensor([[10.0, 10.0], [11.0, 10.0], [40.0, 40.0], [5.0, 60.0]])
    wanted = torch.tensor([[40.0, 43.0], [12.0, 10.0], [60.0, 5.0]])
    assert match_places(found, wanted, 4.0).tolist() == [[1, 1], [2, 0]]  # the first of the two left is a ghost
    assert match_places(wanted, found, 4.0).tolist() == [[1, 1], [0, 2]]
    assert match_places(found, wanted, 2.9).tolist() == [[1, 1]]
    assert match_places(found, wanted, 3.0).tolist() == [[1, 1], [2, 0]], "the largest distance is still near"


def test_a_place_that_is_taken_leaves_the_next_nearest() -> None:
    found = torch.tensor([[10.0, 10.0], [13.0, 10.0]])
    wanted = torch.tensor([[12.0, 10.0], [9.0, 10.0]])
    assert sorted(match_places(found, wanted, 8.0).tolist()) == [[0, 1], [1, 0]]


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (2, 0)])
def test_nothing_has_no_pairs(n: int, m: int) -> None:
    pairs = match_places(torch.zeros(n, 2), torch.zeros(m, 2), 4.0)
    assert pairs.shape == (0, 2)
    assert pairs.dtype == torch.int64


def test_pairs_of_no_places_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found must be \(n, 2\), got \(2,\)"):
        match_places(torch.zeros(2), torch.zeros(3, 2), 4.0)
    with pytest.raises(ValueError, match=r"wanted must be \(n, 2\), got \(3, 3\)"):
        match_places(torch.zeros(2, 2), torch.zeros(3, 3), 4.0)


# How it was trained

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_counter.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_iclevr_layout(tmp_path_factory.mktemp("scenes"), num_scenes=24, image_size=(64, 64))
    prepare(folder, progress=False)
    return folder


def test_train_counter_reports_and_saves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train_counter.py", "--data", str(data), "--steps", "2", "--out", str(tmp_path / "counter")]
    monkeypatch.setattr(sys, "argv", arguments)
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("step") for line in lines] == [2, None]
    assert lines[-1]["split"] == "test"
    assert lines[-1]["real"]["pictures"] == 3 * len(SceneDataset(data, "test"))
    assert ObjectCounter.from_pretrained(tmp_path / "counter").config.threshold == lines[-1]["threshold"]


@pytest.fixture(scope="module")
def recipe() -> SimpleNamespace:
    """What ``train_counter.py`` defines."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(scope="module")
def drawn(data: Path, recipe: SimpleNamespace) -> Any:
    """The scenes of the tests on a floor without objects, as ``train_counter.py`` wants them."""
    pixels = SceneDataset(data).pixels
    floor = pixels[:, :1, :, :4, :4].float().mean((3, 4), keepdim=True).expand(-1, -1, -1, 64, 64)
    before = torch.cat((floor.byte(), pixels), 1)

    def scenes_before(*_: object, progress: bool) -> SimpleNamespace:
        return SimpleNamespace(pixels=before)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(recipe.read_scenes.__globals__, "TrainingScenes", scenes_before)
        return recipe.read_scenes(SceneDataset(data), None, False)


def test_an_object_is_taken_away_without_a_trace(recipe: SimpleNamespace, drawn: Any) -> None:
    rows = torch.arange(24)
    last = torch.full((24,), 2)
    three = recipe.real_pictures(drawn, rows, last + 1)
    two = recipe.take_away(three, drawn, rows, last)
    gone = (two.kinds[:, 2] == recipe.NOTHING).nonzero().flatten()
    assert len(gone) > 12
    assert (two.images[gone] - from_uint8(drawn.pixels[gone, 2])).abs().max() < 1e-5
    assert torch.equal(two.kinds[:, :2], three.kinds[:, :2])


def test_what_is_added_is_where_it_is_said_to_be(recipe: SimpleNamespace, drawn: Any) -> None:
    rows = torch.arange(24)
    one = recipe.real_pictures(drawn, rows, torch.ones(24, dtype=torch.long), spare=1)
    two = recipe.add(one, 3, drawn, torch.Generator().manual_seed(0), only_objects=True)
    new = (two.kinds[:, 3] == recipe.OBJECT).nonzero().flatten()
    assert len(new) > 12
    torch.testing.assert_close(place_of_change(one.images[new], two.images[new]), two.places[new, 3])
    stays = two.kinds[:, 3] == recipe.NOTHING
    assert torch.equal(two.images[stays], one.images[stays])


def test_an_object_replaces_what_was_there_and_its_shadow_is_added(recipe: SimpleNamespace) -> None:
    rng = torch.Generator().manual_seed(3)
    floor, before, after = (torch.rand(1, 3, 32, 32, generator=rng) - 0.5 for _ in range(3))
    region = torch.zeros(1, 32, 32, dtype=torch.bool)
    region[:, 10:20, 12:22] = True
    pasted = recipe.paste(floor, before, after, region)
    torch.testing.assert_close(pasted[..., 10:20, 12:22], after[..., 10:20, 12:22])
    torch.testing.assert_close(pasted[..., 24:, :], (floor + after - before)[..., 24:, :])


def test_what_is_added_behind_an_object_is_where_it_can_be_seen(recipe: SimpleNamespace, drawn: Any) -> None:
    rows = torch.arange(24)
    wall = recipe.real_pictures(drawn, rows, torch.ones(24, dtype=torch.long), spare=1)
    wall.regions[:, 0, 16:] = True
    wall.places[:, 0] = torch.tensor([32.0, 63.0])
    both = recipe.add(wall, 3, drawn, torch.Generator().manual_seed(0), only_objects=True)
    seen = (both.kinds[:, 3] == recipe.OBJECT).nonzero().flatten()
    assert len(seen) > 4
    assert torch.equal(both.images[:, :, 16:], wall.images[:, :, 16:])
    torch.testing.assert_close(place_of_change(wall.images[seen], both.images[seen]), both.places[seen, 3])
    hidden = both.regions[:, 3].sum((1, 2)) < recipe.MIN_VISIBLE
    assert (both.kinds[hidden, 3] != recipe.OBJECT).all()


def test_the_loss_wants_heat_at_centres_and_nowhere_else(recipe: SimpleNamespace) -> None:
    places = torch.tensor([[[20.5, 30.5], [50.5, 10.5], [0.0, 0.0]]])
    kinds = torch.tensor([[recipe.OBJECT, recipe.UNCLEAR, recipe.NOTHING]])
    right = torch.full((1, 1, 32, 32), -9.0)
    right[0, 0, 15, 10] = 9.0
    losses = {"right": recipe.focal_loss(right, places, kinds).item()}
    for name, row, column, heat in (("missed", 15, 10, -9.0), ("ghost", 25, 25, 9.0), ("unclear", 5, 25, 9.0)):
        logits = right.clone()
        logits[0, 0, row, column] = heat
        losses[name] = recipe.focal_loss(logits, places, kinds).item()
    assert losses["right"] < 1e-3
    assert losses["unclear"] == losses["right"]
    assert losses["missed"] == pytest.approx(9, abs=0.01)
    assert losses["ghost"] == pytest.approx(9, abs=0.01)


# The counter that ships, on drawn scenes


def test_the_shipped_counter_counts_and_finds_drawn_objects() -> None:
    """A floor far below the published figures, which are of real pictures."""
    generator, counter = IterativeGenerator.from_pretrained(), ObjectCounter.from_pretrained()
    places = [(31.0, 27.0), (14.0, 24.0), (48.0, 36.0)]
    scenes = [
        ["red cube", "blue sphere", "green cylinder"],
        ["cyan cube"] * 3,
        ["yellow sphere", "gray cube", "gray cube"],
    ]
    turns = draw_turns(generator, scenes * 4, range(12), places=[places] * 12).images  # (12, 4, 3, 64, 64)
    counts = torch.stack([counter.count(turns[:, turn]) for turn in range(4)], 1)
    right = (counts == torch.arange(4)).float().mean(0)
    assert right.amin() > 0.7, f"right counts of 0 to 3 objects: {right.tolist()}"
    assert right.mean() > 0.85
    near = [len(match_places(found, torch.tensor(places), 4.0)) for found in counter.places(turns[:, -1])]
    assert sum(near) > 0.85 * 36


def test_a_ghost_of_an_object_is_not_counted() -> None:
    generator, counter = IterativeGenerator.from_pretrained(), ObjectCounter.from_pretrained()
    turns = draw_turns(generator, [["red cube", "blue sphere"]] * 8, range(8), places=[[None, (48.0, 36.0)]] * 8).images
    before, after = turns[:, 1], turns[:, 2]
    assert (counter.count(torch.lerp(before, after, 0.1)) == counter.count(before)).float().mean() > 0.8
    assert (counter.count(after) == counter.count(before) + 1).float().mean() > 0.8
