"""What a job's event log says about measurements and about a finished training, in words."""

from typing import Any


def of_result(metrics: dict[str, Any]) -> list[str]:
    """What the owner of a finished training should know beyond its numbers."""
    remarks = []
    if metrics.get("stopped_early"):
        remarks.append(f"Stopped early after step {metrics['steps']}: the validation loss did not fall any more")
    if metrics.get("best_step") is not None and metrics["best_step"] != metrics["steps"]:
        remarks.append(f"The adapter is that of step {metrics['best_step']}, where the validation loss was lowest")
    if metrics.get("overfitting_epoch") is not None:
        remarks.append(
            f"Overfitting began at epoch {metrics['overfitting_epoch']:.2f}: "
            "from there on the validation loss rose while the training loss fell"
        )
    return remarks


def of_point(point: dict[str, Any]) -> str:
    """One line for one point of the metrics."""
    if point.get("skipped"):
        return f"Step {point.get('step', 0)} was skipped: its loss or its gradient was not finite"
    if "validation_loss" in point:
        return f"Step {point.get('step', 0)}: validation loss {point['validation_loss']:.4f}"
    return f"Step {point.get('step', 0)}: loss {point.get('loss', 0.0):.4f}"
