"""examples/pasting.py: what is pasted in is where and what it is said to be, and what is taken away leaves no trace."""

from __future__ import annotations

from types import SimpleNamespace

import pasting
import pytest
import torch
from scenes import write_iclevr_layout
from train_classifier import edited_pictures

from condgan.datasets import SceneDataset
from condgan.functional import place_of_change
from condgan.images import from_uint8
from condgan.prepare import prepare


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> pasting.Scenes:
    """The scenes of the tests on a floor without objects."""
    folder = write_iclevr_layout(tmp_path_factory.mktemp("scenes"), num_scenes=24, image_size=(64, 64))
    prepare(folder, progress=False)
    pixels = SceneDataset(folder).pixels
    floor = pixels[:, :1, :, :4, :4].float().mean((3, 4), keepdim=True).expand(-1, -1, -1, 64, 64)
    before = torch.cat((floor.byte(), pixels), 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pasting, "TrainingScenes", lambda *_, **__: SimpleNamespace(pixels=before))
        return pasting.read_scenes(SceneDataset(folder), pasting.empty_scenes(SceneDataset(folder)), False)


def test_an_object_is_taken_away_without_a_trace(drawn: pasting.Scenes) -> None:
    rows = torch.arange(24)
    last = torch.full((24,), 2)
    three = pasting.real_pictures(drawn, rows, last + 1)
    two = pasting.take_away(three, drawn, rows, last)
    gone = (two.kinds[:, 2] == pasting.NOTHING).nonzero().flatten()
    assert len(gone) > 12
    assert (two.images[gone] - from_uint8(drawn.pixels[gone, 2])).abs().max() < 1e-5
    assert torch.equal(two.kinds[:, :2], three.kinds[:, :2])


def test_what_is_added_is_where_it_is_said_to_be(drawn: pasting.Scenes) -> None:
    rows = torch.arange(24)
    one = pasting.real_pictures(drawn, rows, torch.ones(24, dtype=torch.long), spare=1)
    two = pasting.add(one, 3, drawn, torch.Generator().manual_seed(0), only_objects=True)
    new = (two.kinds[:, 3] == pasting.OBJECT).nonzero().flatten()
    assert len(new) > 12
    torch.testing.assert_close(place_of_change(one.images[new], two.images[new]), two.places[new, 3])
    stays = two.kinds[:, 3] == pasting.NOTHING
    assert torch.equal(two.images[stays], one.images[stays])


def test_an_object_replaces_what_was_there_and_its_shadow_is_added() -> None:
    rng = torch.Generator().manual_seed(3)
    floor, before, after = (torch.rand(1, 3, 32, 32, generator=rng) - 0.5 for _ in range(3))
    region = torch.zeros(1, 32, 32, dtype=torch.bool)
    region[:, 10:20, 12:22] = True
    pasted = pasting.paste(floor, before, after, region)
    torch.testing.assert_close(pasted[..., 10:20, 12:22], after[..., 10:20, 12:22])
    torch.testing.assert_close(pasted[..., 24:, :], (floor + after - before)[..., 24:, :])


def test_what_is_added_behind_an_object_is_where_it_can_be_seen(drawn: pasting.Scenes) -> None:
    rows = torch.arange(24)
    wall = pasting.real_pictures(drawn, rows, torch.ones(24, dtype=torch.long), spare=1)
    wall.regions[:, 0, 16:] = True
    wall.places[:, 0] = torch.tensor([32.0, 63.0])
    both = pasting.add(wall, 3, drawn, torch.Generator().manual_seed(0), only_objects=True)
    seen = (both.kinds[:, 3] == pasting.OBJECT).nonzero().flatten()
    assert len(seen) > 4
    assert torch.equal(both.images[:, :, 16:], wall.images[:, :, 16:])
    torch.testing.assert_close(place_of_change(wall.images[seen], both.images[seen]), both.places[seen, 3])
    hidden = both.regions[:, 3].sum((1, 2)) < pasting.MIN_VISIBLE
    assert (both.kinds[hidden, 3] != pasting.OBJECT).all()


def test_a_classifier_is_told_what_was_pasted_and_not_asked_for_what_is_hidden(
    drawn: pasting.Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, there, asked = edited_pictures(drawn, 64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, 64, 64)
    assert there.sum(1).max() > 3, "more than any real scene has"
    assert not ((1 - asked) * there).any()
    assert 0 < (1 - asked).sum() < 0.2 * there.sum(), "some are hidden by what was pasted before them"
    monkeypatch.setattr(pasting, "MIN_VISIBLE", 10_000)  # now everything is
    _, there, asked = edited_pictures(drawn, 64, torch.Generator().manual_seed(0))
    assert not there.any()
    assert 1 < (1 - asked).sum(1).max() < 6
