"""Where the first process of a run listens. Whole runs of several processes are in processes_test.py."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

from scalr_jax.runtime.distributed import _listening, largest_by


@pytest.mark.parametrize("address", ["127.0.0.1:4321", "localhost:4321"])
def test_the_coordinator_listens_on_the_address_that_was_given(address):
    assert _listening(address) in ("127.0.0.1:4321", "[::1]:4321")


def test_jax_chooses_where_the_address_does_not_say_which_interface(monkeypatch):
    assert _listening("") is None
    assert _listening("192.0.2.1:4321") is None  # another machine's: this one is behind NAT
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 4321))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [found])
    assert _listening("node-1:4321") is None  # this machine's own name, in Debian's /etc/hosts
    monkeypatch.undo()
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.1:4321")
    assert _listening("127.0.0.1:4321") is None


def test_processes_agree_on_the_largest_of_their_numbers_in_every_turn():
    """Three clients of JAX's own coordinator; what a turn left there is removed in the next one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, 3)
    clients = [_jax.get_distributed_runtime_client(address, k, init_timeout=20) for k in range(3)]
    numbers = [[0, 2, 1, 0], [1, 0, 1, 3], [0, 1, 1, 2]]

    def process(k):
        clients[k].connect()
        agree = largest_by(clients[k], k, 3, "test")
        return [agree(number) for number in numbers[k]]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(process, range(3))) == [[1, 2, 1, 3]] * 3
        assert {key.split("/")[1] for key, _ in clients[0].key_value_dir_get("test")} == {"3"}
        list(pool.map(lambda client: client.shutdown(), clients))
    service.shutdown()
