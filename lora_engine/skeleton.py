"""The modules of the most common dense families, built without transformers' modelling code.

Importing that code takes longer than loading a small model, and the fast pass needs its modules' names, shapes and
settings alone. So a config that spells everything out gets a tree of the same names here; what one leaves to defaults,
or has beside the ordinary, is left to transformers. Called as a model, a skeleton becomes transformers' own.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
# Old checkpoints carry what is computed.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What shapes a decoder, in the words of transformers' configs."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    query_bias: bool
    output_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    tie_word_embeddings: bool

    def get_text_config(self) -> "DecoderConfig":
        return self


def config_of(values: Mapping[str, Any]) -> DecoderConfig | None:
    """The config, where `values` (of a config.json) say all of it; None: transformers has to say what they mean."""
    sizes = {name: values.get(name) for name in _SIZES}
    family, rope = values.get("model_type"), _rope(values)
    if family not in _FAMILIES or rope is None or not all(_is_size(size) for size in sizes.values()):
        return None
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim: Any = values.get("head_dim")
    if head_dim is None and family != "qwen3" and hidden % heads == 0:
        head_dim = hidden // heads
    window = values.get("sliding_window", 0) if family == "mistral" else None
    eps: Any = values.get("rms_norm_eps")
    settled = (
        _is_size(head_dim)
        and head_dim % 2 == 0
        and heads % values["num_key_value_heads"] == 0
        and isinstance(values.get("hidden_act"), str)
        and isinstance(eps, float)
        and (window is None or _is_size(window))
        and isinstance(values.get("tie_word_embeddings"), bool)
        and not values.get("use_sliding_window")
        and all(kind == "full_attention" for kind in values.get("layer_types") or ())
        and not values.get("use_bidirectional_attention")
    )
    biases = [values.get(name, False) for name in ("attention_bias", "mlp_bias")]
    if not settled or not all(isinstance(bias, bool) for bias in biases):
        return None
    attention_bias = family in ("llama", "qwen3") and biases[0]
    return DecoderConfig(
        model_type=family,
        **sizes,  # type: ignore[arg-type]
        head_dim=head_dim,
        hidden_act=values["hidden_act"],
        rms_norm_eps=eps,
        rope_parameters=rope,
        query_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=family == "llama" and biases[1],
        sliding_window=window,
        tie_word_embeddings=values["tie_word_embeddings"],
    )


def build(
    values: Mapping[str, Any], stored: Collection[str], folder: Path, dtype: torch.dtype, device: torch.device
) -> "Skeleton | None":
    """The model of a config.json's `values`, on the meta device but for its rotary frequencies.

    None where transformers has to build it: the config leaves something open, or the files do not hold exactly the
    tensors (named in `stored`) that this model has.
    """
    config = config_of(values)
    if config is None:
        return None
    with torch.device("meta"):
        model = Skeleton(config, folder).to(dtype)
    model.model.rotary_emb = Rotary(config, device)
    expected = set(model.state_dict()) - set(model.all_tied_weights_keys)
    return model if {name for name in stored if not name.endswith(_COMPUTED)} == expected else None


class Skeleton(nn.Module):
    """A causal language model's modules, by transformers' names."""

    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: DecoderConfig, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.model = _Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.all_tied_weights_keys = (
            {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        )
        self._folder = folder
        self._whole: tuple[Any, ...] = ()  # not among the modules: it has the same ones
        self.tie_weights()

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def tie_weights(self, **_: Any) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """transformers' forward over these weights, and what has been put in the place of layers."""
        if not self._whole:
            self._whole = (self._completed(),)
        return self._whole[0](*arguments, **options)

    def _completed(self) -> Any:
        """transformers' model with these layers and tensors in it; from then on, its modules are this model's too."""
        from lora_engine.base_model import architecture, rebuild_buffers

        weight = self.get_input_embeddings().weight
        whole = architecture(self._folder, weight.dtype)
        inside = [(name, module) for name, module in self.named_modules() if isinstance(module, _PLAIN)]
        layers = {name: module for name, module in self.named_modules() if name.rpartition(".")[2] in _LINEAR}
        for name, module in inside:
            whole.get_submodule(name)._parameters["weight"] = module.weight
        for name, module in layers.items():
            whole.set_submodule(name, module)
        rebuild_buffers(whole, weight.device)
        whole.eval().requires_grad_(False)
        self._modules = whole._modules
        return whole


class _Trunk(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.hidden_size)  # drawing values on no device imports a compiler
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _Norm(config.hidden_size, config)
        self.rotary_emb: nn.Module = nn.Identity()


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = _Norm(config.hidden_size, config)
        self.post_attention_layernorm = _Norm(config.hidden_size, config)


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width, bias = config.hidden_size, config.query_bias
        queries, keys = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(width, queries, bias)
        self.k_proj = nn.Linear(width, keys, bias)
        self.v_proj = nn.Linear(width, keys, bias)
        self.o_proj = nn.Linear(queries, width, config.output_bias)
        if config.model_type == "qwen3":
            self.q_norm = _Norm(config.head_dim, config)
            self.k_norm = _Norm(config.head_dim, config)


class _MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)


class _Norm(nn.Module):
    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.variance_epsilon = config.rms_norm_eps


_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
_PLAIN = (_Norm, nn.Embedding)


class Rotary(nn.Module):
    """Cosines and sines of rotary embeddings (arXiv 2104.09864), plain, linearly stretched, or Llama 3's."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(_frequencies(config).to(device), persistent=False)

    @torch.no_grad()
    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(…, tokens, head size) each in the dtype of `like`, for positions (…, tokens)."""
        angles = positions[..., None].float() * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(like.dtype), both.sin().to(like.dtype)


def _frequencies(config: DecoderConfig) -> Tensor:
    rope, size = config.rope_parameters, config.head_dim
    plain: Tensor = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size))
    if rope["rope_type"] == "default":
        return plain
    factor = float(rope["factor"])
    if rope["rope_type"] == "linear":
        return plain / factor
    # Llama 3.1: long wavelengths are stretched, short ones kept, those between by a share of each.
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    low, high, length = (float(rope[name]) for name in names)
    turns = length / (2 * math.pi / plain)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / factor + share * plain


def _rope(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary settings in the form of transformers 5, from either form; None: something is left open, or special."""
    given = values.get("rope_parameters") or {**(values.get("rope_scaling") or {})}
    if not isinstance(given, dict):
        return None
    rope = {"rope_theta": values.get("rope_theta"), **given}
    rope["rope_type"] = given.get("rope_type", given.get("type", "default"))
    needed: tuple[str, ...] = {"default": (), "linear": _LLAMA3[:1], "llama3": _LLAMA3}.get(rope["rope_type"], ("",))
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        needed = (*needed, "original_max_position_embeddings")
    usual = {"rope_theta", "rope_type", "type", *needed}
    numbers: list[Any] = [rope.get(name) for name in ("rope_theta", *needed)]
    if set(rope) - usual or values.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    return rope if all(type(number) in (int, float) and number > 0 for number in numbers) else None


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
