"""python tests/knock.py ADDRESS TOKEN PORT…: how each port answers whom shows that token, as JSON.

An empty token shows none. A process of its own, since gRPC's threads stay in the network namespace
in which they began.
"""

from __future__ import annotations

import http.client
import json
import sys

import grpc

_SERVICES = {
    "GCS": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "/ray.rpc.NodeManagerService/GetNodeStats",
    "objects": "/ray.rpc.ObjectManagerService/Pull",
    "worker": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "client": "/ray.rpc.RayletDriver/ClusterInfo",
    "agent": "/ray.rpc.ReporterService/GetTraceback",
}
"""A method of each of Ray's services: one that is not known is not asked for a token either."""


def knock(address: str, token: str, port: str) -> str:
    """Such as ``GCS UNAUTHENTICATED``, ``http 401``, ``metrics 200`` or ``closed``."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        for service, method in _SERVICES.items():
            try:
                channel.unary_unary(method)(b"", timeout=10, metadata=metadata)
                return f"{service} OK"
            except grpc.RpcError as error:
                code = error.code().name
            if code == "UNAVAILABLE":
                return _http(address, token, port)
            if code != "UNIMPLEMENTED":
                return f"{service} {code}"
    return "an unknown service"


def _http(address: str, token: str, port: str) -> str:
    connection = http.client.HTTPConnection(address, int(port), timeout=10)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", "/metrics", headers=headers)
        answer = connection.getresponse()
        kind = "metrics" if answer.read(6) == b"# HELP" else "http"
        return f"{kind} {answer.status}"
    except OSError:
        return "closed"


if __name__ == "__main__":
    address, token, *ports = sys.argv[1:]
    print(json.dumps({port: knock(address, token, port) for port in ports}))
