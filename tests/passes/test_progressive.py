"""The cubic schedule by hand, and the passes that take rounds."""

import pytest

from edgec.passes import PassError, PruneMagnitude, PruneStructured
from edgec.passes.progressive import share_of_round, still_ahead


def test_most_is_cut_first():
    # 0.8 (1 - (3/4)^3), 0.8 (1 - (1/2)^3), 0.8 (1 - (1/4)^3), and all of it
    shares = [share_of_round(0.8, number, 4) for number in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.4625, 0.7, 0.7875, 0.8])
    assert shares[-1] == 0.8  # to the last bit: the count of zeros follows from it
    assert share_of_round(0.3, 1, 1) == 0.3


def test_nothing_is_ahead_from_the_end_on():
    assert [still_ahead(done) for done in (0.0, 0.5, 1.0, 1.5)] == [1.0, 0.125, 0.0, 0.0]


@pytest.mark.parametrize("kind", [PruneMagnitude, PruneStructured])
def test_no_round_at_all_is_refused(kind):
    with pytest.raises(PassError, match="rounds is 0, expected 1 or more"):
        kind(rounds=0)


def test_a_pattern_takes_no_rounds():
    with pytest.raises(PassError, match="a pattern has no share that could rise; leave out rounds"):
        PruneMagnitude(pattern="2:4", rounds=2)
