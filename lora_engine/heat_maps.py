"""Pictures of an analysis, as PNG and SVG; the same report gives the same bytes. matplotlib is imported on the first.

cosine   how alike the adapters are over everything
layers   how alike every two are in each layer, and in which layers each adapter is large
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine.merging.arrays import Wide

_SETTINGS: Any = {"svg.hashsalt": "luthier", "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10}
_MOST_PAIRS = 30
_LONGEST_NAME = 24
_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": "Luthier"}}


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Draw the pictures of a report of `analysis` into a folder: cosine and layers, .png and .svg each."""
    import matplotlib as mpl

    names = [_short(item["name"]) for item in report["adapters"]]
    with mpl.rc_context(_SETTINGS):
        _save(_cosine(names, report), folder / "cosine")
        _save(_layers(names, report), folder / "layers")


def _cosine(names: Sequence[str], report: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    values = _matrix(report["total"]["cosines"])
    size = max(3.2, 0.55 * len(names) + 1.8)
    figure = Figure(figsize=(size + 0.9, size), layout="constrained")
    axes = figure.subplots()
    _heat(figure, axes, values, names, names, "RdBu_r", (-1, 1), "cosine of the deltas")
    if len(names) <= 16:
        for (row, column), value in np.ndenumerate(values):
            text = "" if np.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
            axes.text(column, row, text, ha="center", va="center", color="w" if abs(value) > 0.6 else "k", fontsize=8)
    axes.set_title("How alike the adapters are")
    return figure


def _layers(names: Sequence[str], report: Mapping[str, Any]) -> Any:
    """Above, pairs × layers; below, adapters × layers. One adapter has no pairs."""
    from matplotlib.figure import Figure

    layers = list(report["layers"])
    pairs = _pairs(report)
    heights = [height for height in (len(pairs), len(names)) if height]
    width = min(24.0, max(6.0, 0.22 * len(layers) + 3.5))
    figure = Figure(figsize=(width, 0.3 * sum(heights) + 1.5 * len(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=[height + 1.5 for height in heights])[:, 0]
    said = [report["layers"][layer] for layer in layers]
    ticks = [_layer_label(layer) for layer in layers]
    if pairs:
        cosines = np.array([_matrix(item["cosines"]) for item in said])
        values = np.array([cosines[:, i, j] for i, j in pairs])
        labels = [f"{names[i]} · {names[j]}" for i, j in pairs]
        _heat(figure, grid[0], values, labels, ticks, "RdBu_r", (-1, 1), "cosine")
        grid[0].set_title("How alike every two are in each layer")
    norms = np.array([_matrix(item["norms"]) for item in said]).T
    _heat(
        figure, grid[-1], norms, names, ticks, "viridis", (0, max(float(np.nanmax(norms)), 1e-30)), "norm of the delta"
    )
    grid[-1].set_title("How large each adapter is in each layer")
    grid[-1].set_xlabel("layer")
    return figure


def _pairs(report: Mapping[str, Any]) -> list[tuple[int, int]]:
    """All of them, or those that are most or least alike."""
    values = np.nan_to_num(_matrix(report["total"]["cosines"]))
    pairs = sorted(combinations(range(len(values)), 2), key=lambda pair: -abs(values[pair]))
    return sorted(pairs[:_MOST_PAIRS])


def _heat(
    figure: Any,
    axes: Any,
    values: Wide,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    limits: tuple[float, float],
    label: str,
) -> None:
    import matplotlib as mpl

    palette = mpl.colormaps[colours].with_extremes(bad="0.85")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=palette, vmin=limits[0], vmax=limits[1], aspect="auto")
    step = max(1, len(columns) // 40)
    upright = all(column.isdigit() for column in columns)
    axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=0 if upright else 90, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=label)


def _save(figure: Any, path: Path) -> None:
    for kind, metadata in _METADATA.items():
        figure.savefig(path.with_suffix(f".{kind}"), format=kind, dpi=150, metadata=metadata)


def _matrix(values: Any) -> Wide:
    return np.array(values, dtype=np.float64)  # null becomes NaN


def _layer_label(layer: str) -> str:
    last = layer.rpartition(".")[2]
    return last if last.isdigit() else _short(last)


def _short(name: str) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in name)
    return printable if len(printable) <= _LONGEST_NAME else printable[: _LONGEST_NAME - 1] + "…"
