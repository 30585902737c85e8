"""A cache with a limit in bytes: what was used longest ago goes first."""

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class ByteCache:
    """Tensors by key; one that is larger than the whole cache is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.hits, self.misses = limit, 0, 0, 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor, which is now the one used last; None, and a miss, where it is not there."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps a tensor, in place of as many old ones as it takes."""
        size = tensor.numel() * tensor.element_size()
        if key in self._kept or size > self.limit:
            return
        self._kept[key] = tensor
        self.bytes += size
        while self.bytes > self.limit:
            _, old = self._kept.popitem(last=False)
            self.bytes -= old.numel() * old.element_size()
