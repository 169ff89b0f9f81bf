"""What the Prefect UI does, by the same requests: find a deployment, fill its form, watch the run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx

RUN_SECONDS = 420.0
BUSY_SECONDS = 60.0
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Api:
    """A Prefect server."""

    url: str

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request and return the answer's JSON."""
        answer = self.request(path, body)
        answer.raise_for_status()
        return answer.json()

    def request(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> httpx.Response:
        """Send a request, again while the server is busy."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            answer = httpx.request(method, f"{self.url}{path}", json=body or {}, timeout=60)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > until:
                return answer
            time.sleep(1)

    def get(self, path: str) -> Any:
        answer = httpx.get(f"{self.url}{path}", timeout=60)
        answer.raise_for_status()
        return answer.json()

    def submit(self, deployment: str, **parameters: Any) -> httpx.Response:
        """Send a filled form; returns the answer, which may be a refusal."""
        found = self.get(f"/deployments/name/{deployment}")
        return self.request(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})

    def start(self, deployment: str, **parameters: Any) -> str:
        """Send a filled form; returns the id of the run."""
        answer = self.submit(deployment, **parameters)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def switch(self, deployment: str, *, active: bool) -> None:
        """Switch the schedules of a deployment on or off."""
        found = self.get(f"/deployments/name/{deployment}")
        for schedule in found["schedules"]:
            path = f"/deployments/{found['id']}/schedules/{schedule['id']}"
            self.request(path, {"active": active}, method="PATCH").raise_for_status()

    def finished(self, run: str) -> dict[str, Any]:
        """Wait for the end of a run and return it."""
        until = time.monotonic() + RUN_SECONDS
        while time.monotonic() < until:
            found: dict[str, Any] = self.get(f"/flow_runs/{run}")
            if found["state_type"] in FINAL:
                return found
            time.sleep(0.5)
        raise AssertionError(f"run {run} is still {found['state_name']} after {RUN_SECONDS:.0f} s")

    def retried(self, run: str) -> dict[str, Any]:
        """Retry a run that has ended; returns it at its next end."""
        retry = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the Prefect UI"}
        self.post(f"/flow_runs/{run}/set_state", {"state": retry, "force": True})
        return self.finished(run)

    def artifacts(self, run: str) -> dict[str, Any]:
        """Newest artifacts of a run, by key."""
        found = self.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}, "sort": "CREATED_DESC"})
        return {a["key"]: a for a in reversed(found) if a["key"]}

    def events(self, name: str, resource: str) -> int:
        """How many events of a name a resource has had."""
        found = self.post("/events/filter", {"filter": {"event": {"name": [name]}, "resource": {"id": [resource]}}})
        return int(found["total"])

    def task_names(self, run: str) -> list[str]:
        """Names of a run's task runs, sorted."""
        found = self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return sorted(t["name"] for t in found)
