"""From the arguments of `stsr train` to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist

from stsr_core.checkpoint import Checkpoint, StaticField
from stsr_core.configuration import Configuration
from stsr_core.downscaler import choose_device
from stsr_core.errors import ConfigurationError, SourceError
from stsr_core.factors import Factor, authors_recipe, recipe
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.fine import places_of
from stsr_core.sources.location import OptionsOf, no_options
from stsr_core.statics import StaticSource, named_sources
from stsr_core.training.fit import fit
from stsr_core.training.patches import Region, load_archive
from stsr_core.training.presets import PRESETS
from stsr_core.training.run import Run
from stsr_core.training.training import Training

RecipeName = Literal["stsr", "authors"]


@dataclass(frozen=True)
class Data:
    """Fine data to train on.

    Attributes:
        train: files, folders, globs or URLs to fit on.
        validation: likewise, to choose the weights on: those of the least loss are kept.
        variable: name of the amounts.
        declared: what the files do not say themselves.
        base: folder that relative paths start from.
        name: of the archive, for the card.
        statics: where static fields are that the networks are to see, by name.
        options_of: gives the options of the filesystem of a URL.
    """

    train: Sequence[str]
    validation: Sequence[str]
    variable: str = "precipitation"
    declared: Declared = NOTHING
    base: Path | None = None
    name: str = ""
    statics: Mapping[str, StaticSource] = field(default_factory=dict)
    options_of: OptionsOf = no_options

    @classmethod
    def of(
        cls,
        archive: str | None,
        train: Sequence[str],
        validation: Sequence[str],
        catalog_file: Path,
        statics: Sequence[str] = (),
        options_of: OptionsOf = no_options,
    ) -> Data:
        """Data of an archive of catalog.yaml, or of files that are named, with static fields as NAME or NAME=FILE.

        Raises:
            ConfigurationError: neither or both are given, or no archive or static field of that name.
        """
        if (archive is None) == (not train and not validation):
            raise ConfigurationError("Name --archive, or --train and --validation; one of the two.")
        fields = named_sources(statics, catalog_file, options_of)
        if archive is None:
            return cls(train, validation, statics=fields, options_of=options_of)
        found, base = Configuration.load(catalog_file).archive(archive), catalog_file.resolve().parent
        return cls(found.train, found.validation, found.variable, found.declared, base, archive, fields, options_of)

    def regions(self, urls: Sequence[str], cache: Path) -> list[Region]:
        """Read the regions of `train` or `validation`."""
        fields = tuple(self.statics.values())
        return load_archive(
            urls, self.variable, self.declared, base=self.base, cache=cache, statics=fields,
            options_of=self.options_of,
        )  # fmt: skip

    def require_apart(self) -> None:
        """Refuse files that are in `train` and in `validation`; raises ConfigurationError."""
        fitted, watched = (set(places_of(urls, self.base, self.options_of)) for urls in (self.train, self.validation))
        both = sorted(fitted & watched)
        if both:
            raise ConfigurationError(
                f"{both[0]} is in the data to fit on and in those to validate on, whose loss then says nothing of "
                "other weather. Keep them apart."
            )


def train_checkpoint(
    data: Data,
    factors: Sequence[tuple[int, int]],
    *,
    folder: Path,
    name: str,
    preset: str,
    recipe_name: RecipeName = "stsr",
    mean_steps: int | None,
    denoiser_steps: int | None,
    distil_steps: int | None,
    score_steps: int | None,
    learning_rate: float | None = None,
    cells_per_step: int | None = None,
    calibration_patches: int | None = None,
    start: Path | None = None,
    start_share: float = 0.0,
    only_spacing: bool = False,
    device: str,
    seed: int,
    report: Callable[[str], None],
) -> Checkpoint:
    """Train, or go on training, one checkpoint for all `factors`.

    Raises:
        ConfigurationError: a name that no file can have; a share of weights to start from without any, or none of 0..1;
            a file to fit on that is also one to validate on; a factor that is named twice.
        FactorError: a factor that cannot be trained.
        SourceError: archives that cannot be read, or whose steps differ.
    """
    if name in {"", ".."} or name != Path(name).name:
        raise ConfigurationError(f"{name!r} cannot be the name of a file. Name the checkpoint by letters and digits.")
    if not 0 <= start_share <= 1 or (start_share and start is None):
        raise ConfigurationError(
            f"A share of {start_share:g} of the weights of {start or 'nothing'} is asked for. Give one from 0 to 1 "
            "together with --start."
        )
    data.require_apart()
    if twice := [f for i, f in enumerate(factors) if f in factors[:i]]:
        raise ConfigurationError(f"Factor {'x'.join(map(str, twice[0]))} is named twice. Name each once.")
    wanted = [Factor.of(space, time) for space, time in factors]
    joined = Run.join(choose_device(device))
    cache = folder / "archive"
    if joined.rank > 0:  # rank 0 reads the archive; the others map what it has kept
        dist.barrier()
    fitted, watched = data.regions(data.train, cache), data.regions(data.validation, cache)
    if joined.world > 1 and joined.rank == 0:
        dist.barrier()
    step_h = _step_of([*fitted, *watched])
    configurations = [recipe(f, fine_step_h=step_h) if recipe_name == "stsr" else authors_recipe(f) for f in wanted]
    chosen, begun = PRESETS[preset], None if start is None else Checkpoint.read(start)
    if score_steps is None and distil_steps == 0 and not (begun and begun.card.distilled):
        score_steps = 0  # by default, for there is no distilled denoiser then
    chosen = replace(
        chosen,
        mean_steps=chosen.mean_steps if mean_steps is None else mean_steps,
        denoiser_steps=chosen.denoiser_steps if denoiser_steps is None else denoiser_steps,
        distil_steps=chosen.distil_steps if distil_steps is None else distil_steps,
        score_steps=chosen.score_steps if score_steps is None else score_steps,
        learning_rate=chosen.learning_rate if learning_rate is None else learning_rate,
        cells_per_step=cells_per_step or chosen.cells_per_step,
        calibration_patches=calibration_patches or chosen.calibration_patches,
    )
    training = Training(
        train=fitted,
        validation=watched,
        configurations=configurations,
        preset=chosen,
        folder=folder,
        run=joined,
        seed=seed,
        start=begun,
        start_share=start_share,
        only_spacing=only_spacing,
        statics=_fields_over(data.statics, fitted) if begun is None else _those_of(begun, data.statics),
        report=report,
    )
    provenance = {
        "archive": data.name,
        "train": [r.name for r in fitted],
        "validation": [r.name for r in watched],
        "preset": preset,
        "recipe": recipe_name,
    }
    checkpoint = fit(training, name, provenance)
    if joined.rank == 0:
        report(f"Checkpoint {checkpoint.weights_path.with_suffix('.json')}, digest {checkpoint.digest[:12]}.")
    return checkpoint


def _step_of(regions: Sequence[Region]) -> float:
    """Length of the steps of all regions [h]; raises SourceError where they differ."""
    of_step = {region.step_h: region.name for region in regions}
    if len(of_step) > 1:
        found = ", ".join(f"{step:g} h in {name}" for step, name in of_step.items())
        raise SourceError(f"The steps of an archive differ: {found}. Networks learn one; name files of one step.")
    return next(iter(of_step))


def _those_of(start: Checkpoint, sources: Mapping[str, StaticSource]) -> tuple[StaticField, ...]:
    """Static fields of the checkpoint that a training starts from.

    Raises:
        ConfigurationError: others are named.
    """
    needed = [s.name for s in start.card.statics]
    if needed != list(sources):
        raise ConfigurationError(
            f"Checkpoint {start.card.name} was trained with the static fields {needed}; {list(sources)} are named. "
            "Name the same, in this order, with --static."
        )
    return start.card.statics


def _fields_over(sources: Mapping[str, StaticSource], regions: Sequence[Region]) -> tuple[StaticField, ...]:
    """Static fields scaled to zero mean and unit variance over the regions, to three digits."""
    fields = []
    for number, (name, source) in enumerate(sources.items()):
        values = np.concatenate([region.statics[number].ravel() for region in regions])
        offset, scale = (float(f"{v:.3g}") for v in (values.mean(), values.std()))
        fields.append(StaticField(name=name, units=source.units, offset=offset, scale=scale or 1.0))
    return tuple(fields)
