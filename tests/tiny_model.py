"""Tiny base models, made on the spot: random weights, a real tokenizer, an ordinary Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, TURN, END = "<|bos|>", "<|turn|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog and orders two pizzas.",
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system question answer one two three four five",
]


def make_tiny_model(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A Llama of two layers (hidden 32), fp32, with a byte-level tokenizer and a chat template; the folder."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        **token_ids(tokenizer),
    )
    return _save(LlamaForCausalLM, config, tokenizer, folder, seed)


def make_tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """A GPT-2 of two layers (hidden 32), whose linear layers are Conv1D, with dropout in its config; the folder."""
    tokenizer = make_tokenizer()
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, **token_ids(tokenizer)
    )  # fmt: skip
    return _save(GPT2LMHeadModel, config, tokenizer, folder, seed)


def make_llama_config(folder: Path, **sizes: int) -> Path:
    """The config of a Llama of any size, without weights; the folder."""
    LlamaConfig(architectures=["LlamaForCausalLM"], **sizes).save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 300 tokens which puts BOS before a document when asked for special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[TURN],
        chat_template=TEMPLATE,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The fields of a model's config that come from its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(architecture: Any, config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
