"""calibration.py: statistics of what a generator draws by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import COMPACT, REFERENCE, lively_generator
from torch import Tensor

from condgan import IterativeGenerator, calibration
from condgan.calibration import (
    CodedTurns,
    code_turns,
    correct_first_turns,
    fit_mapping,
    fit_places,
    recalibrate,
)
from condgan.configs import NoiseEncoderConfig
from condgan.correction import FirstTurnCorrection
from condgan.datasets import SceneDataset
from condgan.drawing import draw_turns
from condgan.functional import places_of_turns, roll_conditions
from condgan.images import from_uint8, to_uint8
from condgan.models import NoiseEncoder

pytestmark = pytest.mark.whole_fits


def test_recalibrated_statistics_are_those_of_own_scenes(data: Path) -> None:
    generator = lively_generator(COMPACT)
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.fill_(1000.0)
    objects = torch.nn.functional.one_hot(SceneDataset(data, "train").objects, 24).float()
    recalibrate(generator, objects)
    assert not generator.training
    seen: list[Tensor] = []
    hook = generator.bn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generator.generate([["red cube", "blue cube", "gray cube"]] * 8, seed=0)
    hook.remove()
    mean = torch.cat(seen).mean((0, 2, 3))
    spread = torch.cat(seen).std((0, 2, 3))
    assert generator.bn.running_mean is not None
    assert ((generator.bn.running_mean - mean).abs() < spread).all()
    assert all(m.momentum == 0.1 for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d))


NO_PLACES = replace(COMPACT, places=False, window=None)
"""Each of our small generators puts its first objects elsewhere, where nothing is corrected."""


def mean_changes(generator: IterativeGenerator, names: Sequence[str], seeds: range) -> Tensor:
    """(K, 3, H, W): what the first turns of each object change on average, in grey levels."""
    means = []
    for name in names:
        pictures = to_uint8(draw_turns(generator, [[name]] * len(seeds), seeds).images).float()
        means.append((pictures[:, 1] - pictures[:, 0]).mean(0))
    return torch.stack(means)


def test_corrected_first_turns_are_right_on_average_and_objects_without_data_stay_as_they_were() -> None:
    names = ("red cube", "blue sphere", "gray cylinder")
    config = replace(NO_PLACES, objects=names, light_components=0, light_inputs=0)
    generator, teacher = lively_generator(config), lively_generator(config, seed=1)
    generator.canvas.load_state_dict(teacher.canvas.state_dict())
    scenes = draw_turns(teacher, [[name] for name in names[:2]] * 60, range(120))
    pixels, objects = to_uint8(scenes.images), torch.tensor([0, 1] * 60)
    seeds = range(1000, 1060)
    real = mean_changes(teacher, names, seeds)
    before = mean_changes(generator, names, seeds)
    correct_first_turns(generator, None, pixels, objects, noise=0.0, progress=False)
    after = mean_changes(generator, names, seeds)
    errors = [(drawn - real)[:2].square().mean().sqrt() for drawn in (before, after)]
    assert errors[1] < 0.45 * errors[0], errors
    assert not generator.training


def test_the_usual_places_of_first_objects_are_measured() -> None:
    generator = lively_generator(replace(COMPACT, objects=("red cube", "blue sphere", "gray cylinder")))
    pixels = torch.full((60, 2, 3, 64, 64), 100, dtype=torch.uint8)
    objects = torch.tensor([0, 1] * 30)
    pixels[objects == 0, 1, 0, 20:25, 30:35] = 200
    pixels[objects == 1, 1, 2, 40:43, 10:13] = 200
    correct_first_turns(generator, None, pixels, objects, noise=0.0, progress=False)
    assert generator.correction is not None
    assert generator.correction.places[:2].tolist() == [[32.0, 22.0], [11.0, 41.0]]
    assert generator.correction.reach.tolist() == [1.0, 1.0, 128.0]


def only_corrections(objects: tuple[str, ...], mapping: bool) -> tuple[IterativeGenerator, IterativeGenerator]:
    """Two generators that draw nothing but their correction, on canvases whose light varies in three ways."""
    config = replace(NO_PLACES, objects=objects, mapping=mapping)
    networks = lively_generator(config), lively_generator(config)
    ramp = torch.linspace(-0.1, 0.1, 64)
    for network in networks:
        torch.nn.init.constant_(network.conv.get_parameter("bias")[3], -100.0)  # the mask is shut
        torch.nn.init.zeros_(network.conv.get_parameter("weight")[4:])  # and nothing faint is added
        network.canvas.mean.zero_()
        network.canvas.grain_mix.zero_()
        network.canvas.components.copy_(
            torch.stack((ramp.expand(64, 64), ramp[:, None].expand(64, 64), 0 * ramp.expand(64, 64)))[:, None]
        )
        assert network.light is not None and network.correction is not None
        scenes = [[name] for name in objects] * 80
        network.light.fit(draw_turns(network, scenes, range(len(scenes))).images[:, 0])
        network.correction.clear_()
    return networks


def test_corrected_first_turns_answer_to_the_light_as_real_ones_do() -> None:
    """Objects of one shape share two answers to each number and each product; what the one generator lacks is known."""
    generator, teacher = only_corrections(("red cube", "blue cube", "red sphere"), mapping=False)
    known, wanted = generator.correction, teacher.correction
    assert known is not None and wanted is not None
    rng = torch.Generator().manual_seed(0)
    answers, shares = 0.02 * torch.randn(4, 5, 56, 56, generator=rng), torch.randn(3, 3, 4, generator=rng)
    answers[:, :2] *= 3  # what is linear says which pictures objects share
    shares[:2, :, 2:], shares[2, :, :2] = 0, 0
    offsets = 0.1 * torch.randn(3, 3, 64, 64, generator=rng)
    for changed in (offsets, answers):  # the floor around an object is seen
        changed *= F.pad(torch.ones(24, 24), ((changed.shape[-1] - 24) // 2,) * 4)
    wanted.set_(offsets, answers, shares)
    objects = torch.arange(3).repeat(150)
    scenes = [[teacher.vocabulary.names[i]] for i in objects.tolist()]
    pixels = to_uint8(draw_turns(teacher, scenes, range(len(scenes))).images)
    correct_first_turns(generator, None, pixels, objects, noise=0.0, progress=False)
    lights = torch.randn(100, 2, generator=rng)

    def error(correction: FirstTurnCorrection) -> float:
        pairs = zip(*(x(x.conditions[objects[:100]], lights) for x in (correction, wanted)), strict=True)
        return torch.stack([(one - other).square().mean() for one, other in pairs]).mean().sqrt().item()

    right = error(known)
    assert right < 0.01, right
    assert known.responses is not None
    known.responses[:, 2:] = 0
    assert error(known) > 3 * right


def test_corrected_first_turns_answer_to_the_codes_of_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, teacher = only_corrections(("red cube", "blue cube"), mapping=True)
    known, wanted = generator.correction, teacher.correction
    assert known is not None and wanted is not None and teacher.mapping is not None
    rng = torch.Generator().manual_seed(0)
    answers, shares = torch.zeros(2, 8 + 36, 56, 56), torch.randn(2, 3, 2, generator=rng)
    used = torch.tensor([2, 7, 8 + 15, 8 + 20])  # two numbers of the code, the square of one and the product of both
    answers[:, used, 16:40, 16:40] = 0.02 * torch.randn(2, len(used), 24, 24, generator=rng)
    wanted.set_(torch.zeros(2, 3, 64, 64), answers, shares)
    codes: list[Tensor] = []
    teacher.mapping.register_forward_hook(lambda module, args, code: codes.append(code))
    objects = torch.arange(2).repeat(300)
    scenes = [[teacher.vocabulary.names[i]] for i in objects.tolist()]
    pixels = to_uint8(draw_turns(teacher, scenes, range(len(scenes))).images)
    found = CodedTurns(torch.cat(codes), torch.empty(0), torch.empty(0), None, None, objects[:, None])
    monkeypatch.setattr(calibration, "code_turns", lambda *args: found)
    encoder = NoiseEncoder(NoiseEncoderConfig(width=4, z_dim=6, places=False))
    correct_first_turns(generator, encoder, pixels, objects, noise=0.0, progress=False)
    assert known.codes is not None
    torch.testing.assert_close(
        known.codes, torch.stack([torch.cat(codes)[objects == kind].mean(0) for kind in range(2)])
    )
    tested = known.conditions[objects[:100]], torch.randn(100, 2, generator=rng), None, torch.cat(codes)[:100]
    drawn, expected = known(*tested), wanted(*tested)
    right = (drawn - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert right < 0.2, right
    unlike = known(*tested[:3], tested[3].flip(0)) - expected
    assert unlike.square().mean() > 16 * (drawn - expected).square().mean()


def test_first_turns_are_measured_with_the_codes_of_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = lively_generator(replace(COMPACT, objects=("red cube", "blue sphere")))
    encoder = NoiseEncoder(NoiseEncoderConfig(width=4, z_dim=6, places=True, window=40)).train()
    pixels = torch.randint(256, (40, 2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes: list[Tensor] = []
    synthesis = generator.synthesis

    def record(code: Tensor, *args: Tensor) -> Tensor:
        codes.append(code)
        return synthesis(code, *args)

    monkeypatch.setattr(generator, "synthesis", record)
    correct_first_turns(generator, encoder, pixels, torch.arange(40) % 2, noise=0.0, progress=False)
    assert encoder.training
    before, after = from_uint8(pixels).unbind(1)
    with torch.no_grad():
        expected = encoder.eval()(before, after, places_of_turns(pixels)[:, 0])
    torch.testing.assert_close(torch.cat(codes), expected)


def test_what_is_left_of_shadows_in_the_empty_scenes_of_real_turns_is_drawn() -> None:
    """Faint shadows that no real turn adds: pictures come out as real ones are, and not only their changes."""
    generator, _ = only_corrections(("red cube",), mapping=False)
    assert generator.correction is not None
    canvases = to_uint8(draw_turns(generator, [["red cube"]] * 200, range(200)).images[:, 0]).int()
    before, after = canvases.clone(), canvases.clone()
    before[:, :, 36:44, 20:44] -= 3
    after[:, :, 36:44, 20:44] -= 3
    after[:, 0, 26:36, 26:36] += 50
    pixels = torch.stack((before, after), 1).to(torch.uint8)
    correct_first_turns(generator, None, pixels, torch.zeros(200).long(), noise=0.0, progress=False)
    drawn = to_uint8(draw_turns(generator, [["red cube"]] * 200, range(200)).images[:, 1]).float().mean(0)
    wrong = (drawn - after.float().mean(0))[:, 20:44, 20:44]
    assert wrong.abs().max() < 1
    assert wrong.mean().abs() < 0.2


def test_the_tints_that_objects_give_the_floor_are_drawn_with_them() -> None:
    """Red cubes lighten the floor to the right, blue ones to the left, as some scenes are lit whatever is in them."""
    generator, _ = only_corrections(("red cube", "blue cube"), mapping=False)
    objects = torch.arange(2).repeat(150)
    rng = torch.Generator().manual_seed(0)
    light = 0.5 * torch.randn(300, 3, generator=rng)
    light[:, 0] += torch.tensor([0.6, -0.6])[objects]
    before = generator.canvas.in_light(light, torch.zeros(300, 3, 64, 64))
    after = before.clone()
    after[:, 0, 26:36, 26:36] += 0.4
    pixels = to_uint8(torch.stack((before, after), 1))
    correct_first_turns(generator, None, pixels, objects, noise=0.0, progress=False)
    for name, tint in (("red cube", 0.6), ("blue cube", -0.6)):
        images = draw_turns(generator, [[name]] * 100, range(100)).images
        changed = (images[:, 1] - images[:, 0]).mean(0)[2]  # blue, which the object has nothing of
        wanted = tint * generator.canvas.components[0, 2]
        torch.testing.assert_close(changed, wanted, rtol=0, atol=0.012)
        assert wanted.abs().max() > 0.05


def test_what_the_noise_around_codes_changes_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found codes vary in two directions, and real turns with them in red and green; drawn ones must not differ by the
    noise in the others, in which found codes do not vary."""
    generator = lively_generator(
        replace(NO_PLACES, objects=("red cube",), light_components=0, light_inputs=0, mapping=True)
    )
    rng = torch.Generator().manual_seed(7)
    code, around = torch.full((2, 400, 6), 0.5)
    code[:, :2] += 0.3 * torch.randn(400, 2, generator=rng)
    around[:, 2:] += 0.3 * torch.randn(400, 4, generator=rng)
    pixels = torch.full((400, 2, 3, 64, 64), 100, dtype=torch.uint8)
    pixels[:, 1, :2, 24:40, 24:40] = (150 + 40 * code[:, :2, None, None]).to(torch.uint8)
    objects = torch.zeros(400, 1).long()
    monkeypatch.setattr(calibration, "code_turns", lambda *args: CodedTurns(code, code, code, None, None, objects))
    encoder = NoiseEncoder(NoiseEncoderConfig(width=4, z_dim=6, places=False))

    @torch.no_grad()
    def spread(noise: float) -> float:
        correct_first_turns(generator, encoder, pixels, torch.zeros(400).long(), noise=noise, progress=False)
        assert generator.correction is not None
        condition = generator.correction.conditions.expand(400, -1)
        drawn = generator.eval().synthesis(around, condition, from_uint8(pixels[:, 0]), None)
        return drawn[:, :2, 24:40, 24:40].var(0).mean().item()

    without, with_it = spread(0.0), spread(0.3)
    assert with_it < 0.5 * without, (with_it, without)


