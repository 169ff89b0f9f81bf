"""Stands in for a Docker worker: runs an image as a process, with the code of a folder that is named like its tag.

python -m tests.real.image_worker FOLDER_OF_IMAGES
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from prefect.workers.process import ProcessJobConfiguration, ProcessWorker


class ImageConfiguration(ProcessJobConfiguration):
    image: str


class ImageWorker(ProcessWorker):
    type = "docker"
    job_configuration = ImageConfiguration
    images: Path

    async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> Any:
        code = self.images / configuration.image.rpartition(":")[2]
        if not code.is_dir():
            raise RuntimeError(f"No such image: {configuration.image}")
        configuration.working_dir = self.images
        configuration.env |= {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
        return await super().run(flow_run, configuration, task_status)


if __name__ == "__main__":
    ImageWorker.images = Path(sys.argv[1])
    asyncio.run(ImageWorker(work_pool_name="stsr-docker", name="images").start())
