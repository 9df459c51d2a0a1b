"""What the training loop says of each optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step.

    Attributes:
        step: 1 … total_steps.
        epoch: passes over the examples so far, with its fraction.
        loss: per target token, before the update.
        grad_norm: before clipping.
        tokens: of this step's documents; `trained_tokens` of them carried loss, `computed_tokens` rows passed through
            the model: fewer where prompts are shared, more where rows are padded.
        seconds: wall clock of this step, without evaluation; `tokens_per_second` follows from it.
        limit_fraction: operations a second, recomputed ones left out, over the device's measured matrix products.
        recompute_share: of the operations carried out, those of a second forward pass.
        peak_bytes: of memory so far, of the device or of this process.
        skipped: the loss or a gradient was not finite, and no update was made.
        validation_loss: where it was evaluated, after this step's update.
        checkpoint_due: the caller should call `Training.checkpoint` now.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    tokens: int
    computed_tokens: int
    seconds: float
    tokens_per_second: float
    limit_fraction: float | None
    recompute_share: float
    peak_bytes: int
    skipped: bool
    validation_loss: float | None
    checkpoint_due: bool
