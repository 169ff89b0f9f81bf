"""From the arguments of `stsr train` to a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
from stsr_core.training.presets import PRESETS, Preset, PresetName, RecipeName
from stsr_core.training.run import Run
from stsr_core.training.training import Progress, Training

NOTHING_GIVEN: Mapping[str, float | None] = {}
NOT_APART = (
    "is in the data to fit on and in those to validate on, whose loss then says nothing of other weather. Keep them "
    "apart."
)


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
        both = sorted(self._files(self.train) & self._files(self.validation))
        if both:
            raise ConfigurationError(f"{both[0]} {NOT_APART}")

    def _files(self, urls: Sequence[str]) -> set[str]:
        places = places_of(urls, self.base, self.options_of)
        return {place if "://" in place else str(Path(place).resolve()) for place in places}


def _require_other_weather(fitted: Sequence[Region], watched: Sequence[Region]) -> None:
    """Refuse regions to validate on of the same content, or hours and place, as one to fit on, whatever its name."""
    for one, other in itertools.product(fitted, watched):
        if one.fingerprint == other.fingerprint:
            raise ConfigurationError(f"What {one.name} and {other.name} hold {NOT_APART}")
        if one.extent and other.extent and one.extent.meets(other.extent):
            raise ConfigurationError(f"What {one.name} and {other.name} share, hours of one place, {NOT_APART}")


def train_checkpoint(
    data: Data,
    factors: Sequence[Factor],
    *,
    folder: Path,
    name: str,
    preset: PresetName = PresetName.small,
    recipe_name: RecipeName = RecipeName.stsr,
    sizes: Mapping[str, float | None] = NOTHING_GIVEN,
    start: Path | None = None,
    start_share: float = 0.0,
    only_spacing: bool = False,
    device: str,
    seed: int,
    report: Callable[[str], None],
    watch: Callable[[Progress], None] = lambda _: None,
) -> Checkpoint:
    """Train, or go on training, one checkpoint for all `factors`; `sizes` are what is given of the preset's fields.

    Raises:
        ConfigurationError: a name that no file can have; a share of weights to start from without any, or none of 0..1;
            data to fit on that are also to validate on; a factor that is named twice.
        FactorError: a factor that cannot be trained.
        SourceError: archives that cannot be read, or whose steps differ.
    """
    _require_sensible(factors, name, start, start_share)
    data.require_apart()
    joined = Run.join(choose_device(device))
    cache = folder / "archive"
    if joined.rank > 0:  # rank 0 reads the archive; the others map what it has kept
        dist.barrier()
    fitted, watched = data.regions(data.train, cache), data.regions(data.validation, cache)
    if joined.world > 1 and joined.rank == 0:
        dist.barrier()
    step_h, begun = _step_of([*fitted, *watched]), None if start is None else Checkpoint.read(start)
    _require_other_weather(fitted, watched)
    training = Training(
        train=fitted,
        validation=watched,
        configurations=[
            recipe(f, fine_step_h=step_h) if recipe_name == RecipeName.stsr else authors_recipe(f) for f in factors
        ],
        preset=_sized(preset, sizes, begun),
        folder=folder,
        run=joined,
        seed=seed,
        start=begun,
        start_share=start_share,
        only_spacing=only_spacing,
        statics=_fields_over(data.statics, fitted) if begun is None else _those_of(begun, data.statics),
        report=report,
        watch=watch,
    )
    provenance = {
        "archive": data.name,
        "train": [r.name for r in fitted],
        "train_digests": [r.fingerprint for r in fitted],
        "validation": [r.name for r in watched],
        "validation_digests": [r.fingerprint for r in watched],
        "preset": preset.value,
        "recipe": recipe_name.value,
    }
    checkpoint = fit(training, name, provenance)
    if joined.rank == 0:
        report(f"Checkpoint {checkpoint.weights_path.with_suffix('.json')}, digest {checkpoint.digest[:12]}.")
    return checkpoint


def _require_sensible(factors: Sequence[Factor], name: str, start: Path | None, start_share: float) -> None:
    """Refuse what needs no data to be known as wrong; raises ConfigurationError."""
    if name in {"", ".."} or name != Path(name).name:
        raise ConfigurationError(f"{name!r} cannot be the name of a file. Name the checkpoint by letters and digits.")
    if not 0 <= start_share <= 1 or (start_share and start is None):
        raise ConfigurationError(
            f"A share of {start_share:g} of the weights of {start or 'nothing'} is asked for. Give one from 0 to 1 "
            "together with --start."
        )
    if twice := [f for i, f in enumerate(factors) if f in factors[:i]]:
        raise ConfigurationError(f"Factor {twice[0]} is named twice. Name each once.")


def _sized(preset: PresetName, sizes: Mapping[str, float | None], start: Checkpoint | None) -> Preset:
    """A preset with the sizes that are given."""
    given = {name: size for name, size in sizes.items() if size is not None}
    if given.get("distil_steps") == 0 and not (start and start.card.distilled):
        given.setdefault("score_steps", 0)  # there is no distilled denoiser then
    return replace(PRESETS[preset], **given)  # type: ignore[arg-type]  # by the names of its fields


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
