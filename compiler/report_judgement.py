"""How slices, robustness and calibration error read, the same in the terminal and on the page."""

from __future__ import annotations

from edgec import report_format as words
from edgec.report import Confidence, Disturbance, Report, Robustness, Slice, Slices
from edgec.report_format import Rows

_DISTURBANCES = {
    "none": "undisturbed",
    "fgsm": "FGSM attack",
    "pgd": "PGD attack",
    "noise": "noise, mean of 5 strengths",
    "blur": "blur, mean of 5 strengths",
    "contrast": "less contrast, mean of 5 strengths",
}


def comparison_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Name, reference, bundle and remark of the worst slice, the worst disturbance, the error."""
    rows = []
    slices, robustness, confidence = report.slices, report.robustness, report.confidence
    if slices is not None and slices.worst is not None:
        worst = slices.worst
        where = f"{words.printable(slices.title(worst))}, {words.count(worst.samples, 'sample')}"
        rows.append(("worst slice", *_pair(worst), f"drop {_drop(worst)}, {where}"))
    if robustness is not None:
        hardest = robustness.worst
        remark = f"drop {_drop(hardest)}, {strength(robustness)}"
        rows.append((f"under {hardest.kind}", *_pair(hardest), remark))
    if confidence is not None:
        before, after = confidence.reference_error, confidence.bundle_error
        remark = "of the confidence, expected"
        rows.append(("calibration error", words.number(before), words.number(after), remark))
    return rows


def slice_rows(slices: Slices) -> Rows:
    """Head and rows of all slices, the worst first."""
    rows: list[tuple[str, ...]] = [
        (
            f"{row.pooled} small slices together" if row.pooled else row.value,
            str(row.samples),
            words.number(row.reference),
            words.number(row.bundle),
            words.number(row.drop),
            _error(row.error),
            "" if row.judged else f"not judged alone: under {slices.least_samples} samples",
        )
        for row in slices.rows
    ]
    columns = ("samples", "reference", "bundle", "drop", "standard error", "")
    return ("slice", *columns), rows


def robustness_rows(robustness: Robustness) -> Rows:
    """Head and rows of all disturbances."""
    rows: list[tuple[str, ...]] = [
        (
            _DISTURBANCES[row.kind],
            words.number(row.reference),
            words.number(row.bundle),
            words.number(row.drop),
            _error(row.error),
        )
        for row in robustness.rows
    ]
    return ("inputs", "reference", "bundle", "drop", "standard error"), rows


def confidence_rows(confidence: Confidence) -> Rows:
    """Head and rows of the calibration error and of what it is made of."""
    names = (("expected calibration error", "error"), ("mean confidence", "confidence"))
    rows: list[tuple[str, ...]] = [
        (
            title,
            words.number(getattr(confidence, f"reference_{field}")),
            words.number(getattr(confidence, f"bundle_{field}")),
        )
        for title, field in (*names, ("accuracy", "accuracy"))
    ]
    return ("confidence", "reference", "bundle"), rows


def strength(robustness: Robustness) -> str:
    """How much was disturbed, in one line."""
    return (
        f"epsilon {words.number(robustness.epsilon)} of the range, "
        f"{words.count(robustness.samples, 'sample')}"
    )


def how_disturbed(robustness: Robustness) -> str:
    """What was disturbed and how far, in two sentences."""
    return (
        f"{robustness.metric} with input '{robustness.input}' disturbed; {strength(robustness)}. "
        f"Valid range {words.number(robustness.low)} to {words.number(robustness.high)}, from "
        f"{robustness.range_from}; attacks follow the gradients of: {robustness.gradients}."
    )


def _pair(row: Slice | Disturbance) -> tuple[str, str]:
    return words.number(row.reference), words.number(row.bundle)


def _drop(row: Slice | Disturbance) -> str:
    error = "" if row.error is None else f" +- {row.error:.2g}"
    return f"{words.number(row.drop)}{error}"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.2g}"
