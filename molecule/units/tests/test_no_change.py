"""A play that has nothing to do."""

import time
from collections.abc import Callable


def test_play_without_a_change_takes_at_most_20_seconds(play: Callable[..., int]) -> None:
    play()
    started = time.monotonic()
    assert play() == 0
    seconds = time.monotonic() - started
    print(f"A play that changes nothing took {seconds:.1f} s.")
    assert seconds <= 20
