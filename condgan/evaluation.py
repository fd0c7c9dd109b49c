"""Score a generator: draw every list of a file many times and measure the pictures as users would get them.

Two networks look at the pictures, which are for evaluation only: no model is trained against them, no picture is
chosen by them, and but for once (J, an ancestor of ``iclevr-64``, docs/experiments.md) no checkpoint. The *judge* says
whether the asked objects are there; the *counter* says how many there are of any kind. The *verifier*, which the
library itself uses to choose among draws, has a part only with ``best_of``.
"""

from __future__ import annotations

import reprlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from condgan.classifier import SceneClassifier, same_weights
from condgan.counter import ObjectCounter
from condgan.datasets import read_conditions
from condgan.devices import cpu_by_default
from condgan.drawing import Redraw, SceneModel, parse_best_of
from condgan.features import copy_distances
from condgan.functional import encode_objects
from condgan.images import from_uint8
from condgan.layout import compare_layouts
from condgan.measures import (
    NOTHING,
    Score,
    diversity,
    importance_like,
    looks,
    memorisation,
    place_errors,
    quantile,
    quotient,
    real_diversity,
    retention,
    rightness,
    scene_features,
    scene_layout,
    surroundings,
)
from condgan.report import MEASURES, EvaluationReport, Measure
from condgan.requests import MAX_PICTURES, parse_scenes, parse_seed, parse_whole, warn_of_long_scenes
from condgan.scenes import RealScenes, SceneDrawer, Scenes, as_real, read_real
from condgan.vocab import Vocabulary

BLANK_PICTURES = 256
"""Most pictures of the blank control, where it needs no more."""
ONE = Score(1.0, None, 0)
"""What a ratio to real pictures is of real pictures."""


