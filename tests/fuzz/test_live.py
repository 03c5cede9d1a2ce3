"""Hostile peers on real sockets: the short form of what `make fuzz` does with a hundred thousand messages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import impostor, live
from tests.fuzz.attackers import Attacker, Target
from zfabric.limits import PARKED_BYTES_MAX
from zfabric.wire import codec, kinds

#: How many connections attack at a time. Each may leave as much as that unread.
TOGETHER = 8


@pytest.mark.parametrize("keys", [False, True], ids=["without-keys", "with-keys"])
async def test_nobody_feels_an_attack(keys: bool) -> None:
    """Every well-behaved answer comes and is right, no process ends or fails, and the controller's memory is bounded."""
    outcome = await live.run(1_500, 1, keys=keys, quiet_answers=4, half_open=60, together=TOGETHER)
    assert outcome.messages >= 1_500
    assert outcome.said["half-open connections"] >= 60
    assert outcome.rss_most - outcome.rss_before < TOGETHER * PARKED_BYTES_MAX


async def test_nobody_hangs_at_a_hostile_controller() -> None:
    """Each call of a client ends in time, with an answer or an error of the tree; a worker goes on trying."""
    visit = await impostor.run(300, 1)
    assert visit.said.total() >= 300
    assert visit.calls.total()
    # Of a frame that is announced nothing is kept that has not come.
    assert visit.grown < 64 * 2**20


def test_what_an_attacker_says_is_drawn_by_its_seed(tmp_path: Path) -> None:
    gossip = tmp_path / "gossip.json"
    gossip.write_text(json.dumps({"attempts": [[1, 2, 0]], "sessions": [3], "workers": ["w"]}))
    target = Target("tcp://127.0.0.1:1", gossip, "echo")

    def words(seed: int, number: int) -> list[codec.Frames]:
        attacker = Attacker(target, seed, number, Counter())
        return [draw() for _ in range(50) for draw in (attacker._client_words, attacker._worker_words)]

    assert words(1, 1) == words(1, 1)
    assert words(1, 1) != words(1, 2) != words(2, 1)
    said = {frames[0][0] for frames in words(1, 1)}
    assert said >= {
        kinds.SUBMIT,
        kinds.CLAIMS,
        kinds.CANCEL,
        kinds.CREDIT,
        kinds.ENDS,
        kinds.CHUNKS,
        kinds.CARRIED,
        kinds.LOAD,
    }
