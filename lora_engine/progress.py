"""A job's progress on a terminal: one line that moves; elsewhere a line per step, or per tenth of the work."""

import shutil
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from lora_engine.step import Step

_BAR = 24  # characters
_ERASE = "\r\x1b[K"


class Progress:
    """Tells the steps of one training to a stream, with the time that is left at the pace so far."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._moving = stream.isatty()
        self._started = time.monotonic()
        self._steps = 0

    def tell(self, step: "Step") -> None:
        """A step that was made. What is worth keeping stays on the terminal: evaluations and skipped steps."""
        self._steps += 1
        left = (time.monotonic() - self._started) / self._steps * (step.total_steps - step.step)
        where = f"step {step.step}/{step.total_steps}"
        facts = _facts(step)
        if not self._moving:
            self._stream.write("  ".join([where, *facts, f"{clock(left)} left"]) + "\n")
        else:
            if step.validation_loss is not None or step.skipped:
                self._stream.write(_ERASE + "  ".join([where, *facts]) + "\n")
            filled = "█" * (_BAR * step.step // step.total_steps)
            line = "  ".join([filled.ljust(_BAR, "░"), where, f"{clock(left)} left", *facts])
            # A line that wraps could not be written over.
            self._stream.write(_ERASE + line[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()

    def close(self) -> None:
        """Leave the terminal with the cursor on a line of its own."""
        if self._moving and self._steps:
            self._stream.write("\n")
            self._stream.flush()


class Counter:
    """Tells how much of some work is done to a stream, with the time that is left at the pace so far."""

    def __init__(self, stream: TextIO, what: str) -> None:
        self._stream = stream
        self._what = what
        self._moving = stream.isatty()
        self._started = time.monotonic()
        self._tenths = 0

    def tell(self, done: int, total: int) -> None:
        """Called as often as one likes, with numbers of anything."""
        total = max(total, 1)
        left = (time.monotonic() - self._started) / max(done, 1) * (total - done)
        if self._moving:
            filled = "█" * (_BAR * done // total)
            line = f"{filled.ljust(_BAR, '░')}  {self._what} {done / total:.0%}  {clock(left)} left"
            self._stream.write(_ERASE + line[: shutil.get_terminal_size().columns - 1] + "\n" * (done >= total))
        elif 10 * done // total > self._tenths:
            self._tenths = 10 * done // total
            self._stream.write(f"{self._what} {done / total:.0%}  {clock(left)} left\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """ "5:07", "1:05:07": whole seconds, rounded."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _facts(step: "Step") -> list[str]:
    facts = ["skipped: not finite" if step.skipped else f"loss {step.loss:.4f}"]
    if step.validation_loss is not None:
        facts.append(f"validation loss {step.validation_loss:.4f}")
    facts.append(f"rate {step.learning_rate:.2e}")
    facts.append(f"{step.tokens_per_second:,.0f} tokens/s")
    if step.limit_fraction is not None:
        facts.append(f"{step.limit_fraction:.0%} of the limit")
    facts.append(f"{step.peak_bytes / 1e9:.2f} GB")
    return facts
