import math
import re
from xml.etree import ElementTree

import pytest

from lora_engine.curves import render
from lora_engine.history import History

SVG = "{http://www.w3.org/2000/svg}"


def job(steps: int, every: int, *, overfits: bool = False, steps_per_epoch: int = 50) -> History:
    """A job whose validation loss is lowest in the middle if it overfits."""
    history = History(steps_per_epoch)
    history.add_evaluation(0, 3.0)
    for step in range(1, steps + 1):
        share = step / steps
        history.add_step(step, 2.5 - share + 0.1 * math.sin(step), 1e-3 * (1 - share), skipped=step == 3)
        if step % every == 0:
            history.add_evaluation(step, 1.5 + abs(share - 0.5) if overfits else 2.5 - 0.5 * share)
    return history


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - our own


def texts(svg: str) -> list[str]:
    return [str(element.text) for element in parse(svg).iter(f"{SVG}text")]


def classes(svg: str, name: str) -> list[ElementTree.Element]:
    return [element for element in parse(svg).iter() if element.get("class") == name]


@pytest.mark.parametrize(
    "history",
    [
        History(10),
        job(1, 1),
        job(2, 100),
        job(200, 20),
        job(200, 20, overfits=True),
        job(20_000, 5),
    ],
    ids=["empty", "one step", "no evaluation", "plain", "overfitted", "long"],
)
def test_the_figure_is_one_small_self_contained_document(history: History) -> None:
    svg = render(history)
    root = parse(svg)
    assert (root.tag, root.get("viewBox")) == (f"{SVG}svg", "0 0 760 450")
    assert len(svg.encode()) <= 60_000
    assert svg == render(History.from_state(history.to_state()))
    assert "prefers-color-scheme:dark" in svg
    assert "nan" not in svg
    assert "inf" not in svg
    assert not re.search(r"<script|href|url\((?!#)|@import|<image", svg)
    assert svg.count("http") == 1  # the namespace


def test_it_names_what_there_is_to_see() -> None:
    svg = render(job(200, 20, overfits=True))
    said = texts(svg)
    assert "200 steps · training loss 1.4" in said[said.index("Loss by step") + 1]
    assert "lowest validation loss 1.500 at step 100 (epoch 2.00) · 1 skipped" in said[said.index("Loss by step") + 1]
    assert {"training", "smoothed", "validation", "lowest validation", "overfitting from epoch 2.00"} <= set(said)
    assert {"epoch 1", "epoch 3", "step", "learning rate, at most 0.001"} <= set(said)


def test_the_lowest_loss_and_the_overfitting_are_where_they_happened() -> None:
    svg = render(job(200, 20, overfits=True))
    ring, area = classes(svg, "best")[0], classes(svg, "over")[0]
    assert float(str(ring.get("cx"))) == float(str(area.get("x"))) == 390.0  # the middle of 58 … 722
    assert float(str(area.get("width"))) == 332.0
    plain = render(job(200, 20))
    assert classes(plain, "over") == []
    assert not any("overfitting" in text for text in texts(plain))
    assert float(str(classes(plain, "best")[0].get("cx"))) == 722.0


def test_losses_lie_inside_their_axes_and_on_the_right_height() -> None:
    history = History(10)
    for step, loss in enumerate([4.0, 3.0, 2.0], 1):
        history.add_step(step, loss, 1e-3)
    svg = render(history)
    path = str(classes(svg, "raw")[0].get("d"))
    (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]
    assert (x1, x2, x3) == (279.3, 500.7, 722.0)
    assert 78 <= y1 < y2 < y3 <= 336
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)
    ticks = {float(text): element for text, element in _ticks(svg).items()}
    assert float(str(ticks[3.0].get("y"))) - 4 == pytest.approx(y2, abs=0.1)


def _ticks(svg: str) -> dict[str, ElementTree.Element]:
    return {str(element.text): element for element in classes(svg, "end") if "epoch" not in str(element.text)}


def test_a_single_spike_does_not_flatten_the_rest() -> None:
    history = job(200, 20)
    calm = max(float(text) for text in _ticks(render(history)))
    history.add_step(201, 1e6, 1e-3)
    history.add_step(202, 1.5, 1e-3)
    spiked = max(float(text.replace(",", "")) for text in _ticks(render(history)))
    assert spiked <= calm


def test_steps_are_whole() -> None:
    assert [element.text for element in classes(render(job(2, 1)), "middle")] == ["0", "1", "2", "step"]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4])
def test_axes_have_readable_ticks_at_any_scale(scale: float) -> None:
    history = History(10)
    for step in range(1, 6):
        history.add_step(step, scale * (2 + step % 2), scale)
    labels = list(_ticks(render(history)))
    assert 3 <= len(labels) == len(set(labels)) <= 8