@cpu_by_default()
def evaluate(
    generator: SceneModel,
    conditions: Sequence[Sequence[str]] | str | Path,
    *,
    draws: int = 64,
    judge: SceneClassifier | str | Path = "judge",
    counter: ObjectCounter | str | Path = "counter",
    data: str | Path | None = None,
    best_of: int = 1,
    redraw: Redraw = "picture",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    model_name: str | None = None,
) -> EvaluationReport:
    """Draw every list ``draws`` times and measure the pictures, each rounded to 256 grey levels as in a file.

    With ``data``, the lists of the real test scenes are drawn too, once with places of the model's choice, to hold the
    drawn scenes against the real ones turn by turn; and, by models that know places, once with the places of the real
    objects, to see whether they are met. The lists of the real validation scenes are drawn once as well: as these
    scenes, they are held against the test scenes in look. docs/evaluation.md defines every measure.

    Picture number ``draw`` of list number ``i`` of L has the seed ``seed + draw * L + i``; those drawn for the real
    scenes go on from ``seed + draws * L``. No seed, list or picture is chosen by its score.

    Args:
        generator: an ``IterativeGenerator``, or any model that draws alike; draws in eval mode.
        conditions: lists of names, or the JSON file that holds them.
        draws: pictures a list. An interval does not shrink below what the number of lists allows.
        judge: classifier that looks for the objects, or the name or folder of one. It must have had no part in
            training the generator or in choosing it; the bundled one had none since the weights J
            (docs/results.md says what it had before).
        counter: counts objects, or the name or folder of one; the same holds for it.
        data: packed file of ``condgan prepare`` with real scenes, or the folder with it: its test split is held
            against the drawn pictures, its validation split, if any, gives the floors. None leaves out what needs
            them.
        best_of: candidates of each picture, of which the verifier keeps one; 1 takes every picture as it is drawn.
        redraw: with ``best_of``, whether whole pictures are drawn again or single turns.
        seed: of the first picture.
        batch_size: pictures at once; has no part in the results.
        progress: show a progress bar on stderr.
        model_name: what the report calls the generator; None is the name of its class.

    Raises:
        TypeError, ValueError: an argument does not fit, a name is unknown, or ``data`` has no test scene or pictures
            of another size than the generator's; ``conditions`` is not there.
        DatasetError: ``data`` is not there or damaged.
    """
    started = time.perf_counter()
    draws, batch_size = parse_whole("draws", draws, 1, MAX_PICTURES), parse_whole("batch_size", batch_size, 1)
    best_of = parse_best_of(best_of, redraw)
    seed = parse_seed(seed)
    conditions_name = "given lists"
    if isinstance(conditions, (str, Path)):
        conditions_name = Path(conditions).name
        conditions = read_conditions(conditions, generator.vocabulary)
    if isinstance(conditions, (list, tuple)):
        conditions = [[names] if isinstance(names, str) else names for names in conditions]
    lists = parse_scenes(conditions, generator.vocabulary)
    judge_name = str(judge) if isinstance(judge, (str, Path)) else type(judge).__name__
    observer = _Observer(
        judge=_network("judge", judge, SceneClassifier),
        counter=_network("counter", counter, ObjectCounter),
        batch_size=batch_size,
    )
    try:
        encode_objects(lists, observer.vocabulary)
    except ValueError as error:
        raise ValueError(
            f"judge: {judge_name!r} was not trained on all objects of the model ({error}): give a judge that was, "
            "examples/train_classifier.py trains one"
        ) from None
    if same_weights(observer.judge, SceneClassifier.from_pretrained("verifier")):
        warnings.warn(
            f"judge: {judge_name!r} has the weights of the verifier, which has a part in training and chooses with "
            "best_of: it will find more right than there is; 'judge' has no such part",
            stacklevel=2,
        )
    warn_of_long_scenes(lists, generator)
    drawer = SceneDrawer(generator, observer.vocabulary, best_of, redraw, batch_size, progress)
    real = None if data is None else read_real(data, generator, observer.vocabulary)  # errors before the long drawing

    # All draws of a list follow each other: a batch then holds scenes of about one length.
    drawn, passes = drawer.draw(
        [names for names in lists for _ in range(draws)],
        [seed + draw * len(lists) + i for i in range(len(lists)) for draw in range(draws)],
    )
    for_test = for_validation = at_test = None
    if real is not None:
        first = seed + draws * len(lists)
        for_test, _ = drawer.draw(real.lists, range(first, first + len(real.lists)))
        first += len(real.lists)
        if generator.place_model is not None:
            places = [[(x, y) for x, y in scene] for scene in real.places.tolist()]
            at_test, _ = drawer.draw(real.lists, range(first, first + len(real.lists)), places)
        first += len(real.lists)
        if real.validation is not None:
            for_validation, _ = drawer.draw(real.validation_lists, range(first, first + len(real.validation_lists)))

    measures = _measure_rightness(observer, drawn, len(lists), real)
    measures |= _measure_surroundings(drawn, len(lists), real)
    measures |= _measure_diversity(drawn, len(lists), real)
    layout = {}
    if real is not None and at_test is not None:
        measures |= _measure_places(as_real(at_test, generator), real)
    if real is not None and real.validation is not None and for_test is not None and for_validation is not None:
        alike = (as_real(for_test, generator), real.test, real.validation)
        layouts = [scene_layout(scenes, observer.vocabulary) for scenes in alike]
        layout = compare_layouts(*layouts, rng_seed=0)
        measures |= _measure_looks(for_validation, for_test, real, real.validation)

    return EvaluationReport(
        model=model_name or type(generator).__name__,
        conditions=conditions_name,
        judge=judge_name,
        draws=draws,
        best_of=best_of,
        redraw=redraw,
        passes=passes,
        seed=seed,
        lists=len(lists),
        objects_asked=sum(map(len, lists)),
        pictures=len(drawn.pictures),
        real_pictures=0 if real is None else int(real.test.present.sum()),
        measures={name: measures.get(name, Measure()) for name in MEASURES},
        layout=layout,
        seconds=time.perf_counter() - started,
    )


Network = TypeVar("Network", SceneClassifier, ObjectCounter)


