"""Limits of cells: controllers that are registered at another one as a worker."""

from __future__ import annotations

from typing import Final

#: A cell adds up what it has so soon after a change, and tells its parent what is another sum: ten looks a second at a thousand
#: workers take about a hundredth of a core, and a slot that is told a tenth of a second late costs a request that long.
CELL_LOOK_MS: Final = 100
#: An announcement of models names all that runs, and costs both sides some microseconds for each of it. With so much more time
#: between two of them for each running request, that stays below a tenth of a core: 6.6 s for as many as a worker may have.
CELL_ANNOUNCED_US: Final = 100
#: Controllers that may stand below one: their numbers go with each announcement, nine bytes each.
CELLS_MAX: Final = 4_096
#: Controllers that a request may pass below the one that its client is connected to. Four of a thousand workers each would be
#: more workers than there are; more than that is a mistake.
CELL_DEPTH_MAX: Final = 4
#: What a cell runs for a parent that is away goes on for so long: clients wait for a controller for ten seconds by default, and
#: whatever a parent that comes later finds unclaimed is stopped all the same.
CELL_AWAY_MS: Final = 30_000
#: A cell that was refused for good, by an operator's mistake, asks again so rarely: somebody may mend it without restarting it.
CELL_REFUSED_MS: Final = 10_000
#: Of what was told as cached in a cell so many blocks are looked at in one look, after a worker that had some of it is gone.
CELL_SWEPT_BLOCKS: Final = 2_048
