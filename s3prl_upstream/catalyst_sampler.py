"""catalyst.data.sampler.DistributedSamplerWrapper, the one thing that S3PRL's keyword spotting imports of
catalyst, whose last release current versions of pip refuse to install. Supplied only where catalyst is not
installed."""

from __future__ import annotations

import importlib.machinery
from types import ModuleType
from typing import Iterator, Optional

PACKAGES, MODULE = ("catalyst", "catalyst.data"), "catalyst.data.sampler"


def wrapper_class() -> type:
    from torch.utils.data import DistributedSampler, Sampler

    class DistributedSamplerWrapper(DistributedSampler):
        """Deals the indices that any sampler draws out to the processes of a distributed run. Every process
        draws the same sequence where their generators are seeded alike, as S3PRL seeds them."""

        def __init__(self, sampler: Sampler, num_replicas: Optional[int] = None, rank: Optional[int] = None,
                     shuffle: bool = True) -> None:
            super().__init__(range(len(sampler)), num_replicas=num_replicas, rank=rank, shuffle=shuffle)
            self.sampler = sampler

        def __iter__(self) -> Iterator[int]:
            drawn = list(self.sampler)
            return iter([drawn[position] for position in super().__iter__()])

    return DistributedSamplerWrapper


class Loader:
    """Makes the empty packages, and the module with its one class."""

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        if module.__name__ == MODULE:
            module.DistributedSamplerWrapper = wrapper_class()


def find_spec(name: str) -> Optional[importlib.machinery.ModuleSpec]:
    if name in PACKAGES or name == MODULE:
        return importlib.machinery.ModuleSpec(name, Loader, is_package=name in PACKAGES)
    return None
