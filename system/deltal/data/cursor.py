"""The order of prompts: which group comes next, and which row of the data set a group asks about.

The cursor's whole state is `(epoch, index)`; the journal records it at every issue, so a resumed run goes on with the
very next group. Rows are a permutation by (seed, epoch): any machine can say which row `train/3/17` is about.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from deltal.types import GroupId


class PromptCursor:
    """Position in an endless walk over a data set: `train/0/0 -> … -> train/0/size-1 -> train/1/0 -> …`.

    It knows nothing of the prompts themselves, only how many there are.
    """

    def __init__(self, size: int, seed: int, epoch: int = 0, index: int = 0) -> None:
        """`size`: rows of the data set; (`epoch`, `index`): the group that `next` gives first.

        Raises ValueError when `size` is below 1 or the position is outside of it.
        """
        if size < 1:
            raise ValueError(f"size = {size}: a cursor needs at least one row")
        if epoch < 0 or not 0 <= index <= size:
            raise ValueError(f"epoch = {epoch}, index = {index} is no position in a data set of {size} rows")
        self.size = size
        self.seed = seed
        self.epoch, self.index = (epoch, index) if index < size else (epoch + 1, 0)

    def next(self) -> GroupId:
        """The next group's id; the cursor moves on, into the next epoch after the last row."""
        group = GroupId(purpose="train", epoch=self.epoch, index=self.index)
        self.index += 1
        if self.index == self.size:
            self.epoch, self.index = self.epoch + 1, 0
        return group

    def row(self, group: GroupId) -> int:
        """Row of the data set a group asks about, for any epoch; for `eval` its index (in the held-out set's order).

        Raises ValueError when a training group's index is outside of the data set.
        """
        if group.purpose == "eval":
            return group.index
        if not 0 <= group.index < self.size:
            raise ValueError(f"{group} is outside of a data set of {self.size} rows")
        return int(epoch_order(self.size, self.seed, group.epoch)[group.index])


@lru_cache(maxsize=4)  # groups in flight span two epochs at most, in a tiny data set a few more
def epoch_order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Rows in the order of one epoch, int64[size]: the same on every machine for the same arguments."""
    # SeedSequence takes no negative numbers; a run's seed may be one.
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])))
    order = generator.permutation(size)
    order.flags.writeable = False
    return order
