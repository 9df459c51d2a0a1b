"""The parity's numbers against their definitions, and what makes it fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_engine import base_model
from lora_engine.errors import AdapterError
from lora_engine.exporting import merged, parity
from lora_engine.exporting.base import open_base
from lora_engine.exporting.parity import Text
from lora_engine.exporting.sums import Block
from tests.lora_engine.exporting.made import make_adapter, run
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def test_log_probabilities_are_those_of_each_text_alone(base: Path) -> None:
    opened = open_base(base)
    prompts = parity.texts(opened.tokenizer)
    got = parity.log_probabilities(opened.evaluated(), prompts)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        want = [model(torch.tensor([text.ids])).logits[0, list(text.positions)] for text in prompts]
    assert (got - torch.cat(want).log_softmax(dim=-1)).abs().max() < 1e-5


def test_the_texts_are_answers_with_their_stop_token(base: Path) -> None:
    tokenizer = base_model.load_tokenizer(base, 320)
    prompts = parity.texts(tokenizer)
    assert len(prompts) == len(parity.PROMPTS)
    for text in prompts:
        assert max(text.positions) + 1 < len(text.ids)
    # The answer begins where the template's own prompt ends.
    first = prompts[0]
    assert tokenizer.decode(first.ids[: first.positions[0] + 1]).endswith("assistant\n")


def test_the_figures() -> None:
    prompts = [Text(ids=(0, 1, 2), positions=(0, 1))]
    reference = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    written = torch.tensor([[0.3, 0.5, 0.2], [0.1, 0.3, 0.6]]).log()
    found = parity.compare(reference, written, prompts)
    # Own tokens 1 and 2, likely tokens 0 and 2.
    gaps = [(torch.tensor(a) / b).log().abs().item() for a, b in ((0.3, 0.5), (0.5, 0.3), (0.7, 0.6), (0.7, 0.6))]
    assert found.max_gap == pytest.approx(max(gaps))
    assert found.mean_gap == pytest.approx(sum(gaps) / 4)
    assert found.kl == pytest.approx((reference.exp() * (reference - written)).sum().item() / 2)
    assert found.greedy_agreement == 0.5
    assert found.predictions == 2
    with pytest.raises(AdapterError, match="differs"):
        parity.check(found, 0.5, "do this")
    with pytest.raises(AdapterError, match="not finite"):
        parity.compare(reference, written * float("nan"), prompts)


def test_a_writer_that_errs_is_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = merged._Writer.write

    def wrong(self: Any, block: Block, data: Tensor) -> None:
        write(self, block, data * 1.01 if block.piece.module else data)

    monkeypatch.setattr(merged._Writer, "write", wrong)
    with pytest.raises(AdapterError, match="parity"):
        run(base, [make_adapter(tmp_path / "a", base, 1)], tmp_path / "out", format="merged")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_caught(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base", tied=False)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"  # NaN
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="not finite"):
        run(folder, [make_adapter(tmp_path / "a", folder, 1)], tmp_path / "out", format="peft")
