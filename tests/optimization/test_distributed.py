"""Connections that tell a process that another one is gone, where a sum would wait for it for ever."""

import socket
import threading

import pytest

from mlx_adapters.optimization.distributed import LostPeerError, Peers


@pytest.fixture
def three():
    """The peers of rank 0, 1 and 2."""
    pairs = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(2):
            mine = socket.create_connection(server.getsockname())
            pairs.append((server.accept()[0], mine))
    made = [Peers([first for first, _ in pairs], True, 0.1), *(Peers([mine], False, 0.1) for _, mine in pairs)]
    yield made
    for peers in made:
        peers.close()


def together(*calls):
    """What each call gave or raised, all at once."""
    results = [None] * len(calls)

    def note(index, call):
        try:
            results[index] = call()
        except LostPeerError as error:
            results[index] = error

    threads = [threading.Thread(target=note, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return results


def test_all_meet_time_after_time(three):
    for _ in range(3):
        assert together(*(peers.meet for peers in three)) == [None, None, None]


@pytest.mark.parametrize("gone", range(3))
def test_one_that_is_gone_is_missed_by_all_others(gone, three):
    three[gone].close()
    others = [peers for peers in three if peers is not three[gone]]
    assert all(isinstance(result, LostPeerError) for result in together(*(peers.meet for peers in others)))


@pytest.mark.parametrize(("gone", "told"), [(2, 0), (0, 1)])
def test_one_that_goes_within_a_sum_ends_the_others(gone, told, three):
    ended = threading.Event()
    three[told].lost = ended.set
    together(*(peers.meet for peers in three))
    with three[told].summing():
        three[gone].close()
        assert ended.wait(10)


def test_a_long_sum_of_all_is_waited_for(three):
    ended = threading.Event()
    three[0].lost = ended.set
    with three[0].summing():
        assert not ended.wait(0.3)
    three[1].close()
    assert not ended.wait(0.2)  # no sum, and nothing to be lost in
