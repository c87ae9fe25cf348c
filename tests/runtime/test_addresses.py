"""What is loopback, which ports a syncer has, and where a learner dials the second one."""

from __future__ import annotations

import socket

import pytest

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.addresses import bulk_after, is_ipv6_only, is_loopback, own_host, reach, split


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "10.0.0.1", "localhost.example", "127.0.0.1.example", "eth0"])
def test_beyond_loopback(host):
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "text",
    ["", "tcp://", "tcp://a", "tcp://:5", "tcp://a:x", "tcp://a:70000", "ipc://a:5", "a:5", "tcp://a:5/b", "tcp://b@a:5", "tcp://[::1:5"],
)
def test_what_is_no_address(text):
    assert split(text) is None


def test_addresses_are_taken_apart():
    assert split("tcp://a.example:5") == ("a.example", 5)
    assert split("tcp://[::1]:0") == ("::1", 0)
    assert split("tcp://*:7777") == ("*", 7777)


def test_beyond_loopback_payloads_take_the_next_port():
    assert bulk_after("tcp://0.0.0.0:7777") == "tcp://0.0.0.0:7778"
    assert bulk_after("tcp://[::]:7777") == "tcp://[::]:7778"
    assert bulk_after("tcp://0.0.0.0:0") == bulk_after("tcp://127.0.0.1:7777") == bulk_after("inproc://x") == ""
    with pytest.raises(ConfigurationError, match="below 65535"):
        bulk_after("tcp://0.0.0.0:65535")


@pytest.mark.parametrize("told", ["tcp://0.0.0.0:8", "tcp://[::]:8", "tcp://10.0.0.1:8", "tcp://elsewhere.example:8"])
def test_a_learner_dials_payloads_at_the_host_that_it_has_dialled(told):
    assert reach("tcp://a.example:7", told) == "tcp://a.example:8"
    assert reach("tcp://[2001:db8::1]:7", told) == "tcp://[2001:db8::1]:8"


@pytest.mark.parametrize(
    "told", ["", "nowhere", "tcp://", "tcp://a:port", "tcp://a\x00b:1", "tcp://a:0", "tcp://a:65536", "inproc://a", "tcp://a b:1"]
)
def test_an_address_that_is_none_is_refused(told):
    with pytest.raises(ConfigurationError, match="is no address"):
        reach("tcp://a.example:7", told)


def test_in_one_process_the_name_is_taken_as_it_is():
    assert reach("inproc://a", "inproc://a-bulk") == "inproc://a-bulk"
    with pytest.raises(ConfigurationError, match="is no address"):
        reach("inproc://a", "tcp://127.0.0.1:1")


def test_this_machine_has_an_address_or_a_name():
    assert own_host()


@pytest.mark.parametrize(("families", "is_only"), [("46", False), ("4", False), ("6", True), ("", False)])
def test_of_a_name_with_both_kinds_the_ipv4_address_is_taken(monkeypatch, families, is_only):
    def look_up(host, port, family):
        if {socket.AF_INET: "4", socket.AF_INET6: "6"}[family] not in families:
            raise socket.gaierror
        return ["an address"]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert is_ipv6_only("syncer.example") == is_only
    assert is_ipv6_only("2001:db8::1")
