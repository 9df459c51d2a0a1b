"""A job's losses as one figure: SVG without scripts or fonts of its own, in the viewer's light or dark colours.

Training loss by step (each point, and smoothed), validation loss with its lowest value marked, the part where the model
overfitted, and the learning rate beneath. The same history gives the same bytes.
"""

import math
from collections.abc import Sequence

from lora_engine.history import Evaluation, History

_WIDTH, _HEIGHT = 760, 450
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 722, 78, 336  # of the losses
_RATE_TOP, _RATE_BOTTOM = 364, 404
_MAX_DOTS = 60  # evaluations that are drawn as a dot each
_MAX_EVALUATIONS = 400
_MAX_EPOCH_LINES = 12
_STYLE = """
svg{--paper:#fff;--ink:#1f2328;--quiet:#636c76;--grid:#e3e6ea;--train:#3b7dd8;--held:#c2570c;--over:#d1242f}
@media(prefers-color-scheme:dark){
svg{--paper:#0d1117;--ink:#e6edf3;--quiet:#9198a1;--grid:#2b3138;--train:#6cb0ff;--held:#ffa657;--over:#ff7b72}}
text{fill:var(--quiet)}.ink{fill:var(--ink)}.end{text-anchor:end}.middle{text-anchor:middle}
path{fill:none;stroke-linejoin:round;stroke-linecap:round}
.grid{stroke:var(--grid)}.axis{stroke:var(--quiet)}.epoch{stroke:var(--grid);stroke-dasharray:2 4}
.raw{stroke:var(--train);opacity:.5}.smooth{stroke:var(--train);stroke-width:2.2}
.held{stroke:var(--held);stroke-width:2}.dots{stroke:var(--held);stroke-width:7}
.best{fill:var(--paper);stroke:var(--held);stroke-width:2.5}.mark{stroke:var(--held);stroke-dasharray:4 4}
.over{fill:var(--over);opacity:.12}
.rate{stroke:var(--quiet);stroke-width:1.5}"""


