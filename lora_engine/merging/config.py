"""What can be asked of a merge. No torch.

`MergeConfig` stands in the body of ``POST /adapters/merge`` as it is, and `MergeSpec` adds folders of this machine.
Every method names the options that it knows; any other is refused, as it would change nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from lora_engine.errors import SpecError
from lora_engine.fields import bounded, bounded_values, one_of

MAX_ADAPTERS = 256
MAX_WEIGHT = 1e4
# The ranks that vLLM's max_lora_rank may have; it reserves memory for the one that is set.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

Method = Literal[
    "stack", "linear", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "magnitude_prune", "sce",
    "slerp", "karcher", "model_stock", "project_out", "peft_linear",
]  # fmt: skip

_SIZE = {"rank": None, "energy": None, "max_bytes": None, "fit": None, "dtype": "fp32"}
_SHARED = {**_SIZE, "basis": "knots", "density": 0.5}
_TIES = {"election": "mass", "normalize": "count"}
_WHOLE = {"fit": None, "dtype": "fp32"}  # exact: nothing to compress
# Of every method: the options it knows and what they are when left out.
OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "stack": _WHOLE,
        "linear": _SIZE,
        "ties": {**_SHARED, **_TIES, "scope": "module"},
        "dare_linear": {**_SHARED, "seed": 0},
        "dare_ties": {**_SHARED, **_TIES, "seed": 0},
        "della": {**_SHARED, **_TIES, "epsilon": 0.1, "seed": 0},
        "breadcrumbs": {**_SHARED, "gamma": 0.01, "density": 0.9, "scope": "module"},
        "magnitude_prune": {**_SHARED, "scope": "module"},
        "sce": {**_SHARED, "scope": "module"},
        "slerp": {**_WHOLE, "scope": "module"},
        "karcher": {**_WHOLE, "scope": "module"},
        "model_stock": {**_WHOLE, "scope": "module"},
        "project_out": {**_WHOLE, "subspace": "span"},
        "peft_linear": _WHOLE,
    }
)
NONLINEAR = ("ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "magnitude_prune", "sce")
GEOMETRIC = ("slerp", "karcher", "model_stock")


@dataclass(frozen=True, kw_only=True)
class WeightedAdapter:
    """One source of a merge: an adapter's folder and the weight its delta gets, of any sign.

    Attributes:
        path: folder of the adapter.
        weight: of every module that `weights` does not name.
        weights: of the modules so named, as in `LoraConfig.target_modules` (last names, full names, wildcards as in
            "layers.[0-7].*"); of several entries that match, the last one counts.
    """

    path: str
    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounded(self, "weight", -MAX_WEIGHT, MAX_WEIGHT)
        bounded_values(self, "weights", -MAX_WEIGHT, MAX_WEIGHT)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How several adapters become one. With D_i = scaling_i · B_i·A_i and weights w_i:

    "stack": Σ w_i·D_i, exact; the ranks add up. "linear": the same, compressed to fewer ranks as well as can be
    (Eckart–Young). "peft_linear": what PEFT calls linear, cross terms B_i·A_j and all, with its error stated.

    On the entries of the deltas in a basis that they share, which keeps the result an adapter: "ties" (arXiv
    2306.01708), "dare_linear" and "dare_ties" (2311.03099), "della" (2406.11617), "breadcrumbs" (2312.06795), "sce"
    (2408.07990) and "magnitude_prune".

    By weights that follow from the angles between the deltas, exact as a stack: "slerp" (of two), "karcher" (mean of
    directions on the sphere), both by the ratio of the weights alone, and "model_stock" (2403.19522). In these and the
    nonlinear methods an adapter takes no part in a module that it does not change.

    "project_out": the first adapter without what lies in the subspace of the others.

    An option that is left out has the default of the method (`OPTIONS`).

    Attributes:
        rank: compress to it; "linear" without rank, energy and max_bytes takes the largest rank of its sources.
        energy: compress every module to the fewest ranks that keep this share of its squared norm.
        max_bytes: of the weights file; the ranks go where they keep most of the squared norm per byte.
        fit: "vllm" pads the rank up to one that vLLM's max_lora_rank may have, and compresses what is above them all.
        density: share of the entries that is kept.
        gamma: of "breadcrumbs": share of the largest entries that is left out.
        epsilon: of "della": width of the range of probabilities around `density`.
        election: of a sign: by the sum of the values ("mass") or their number ("count").
        scope: what density, gamma and angles are taken over: each "module", or the whole "adapter".
        basis: "knots" (arXiv 2410.19735) shares the column space, "core" (2509.17786) column and row space.
        normalize: the kept values of one sign are averaged ("count", as the paper does), averaged by weight
            ("weight", as mergekit does where weights are positive) or added up ("none").
        subspace: of "project_out": the "span" of the others' deltas, their "column" or "row" space, or "both".
        seed: of "dare_linear", "dare_ties" and "della".
        dtype: of the weights file.
    """

    method: Method = "stack"
    rank: int | None = None
    energy: float | None = None
    max_bytes: int | None = None
    fit: Literal["vllm"] | None = None
    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    election: Literal["mass", "count"] | None = None
    scope: Literal["module", "adapter"] | None = None
    basis: Literal["knots", "core"] | None = None
    normalize: Literal["count", "weight", "none"] | None = None
    subspace: Literal["span", "column", "row", "both"] | None = None
    seed: int | None = None
    dtype: Literal["fp32", "fp16", "bf16"] | None = None

    def __post_init__(self) -> None:
        one_of(self, "method", tuple(OPTIONS))
        known = OPTIONS[self.method]
        for item in fields(MergeConfig):
            if item.name != "method" and item.name not in known and getattr(self, item.name) is not None:
                raise SpecError(
                    f"{item.name}: {self.method} has no such option; it has {', '.join(known)}", field=item.name
                )
        for name, low, high in _BOUNDS:
            if getattr(self, name) is not None:
                bounded(self, name, low, high, exclusive_low=low == 0 and name not in ("gamma", "epsilon", "seed"))
        for name, values in _CHOICES.items():
            if getattr(self, name) is not None:
                one_of(self, name, values)
        self._check_together()

    @property
    def options(self) -> dict[str, Any]:
        """Every option that the method knows, with its default where it was left out."""
        given = {name: getattr(self, name) for name in OPTIONS[self.method]}
        filled = {name: OPTIONS[self.method][name] if value is None else value for name, value in given.items()}
        return {
            name: float(value) if name in _SHARES and value is not None else value for name, value in filled.items()
        }

    @property
    def compresses(self) -> bool:
        """Whether the result is cut to fewer ranks than it needs to be exact."""
        asked = any(item is not None for item in (self.rank, self.energy, self.max_bytes, self.fit))
        return self.method == "linear" or (asked and "rank" in OPTIONS[self.method])

    def _check_together(self) -> None:
        sizes = [name for name in ("rank", "energy", "max_bytes") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise SpecError(f"{sizes[1]}: at most one of rank, energy and max_bytes can be given", field=sizes[1])
        if self.fit and sizes and sizes[0] != "rank":
            raise SpecError(f"fit: pads to one rank, which {sizes[0]} does not keep; give a rank", field="fit")
        if self.fit and self.rank is not None and self.rank > VLLM_RANKS[-1]:
            raise SpecError(f"rank: vLLM takes at most {VLLM_RANKS[-1]}", field="rank")
        options = self.options
        if self.method == "breadcrumbs" and options["density"] + options["gamma"] > 1:
            raise SpecError(
                "gamma: density and gamma are shares of the same entries; at most 1 together", field="gamma"
            )
        if self.method == "della" and not epsilon_fits(options["density"], options["epsilon"]):
            raise SpecError(
                "epsilon: density ± epsilon/2 must lie above 0 and at most at 1; make epsilon smaller", field="epsilon"
            )


def epsilon_fits(density: float, epsilon: float) -> bool:
    return density - epsilon / 2 > 0 and density + epsilon / 2 <= 1


_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("rank", 1, 4096), ("energy", 0, 1), ("max_bytes", 1, 2**50), ("density", 0, 1), ("gamma", 0, 0.99),
    ("epsilon", 0, 1), ("seed", 0, 2**31 - 1),
)  # fmt: skip
_SHARES = ("energy", "density", "gamma", "epsilon")  # 1 and 1.0 are one recipe
_CHOICES = {
    "fit": ("vllm",),
    "election": ("mass", "count"),
    "scope": ("module", "adapter"),
    "basis": ("knots", "core"),
    "normalize": ("count", "weight", "none"),
    "subspace": ("span", "column", "row", "both"),
    "dtype": ("fp32", "fp16", "bf16"),
}


