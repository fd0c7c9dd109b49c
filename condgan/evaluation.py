"""Score a generator: draw every list of a file many times and measure the pictures as users would get them.

Two classifiers take part. The *judge* says whether the asked objects are there; it is only ever evaluated on, never
trained against, never used to choose a checkpoint or a picture. The *verifier*, which the library itself uses to
choose among draws, gives the features of the Fréchet distances.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condgan import metrics
from condgan.classifier import SceneClassifier
from condgan.datasets import SceneDataset, Split, read_conditions
from condgan.drawing import SceneModel, draw_turns
from condgan.functional import evaluating
from condgan.images import from_uint8, to_uint8
from condgan.requests import parse_scenes, parse_seed
from condgan.vocab import Vocabulary

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What :func:`evaluate` measured. Scores are in [0, 1]; None where the data that a measure needs was not given."""

    model: str
    """Name of the generator."""
    conditions: str
    """Name of the file of lists."""
    judge: str
    """Name of the classifier that looked for the objects."""
    draws: int
    """Pictures drawn for each list."""
    seed: int
    """Of the first picture."""
    lists: int
    """Lists of objects in ``conditions``."""
    objects_asked: int
    """Objects in all lists, each list counted once."""
    pictures: int
    """Final pictures judged: lists x draws."""
    accuracy: float
    """Objects found / objects asked (:func:`condgan.metrics.multilabel_accuracy`), over all draws."""
    accuracy_ci95: Interval
    """Its 95 % interval over lists (:func:`condgan.metrics.bootstrap_interval`)."""
    exact: float
    """Share of pictures whose set of objects at threshold 0.5 equals the asked one."""
    exact_ci95: Interval
    """Its 95 % interval over lists."""
    object_f1: float
    """Micro-averaged F1 of objects at threshold 0.5 (:func:`condgan.metrics.object_scores`)."""
    real_accuracy: float | None = None
    """``accuracy`` by the same judge of real pictures of the test split: what one can hope for."""
    real_exact: float | None = None
    """``exact`` by the same judge of the same real pictures."""
    real_pictures: int = 0
    """Real pictures of the test split, all turns; 0 without data."""
    frechet_distance: float | None = None
    """Drawn final pictures to real test pictures. Part of it is only that ``conditions`` asks for other objects than
    the real scenes hold: compare models by it, on the same file, data and verifier."""
    frechet_matched: float | None = None
    """Pictures drawn for the lists of the real test scenes, every turn, to those scenes: the same objects on both
    sides. This is the one to hold against ``frechet_floor``."""
    frechet_floor: float | None = None
    """Real validation pictures to real test pictures: what a perfect generator would reach."""
    frechet_pictures: int = 0
    """Pictures on either side of each of the three distances; 0 without data."""
    preservation: float | None = None
    """Mean change outside the new object, in grey levels a turn (:func:`condgan.metrics.preservation`), over all turns
    after a scene's first; None if every list has one object."""
    preservation_real: float | None = None
    """The same between the turns of real test scenes."""
    changed_area: float | None = None
    """Mean share of the picture that a turn changed (:func:`condgan.metrics.changed_area`), over the same turns."""
    changed_area_real: float | None = None
    """The same between the turns of real test scenes."""
    diversity: float | None = None
    """Mean distance of two draws of one list, in grey levels (:func:`condgan.metrics.diversity`), averaged over lists;
    None with one draw."""
    diversity_real: float | None = None
    """Mean distance of two real test pictures of one set of objects, averaged over sizes of sets in the proportions of
    ``conditions``; sizes of which no two real pictures hold the same set are left out."""
    diversity_ratio: float | None = None
    """Drawn / real, over lists of the sizes that ``diversity_real`` has: below 1, draws are more alike than real
    pictures."""
    seconds: float
    """Time that the evaluation took."""

    def to_dict(self) -> dict[str, Any]:
        """All fields under their names, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    def __str__(self) -> str:
        def show(value: float | None, digits: int = 3) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        def interval(ends: Interval) -> str:
            return f"{ends[0]:.3f} .. {ends[1]:.3f}"

        rows = [
            ("", "drawn", "95 % interval", "real"),
            ("accuracy", show(self.accuracy), interval(self.accuracy_ci95), show(self.real_accuracy)),
            ("exact set", show(self.exact), interval(self.exact_ci95), show(self.real_exact)),
            ("object F1", show(self.object_f1), "", ""),
            ("Frechet distance, same objects", show(self.frechet_matched), "", show(self.frechet_floor)),
            ("Frechet distance, these lists", show(self.frechet_distance), "", ""),
            ("preservation, grey levels", show(self.preservation, 2), "", show(self.preservation_real, 2)),
            ("changed area", show(self.changed_area), "", show(self.changed_area_real)),
            ("diversity, grey levels", show(self.diversity, 2), "", show(self.diversity_real, 2)),
        ]
        table = [f"{name:<32}{drawn:>8}   {ends:<18}{real:>8}".rstrip() for name, drawn, ends, real in rows]
        head = (
            f"{self.model} on {self.conditions}: {self.lists} lists of {self.objects_asked} objects, "
            f"{self.draws} draws each, {self.pictures} pictures, judged by {self.judge}"
        )
        foot = f"real: {self.real_pictures} pictures; each Frechet distance: {self.frechet_pictures} a side; "
        return "\n".join([head, *table, foot + f"{self.seconds:.0f} s"])


def evaluate(
    generator: SceneModel,
    conditions: Sequence[Sequence[str]] | str | Path,
    *,
    draws: int = 64,
    judge: SceneClassifier | str = "judge",
    verifier: SceneClassifier | str = "verifier",
    data: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    model_name: str | None = None,
) -> EvaluationReport:
    """Draw every list ``draws`` times and measure the pictures, each rounded to 256 grey levels as in a file.

    Picture number ``draw`` of list number ``i`` of L has the seed ``seed + draw * L + i``; those drawn for the real
    test scenes (see ``frechet_matched``) go on from ``seed + draws * L``. No seed, list or picture is chosen by its
    score. The judge must have had no part in training the generator or in choosing it; the bundled one had none.

    Args:
        generator: an ``IterativeGenerator``, or any model that draws alike; draws in eval mode.
        conditions: lists of names, or the JSON file that holds them.
        draws: pictures a list. The interval does not shrink below what the number of lists allows.
        judge: classifier that looks for the objects, or the name of a shipped one.
        verifier: classifier whose features the Fréchet distances compare, or a name; not read without ``data``.
        data: packed file of ``condgan prepare`` with real scenes, or the folder with it: its test split is held
            against the drawn pictures, its validation split gives ``frechet_floor``. None leaves those fields None.
        seed: of the first picture, and of the resampling of the intervals.
        batch_size: pictures at once; has no part in the results.
        progress: show a progress bar on stderr.
        model_name: what the report calls the generator; None is the name of its class.

    Raises:
        TypeError, ValueError: an argument does not fit, a name is unknown, or ``data`` has no test scene or pictures
            of another size than the generator's.
        FileNotFoundError: ``conditions`` or ``data`` is not there.
    """
    started = time.perf_counter()
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    seed = parse_seed(seed)
    conditions_name = "given lists"
    if isinstance(conditions, (str, Path)):
        conditions_name = Path(conditions).name
        conditions = read_conditions(conditions)
    scenes = [[names] if isinstance(names, str) else list(names) for names in conditions]
    lists = parse_scenes(scenes, generator.vocabulary)
    judge_name, judge = _load(judge)
    vocabulary = Vocabulary(judge.config.objects)
    objects = torch.stack([vocabulary.multi_hot(names) for names in lists])  # (L, K)
    real = None
    if data is not None:  # read, with all its errors, before the long drawing
        image_size = generator.image_size
        real = _read_real(data, "test", vocabulary, image_size)
        validation = _read_real(data, "validation", vocabulary, image_size)
        if not real.lists:
            raise ValueError(
                f"data: {str(data)!r} has no scene of the test split; leave data out, or prepare more scenes"
            )
        real_lists = parse_scenes(real.lists, generator.vocabulary)
        _, feature_model = _load(verifier)

    drawn, measured = _draw_lists(generator, lists, draws, seed, batch_size, progress)  # (L, draws, 3, H, W)

    logits = _in_batches(judge, judge, drawn.flatten(0, 1), batch_size)
    asked = objects.repeat_interleave(draws, 0)  # (L * draws, K)
    found = metrics.top_k_found(logits, asked)
    exact = metrics.exact_set(logits, asked).double()
    per_list = (len(lists), draws)
    accuracy_ci95 = metrics.bootstrap_interval(found.view(per_list), asked.sum(1).view(per_list), rng_seed=seed)
    exact_ci95 = metrics.bootstrap_interval(exact.view(per_list), torch.ones(per_list), rng_seed=seed)

    if real is not None:
        measured |= _judge_real(judge, real, batch_size)
        matched = _draw_every_turn(generator, real_lists, seed + draws * len(lists), batch_size, progress)
        sets = {
            "real": real.pictures.flatten(0, 1),
            "frechet_distance": drawn.transpose(0, 1).flatten(0, 1),  # the first n hold every list equally often
            "frechet_matched": matched,
            "frechet_floor": validation.pictures.flatten(0, 1),
        }
        measured |= _frechet_distances(feature_model, sets, batch_size)
    if draws > 1:
        measured |= _diversity(drawn, objects, real)

    return EvaluationReport(
        model=model_name or type(generator).__name__,
        conditions=conditions_name,
        judge=judge_name,
        draws=draws,
        seed=seed,
        lists=len(lists),
        objects_asked=int(objects.sum()),
        pictures=len(logits),
        accuracy=metrics.multilabel_accuracy(logits, asked),
        accuracy_ci95=accuracy_ci95,
        exact=float(exact.mean()),
        exact_ci95=exact_ci95,
        object_f1=metrics.object_scores(logits, asked).f1,
        seconds=time.perf_counter() - started,
        **measured,
    )


def _load(classifier: SceneClassifier | str) -> tuple[str, SceneClassifier]:
    if isinstance(classifier, str):
        return classifier, SceneClassifier.from_pretrained(classifier)
    return type(classifier).__name__, classifier


@torch.no_grad()
def _in_batches(
    classifier: SceneClassifier, function: Callable[[Tensor], Tensor], pictures: Tensor, batch_size: int
) -> Tensor:
    """``function`` of uint8 pictures (N, 3, H, W) with ``classifier`` in eval mode, (N, D) float32 on the CPU."""
    weight = next(classifier.parameters())
    with evaluating(classifier):
        outputs = [function(from_uint8(chunk).to(weight.device, weight.dtype)) for chunk in pictures.split(batch_size)]
    return torch.cat(outputs).float().cpu()


def _draw(
    generator: SceneModel,
    lists: Sequence[Sequence[str]],
    seeds: Sequence[int],
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pictures after each turn, without the canvas, uint8 (N, T, 3, H, W), and turns a scene (N,)."""
    from tqdm import tqdm

    with tqdm(total=len(seeds), desc="drawing", unit="picture", file=sys.stderr, disable=not progress) as bar:
        for low in range(0, len(seeds), batch_size):
            part = slice(low, low + batch_size)
            turns = draw_turns(generator, lists[part], seeds[part])
            yield to_uint8(turns.images[:, 1:]), turns.lengths
            bar.update(len(turns.lengths))