class _Scale:
    """Data values to pixels, along one axis."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self._start, self._factor = start, (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) * self._factor


def render(history: History) -> str:
    """The figure as an SVG document, 60 kB at the most."""
    steps = [point.step for point in history.points] + [evaluation.step for evaluation in history.evaluations]
    x = _Scale(0, max([*steps, 1]), _LEFT, _RIGHT)
    y = _Scale(*_loss_range(history), _BOTTOM, _TOP)
    body = [
        *_axes(history, x, y),
        *_overfitting(history, x),
        *_training(history, x, y),
        *_validation(history, x, y),
        *_learning_rate(history, x),
        *_legend(history),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            'font-family="system-ui, sans-serif" font-size="12">',
            "<title>Loss by step</title>",
            f"<desc>{_summary(history)}</desc>",
            f"<style>{_STYLE}</style>",
            f'<clipPath id="losses"><rect x="{_LEFT}" y="{_TOP}" width="{_RIGHT - _LEFT}" height="{_BOTTOM - _TOP}"/>'
            "</clipPath>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6" style="fill:var(--paper)"/>',
            *body,
            "</svg>\n",
        ]
    )


def _loss_range(history: History) -> tuple[float, float]:
    """What the axis has to show; the few highest single points may be cut off, so that the rest can be read."""
    losses = sorted(point.loss for point in history.points)
    shown = losses[: math.ceil(0.98 * len(losses))]
    shown += [evaluation.loss for evaluation in history.evaluations if math.isfinite(evaluation.loss)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.06 * (high - low) or max(0.06 * abs(high), 1e-6)
    return max(0.0, low - margin) if low >= 0 else low - margin, high + margin


def _axes(history: History, x: _Scale, y: _Scale) -> list[str]:
    parts = []
    for value, label in _ticks(y.low, y.high, 8):
        parts.append(_line("grid", [(_LEFT, y(value)), (_RIGHT, y(value))]))
        parts.append(_text(_LEFT - 8, y(value) + 4, label, "end"))
    epochs = math.ceil(x.high / history.steps_per_epoch)
    if 1 < epochs <= _MAX_EPOCH_LINES:
        for epoch in range(1, epochs):
            at = x(epoch * history.steps_per_epoch)
            parts.append(_line("epoch", [(at, _TOP), (at, _RATE_BOTTOM)]))
            parts.append(_text(at - 4, _TOP + 12, f"epoch {epoch}", "end"))
    parts.append(_line("axis", [(_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)]))
    parts.append(_line("axis", [(_LEFT, _RATE_BOTTOM), (_RIGHT, _RATE_BOTTOM)]))
    for value, label in _ticks(x.low, x.high, 9, whole=True):
        parts.append(_line("axis", [(x(value), _RATE_BOTTOM), (x(value), _RATE_BOTTOM + 4)]))
        parts.append(_text(x(value), _RATE_BOTTOM + 17, label, "middle"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _RATE_BOTTOM + 34, "step", "middle"))
    return parts


def _training(history: History, x: _Scale, y: _Scale) -> list[str]:
    raw = [(x(point.step), y(point.loss)) for point in history.points]
    smooth = [(x(point.step), y(loss)) for point, loss in zip(history.points, history.smoothed(), strict=True)]
    return ['<g clip-path="url(#losses)">', _line("raw", raw), _line("smooth", smooth), "</g>"] if raw else []


def _validation(history: History, x: _Scale, y: _Scale) -> list[str]:
    evaluations = [evaluation for evaluation in history.evaluations if math.isfinite(evaluation.loss)]
    if not evaluations:
        return []
    line = [(x(evaluation.step), y(evaluation.loss)) for evaluation in _thinned(evaluations)]
    parts = [_line("held", line)]
    if len(line) <= _MAX_DOTS:
        parts.append(f'<path class="dots" d="{"".join(f"M{_point(dot)}h0" for dot in line)}"/>')
    step, loss = history.best_step, history.best_validation_loss
    if step is not None and loss is not None:
        parts.append(_line("mark", [(x(step), y(loss) + 6), (x(step), _BOTTOM)]))
        parts.append(f'<circle class="best" cx="{x(step):.1f}" cy="{y(loss):.1f}" r="5"/>')
    return parts


def _overfitting(history: History, x: _Scale) -> list[str]:
    if history.best_step is None or history.overfitting_epoch is None:
        return []
    start = x(history.best_step)
    return [_area("over", start, _TOP, _RIGHT - start, _BOTTOM - _TOP)]


def _learning_rate(history: History, x: _Scale) -> list[str]:
    highest = max((point.learning_rate for point in history.points), default=0.0)
    rate = _Scale(0, highest or 1.0, _RATE_BOTTOM, _RATE_TOP)
    line = [(x(point.step), rate(point.learning_rate)) for point in history.points]
    label = f"learning rate, at most {highest:.2g}" if history.points else "learning rate"
    return [_text(_LEFT, _RATE_TOP - 8, label), *([_line("rate", line)] if line else [])]


def _legend(history: History) -> list[str]:
    parts = [_text(_LEFT, 24, "Loss by step", "ink", size=16), _text(_LEFT, 44, _summary(history), "ink")]
    at = float(_LEFT)
    entries = [("raw", "training"), ("smooth", "smoothed"), ("held", "validation")]
    for name, label in entries[: 2 + bool(history.evaluations)]:
        parts.append(_line(name, [(at, 61), (at + 22, 61)]))
        if name == "held":
            parts.append(f'<path class="dots" d="M{at + 11:.1f} 61h0"/>')
        parts.append(_text(at + 29, 65, label))
        at += 52 + 6.2 * len(label)
    if history.best_step is not None:
        parts.append(f'<circle class="best" cx="{at + 5:.1f}" cy="61" r="5"/>')
        parts.append(_text(at + 16, 65, "lowest validation"))
        at += 130
    if history.overfitting_epoch is not None:
        parts.append(_area("over", at, 54, 22, 14))
        parts.append(_text(at + 29, 65, f"overfitting from epoch {history.overfitting_epoch:.2f}"))
    return parts


def _summary(history: History) -> str:
    """What the figure shows, in words."""
    if not history.points:
        return "no step has been made"
    told = [f"{history.points[-1].step:,} steps", f"training loss {history.smoothed()[-1]:.3f}"]
    if history.best_step is not None:
        epoch = history.best_step / history.steps_per_epoch
        where = f"at step {history.best_step:,} (epoch {epoch:.2f})"
        told.append(f"lowest validation loss {history.best_validation_loss:.3f} {where}")
    if history.skipped_steps:
        told.append(f"{history.skipped_steps} skipped")
    return " · ".join(told)


def _thinned(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """At most `_MAX_EVALUATIONS`, each the lowest of its neighbours, as the lowest one is what matters."""
    size = math.ceil(len(evaluations) / _MAX_EVALUATIONS)
    groups = [evaluations[start : start + size] for start in range(0, len(evaluations), size)]
    return [min(group, key=lambda evaluation: evaluation.loss) for group in groups]


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[tuple[float, str]]:
    """Round values between low and high, at most `most`, and their labels."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    distance = next(d for d in (power, 2 * power, 5 * power, 10 * power, 20 * power) if span / d <= most - 1)
    if whole:
        distance = max(1.0, distance)
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [(number * distance, f"{number * distance:,.{decimals}f}") for number in range(first, last + 1)]


def _line(name: str, points: Sequence[tuple[float, float]]) -> str:
    start, *rest = points
    # A line to where it stands makes a single point visible.
    path = f"M{_point(start)}" + ("L" + " ".join(map(_point, rest)) if rest else "h0")
    return f'<path class="{name}" d="{path}"/>'


def _point(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"


def _area(name: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{name}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"/>'


def _text(x: float, y: float, text: str, classes: str = "", size: int | None = None) -> str:
    style = (f' class="{classes}"' if classes else "") + (f' font-size="{size}"' if size else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{text}</text>'
