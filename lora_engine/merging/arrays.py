"""The two kinds of numbers that merging computes with."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]  # what files hold
Wide: TypeAlias = NDArray[np.float64]  # what is computed with