def test_a_generator_without_correction_is_an_error() -> None:
    with pytest.raises(ValueError, match="correction=False"):
        correct_first_turns(
            lively_generator(REFERENCE), None, torch.zeros(1, 2, 3, 64, 64).byte(), torch.zeros(1).long(), noise=0.0
        )


@pytest.mark.parametrize("change", [{"z_dim": COMPACT.z_dim + 1}, {"window": 32}, {"image_size": 128}])
def test_codes_are_not_asked_of_the_noise_encoder_of_another_model(change: dict[str, int]) -> None:
    fitting = NoiseEncoderConfig(width=4, z_dim=COMPACT.z_dim, places=True, window=COMPACT.window)
    other, (field, value) = NoiseEncoder(replace(fitting, **change)), *change.items()
    pixels, objects = torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"noise_encoder: it is of another model, its {field} is {value}"):
        code_turns(IterativeGenerator(COMPACT), other, pixels, objects, torch.zeros(2, 1, 2))


def test_codes_of_turns_come_with_what_the_generator_knows_of_each(data: Path) -> None:
    generator = lively_generator(COMPACT)
    noise_encoder = NoiseEncoder(NoiseEncoderConfig(width=4, z_dim=6, places=True, window=40)).train()
    scenes = SceneDataset(data, "train")
    pixels = torch.cat((scenes.pixels[:, :1], scenes.pixels), 1)
    places = torch.rand(len(pixels), 3, 2) * 40 + 12
    turns = code_turns(generator, noise_encoder, pixels, scenes.objects, places)
    assert noise_encoder.training
    assert not turns.codes.requires_grad and not turns.conditions.requires_grad, "nobody learns from what is found"
    assert turns.codes.shape == (3 * len(pixels), 6)
    assert turns.places is not None
    torch.testing.assert_close(turns.places[4], places[1, 1])
    one_hot = torch.eye(24)[scenes.objects[1]]
    first, hidden = generator.encoder(one_hot[:1])
    second, _ = generator.encoder(one_hot[1:2], hidden)
    torch.testing.assert_close(turns.conditions[3:5], torch.cat((first, second)))
    torch.testing.assert_close(turns.conditions_alone[4:5], generator.encoder(one_hot[1:2])[0])
    with torch.no_grad():
        images = pixels[1, 1:3].float() / 127.5 - 1
        code = noise_encoder.eval()(images[:1], images[1:], places[1, 1:2])
    torch.testing.assert_close(turns.codes[4:5], code)
    assert turns.light is not None and turns.light.any()
    torch.testing.assert_close(turns.light[4:5], generator.read_light(images[:1]))


