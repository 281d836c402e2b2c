"""The network interface of gloo: that of the node's address, unless the user chose one."""

from __future__ import annotations

import os

import pytest
import ray.util

from fer_ray.training import gloo


@pytest.mark.parametrize(("address", "chosen"), [("127.0.0.1", "lo"), ("192.0.2.77", "")])
def test_gloo_listens_where_the_node_is_reached(monkeypatch, address, chosen):
    monkeypatch.setenv(gloo.VARIABLE, "")  # so that it is put back
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    gloo.choose_interface()
    assert os.environ[gloo.VARIABLE] == chosen


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(gloo.VARIABLE, "eth7")
    gloo.choose_interface()
    assert os.environ[gloo.VARIABLE] == "eth7"
