"""The checkpoint that made a version, published beside the products as an item of the machine-learning-model kind."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.addresses import checksum
from stsr_core.catalog.documents import ConflictError, Documents
from stsr_core.catalog.items import FILE, MLM, stamp
from stsr_core.catalog.publish import add_to_root

if TYPE_CHECKING:
    from stsr_core.checkpoint import Checkpoint, Served

TASKS = ["downscaling", "super-resolution", "generative"]


def publish_checkpoint(documents: Documents, checkpoint: Checkpoint) -> str:
    """Publish card, weights and item of a checkpoint unless they are there.

    The root links it as related, so that whoever walks the catalogue for items meets versions only.

    Returns:
        Path of the item below the destination.

    Raises:
        PublicationError: the destination cannot be written.
    """
    folder = f"checkpoints/{checkpoint.digest[:16]}"
    path = f"{folder}/checkpoint.json"
    if documents.read(path) is None:
        weights = checkpoint.weights_path.read_bytes()
        card = checkpoint.weights_path.with_suffix(".json").read_bytes()
        documents.write(f"{folder}/{checkpoint.weights_path.name}", weights)
        documents.write(f"{folder}/{checkpoint.card.name}.json", card)
        with suppress(ConflictError):  # another publisher wrote the same
            documents.create(path, checkpoint_item(checkpoint, card, weights))
    title = f"Checkpoint {checkpoint.card.name}"
    add_to_root(documents, {"rel": "related", "href": f"./{path}", "type": "application/geo+json", "title": title})
    return path


def checkpoint_item(checkpoint: Checkpoint, card: bytes, weights: bytes) -> dict[str, Any]:
    """Make the STAC item of a checkpoint; it holds everywhere, so its footprint is the world."""
    name = checkpoint.card.name
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [MLM, FILE],
        "id": f"checkpoint-{name}-{checkpoint.digest[:16]}",
        "bbox": [-180.0, -90.0, 180.0, 90.0],
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[-180.0, -90.0], [180.0, -90.0], [180.0, 90.0], [-180.0, 90.0], [-180.0, -90.0]]],
        },
        "properties": {
            "title": f"Checkpoint {name}",
            "datetime": stamp(datetime.now(UTC)),
            **_model(checkpoint),
            "stsr:digest": checkpoint.digest,
            "stsr:served": [_scores(s) for s in checkpoint.card.served],
        },
        "links": [
            {"rel": "root", "href": "../../catalog.json", "type": "application/json"},
            {"rel": "parent", "href": "../../catalog.json", "type": "application/json"},
        ],
        "assets": {
            "weights": {
                **_file(f"./{checkpoint.weights_path.name}", weights, "application/octet-stream"),
                "title": "Weights", "roles": ["mlm:model", "mlm:weights"],
                "mlm:artifact_type": "safetensors.torch.save_file",
            },
            "card": {
                **_file(f"./{name}.json", card, "application/json"), "title": "Card", "roles": ["metadata"],
            },
        },
    }  # fmt: skip


def _file(href: str, data: bytes, media_type: str) -> dict[str, Any]:
    return {"href": href, "type": media_type, "file:checksum": checksum(data), "file:size": len(data)}


def _scores(served: Served) -> dict[str, Any]:
    factor = served.configuration.factor
    return {
        "factor": [factor.space, factor.time],
        "scores": {str(km): found.scores for km, found in served.measured.items()},
    }


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    def tensor(*dims: str) -> dict[str, Any]:
        return {"shape": [-1] * len(dims), "dim_order": list(dims), "data_type": "float32"}

    return {
        "mlm:name": f"stsr {checkpoint.card.name}",
        "mlm:architecture": "Video U-Net: conditional mean and residual diffusion",
        "mlm:framework": "PyTorch",
        "mlm:tasks": TASKS,
        "mlm:input": [{"name": "coarse precipitation amount [mm per step]", "input": tensor("time", "y", "x")}],
        "mlm:output": [
            {
                "name": "fine precipitation amount [mm per step]",
                "tasks": TASKS,
                "result": tensor("member", "time", "y", "x"),
            }
        ],
    }
