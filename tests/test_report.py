"""What a report says of measures and controls."""

from __future__ import annotations

import json

import pytest

from condgan.layout import Comparison
from condgan.report import MEASURES, EvaluationReport, Measure


def report_of(layout: dict[str, Comparison] | None = None, **measures: Measure) -> EvaluationReport:
    return EvaluationReport(
        model="small",
        conditions="test.json",
        judge="judge",
        draws=2,
        best_of=1,
        redraw="picture",
        passes=1.5,
        seed=0,
        lists=2,
        objects_asked=3,
        pictures=4,
        measures={name: measures.get(name, Measure()) for name in MEASURES},
        layout=layout or {},
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("name", "measure", "told"),
    [
        ("accuracy", Measure(drawn=0.9, shuffled=0.3, blank=0.1), True),
        ("accuracy", Measure(drawn=0.9, shuffled=0.9, blank=0.1), False),
        ("accuracy", Measure(drawn=0.9, shuffled=0.3, blank=0.95), False),
        ("accuracy", Measure(drawn=0.2, real=0.9, shuffled=0.2, blank=0.1), True),  # a bad model, a good measure
        ("accuracy", Measure(drawn=0.9), True),  # no control
        ("retention", Measure(drawn=0.9, blank=None), True),  # nothing to measure in a blank picture
        ("preservation", Measure(drawn=0.2, real=0.1, blank=0.0), False),
        ("preservation", Measure(drawn=0.2, real=0.1, blank=0.4), True),
        ("changed_area", Measure(drawn=0.12, real=0.13, blank=0.0), True),
        ("changed_area", Measure(drawn=0.12, real=0.05, blank=0.0), False),
        ("exact", Measure(), True),
    ],
)
def test_a_measure_is_told_if_every_control_is_worse(name: str, measure: Measure, told: bool) -> None:
    report = report_of(**{name: measure})
    assert report.is_told(name) == told
    assert report.to_dict()["measures"][name]["used"] == told
    assert ("not used" in str(report)) != told


def test_short_names_repeat_the_measures() -> None:
    accuracy = Measure(drawn=0.9, ci95=(0.8, 0.95), samples=3, real=0.97, matched=0.96, matched_ci95=(0.94, 0.98))
    fields = json.loads(json.dumps(report_of(accuracy=accuracy).to_dict(), allow_nan=False))
    assert (fields["accuracy"], fields["accuracy_ci95"], fields["real_accuracy"]) == (0.9, [0.8, 0.95], 0.97)
    assert fields["matched_accuracy"] == 0.96
    assert [fields[name] for name in ("exact", "exact_ci95", "real_exact", "matched_exact")] == [None] * 4
    assert fields["measures"]["accuracy"] == {
        "drawn": 0.9,
        "ci95": [0.8, 0.95],
        "samples": 3,
        "real": 0.97,
        "matched": 0.96,
        "matched_ci95": [0.94, 0.98],
        "shuffled": None,
        "blank": None,
        "used": True,
    }
    assert MEASURES.keys() <= fields.keys()


def test_text_has_a_line_for_every_measure_and_statistic() -> None:
    layout = {"place_later": Comparison(distance=0.123, p_value=0.04, adjusted_p=0.2, floor=0.05, drawn=20, real=30)}
    lines = str(report_of(layout, accuracy=Measure(drawn=0.9, ci95=(0.8, 0.95), samples=3))).splitlines()
    assert all(any(line.startswith(kind.label) for line in lines) for kind in MEASURES.values())
    (line,) = [line.split() for line in lines if "place later" in line]
    assert line == ["place", "later", "0.123", "0.040", "(0.200)", "20", "0.050"]
    (line,) = [line.split() for line in lines if line.startswith("accuracy")]
    assert line == ["accuracy", "0.900", "0.800", "..", "0.950", "3", "-", "-", "-", "-"]
