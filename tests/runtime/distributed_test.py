"""Where the first process of a run listens. Whole runs of several processes are in processes_test.py."""

import socket

import pytest

from scalr_jax.runtime.distributed import _listening


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
