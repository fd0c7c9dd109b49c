"""Told apart: how often a fresh classifier that learns the difference tells drawn pictures from real ones.

A trial, not a score of fixed features: what the pictures have in common is learned anew for each generator, so that
nothing is safe from being seen. 50 % is what guessing reaches, and what real pictures held against real ones get.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from condgan.datasets import SceneDataset, scene_split
from condgan.devices import cpu_by_default
from condgan.drawing import Redraw, SceneModel, parse_best_of
from condgan.functional import evaluating
from condgan.images import from_uint8, grid, to_pil, to_uint8
from condgan.metrics import share_interval
from condgan.requests import parse_scenes, parse_seed, parse_whole
from condgan.scenes import SceneDrawer, open_real

EPOCHS = 8
"""How often a classifier sees each picture it learns from."""
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
"""The highest, of AdamW; one cycle over the whole training."""
RESAMPLES = 2000
"""Bootstrap resamples of an interval."""
BLUR_SIGMA = 0.5
"""Standard deviation, in pixels, of the blur in the control that must be told apart."""
CAPTION_HEIGHT = 16
"""Of a row of the sheet, in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ToldApart:
    """What :func:`told_apart` found."""

    rate: float
    """Share of the held-out pictures that a classifier is right about, mean over seeds: 0.5 is guessing."""
    rates: tuple[float, ...]
    """The same for each seed."""
    rate_ci95: tuple[float, float]
    """95 % interval of ``rate`` over other held-out pictures and other seeds of the classifier."""
    training_pictures: int
    """Real pictures that each classifier learned from; of drawn ones as many."""
    held_out_pictures: int
    """Real pictures that it was tested on; of drawn ones as many."""
    real_scores: Tensor
    """(N,) float32: the logit of each held-out real picture, mean over seeds; positive means called real."""
    drawn_scores: Tensor
    """(N,) float32: likewise of each held-out drawn picture."""

    def to_dict(self) -> dict[str, Any]:
        """All fields but the scores under their names, ready for JSON."""
        return {
            "rate": self.rate,
            "rates": list(self.rates),
            "rate_ci95": list(self.rate_ci95),
            "training_pictures": self.training_pictures,
            "held_out_pictures": self.held_out_pictures,
        }


