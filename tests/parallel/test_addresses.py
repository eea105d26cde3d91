"""Names that lead nowhere are told at once, and by name."""

from __future__ import annotations

import os
import socket

import pytest

from attnres_train.errors import UserError
from attnres_train.parallel import addresses
from attnres_train.parallel.addresses import check_master, choose_interface, listener
from tests.tiny import free_port


def test_a_master_that_does_not_resolve_is_named(monkeypatch):
    monkeypatch.setattr(addresses, "PAUSE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"MASTER_ADDR is 'nohost123\.invalid', which .* cannot re"):
        check_master("nohost123.invalid")
    check_master("127.0.0.1")


def test_a_name_server_that_is_late_is_asked_again(monkeypatch):
    answers = [socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), []]

    def ask(name: str, port: None) -> list:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(addresses, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    check_master("late")
    assert not answers


def test_gloo_takes_the_interface_that_leads_to_rank_0(monkeypatch):
    # Set and removed, so that what is chosen is undone after the test.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(socket, "gethostname", lambda: "nohost123.invalid")
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"


def test_a_name_of_its_own_is_enough(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    choose_interface("127.0.0.1")
    assert not os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.parametrize(
    ("address", "bound"),
    [("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("node0.cluster", "::")],
)
def test_rank_0_listens_no_wider_than_asked(address, bound):
    port = free_port()
    with socket.socket(fileno=listener(address, port)) as server:
        assert server.getsockname()[:2] == (bound, port)
        with socket.create_connection(("127.0.0.1", port)):
            pass
        with pytest.raises(UserError, match=f"MASTER_PORT is {port}, where rank 0 cannot listen"):
            listener(address, port)