def _network(name: str, given: Network | str | Path, kind: type[Network]) -> Network:
    """A network, or that of a name or folder."""
    if isinstance(given, (str, Path)):
        return kind.from_pretrained(given)
    if not isinstance(given, kind):
        raise TypeError(f"{name} must be of class {kind.__name__}, or the name of one, got {reprlib.repr(given)}")
    return given


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Observer:
    """Looks at pictures: what is there, and how many."""

    judge: SceneClassifier
    counter: ObjectCounter
    batch_size: int

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.judge.config.objects)

    def logits(self, pictures: Tensor) -> Tensor:
        """The judge's, of uint8 pictures (N, 3, H, W): (N, K) float32 on the CPU."""
        return torch.cat([self.judge.logits(from_uint8(chunk)).cpu() for chunk in pictures.split(self.batch_size)])

    def counts(self, pictures: Tensor) -> Tensor:
        """Objects in uint8 pictures (N, 3, H, W): (N,) int64 on the CPU."""
        return torch.cat([self.counter.count(from_uint8(chunk)).cpu() for chunk in pictures.split(self.batch_size)])

    def turn_logits(self, scenes: Scenes) -> Tensor:
        """The judge's of the picture after every turn, (S, T, K); those of the last turn go on after it."""
        present = scenes.present
        of_present = self.logits(scenes.pictures[:, 1:][present])
        last = present.flatten().cumsum(0).view_as(present) - 1  # a scene's turns come first, then what repeats them
        return of_present[last]


def _blank(scenes: Scenes) -> Scenes:
    """The control in which no turn draws anything: some of the scenes, evenly, empty to the end."""
    count = len(scenes.pictures)
    rows = torch.arange(min(count, BLANK_PICTURES)) * count // min(count, BLANK_PICTURES)
    pictures, objects = scenes.pictures[rows], scenes.objects[rows]
    return Scenes(pictures[:, :1].expand_as(pictures), objects)


def _measures(
    drawn: dict[str, Score],
    real: dict[str, Score],
    shuffled: dict[str, Score],
    blank: dict[str, Score],
    matched: dict[str, Score] | None = None,
) -> dict[str, Measure]:
    matched = matched or {}
    return {
        name: Measure(
            drawn=score.value,
            ci95=score.ci95,
            samples=score.samples,
            real=real.get(name, NOTHING).value,
            matched=matched.get(name, NOTHING).value,
            matched_ci95=matched.get(name, NOTHING).ci95,
            shuffled=shuffled.get(name, NOTHING).value,
            blank=blank.get(name, NOTHING).value,
        )
        for name, score in drawn.items()
    }


def _measure_rightness(
    observer: _Observer, drawn: Scenes, num_lists: int, real: RealScenes | None
) -> dict[str, Measure]:
    """Are the objects there, no others, and do they stay; one score a picture drawn, and a picture after any turn."""
    asked, logits = drawn.asked[:, -1], observer.turn_logits(drawn)
    counts, num_objects = observer.counts(drawn.final), drawn.present.sum(1)
    scores = rightness(logits[:, -1], asked, counts, num_objects, num_lists)
    scores["retention"] = retention(logits, drawn, num_lists)
    of_real: dict[str, Score] = {}
    matched: dict[str, Score] = {}
    if real is not None:
        scenes, present = real.test, real.test.present
        real_logits, pictures = observer.turn_logits(scenes), scenes.pictures[:, 1:][present]
        so_far = present.cumsum(1)[present]
        seen = (real_logits[present], scenes.asked[present], observer.counts(pictures), so_far, len(scenes.pictures))
        of_real = rightness(*seen)
        importance = importance_like(so_far, num_objects)
        if importance is not None:
            matched = rightness(*seen, importance)
        of_real["retention"] = retention(real_logits, scenes, len(scenes.pictures))
    shuffled: dict[str, Score] = {}
    of_lists = asked.unflatten(0, (num_lists, -1))[:, 0]
    if (of_lists != of_lists[0]).any():  # where all ask for the same, another list is no other
        order = torch.randperm(num_lists, generator=torch.Generator().manual_seed(0))
        other = torch.empty_like(order).scatter_(0, order, order.roll(1))  # of every list another one
        of_others, num_of_others = (  # all draws of a list follow each other
            x.unflatten(0, (num_lists, -1))[other].flatten(0, 1) for x in (asked, num_objects)
        )
        shuffled = rightness(logits[:, -1], of_others, counts, num_of_others, num_lists)
        if (num_objects == num_objects[0]).all():  # nor another number of objects
            del shuffled["count_accuracy"]
    empty = _blank(drawn)
    empty_logits = observer.logits(empty.final)
    blank = rightness(
        empty_logits, empty.asked[:, -1], observer.counts(empty.final), empty.present.sum(1), len(empty_logits)
    )
    blank["retention"] = retention(empty_logits[:, None].expand(-1, logits.shape[1], -1), empty, len(empty_logits))
    return _measures(scores, of_real, shuffled, blank, matched)