@dataclass(frozen=True, kw_only=True)
class MergeSpec(MergeConfig):
    """Several adapters into one, on files of this machine.

    Attributes:
        adapters: the sources, all of one base model.
        output: folder for the merged adapter.
    """

    adapters: Sequence[WeightedAdapter]
    output: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.method, len(self.adapters))


def check_count(method: str, count: int) -> None:
    """Raises SpecError for a number of adapters that a method does not take."""
    low, high = {"slerp": (1, 2), "project_out": (2, MAX_ADAPTERS)}.get(method, (1, MAX_ADAPTERS))
    if count < low:
        raise SpecError(f"adapters: expected at least {'one adapter' if low == 1 else low}", field="adapters")
    if count > high:
        raise SpecError(f"adapters: {method} takes at most {high}, there are {count}", field="adapters")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """How the difference of two full checkpoints of one architecture becomes an adapter: D = W_tuned - W_base.

    Attributes:
        rank: of every module; 16 where neither it nor `energy` is given.
        energy: in its place, the share of every module's squared norm that is kept.
        other_changes: what else differs, as norms and embeddings, no adapter can hold: "refuse" it, or "leave_out" and
            state it in the certificate.
    """

    rank: int | None = None
    energy: float | None = None
    other_changes: Literal["refuse", "leave_out"] = "refuse"

    def __post_init__(self) -> None:
        if self.rank is not None:
            bounded(self, "rank", 1, 4096)
        if self.energy is not None:
            bounded(self, "energy", 0, 1, exclusive_low=True)
            if self.rank is not None:
                raise SpecError("energy: at most one of rank and energy can be given", field="energy")
        one_of(self, "other_changes", ("refuse", "leave_out"))


@dataclass(frozen=True, kw_only=True)
class ExtractSpec(ExtractConfig):
    """An adapter from two full checkpoints, on files of this machine.

    Attributes:
        base_model, tuned_model: folders with config and safetensors.
        output: folder for the adapter.
        base_model_name: what `adapter_config.json` calls the base model; its folder when left out.
    """

    base_model: str
    tuned_model: str
    output: str
    base_model_name: str | None = None