def test_the_mapping_learns_which_codes_go_with_which_object() -> None:
    generator = lively_generator(COMPACT)
    assert generator.mapping is not None
    rng = torch.Generator().manual_seed(0)
    kinds = torch.arange(600) % 2
    codes = 0.1 * torch.randn(600, 6, generator=rng)
    codes[:, 0] += 2.0 * kinds - 1
    conditions = generator.encoder(torch.eye(24)[:2])[0].detach()[kinds]
    bright = (torch.arange(600) % 4 < 2).float()
    codes[:, 1] += 2.0 * bright - 1
    light = torch.stack((bright, torch.zeros(600)), 1)
    turns = CodedTurns(codes, conditions, conditions, torch.full((600, 2), 30.0), light, kinds[:, None])
    state = torch.get_rng_state()
    fit_mapping(generator, turns, noise=0.1, history_dropout=0.5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = generator.mapping(torch.randn(600, 6, generator=rng), conditions, turns.places, light)
    for number, known in ((0, kinds), (1, bright)):
        right = (drawn[:, number] > 0) == (known == 1)
        assert right.float().mean() > 0.97
    assert (drawn[:, 2:].std(0) < 0.35).all()
    again = lively_generator(COMPACT)
    fit_mapping(again, turns, noise=0.1, history_dropout=0.5, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(generator.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_codes_of_later_turns_are_not_learned_by_heart() -> None:
    """They depend on the object and on chance: others are as likely as those that were seen in the same scenes."""
    generator = lively_generator(COMPACT)
    assert generator.mapping is not None
    rng = torch.Generator().manual_seed(0)
    objects = torch.cat((torch.randint(0, 24, (200, 2), generator=rng), torch.arange(200)[:, None] % 2), 1)
    with torch.no_grad():
        conditions = roll_conditions(generator.encoder, torch.eye(24)[objects])[0].flatten(0, 1)
    seen, others = 0.5 * torch.randn(2, 600, 6, generator=rng)
    for codes in (seen, others):
        codes[2::3, 0] += 2.0 * objects[:, 2] - 1
    light = torch.randn(200, 1, 2, generator=rng).expand(-1, 3, -1).flatten(0, 1)
    turns = CodedTurns(seen, conditions, conditions, torch.full((600, 2), 30.0), light, objects)
    fit_mapping(generator, turns, noise=0.0, history_dropout=0.0, progress=False)

    @torch.no_grad()
    def likelihood(codes: Tensor, of: Tensor = conditions) -> float:
        assert generator.mapping is not None
        return -generator.mapping.loss(codes[2::3], of[2::3], turns.places[2::3], light[2::3]).mean().item()  # type: ignore[index]

    assert likelihood(seen) < likelihood(others) + 1.2  # without another history and noise: 2.2
    assert likelihood(others) > likelihood(others, conditions.roll(3, 0)) + 1  # of the other object


def test_a_generator_without_mapping_is_an_error() -> None:
    turns = CodedTurns(torch.zeros(1, 6), torch.zeros(1, 12), torch.zeros(1, 12), None, None, torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match="mapping=False"):
        fit_mapping(lively_generator(REFERENCE), turns, noise=0.1, history_dropout=0.0)


def test_the_place_model_learns_where_which_object_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """First turns stand in one cell of two pixels, where in it depends on the object. They start from own canvases."""
    monkeypatch.setattr(calibration, "FIT_BATCH_SIZE", 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = IterativeGenerator(replace(COMPACT, image_size=32, window=32))
    model = generator.place_model
    assert model is not None
    rng = torch.Generator().manual_seed(0)
    generator.canvas.mean.copy_(torch.rand(3, 32, 32, generator=rng) * 2 - 1)
    canvases = generator.canvas.mean.expand(64, -1, -1, -1)
    pixels = torch.zeros(64, 2, 3, 32, 32, dtype=torch.uint8)
    objects = torch.arange(64)[:, None] % 2
    places = torch.tensor([[10.5, 14.9], [11.5, 14.4]])[objects] + 0.1 * torch.randn(64, 1, 2, generator=rng)
    conditions = generator.encoder(torch.eye(24)[objects[:, 0]])[0].detach()

    @torch.no_grad()
    def likelihood(of: Tensor) -> float:
        return -model.loss(canvases, conditions, of[:, 0]).mean().item()

    fresh, state = likelihood(places), torch.get_rng_state()
    fit_places(generator, pixels, objects, places, history_dropout=0.5, epochs=60, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert likelihood(places) > fresh + 5
    assert likelihood(places) > likelihood(places.roll(1, 0)) + 5  # of the other object


def test_the_place_of_a_first_object_follows_the_light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "FIT_BATCH_SIZE", 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = IterativeGenerator(replace(COMPACT, image_size=32, window=32))
    assert generator.place_model is not None and generator.light is not None
    generator.canvas.components[0] = torch.linspace(-0.1, 0.1, 32)
    amounts = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    canvases = to_uint8(generator.canvas.in_light(amounts, torch.zeros(128, 3, 32, 32)))
    generator.light.fit(from_uint8(canvases))
    places = torch.tensor([15.0, 13.0]) + 0.3 * amounts[:, None, :1].clamp(-2, 2)
    pixels, objects = canvases[:, None].repeat(1, 2, 1, 1, 1), torch.zeros(128, 1).long()
    fit_places(generator, pixels, objects, places, history_dropout=0.0, epochs=40, progress=False)
    empty = from_uint8(canvases)
    condition = generator.encoder(torch.eye(24)[objects[:, 0]])[0]
    with torch.no_grad():
        _, points = generator.place_model.distribution(empty, condition, generator.read_light(empty))
    share, peak = points.share.exp()[:, :, 6, 7], points.peak[:, :, 0, 6, 7]  # of the cell they stand in
    assert torch.corrcoef(torch.stack(((share * peak).sum(1), places[:, 0, 0])))[0, 1] > 0.98


def test_later_turns_are_not_learned_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrored or not, colours in any order, with light and history of another scene; first turns as they are."""
    monkeypatch.setattr(calibration, "FIT_BATCH_SIZE", 16)
    generator = lively_generator(COMPACT)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 4, 3, 64, 64), dtype=torch.uint8, generator=rng)
    objects = torch.tensor([[0, 1, 2], [3, 1, 4], [5, 1, 2], [6, 7, 4], [8, 7, 9], [9, 7, 2]])
    places = torch.rand(6, 3, 2, generator=rng) * 60
    assert generator.place_model is not None
    seen: list[tuple[Tensor, ...]] = []
    usual = generator.place_model.loss

    def watch(image: Tensor, condition: Tensor, place: Tensor, light: Tensor) -> Tensor:
        seen.extend(zip(image, condition.detach(), place, light, strict=True))
        return usual(image, condition, place, light)

    monkeypatch.setattr(generator.place_model, "loss", watch)
    fit_places(generator, pixels, objects, places, history_dropout=0.0, epochs=20, progress=False)
    one_hot = torch.eye(24)[objects]
    with torch.no_grad():
        conditions, _ = roll_conditions(generator.encoder, one_hot)
        lights = generator.read_light(from_uint8(pixels[:, 1:-1].flatten(0, 1))).view(6, 2, -1)
    canvases = calibration._empty_scenes(generator, pixels[:, 1], objects[:, 0], torch.Generator().manual_seed(0))
    found = set()
    for image, condition, place, light in seen:
        scene, turn = divmod(int((places.flatten(0, 1)[:, 1] - place[1]).abs().argmin()), 3)  # no mirror changes y
        x = places[scene, turn, 0]
        if turn == 0:
            assert place[0] == x
            assert torch.equal(image, from_uint8(canvases[scene]))
            torch.testing.assert_close(condition, conditions[scene, 0])
            continue
        before = from_uint8(pixels[scene, turn])
        mirrored = place[0] != x
        assert place[0] == (63 - x if mirrored else x)
        before = before.flip(2) if mirrored else before
        colours = tuple(int((before - channel).abs().sum((1, 2)).argmin()) for channel in image)
        assert sorted(colours) == [0, 1, 2]
        assert torch.equal(image, before[[*colours]])
        other = int((conditions[:, turn] - condition).abs().sum(1).argmin())
        torch.testing.assert_close(condition, conditions[other, turn])
        assert objects[other, turn] == objects[scene, turn]
        torch.testing.assert_close(light, lights[other, turn - 1])
        found.add((scene, turn, other, mirrored.item(), colours))
    pairs = {(scene, turn, other) for scene, turn, other, *_ in found}
    assert pairs == {(s, t, o) for t in (1, 2) for s in range(6) for o in range(6) if objects[s, t] == objects[o, t]}
    assert len({colours for *_, colours in found}) == 6
    assert len({mirrored for *_, mirrored, _ in found}) == 2


def test_a_generator_without_places_is_an_error() -> None:
    pixels, objects = torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 1).long()
    with pytest.raises(ValueError, match="places=False"):
        fit_places(lively_generator(REFERENCE), pixels, objects, torch.zeros(1, 1, 2), history_dropout=0.0)