def _draw_lists(
    generator: SceneModel, lists: list[list[str]], draws: int, seed: int, batch_size: int, progress: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Final pictures, uint8 (L, draws, 3, H, W), and the fields about what a turn leaves alone."""
    # All draws of a list follow each other: a batch then holds scenes of about one length.
    scenes = [names for names in lists for _ in range(draws)]
    seeds = [seed + draw * len(lists) + i for i in range(len(lists)) for draw in range(draws)]
    final, preservation, changed_area = [], [], []
    for turns, lengths in _draw(generator, scenes, seeds, batch_size, progress):
        final.append(turns[:, -1])
        if turns.shape[1] > 1:
            images = from_uint8(turns)
            present = torch.arange(1, turns.shape[1]) < lengths[:, None]  # (N, T - 1)
            preservation.append(metrics.preservation(images)[present])
            changed_area.append(metrics.changed_area(images)[present])
    drawn = torch.cat(final).unflatten(0, (len(lists), draws))
    measured: dict[str, Any] = {}
    if preservation:
        measured["preservation"] = float(torch.cat(preservation).mean())
        measured["changed_area"] = float(torch.cat(changed_area).mean())
    return drawn, measured


def _draw_every_turn(
    generator: SceneModel, lists: list[list[str]], seed: int, batch_size: int, progress: bool
) -> Tensor:
    """One draw of every list, all of T objects: the pictures of all turns in order, uint8 (N * T, 3, H, W)."""
    seeds = range(seed, seed + len(lists))
    return torch.cat([turns.flatten(0, 1) for turns, _ in _draw(generator, lists, seeds, batch_size, progress)])


class _Real(NamedTuple):
    """Real scenes of one split."""

    pictures: Tensor
    """(S, T, 3, H, W) uint8."""
    objects: Tensor
    """(S, T, K) multi-hot in the judge's vocabulary: all objects in each picture."""
    lists: list[list[str]]
    """The objects of each scene in the order of its turns."""


def _read_real(data: str | Path, split: Split, vocabulary: Vocabulary, image_size: int) -> _Real:
    path = Path(data)
    if path.is_dir():
        path = path / f"condgan-{image_size}.npy"
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {str(path)!r}; `condgan prepare` writes it")
    scenes = SceneDataset(path, split=split)
    records = [scenes[i] for i in range(len(scenes))]
    lists = [[name for turn in record.objects for name in scenes.vocabulary.decode(turn)] for record in records]
    if not records:
        return _Real(
            torch.zeros(0, 1, 3, image_size, image_size, dtype=torch.uint8), torch.zeros(0, 1, len(vocabulary)), []
        )
    pictures = torch.stack([to_uint8(record.images) for record in records])
    if pictures.shape[-1] != image_size:
        raise ValueError(
            f"data: {str(path)!r} has pictures of {pictures.shape[-1]} pixels, but the generator draws {image_size}; "
            "prepare the data in its size"
        )
    objects = torch.stack(
        [torch.stack([vocabulary.multi_hot(names[: turn + 1]) for turn in range(len(names))]) for names in lists]
    )
    return _Real(pictures, objects, lists)


def _judge_real(judge: SceneClassifier, real: _Real, batch_size: int) -> dict[str, Any]:
    """The fields of the report that measure real pictures alone."""
    logits, objects = _in_batches(judge, judge, real.pictures.flatten(0, 1), batch_size), real.objects.flatten(0, 1)
    measured: dict[str, Any] = {
        "real_pictures": len(logits),
        "real_accuracy": metrics.multilabel_accuracy(logits, objects),
        "real_exact": float(metrics.exact_set(logits, objects).double().mean()),
    }
    if real.pictures.shape[1] > 1:
        images = from_uint8(real.pictures)
        measured["preservation_real"] = float(metrics.preservation(images).mean())
        measured["changed_area_real"] = float(metrics.changed_area(images).mean())
    return measured


def _diversity(drawn: Tensor, objects: Tensor, real: _Real | None) -> dict[str, float]:
    """The fields about diversity, from drawn (L, draws, 3, H, W) for lists of objects (L, K), draws at least 2."""
    of_lists = [metrics.diversity(from_uint8(pictures)) for pictures in drawn]
    measured = {"diversity": _mean(of_lists)}
    if real is not None:
        of_sizes = _diversity_by_size(real)
        sizes = [int(size) for size in objects.sum(1)]
        pairs = [(of_list, of_sizes[size]) for of_list, size in zip(of_lists, sizes, strict=True) if size in of_sizes]
        if pairs:
            mean_drawn, mean_real = (_mean(values) for values in zip(*pairs, strict=True))
            measured |= {"diversity_real": mean_real, "diversity_ratio": mean_drawn / mean_real}
    return measured


def _diversity_by_size(real: _Real) -> dict[int, float]:
    """Mean distance of all pairs of real pictures that hold the same set, for each size of set that has pairs."""
    groups: dict[tuple[float, ...], list[Tensor]] = {}
    for picture, present in zip(real.pictures.flatten(0, 1), real.objects.flatten(0, 1).tolist(), strict=True):
        groups.setdefault(tuple(present), []).append(picture)
    total: dict[int, float] = {}
    pairs: dict[int, int] = {}
    for present, group in groups.items():
        if len(group) > 1:
            size, count = int(sum(present)), len(group) * (len(group) - 1) // 2
            total[size] = total.get(size, 0.0) + count * metrics.diversity(from_uint8(torch.stack(group)))
            pairs[size] = pairs.get(size, 0) + count
    return {size: total[size] / pairs[size] for size in total}


def _frechet_distances(verifier: SceneClassifier, sets: dict[str, Tensor], batch_size: int) -> dict[str, Any]:
    """Distance of every set of pictures to the set called ``real``, all of the size of the smallest."""
    sets = {name: pictures for name, pictures in sets.items() if len(pictures) > 1}
    count = min(len(pictures) for pictures in sets.values())
    gaussians = {
        name: metrics.fit_gaussian(_in_batches(verifier, verifier.features, pictures[:count], batch_size))
        for name, pictures in sets.items()
    }
    real = gaussians.pop("real", None)
    if real is None:
        return {}
    distances = {name: metrics.gaussian_frechet_distance(gaussian, real) for name, gaussian in gaussians.items()}
    return {"frechet_pictures": count, **distances}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
