"""Documents of random tokens whose beginnings are shared, as prompts from one template are."""

import torch

from lora_engine.data import Document

LENGTHS = (20, 33, 50, 21, 90, 17, 34)


def templated(vocabulary: int = 300, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[Document]:
    """Some begin with twelve tokens in common, two of these with five more; targets have gaps and early ends."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randint(3, vocabulary, (17,), generator=generator)
    documents = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        trained = torch.zeros(length, dtype=torch.bool)
        if number % 2 == 0:
            ids[:12] = prefix[:12]
        if number in (2, 4):
            ids[12:17] = prefix[12:]
        trained[min(18, length - 2) :] = True
        if number == 1:
            trained[20:24] = False
        if number == 3:
            trained[-1:] = False
        documents.append(Document(number, ids.int(), trained))
    return documents
