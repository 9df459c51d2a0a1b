"""What a search for weights cannot be made with, told from headers and the names of linear layers. No torch.

A service asks before it queues a search; the search asks again, of the base model that it has loaded.
"""

from collections.abc import Sequence

from lora_engine.adapter_header import Header
from lora_engine.config import MAX_RANK
from lora_engine.errors import AdapterError, SpecError
from lora_engine.target_modules import Module


def stacked_ranks(headers: Sequence[Header]) -> dict[str, int]:
    """Of every module, the ranks of all adapters together.

    Raises:
        SpecError: they add up to more than the largest that an adapter is trained with.
    """
    ranks: dict[str, int] = {}
    for header in headers:
        for name, module in header.modules.items():
            ranks[name] = ranks.get(name, 0) + module.rank
    name = max(ranks, key=lambda module: ranks[module])
    if ranks[name] > MAX_RANK:
        widest = max(headers, key=lambda header: header.modules[name].rank if name in header.modules else 0)
        raise SpecError(
            f"adapters: their ranks add up to {ranks[name]} on {name}, a search takes {MAX_RANK}; compress them first "
            f"({widest.folder.name} has {widest.modules[name].rank} of them)",
            field="adapters",
        )
    return ranks


def check_fit(modules: Sequence[Module], tied_head: str | None, digest: str | None, headers: Sequence[Header]) -> None:
    """Whether every adapter can run on a base model with these linear layers and this digest.

    Args:
        tied_head: name of the output head, where it shares its weight with the input embeddings.

    Raises:
        AdapterError: an adapter of another base model, or on a layer that it has not, or that it shares.
    """
    known = {module.name: (module.inputs, module.outputs) for module in modules}
    for header in headers:
        if None not in (digest, header.base_digest) and digest != header.base_digest:
            raise AdapterError(
                f"{header.folder.name}: the adapter is of another base model ({header.base_digest}); search with "
                "adapters of one base model",
                field="adapters",
            )
        for name, module in header.modules.items():
            if known.get(name) != (module.inputs, module.outputs):
                raise AdapterError(
                    f"{header.folder.name}: {name} ({module.outputs} × {module.inputs}) is no linear layer of this "
                    "shape in the base model; search with adapters of one base model",
                    field="adapters",
                )
            if name == tied_head:
                raise AdapterError(
                    f"{header.folder.name}: {name} shares its weight with the input embeddings in this base model; "
                    "leave the adapter out, or merge without a search",
                    field="adapters",
                )