def _measure_surroundings(drawn: Scenes, num_lists: int, real: RealScenes | None) -> dict[str, Measure]:
    """What turns leave alone, and its ratio to real turns."""
    scores, empty = surroundings(drawn, num_lists), _blank(drawn)
    blank = surroundings(empty, len(empty.pictures))
    of_real = {} if real is None else surroundings(real.test, len(real.test.pictures))
    by_real = quotient(scores["preservation"], of_real.get("preservation", NOTHING))
    if by_real.value is not None:
        scores["preservation_ratio"], of_real["preservation_ratio"] = by_real, ONE
    return _measures(scores, of_real, {}, blank)


def _measure_diversity(drawn: Scenes, num_lists: int, real: RealScenes | None) -> dict[str, Measure]:
    objects = drawn.asked[:, -1].unflatten(0, (num_lists, -1))[:, 0]  # (L, K)
    of_lists = {} if real is None else real_diversity(real.turns)
    of_drawn, of_empty = (
        diversity(pictures.unflatten(0, (num_lists, -1)), objects, of_lists)
        for pictures in (drawn.final, drawn.pictures[:, 0])
    )
    of_real = {"diversity": of_drawn.pop("diversity_real", NOTHING), "diversity_ratio": ONE}
    return _measures(of_drawn, of_real, {}, of_empty)


def _measure_looks(
    for_validation: Scenes, for_test: Scenes, real: RealScenes, real_validation: Scenes
) -> dict[str, Measure]:
    """How far drawn pictures are from real ones, and whether they are copies of training pictures.

    Look is that of scenes drawn for the lists of the validation scenes, which set the floor; copies are looked for in
    those drawn for the lists of the test scenes. All sets are of the size of the smaller split.
    """
    if not len(real.training):
        return {}
    count = min(len(for_test.pictures), len(for_validation.pictures))
    turns = for_validation.pictures.shape[1] - 1
    pictures = {
        "drawn": for_validation.pictures[:count, 1:],
        "test": real.test.pictures[:count, 1:],
        "validation": real_validation.pictures[:count, 1:],
        "blank": for_validation.pictures[:count, :1].expand(-1, turns, -1, -1, -1),
    }
    features = scene_features(pictures, real.training)
    of_drawn, of_real, of_blank = (
        looks(features[name], features["test"], intervals=name == "drawn") for name in ("drawn", "validation", "blank")
    )
    drawn, test, validation = (
        copy_distances(x.final[:count], real.training[:, -1]) for x in (for_test, real.test, real_validation)
    )
    of_drawn |= memorisation(drawn, test)
    of_real |= memorisation(validation, test)
    return _measures(of_drawn, of_real, {}, of_blank)


def _measure_places(drawn: Scenes, real: RealScenes) -> dict[str, Measure]:
    """How far objects are from where they were asked to be; shuffled, from the places of another scene."""
    places, empty = real.places, Scenes(drawn.pictures[:, :1].expand_as(drawn.pictures), drawn.objects)
    pairs = [(drawn, places), (real.test, places), (drawn, places.roll(1, 0)), (empty, places)]
    shares = {"place_error": 0.5, "place_error_p95": 0.95}
    scores, of_real, shuffled, blank = (
        {name: quantile(place_errors(scenes, asked), share) for name, share in shares.items()}
        for scenes, asked in pairs
    )
    return _measures(scores, of_real, shuffled if len(places) > 1 else {}, blank)
