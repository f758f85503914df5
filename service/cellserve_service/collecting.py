"""How Python's garbage collector works in a server's processes."""

import gc
from typing import Final

# Containers that are made and not freed before the collector looks for cycles among them. The usual 700 come and go
# with every batch of frames, and looking at them took a twelfth of the time; cycles are rare here.
_YOUNG_OBJECTS: Final = 20_000


def settle_collector() -> None:
    """What is loaded by now stays, so the collector need not look through it; to the rest it looks less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
