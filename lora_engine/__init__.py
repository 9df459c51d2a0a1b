"""Luthier's training engine: LoRA and QLoRA for any Hugging Face causal language model.

Usable alone, without the service: ``python -m lora_engine train spec.json``.
Importing this package, `config`, `errors`, `strict_json` or `examples` never imports torch.
"""
