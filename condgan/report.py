"""What an evaluation says: measures beside their intervals, real pictures and controls, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from condgan.drawing import Redraw
from condgan.layout import Comparison

Interval = tuple[float, float]


class MeasureKind(NamedTuple):
    """How a measure is read and shown."""

    label: str
    better: Literal["higher", "lower", "real"]
    """Which value is better; ``real`` is the one nearest to that of real pictures."""
    digits: int = 3


MEASURES = {
    "accuracy": MeasureKind("accuracy", "higher"),
    "exact": MeasureKind("exact set", "higher"),
    "object_precision": MeasureKind("object precision", "higher"),
    "object_recall": MeasureKind("object recall", "higher"),
    "object_f1": MeasureKind("object F1", "higher"),
    "count_accuracy": MeasureKind("count accuracy", "higher"),
    "retention": MeasureKind("retention of earlier objects", "higher"),
    "preservation": MeasureKind("preservation, grey levels", "lower"),
    "preservation_ratio": MeasureKind("preservation, drawn / real", "lower"),
    "changed_area": MeasureKind("changed area", "real"),
    "place_error": MeasureKind("place error, median px", "lower", 2),
    "place_error_p95": MeasureKind("place error, 95th perc. px", "lower", 2),
    "frechet_distance": MeasureKind("Frechet distance", "lower", 2),
    "kernel_distance": MeasureKind("kernel distance", "lower", 4),
    "precision": MeasureKind("precision", "higher"),
    "recall": MeasureKind("recall", "higher"),
    "density": MeasureKind("density", "higher"),
    "coverage": MeasureKind("coverage", "higher"),
    "memorisation_ratio": MeasureKind("distance to training pictures", "higher"),
    "memorisation_nearer": MeasureKind("nearer than 1 % of real ones", "lower"),
    "memorisation_p": MeasureKind("no copies: p", "higher"),
    "diversity": MeasureKind("diversity, grey levels", "higher", 2),
    "diversity_ratio": MeasureKind("diversity, drawn / real", "higher"),
}
"""All measures, defined in docs/evaluation.md, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of the drawn pictures and of what it must be held against; None where there is nothing to measure."""

    drawn: float | None = None
    ci95: Interval | None = None
    """95 % interval of ``drawn``, over other lists or other scenes."""
    samples: int = 0
    """How many things ``drawn`` is a mean over; docs/evaluation.md says which."""
    real: float | None = None
    """The same of real held-out pictures; for a distance, of other real pictures to them: the floor."""
    matched: float | None = None
    """The same of real held-out pictures, each counted so often that as many have one object, two or three as do
    lists: what the judge gives real pictures of such lists."""
    matched_ci95: Interval | None = None
    """95 % interval of ``matched``, over other real scenes."""
    shuffled: float | None = None
    """Control: the same of the drawn pictures with the lists of other pictures."""
    blank: float | None = None
    """Control: the same of the empty scenes that the drawings began with."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What :func:`condgan.evaluation.evaluate` measured."""

    model: str
    """Name of the generator."""
    conditions: str
    """Name of the file of lists."""
    judge: str
    """Name of the classifier that looked for the objects."""
    draws: int
    """Pictures drawn for each list."""
    best_of: int
    """Candidates of each picture, or of each turn; 1 is a single draw."""
    redraw: Redraw
    """What was drawn again: ``picture`` or ``turn``."""
    passes: float
    """Passes of the generator for a picture, on average; without ``best_of``, objects in a list."""
    seed: int
    """Of the first picture."""
    lists: int
    """Lists of objects in ``conditions``."""
    objects_asked: int
    """Objects in all lists, each list counted once."""
    pictures: int
    """Final pictures judged: lists x draws."""
    real_pictures: int = 0
    """Real pictures of the test split, all turns; 0 without data."""
    measures: dict[str, Measure]
    """Under the names of :data:`MEASURES`, all of them."""
    layout: dict[str, Comparison] = field(default_factory=dict)
    """Two-sample tests of drawn against real scenes (:func:`condgan.layout.compare_layouts`); empty without data."""
    seconds: float
    """Time that the evaluation took."""

    def is_told(self, name: str) -> bool:
        """Whether a measure tells the controls from what they imitate: a measure that does not is not used.

        Each control must score worse than real pictures do, or than drawn ones where there are no real ones; where
        real pictures set the aim, worse than drawn ones. A control in which there is nothing to measure is told.
        """
        measure, better = self.measures[name], MEASURES[name].better
        wanted = measure.drawn if measure.real is None else measure.real
        controls = [control for control in (measure.shuffled, measure.blank) if control is not None]
        if wanted is None or measure.drawn is None:
            return True
        if better == "real":
            return all(abs(control - wanted) > abs(measure.drawn - wanted) for control in controls)
        return all(control < wanted if better == "higher" else control > wanted for control in controls)

    def to_dict(self) -> dict[str, Any]:
        """All fields under their names, ready for JSON, and what is asked for most a second time under short names.

        Short are the value of every measure (``accuracy``), ``accuracy_ci95``, ``exact_ci95``, ``real_accuracy``,
        ``real_exact``, ``matched_accuracy`` and ``matched_exact``.
        """
        fields = dict(vars(self))
        seconds = fields.pop("seconds")
        fields["measures"] = {
            name: {
                **asdict(measure),
                "ci95": _as_list(measure.ci95),
                "matched_ci95": _as_list(measure.matched_ci95),
                "used": self.is_told(name),
            }
            for name, measure in self.measures.items()
        }
        fields["layout"] = {name: comparison._asdict() for name, comparison in self.layout.items()}
        short: dict[str, Any] = {name: measure.drawn for name, measure in self.measures.items()}
        for name in ("accuracy", "exact"):
            short[f"{name}_ci95"] = fields["measures"][name]["ci95"]
            short[f"real_{name}"] = self.measures[name].real
            short[f"matched_{name}"] = self.measures[name].matched
        return {**fields, **short, "seconds": seconds}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"{self.model} on {self.conditions}: {self.lists} lists of {self.objects_asked} objects, "
            f"{self.draws} draws each, {self.pictures} pictures, judged by {self.judge}"
        )
        if self.best_of > 1:
            yield (
                f"the best of {self.best_of} by the verifier, by {self.redraw}: "
                f"{self.passes:.2f} passes of the generator a picture"
            )
        beside = f"{'real':>8}{'matched':>8}{'shuffled':>10}{'blank':>8}"
        yield f"{'':<30}{'drawn':>7}   {'95 % interval':<18}{'of':>6}{beside}"
        for name, measure in self.measures.items():
            kind = MEASURES[name]
            drawn, real, matched, shuffled, blank = (
                _show(value, kind.digits)
                for value in (measure.drawn, measure.real, measure.matched, measure.shuffled, measure.blank)
            )
            interval = " .. ".join(_show(end, kind.digits) for end in measure.ci95 or ())
            mark = "" if self.is_told(name) else " *"
            columns = f"{measure.samples:>6}{real:>8}{matched:>8}{shuffled:>10}{blank:>8}{mark}"
            yield f"{kind.label:<30}{drawn:>7}   {interval:<18}{columns}"
        if not all(map(self.is_told, self.measures)):
            yield "* not used: a control does as well, so this number says nothing here"
        if self.layout:
            yield f"{'layout, 0 alike .. 1 apart':<30}{'drawn':>7}   {'p (among all)':<18}{'of':>6}{'real':>8}"
            for name, found in self.layout.items():
                label = name.replace("_", " ")
                p_value = f"{found.p_value:.3f} ({found.adjusted_p:.3f})"
                yield f"  {label:<28}{found.distance:>7.3f}   {p_value:<18}{found.drawn:>6}{found.floor:>8.3f}"
        real = ""
        if self.real_pictures:
            real = (
                f"real: {self.real_pictures} pictures of the test split; matched: with as many objects as the lists; "
            )
        yield f"{real}{self.seconds:.0f} s"


def _as_list(interval: Interval | None) -> list[float] | None:
    """An interval as JSON has it."""
    return interval and [*interval]


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits if abs(value) < 100 else 1}f}"
