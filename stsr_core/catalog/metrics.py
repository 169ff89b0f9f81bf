"""Prometheus metrics of a served catalogue: how fresh each product is, and how requests are answered."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import pyarrow.compute as pc
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from stsr_core.errors import StoreError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from stsr_core.catalog.snapshot import Loaded

PATH = "/metrics"


class Catalogue(Collector):
    """What the catalogue holds at the time of asking."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges; of a catalogue that was never read only that it is not."""
        up = GaugeMetricFamily("stsr_catalogue_up", "1 while the catalogue is read as it is, 0 while that fails")
        versions = GaugeMetricFamily("stsr_versions", "Published versions", labels=["product"])
        withdrawn = GaugeMetricFamily("stsr_versions_withdrawn", "Withdrawn versions", labels=["product"])
        newest = GaugeMetricFamily(
            "stsr_newest_version_timestamp_seconds", "When the newest version was published", labels=["product"]
        )
        try:
            products = self.loaded.current().products
        except StoreError:
            products = {}
        up.add_metric([], float(bool(products) and self.loaded.failure is None))
        for name, product in products.items():
            if product.rows is None:
                continue
            versions.add_metric([name], product.rows.num_rows)
            withdrawn.add_metric([name], len(product.withdrawn))
            newest.add_metric([name], pc.max(product.rows["created"]).as_py().timestamp())
        return [up, versions, withdrawn, newest]


def add_metrics(app: FastAPI, loaded: Loaded) -> None:
    """Count the requests of an application, and answer /metrics."""
    registry = CollectorRegistry()
    registry.register(Catalogue(loaded))
    answered = Counter("stsr_http_requests", "Requests answered", ["method", "route", "status"], registry=registry)
    seconds = Histogram("stsr_http_request_seconds", "Time to answer", ["route"], registry=registry)

    async def counted(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        response = await call_next(request)
        # the route, not the path: what people ask for must not grow the number of series
        route = getattr(request.scope.get("route"), "path", "none")
        answered.labels(request.method, route, str(response.status_code)).inc()
        seconds.labels(route).observe(time.perf_counter() - started)
        return response

    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.middleware("http")(counted)
    app.add_api_route(PATH, metrics, include_in_schema=False)
