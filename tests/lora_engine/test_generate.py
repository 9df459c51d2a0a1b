from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_engine import adapter, base_model
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.base_model import BaseModel, linear_modules
from lora_engine.errors import AdapterError, SpecError
from lora_engine.generate import attached, generate, greedy
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=[make_tiny_model, make_tiny_gpt2], ids=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return base_model.load(request.param(tmp_path_factory.mktemp("base")))


def random_adapter(base: BaseModel, *, rank: int = 4, scale: float = 0.3, **settings: Any) -> Adapter:
    generator = torch.Generator().manual_seed(7)
    weights = {
        module.name: LoraWeights(
            torch.randn(rank, module.inputs, generator=generator) * scale,
            torch.randn(module.outputs, rank, generator=generator) * scale,
        )
        for module in linear_modules(base.model)
        if not module.head
    }
    return Adapter(**{"weights": weights, "rank": rank, "alpha": 6.0, **settings})


def expected(model: Any, base: BaseModel, max_new_tokens: int = 24) -> str:
    """The answer to CHAT by transformers' own generation."""
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_the_answer_is_that_of_transformers_with_and_without_an_adapter(base: BaseModel, tmp_path: Path) -> None:
    plain = generate(base, CHAT, max_new_tokens=24)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    assert plain == expected(model, base)
    assert len(plain) > 10

    ours = random_adapter(base, use_rslora=True)
    adapted = generate(base, CHAT, adapter=ours, max_new_tokens=24)
    adapter.write(ours, tmp_path / "adapter", lineage={})
    assert adapted == expected(PeftModel.from_pretrained(model, str(tmp_path / "adapter")), base)
    assert adapted != plain
    assert generate(base, CHAT, max_new_tokens=24) == plain


def test_an_adapter_gives_the_logits_that_stock_peft_gives(base: BaseModel, tmp_path: Path) -> None:
    ours = random_adapter(base, scale=0.1)
    ids = torch.arange(5, 25)[None]
    with attached(base, ours), torch.no_grad():
        found = base.model(ids).logits
    adapter.write(ours, tmp_path / "adapter", lineage={})
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_it_ends_before_the_first_stop_token(base: BaseModel) -> None:
    ids = list(greedy(base, [5, 6, 7], set(), 24))
    stop = ids[9]
    assert list(greedy(base, [5, 6, 7], {stop}, 24)) == ids[: ids.index(stop)]


def test_a_plain_text_is_continued(base: BaseModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    ids = tokenizer("The quick brown", return_tensors="pt")  # its BOS included
    output = model.generate(**ids, max_new_tokens=12, do_sample=False)
    wanted = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(base, "The quick brown", max_new_tokens=12) == wanted


def test_a_full_context_ends_the_answer_or_refuses_the_prompt(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_engine.chat.stop_ids", lambda _: set())
    assert generate(base, "a" * 230, max_new_tokens=10_000)
    with pytest.raises(SpecError, match="context of 256"):
        generate(base, "a" * 256)


def test_an_adapter_of_another_base_model_is_refused_and_leaves_no_trace(base: BaseModel) -> None:
    before = [type(module) for module in base.model.modules()]
    foreign = random_adapter(base)
    foreign.weights["model.layers.9.q_proj"] = LoraWeights(torch.ones(4, 32), torch.ones(32, 4))
    with pytest.raises(AdapterError, match=r"layers\.9\.q_proj"):
        generate(base, CHAT, adapter=foreign)
    with pytest.raises(RuntimeError, match="in the middle"), attached(base, random_adapter(base)):
        raise RuntimeError("in the middle")
    assert [type(module) for module in base.model.modules()] == before
    foreign = random_adapter(base, base_digest="b" * 64)
    base.digest = "a" * 64
    try:
        with pytest.raises(AdapterError, match="another base model"):
            generate(base, CHAT, adapter=foreign)
    finally:
        base.digest = None