@cpu_by_default()
def told_apart(
    real: Tensor,
    drawn: Tensor,
    *,
    held_out_real: Tensor,
    held_out_drawn: Tensor,
    seeds: int = 5,
    epochs: int = EPOCHS,
    scene_size: int = 1,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> ToldApart:
    """Train fresh classifiers to tell drawn pictures from real ones, and test them on others.

    For each seed a new network: five 3x3 convolutions of 24, 48, 96, 96 and 96 channels, the middle three with stride
    2, each with batch norm and leaky ReLU; then mean and maximum over space and one linear logit, 0.22 million
    parameters. AdamW in batches of 64 with a learning rate that rises to 0.002 and falls to 0 (one cycle), binary
    cross-entropy, float32 on every device; flips are the only augmentation. The network of the last step is tested,
    with the batch norms' statistics taken once more over the pictures that it learned from: averages from the course of
    a short training would blind it. No choice is made by the held-out pictures.

    Equal arguments give equal results on one machine with one number of threads (on a GPU nearly so). The global
    random state is left alone.

    Args:
        real: (M, 3, H, W) uint8, real pictures to learn from.
        drawn: likewise, as many.
        held_out_real: (N, 3, H, W) uint8, real pictures to be tested on. None of ``real`` may be among them, nor any
            other picture of their scenes: the light alone would give it away.
        held_out_drawn: likewise, as many.
        seeds: classifiers; number i starts from seed i.
        epochs: how often a classifier sees each picture.
        scene_size: so many held-out pictures in a row are of one scene: they are not independent.
        device: where the classifiers are trained.
        progress: show a progress bar on stderr.

    Returns:
        :class:`ToldApart`. Its interval resamples held-out scenes and seeds, both at once.

    Raises:
        TypeError: pictures are not uint8.
        ValueError: pictures are not (N, 3, H, W), all of one size, and as many drawn as real; ``seeds``, ``epochs`` or
            ``scene_size`` is less than 1; or the held-out pictures are no whole number of scenes.

    Source: the classifier two-sample test of Lopez-Paz and Oquab 2017, arXiv:1610.06545; the interval is the pigeonhole
    bootstrap of Owen 2007, Annals of Applied Statistics 1(2).
    """
    _check_pictures(real=real, drawn=drawn)
    _check_pictures(held_out_real=held_out_real, held_out_drawn=held_out_drawn)
    if real.shape[1:] != held_out_real.shape[1:]:
        raise ValueError(
            f"real and held_out_real must be pictures of one size, got {tuple(real.shape)} and "
            f"{tuple(held_out_real.shape)}"
        )
    seeds, epochs = parse_whole("seeds", seeds, 1), parse_whole("epochs", epochs, 1)
    if len(held_out_real) % parse_whole("scene_size", scene_size, 1):
        raise ValueError(f"scene_size: {len(held_out_real)} held-out pictures are no whole scenes of {scene_size}")
    from tqdm import tqdm

    device = torch.device(device)
    training, held_out = torch.cat([real, drawn]).cpu(), torch.cat([held_out_real, held_out_drawn]).cpu()
    logits = []
    with tqdm(total=seeds * epochs, desc="telling apart", unit="epoch", file=sys.stderr, disable=not progress) as bar:
        for seed in range(seeds):
            logits.append(_classify(_train(training, seed, epochs, device, bar.update), held_out, device))
    scores = torch.stack(logits).unflatten(1, (2, -1))  # (seeds, 2, N): real, drawn
    right = torch.stack([scores[:, 0] > 0, scores[:, 1] <= 0], 1).double()
    real_scores, drawn_scores = scores.mean(0)
    return ToldApart(
        rate=float(right.mean()),
        rates=tuple(right.mean((1, 2)).tolist()),
        rate_ci95=_interval(right.unflatten(2, (-1, scene_size)).mean(3)),
        training_pictures=len(real),
        held_out_pictures=len(held_out_real),
        real_scores=real_scores,
        drawn_scores=drawn_scores,
    )


def _check_pictures(**pairs: Tensor) -> None:
    """Raise unless two named sets of pictures are uint8 (N, 3, H, W) of one shape, and not empty."""
    (name, real), (other_name, drawn) = pairs.items()
    for key, pictures in pairs.items():
        if pictures.dtype != torch.uint8:
            raise TypeError(f"{key} must be uint8 pictures of 0 to 255, got {pictures.dtype}; see images.to_uint8")
        if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) == 0:
            raise ValueError(f"{key} must be (N, 3, H, W) and not empty, got {tuple(pictures.shape)}")
    if real.shape != drawn.shape:
        raise ValueError(
            f"{name} and {other_name} must be as many pictures of one size, so that guessing is right half of the "
            f"time, got {tuple(real.shape)} and {tuple(drawn.shape)}"
        )


