"""A model larger than the memory it may take is exported: bounded by its largest tensor, the factors and 256 MB."""

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

from lora_engine.safetensors_file import layout
from tests.tiny_model import make_tokenizer, token_ids

_CHILD = """
import resource, sys
from pathlib import Path
from tests.lora_engine.exporting.made import run
from lora_engine.merging.config import WeightedAdapter

def data() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) * 1024

small, large, adapter_small, adapter_large, output, allowed = sys.argv[1:]
run(Path(small), [WeightedAdapter(path=adapter_small)], Path(output) / "warm", format="merged")
limit = data() + int(allowed)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
run(Path(large), [WeightedAdapter(path=adapter_large)], Path(output) / "out", format="merged")
"""


def make_sparse_model(folder: Path, *, hidden: int, layers: int) -> Path:
    """A Llama of zeros in bf16, whose file takes no room on the disk."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        max_position_embeddings=256, architectures=["LlamaForCausalLM"], dtype="bfloat16", **token_ids(tokenizer),
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("BF16", (config.vocab_size, hidden)),
        "lm_head.weight": ("BF16", (config.vocab_size, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = "BF16", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}mlp.{name}.weight"] = "BF16", (4 * hidden, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = "BF16", (hidden, 4 * hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = "BF16", (hidden,)
    header, entries = layout(shapes, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(entry.end for entry in entries.values()))
    return folder


def test_under_a_limit_smaller_than_the_model(tmp_path: Path) -> None:
    from tests.lora_engine.exporting.made import make_adapter

    small = make_sparse_model(tmp_path / "small", hidden=64, layers=1)
    large = make_sparse_model(tmp_path / "large", hidden=2048, layers=3)
    for name, base in (("a", small), ("b", large)):
        make_adapter(tmp_path / name, base, 1, rank=8, targets=["q_proj", "down_proj"])
        (tmp_path / name / "lineage.json").write_text(json.dumps({}))  # without a digest of all that is in the base
    size = (large / "model.safetensors").stat().st_size
    factors = (tmp_path / "b" / "adapter_model.safetensors").stat().st_size
    largest = 2 * 2048 * 8192
    allowed = 2 * largest + factors + (256 << 20)
    assert allowed < size
    arguments = [small, large, tmp_path / "a", tmp_path / "b", tmp_path, allowed]
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[3], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == size
