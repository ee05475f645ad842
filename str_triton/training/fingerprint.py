"""Fingerprints of examples and of networks, by which a resumed run notices others of the same names and sizes."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLES = 16
"""The largest number of examples whose content is hashed."""


@dataclass(frozen=True)
class Fingerprint:
    """The number of examples of a part of the data, and hashes of them.

    Attributes:
        examples: the number of examples.
        labels: a hash of all labels in their order.
        contents: hashes of up to `SAMPLES` examples, evenly spread, as they are stored. None for an example that cannot
            be read or decoded. Empty where the stored bytes are not at hand.
    """

    examples: int
    labels: str
    contents: tuple[str | None, ...] = ()

    @classmethod
    def of(cls, labels: Tensor, stored: Callable[[int], bytes | None] | None = None) -> "Fingerprint":
        """Compute the fingerprint of examples with these labels, int64 [N] on the CPU.

        ``stored`` returns the bytes of an example, or None for one that cannot be read or decoded.
        """
        count = len(labels)
        samples = min(SAMPLES, count)
        contents = [] if stored is None else [stored(place * count // samples) for place in range(samples)]
        hashes = tuple(None if content is None else _hash(content) for content in contents)
        return cls(count, _hash(labels.contiguous().numpy().data), hashes)

    @classmethod
    def of_text(cls, codes: Tensor) -> "Fingerprint":
        """Compute the fingerprint of a text, int64 [N] on the CPU. The label of a character is the next character."""
        whole = _hash(codes.contiguous().numpy().data)
        return cls(len(codes), whole, (whole,))

    def change(self, now: "Fingerprint", part: str) -> str | None:
        """Return in words the first difference of ``now`` from this fingerprint; None if the data are the same.

        ``part`` names the part. Examples that could not be decoded before or cannot be now are not compared: a user
        may have restored damaged ones, and training names those that went missing.
        """
        if self.examples != now.examples:
            return f"there were {self.examples:,} {part} examples, and are {now.examples:,} now"
        if self.labels != now.labels:
            return f"the labels of its {part} examples, or their order, have changed"
        differing = sum(a != b for a, b in zip(self.contents, now.contents, strict=False) if a and b)
        if differing:
            return f"there are differences in {differing} of {len(self.contents)} sampled {part} examples"
        return None

    def proves(self, now: "Fingerprint") -> bool:
        """Return whether ``now`` has the same contents, as far as they are sampled. Labels alone prove nothing."""
        return self == now and any(self.contents)


def hash_of_network(model: nn.Module) -> str:
    """Return a hash of the names and the values of a network's weights and buffers."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