class _Network(nn.Module):
    """The classifier of :func:`told_apart`: (N, 3, H, W) in [-1, 1] to (N,) logits, positive means real."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96, 96)
        self.features = nn.Sequential()
        for in_channels, channels, stride in zip(widths, widths[1:], (1, 2, 2, 2, 1), strict=False):
            self.features.append(nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False))
            self.features.append(nn.BatchNorm2d(channels))
            self.features.append(nn.LeakyReLU(0.1))
        self.head = nn.Linear(2 * widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.head(pooled).squeeze(1)


def _train(training: Tensor, seed: int, epochs: int, device: torch.device, advance: Callable[[], object]) -> nn.Module:
    """A classifier that has learned from (2M, 3, H, W) uint8, first M real pictures, then M drawn ones."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU, the same for every device
        torch.default_generator.manual_seed(seed)
        network = _Network()
    network = network.to(device).to(memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(seed)
    labels = (torch.arange(len(training)) < len(training) // 2).float()
    steps = epochs * math.ceil(len(training) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    for _ in range(epochs):
        for batch in torch.randperm(len(training), generator=rng).split(BATCH_SIZE):
            flip = torch.rand(len(batch), 1, 1, 1, generator=rng) < 0.5
            pictures = torch.where(flip, training[batch].flip(3), training[batch])
            loss = F.binary_cross_entropy_with_logits(_logits(network, pictures, device), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance()
    batches = torch.randperm(len(training), generator=rng).split(BATCH_SIZE)
    update_bn((_images(training[batch], device) for batch in batches), network)
    return network


@torch.no_grad()
def _classify(network: nn.Module, pictures: Tensor, device: torch.device) -> Tensor:
    """Logits (N,) float32 on the CPU of pictures (N, 3, H, W) uint8, with the network in eval mode."""
    with evaluating(network):
        return torch.cat([_logits(network, chunk, device).cpu() for chunk in pictures.split(BATCH_SIZE)])


def _logits(network: nn.Module, pictures: Tensor, device: torch.device) -> Tensor:
    """Logits (N,) float32 of pictures (N, 3, H, W) uint8."""
    return network(_images(pictures, device))


def _images(pictures: Tensor, device: torch.device) -> Tensor:
    """Pictures (N, 3, H, W) uint8 as the network takes them."""
    return from_uint8(pictures.to(device)).contiguous(memory_format=torch.channels_last)


def _interval(right: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of (seeds, 2, N) float64, by resampling seeds, and the N scenes of each kind.

    Where all are right, or none, all resamples are alike: then it is that of a share, over scenes.
    """
    if right.min() == right.max():
        of_scenes = right.flatten(1).T
        return share_interval(of_scenes, torch.ones_like(of_scenes))
    rng = torch.Generator().manual_seed(0)

    def times(count: int) -> Tensor:  # how often each of ``count`` is taken: (RESAMPLES, count)
        taken = torch.randint(count, (RESAMPLES, count), generator=rng)
        return torch.zeros(RESAMPLES, count, dtype=right.dtype).scatter_add_(
            1, taken, torch.ones_like(taken, dtype=right.dtype)
        )

    seeds, kinds, scenes = right.shape
    of_seeds = times(seeds)
    num_right = [((of_seeds @ right[:, kind]) * times(scenes)).sum(1) for kind in range(kinds)]  # (RESAMPLES,) each
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (torch.stack(num_right).sum(0) / right.numel()).quantile(ends).tolist()
    return low, high


# --- a generator against a data set -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class RealismReport:
    """What :func:`realism_report` found."""

    model: str
    """Name of the generator."""
    first_seed: int
    """Of the pictures that it drew."""
    best_of: int = 1
    """Candidates of each picture, or of each turn, of which the verifier kept one; 1 is a single draw."""
    redraw: Redraw = "picture"
    """With ``best_of``, what was drawn again."""
    told_apart: ToldApart
    """Drawn pictures against real ones."""
    real_against_real: ToldApart
    """First control: real pictures against real pictures of other scenes. 0.5, or the trial is not fair."""
    blurred: ToldApart
    """Second control: slightly blurred real pictures against real ones of other scenes. Near 1, or it is blind."""
    held_out_real: Tensor
    """(N, 3, H, W) uint8: the held-out real pictures of ``told_apart``, in the order of its scores."""
    held_out_drawn: Tensor
    """(N, 3, H, W) uint8: likewise the drawn ones."""
    seconds: float
    """Time that the drawing and the three trials took."""

    def to_dict(self) -> dict[str, Any]:
        """All but pictures and scores under their names, ready for JSON."""
        trials = {name: getattr(self, name).to_dict() for name in ("told_apart", "real_against_real", "blurred")}
        drawn = {name: getattr(self, name) for name in ("model", "first_seed", "best_of", "redraw")}
        return {**drawn, **trials, "seconds": self.seconds}

    def __str__(self) -> str:
        rows = [
            ("drawn against real", self.told_apart),
            ("control: real against real", self.real_against_real),
            (f"control: real, blurred by {BLUR_SIGMA:g} px", self.blurred),
        ]
        table = [f"{'':<32}{'right':>8}   {'95 % interval':<18}{'pictures':>9}{'held out':>10}   each seed"]
        for name, trial in rows:
            low, high = trial.rate_ci95
            counts = f"{2 * trial.training_pictures:>9}{2 * trial.held_out_pictures:>10}"
            each = " ".join(f"{rate:.3f}" for rate in trial.rates)
            table.append(f"{name:<32}{trial.rate:>8.3f}   {f'{low:.3f} .. {high:.3f}':<18}{counts}   {each}")
        chosen = f", the best of {self.best_of} by the verifier, by {self.redraw}" if self.best_of > 1 else ""
        head = f"{self.model}{chosen}: how often a fresh classifier is right about drawn or real"
        return "\n".join([head, *table, f"half of the pictures of each trial are real; {self.seconds:.0f} s"])

    def sheet(self, columns: int = 12, scale: int = 2) -> Image.Image:
        """The held-out pictures that the classifiers are surest about, rightly and wrongly, as four captioned rows.

        Args:
            columns: pictures of each kind.
            scale: pixels a side for each pixel of a picture.

        Raises:
            ValueError: an argument is less than 1.
        """
        for name, value in (("columns", columns), ("scale", scale)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        drawn, real = self.told_apart.drawn_scores, self.told_apart.real_scores
        kinds = [
            ("drawn, and surest to be drawn", self.held_out_drawn, drawn, False),
            ("drawn, but surest to be real", self.held_out_drawn, drawn, True),
            ("real, but surest to be drawn", self.held_out_real, real, False),
            ("real, and surest to be real", self.held_out_real, real, True),
        ]
        rows = []
        for caption, pictures, scores, called_real in kinds:
            surest = scores.argsort(descending=called_real, stable=True)[:columns]
            row = grid([to_pil(from_uint8(picture)) for picture in pictures[surest]], columns)
            row = row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST)
            chances = scores[surest].sigmoid() * 100
            caption = f"{caption}: chance of real {chances[0]:.1f} to {chances[-1]:.1f} %"
            rows.append(_captioned(row, caption))
        return grid(rows, columns=1, margin=CAPTION_HEIGHT // 2)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    """A picture with a line of text above it, on white."""
    sheet = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT), "white")
    ImageDraw.Draw(sheet).text((2, 2), caption, fill="black")
    sheet.paste(picture, (0, CAPTION_HEIGHT))
    return sheet


@cpu_by_default()
def realism_report(
    generator: SceneModel,
    data: str | Path,
    *,
    pictures: int = 3000,
    seeds: int = 5,
    control_seeds: int = 2,
    epochs: int = EPOCHS,
    first_seed: int = 0,
    best_of: int = 1,
    redraw: Redraw = "picture",
    device: torch.device | str | None = None,
    progress: bool = True,
    model_name: str | None = None,
) -> RealismReport:
    """Tell a generator's pictures from real ones, with two controls.

    Classifiers learn from scenes of the train split and are tested on those of the validation and test splits. A scene
    gives one real picture, after its first, second or third turn, which is drawn by lot, the same for every generator;
    and one drawn picture, of the same list of objects. Both have 256 grey levels, as in a file.

    Two controls say whether the trial can be trusted. Each holds real pictures of one half of these scenes against
    those of the other half: as they are, which must come out at one half, and blurred with a Gaussian of 0.5 pixels,
    which a person hardly sees and the classifiers must. A half has ``pictures`` scenes of the train split or, where
    these are too few, half of them.

    With fewer pictures the classifiers see less: compare rates only at equal ``training_pictures`` and ``epochs``.

    Args:
        generator: an ``IterativeGenerator``, or any model that draws alike; draws in eval mode.
        data: packed file of ``condgan prepare``, or the folder with it.
        pictures: real pictures to learn from, fewer if the train split has fewer scenes; of drawn ones as many.
        seeds: classifiers for the drawn pictures.
        control_seeds: classifiers for each control.
        epochs: how often a classifier sees each picture.
        first_seed: of the drawn pictures, which are numbered from there: first those to learn from.
        best_of: candidates of each picture, of which the verifier keeps one; 1 takes every picture as it is drawn.
        redraw: with ``best_of``, whether whole pictures are drawn again or single turns.
        device: where the classifiers are trained; None is where the generator is.
        progress: show progress bars on stderr.
        model_name: what the report calls the generator; None is the name of its class.

    Raises:
        DatasetError: ``data`` is not there or damaged.
        ValueError: ``data`` cannot be used, has too few scenes, pictures of another size than the generator's or an
            object that it does not know; or an argument is less than 1.
    """
    started = time.perf_counter()
    pictures, epochs = parse_whole("pictures", pictures, 1), parse_whole("epochs", epochs, 1)
    seeds, control_seeds = parse_whole("seeds", seeds, 1), parse_whole("control_seeds", control_seeds, 1)
    first_seed, best_of = parse_seed(first_seed), parse_best_of(best_of, redraw)
    device = next(generator.parameters()).device if device is None else device
    training, held_out = _read_real(data, generator)
    lists = parse_scenes(training.lists[:pictures] + held_out.lists, generator.vocabulary)
    drawer = SceneDrawer(generator, generator.vocabulary, best_of, redraw, BATCH_SIZE, progress)
    scenes, _ = drawer.draw(lists, range(first_seed, first_seed + len(lists)))
    drawn, held_out_drawn = scenes.final.split([len(lists) - len(held_out.lists), len(held_out.lists)])

    def trial(real: Sequence[Tensor], others: Sequence[Tensor], seeds: int) -> ToldApart:
        return told_apart(
            real[0],
            others[0],
            held_out_real=real[1],
            held_out_drawn=others[1],
            seeds=seeds,
            epochs=epochs,
            device=device,
            progress=progress,
        )

    halves = [min(pictures, len(training.lists) // 2), len(held_out.lists) // 2]
    splits = list(zip((training.pictures, held_out.pictures), halves, strict=True))
    one_half = [split[:half] for split, half in splits]
    other_half = [split[half : 2 * half] for split, half in splits]
    return RealismReport(
        model=model_name or type(generator).__name__,
        first_seed=first_seed,
        best_of=best_of,
        redraw=redraw,
        told_apart=trial((training.pictures[: len(drawn)], held_out.pictures), (drawn, held_out_drawn), seeds),
        real_against_real=trial(one_half, other_half, control_seeds),
        blurred=trial(one_half, [blur(split) for split in other_half], control_seeds),
        held_out_real=held_out.pictures,
        held_out_drawn=held_out_drawn,
        seconds=time.perf_counter() - started,
    )


class _Real(NamedTuple):
    """One real picture of each of S scenes, in a random order that is always the same."""

    pictures: Tensor
    """(S, 3, H, W) uint8."""
    lists: list[list[str]]
    """The objects in each picture, in the order of its turns."""


def check_data(data: str | Path, generator: SceneModel) -> None:
    """Raise what :func:`realism_report` would of data that it cannot use."""
    _read_real(data, generator)


def _read_real(data: str | Path, generator: SceneModel) -> tuple[_Real, _Real]:
    """Pictures to learn from, and held-out ones."""
    dataset = open_real(data, generator.image_size)
    training = torch.tensor([scene_split(name) == "train" for name in dataset.names])
    num_training = int(training.sum())
    num_held_out = len(dataset) - num_training
    if min(num_training, num_held_out) < 2:
        raise ValueError(
            f"data: {str(dataset.path)!r} has {num_training} scenes of the train split and {num_held_out} of the "
            "validation and test splits; at least 2 of each are needed, and thousands for a trial that sees much"
        )
    return _one_turn(dataset, training), _one_turn(dataset, ~training)


def _one_turn(dataset: SceneDataset, wanted: Tensor) -> _Real:
    """A picture of every scene where ``wanted`` (S,) says so, after a turn drawn by lot."""
    rng = torch.Generator().manual_seed(0)
    scenes = wanted.nonzero().squeeze(1)
    scenes = scenes[torch.randperm(len(scenes), generator=rng)]
    turns = torch.randint(dataset.objects.shape[1], (len(scenes),), generator=rng)
    lists = [
        [dataset.vocabulary.names[i] for i in dataset.objects[scene, : turn + 1].tolist()]
        for scene, turn in zip(scenes.tolist(), turns.tolist(), strict=True)
    ]
    return _Real(dataset.pixels[scenes, turns], lists)


def blur(pictures: Tensor) -> Tensor:
    """A Gaussian of :data:`BLUR_SIGMA` over pictures (N, 3, H, W) uint8, edges repeated; to the same."""
    radius = 2
    weights = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * BLUR_SIGMA**2))
    weights = weights / weights.sum()
    images = F.pad(from_uint8(pictures), (radius,) * 4, mode="replicate").flatten(0, 1)[:, None]  # (3N, 1, H, W)
    images = F.conv2d(F.conv2d(images, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return to_uint8(images.view(pictures.shape))
