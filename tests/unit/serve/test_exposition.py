"""The text at ``/metrics``: all nodes' samples of Loom's, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.exposition import ClusterMetrics, MetricsUnavailable, merged

NODE = """# HELP ray_node_mem_used Memory usage on a ray node
# TYPE ray_node_mem_used gauge
ray_node_mem_used{{ip="10.0.0.{node}"}} 5.0
# HELP ray_loom_requests_total Answered requests
# TYPE ray_loom_requests_total counter
ray_loom_requests_total{{replica="gateway{node}",target="a"}} {count}
# HELP ray_vllm_time_to_first_token_seconds Time to the first token
# TYPE ray_vllm_time_to_first_token_seconds histogram
ray_vllm_time_to_first_token_seconds_bucket{{le="0.1",replica="engine{node}"}} {count}
ray_vllm_time_to_first_token_seconds_bucket{{le="+Inf",replica="engine{node}"}} {count}
ray_vllm_time_to_first_token_seconds_count{{replica="engine{node}"}} {count}
ray_vllm_time_to_first_token_seconds_sum{{replica="engine{node}"}} 1.0
# HELP ray_serve_num_http_requests_total Requests
# TYPE ray_serve_num_http_requests_total counter
ray_serve_num_http_requests_total{{route="/"}} 9.0
"""


def node(number: int, count: int) -> str:
    return NODE.format(node=number, count=float(count))


def test_each_family_stands_once_with_the_samples_of_every_node():
    text = merged([node(1, 3), "", node(2, 4)])
    assert text.count("# TYPE loom_requests_total counter") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {"loom_requests", "vllm:time_to_first_token_seconds"}
    counted = {sample.labels["replica"]: sample.value for sample in families["loom_requests"].samples}
    assert counted == {"gateway1": 3, "gateway2": 4}
    first = families["vllm:time_to_first_token_seconds"]
    assert first.type == "histogram" and len(first.samples) == 8
    assert first.documentation == "Time to the first token"


class _Node(ThreadingHTTPServer):
    asked = 0
    status = 200


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(node(self.server.server_address[1], 1).encode())

    def log_message(self, *_: object) -> None:
        """Quietly."""


@contextmanager
def nodes(count: int) -> Iterator[list[_Node]]:
    opened = [_Node(("127.0.0.1", 0), _Handler) for _ in range(count)]
    for server in opened:
        Thread(target=server.serve_forever, daemon=True).start()
    yield opened
    for server in opened:
        server.shutdown()
        server.server_close()


def addresses(servers: list[_Node]) -> list[str]:
    return [f"127.0.0.1:{server.server_address[1]}" for server in servers]


async def test_many_who_ask_at_once_are_two_questions_to_each_node():
    with nodes(2) as servers:
        metrics = ClusterMetrics(lambda: addresses(servers))
        await asyncio.gather(*(metrics.text() for _ in range(20)))
        assert all(server.asked <= 2 for server in servers)


async def test_what_was_read_before_somebody_asked_is_not_given_out():
    """With two gateways, an older text of one after a newer one of the other would have counts go back."""
    with nodes(1) as (server,):
        metrics = ClusterMetrics(lambda: addresses([server]))
        for number in range(1, 4):
            await metrics.text()
            assert server.asked == number


@pytest.mark.parametrize("trouble", ["gone", "broken"])
async def test_a_node_that_cannot_be_read_is_an_error_and_not_a_smaller_sum(trouble: str):
    with nodes(2) as servers:
        metrics = ClusterMetrics(lambda: addresses(servers))
        if trouble == "broken":
            servers[1].status = 500
        else:
            servers[1].shutdown()
            servers[1].server_close()
        with pytest.raises(MetricsUnavailable, match=addresses(servers)[1]):
            await metrics.text()
