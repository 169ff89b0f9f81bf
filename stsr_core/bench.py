"""Benchmarks on the user's own machine: the whole engine on the shipped forecast, and training steps."""

from __future__ import annotations

import copy
import cProfile
import io
import platform
import pstats
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from stsr_core.bench_regrid import peak_memory
from stsr_core.checkpoint import Checkpoint, Library, Served, Transform
from stsr_core.downscaler import Downscaler, build_networks, choose_device
from stsr_core.ensemble.cluster import AT_ONCE, Cluster
from stsr_core.ensemble.downscale import ARRAY, layout_of
from stsr_core.ensemble.generate import Target, generate
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.ensemble.shard import make_shard
from stsr_core.evaluation.baselines import rainfarm, without_rainfarm
from stsr_core.factors import recipe
from stsr_core.sources.cube import as_cube
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.harmonise import read_cube
from stsr_core.sources.open import open_dataset
from stsr_core.store.group import filesystem, finish, remove_store
from stsr_core.store.layout import create_ensemble
from stsr_core.training.distil import DISTILLED_EVALUATIONS, distillation_loss
from stsr_core.training.losses import denoiser_loss, mean_loss
from stsr_core.training.patches import region_of
from stsr_core.training.presets import PRESETS, PresetName
from stsr_core.training.run import Run
from stsr_core.training.score import score_loss
from stsr_core.training.stage import Stage
from stsr_core.training.training import Training

if TYPE_CHECKING:
    from distributed import Client
    from numpy.typing import NDArray

    from stsr_core.factors import Factor

SAMPLE = "package:samples/arpege_fc1h_20180501_SE.nc"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A coarse file; without more the shipped forecast."""

    url: str = SAMPLE
    variable: str = "precipitation"
    declared: Declared = NOTHING
    storage_options: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        factor: (s, t).
        cells: fine cells along the square.
        steps: fine steps.
        members: members.
        workers: numbers of local workers, one run each; where there are GPUs, no more than one for each is started.
        device: auto, cpu or cuda.
        precision: auto, float32 or bfloat16.
        output: folder or bucket prefix that the stores are written below; None is a temporary folder.
        storage_options: of the output's filesystem.
        source: coarse file whose cells are taken as they are, and how it is read.
    """

    factor: Factor
    cells: int = 200
    steps: int = 24
    members: int = 8
    workers: tuple[int, ...] = (1, 2)
    device: str = "auto"
    precision: str = "auto"
    output: str | None = None
    storage_options: Mapping[str, object] | None = None
    source: Source = Source()


def sample_rain(options: Options) -> NDArray[np.float32]:
    """Coarse amounts [mm per coarse step] of the size asked for: the source around its wettest place.

    Where the source ends it is repeated.
    """
    with open_dataset(options.source.url, storage_options=options.source.storage_options) as data:
        rain = np.nan_to_num(read_cube(data, options.source.variable, options.source.declared).amount)
    s, t = options.factor.space, options.factor.time
    shape = (max(1, options.steps // t), max(1, options.cells // s), max(1, options.cells // s))
    wettest = [int(rain.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]
    indices = [
        (np.arange(n) + centre - n // 2) % size for n, centre, size in zip(shape, wettest, rain.shape, strict=True)
    ]
    return np.ascontiguousarray(rain[np.ix_(*indices)]) * np.float32(t)


def bench_engine(options: Options, *, checkpoints: str | None = None, report: Report = print) -> dict[str, object]:
    """Run the whole engine, once for each number of workers, and say what it took.

    Returns:
        Figures ready for json.dump; seconds, bytes, and rates per second.
    """
    checkpoint = Library.open(checkpoints).serving(options.factor)
    served = checkpoint.card.serving(options.factor)
    started = time.perf_counter()
    plan = _plan(checkpoint, options, options.members)
    reading = time.perf_counter() - started
    device = choose_device(options.device)
    downscaler = Downscaler.load(checkpoint, options.factor, choose_device("cpu"))
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        root = options.output or folder
        for workers in options.workers:
            url = f"{root}/bench-{uuid.uuid4().hex[:8]}"
            try:
                runs.append(_run(plan, downscaler, workers, url, options, reading))
            finally:
                remove_store(url, options.storage_options)
            report(_line(runs[-1]))
    first, last = runs[0], runs[-1]
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        },
        "checkpoint": checkpoint.card.name,
        "factor": [options.factor.space, options.factor.time],
        "fine_shape": list(plan.fine_shape),
        "windows_skipped": plan.skipped,
        "reading_seconds": reading,
        "evaluations_per_member": served.evaluations,
        "runs": runs,
        "speedup": first["seconds"] / last["seconds"],
        "speedup_of_networks": _rate(last) / _rate(first),
        "rainfarm_seconds_per_member": _rainfarm_seconds(plan, options, report),
        **_flops(
            plan,
            downscaler,
            peak_flops(device, downscaler.on(device, precision=options.precision).precision),
            float(first["cell_evaluations_per_s_in_networks"]),
        ),
    }


def _rate(run: Mapping[str, float]) -> float:
    """What the networks of all workers do in a second of theirs: with more of them, all that the machine leaves."""
    return run["workers"] * run["cell_evaluations_per_s_in_networks"]


def _run(
    plan: Plan, downscaler: Downscaler, asked: int, url: str, options: Options, reading: float
) -> dict[str, float]:
    """Make one ensemble on a cluster of its own; the share outside the networks counts reading."""
    seconds_in_networks, evaluations = 0.0, 0

    def progress(done: int, seconds: float) -> None:
        nonlocal seconds_in_networks, evaluations
        seconds_in_networks += seconds
        evaluations += done

    store_options = options.storage_options or {}
    cluster = Cluster(device=options.device, workers=asked, precision=options.precision)  # type: ignore[arg-type]
    target = Target(url, ARRAY, store_options)
    with cluster.client() as client:
        workers = _started(client)
        create_ensemble(url, layout_of(plan), array=ARRAY, options=store_options)
        gpu, translating = choose_device(options.device).type == "cuda", 0.0
        if gpu:  # which a worker translates the networks for, once
            started = time.perf_counter()
            wettest = max(plan.shards, key=plan.evaluations)
            generate(plan, [wettest], downscaler, target, client, cluster, progress=lambda *_: None)
            translating = time.perf_counter() - started
        with _busy(gpu) as busy:
            started = time.perf_counter()
            generate(plan, plan.shards, downscaler, target, client, cluster, progress=progress)
            finish(url, {}, store_options)
            seconds = time.perf_counter() - started
        deadline = time.monotonic() + 5
        while evaluations < sum(plan.evaluations(s) for s in plan.shards) and time.monotonic() < deadline:
            time.sleep(0.05)  # the last progress events arrive after the futures
        memory = max(client.run(peak_memory).values())
    fs, path = filesystem(f"{url}/{ARRAY}/c", store_options)
    written = int(fs.du(path))
    if gpu:  # threads of one worker pass each other's time while they wait for it
        seconds_in_networks /= AT_ONCE
    cells = float(np.prod(plan.fine_shape))
    window_cells = float(sum(plan.cell_evaluations(shard) for shard in plan.shards))
    return {
        "workers": workers,
        "translating_seconds": translating,
        "seconds": seconds,
        **busy,
        "fine_cell_steps_per_s": cells / seconds,
        "network_evaluations": evaluations,
        "share_outside_networks": 1 - seconds_in_networks / ((reading + seconds) * workers),
        "cell_evaluations_per_s_in_networks": window_cells / max(seconds_in_networks, 1e-9),
        "peak_memory_per_worker": memory,
        "bytes_written": written,
        "compression": 2 * cells / max(1, written),
        "bytes_written_per_s": written / seconds,
    }


def _started(client: Client) -> int:
    """Number of workers of a local cluster, once all are there; there may be fewer than were asked for."""
    assert client.cluster is not None  # this process started it
    client.wait_for_workers(len(client.cluster.worker_spec))
    return len(client.scheduler_info(n_workers=-1)["workers"])


@contextmanager
def _busy(gpu: bool, every: float = 0.1) -> Iterator[dict[str, float]]:
    """Share of the time in which a GPU ran a kernel, as its driver counts it, put into a dict at the end."""
    found: dict[str, float] = {}
    if not gpu:
        yield found
        return
    samples: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            samples.append(torch.cuda.utilization())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
    if samples:
        found["device_busy"] = float(np.mean(samples)) / 100


def _plan(checkpoint: Checkpoint, options: Options, members: int) -> Plan:
    """Plan an ensemble of the sample; static fields, if the networks see any, are at their mean."""
    recipe = Recipe.of(checkpoint, checkpoint.card.serving(options.factor), seed=1, members=members, conserve=True)
    plan = Plan((as_cube(sample_rain(options), options.factor),), recipe)
    statics = checkpoint.card.statics
    return replace(plan, statics=np.zeros((len(statics), *plan.fine_shape[-2:]), np.float32)) if statics else plan


def _rainfarm_seconds(plan: Plan, options: Options, report: Report) -> float | None:
    if why := without_rainfarm(plan.cube.amount.shape):
        report(f"RainFARM is left out: {why}")
        return None
    started = time.perf_counter()
    rainfarm(plan.cube.amount, options.factor, members=1, seed=1)
    return time.perf_counter() - started


def _flops(plan: Plan, downscaler: Downscaler, peak: float, rate: float) -> dict[str, float]:
    """Floating-point operations of the denoiser per fine cell-step, how many a second the networks did, and the share
    of the peak of the device, see `peak_flops`.

    They are counted with networks on the CPU: torch does not see those of a GPU's own kernels.
    """
    coarse = torch.from_numpy(np.pad(plan.cube.amount[:3], 1, mode="edge"))
    statics = None if plan.statics is None else torch.from_numpy(plan.statics)[None]
    conditions = downscaler.condition(coarse[None], statics)
    frame = torch.zeros_like(conditions[:, :, :1])
    with FlopCounterMode(display=False) as counter:
        downscaler.expected_residual(frame, 0.5, frame, conditions)
    per_cell = counter.get_total_flops() / frame.numel()
    return {
        "flop_per_cell_evaluation": per_cell,
        "gflop_per_s_per_worker": per_cell * rate / 1e9,
        "peak_gflop_per_s": peak / 1e9,
        "share_of_peak": per_cell * rate / peak,
    }


def peak_flops(device: torch.device, precision: torch.dtype, tries: int = 5) -> float:
    """Floating-point operations per second of products of large matrices, on one thread where there are threads."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=precision)
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(tries):
        started = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return 2 * size**3 / min(seconds)


def _line(run: Mapping[str, float]) -> str:
    return (
        f"{run['workers']} workers: {run['seconds']:.1f} s, {run['fine_cell_steps_per_s']:.3g} fine cell-steps/s, "
        + (f"GPU busy {run['device_busy']:.0%}, " if "device_busy" in run else "")
        + f"{run['share_outside_networks']:.1%} outside the networks, "
        f"{run['peak_memory_per_worker'] / 1e9:.2f} GB at most per worker, "
        f"{run['bytes_written'] / 1e6:.1f} MB written (compression {run['compression']:.1f})"
    )


def profile_shard(options: Options, *, checkpoints: str | None = None, lines: int = 25) -> str:
    """Where the time of the wettest shard goes, as text; one member, in this process."""
    checkpoint = Library.open(checkpoints).serving(options.factor)
    plan = _plan(checkpoint, options, members=1)
    torch.set_num_threads(1)  # as on a worker
    downscaler = Downscaler.load(checkpoint, options.factor, choose_device(options.device), precision=options.precision)
    profile = cProfile.Profile()
    profile.runcall(make_shard, plan.task(max(plan.shards, key=plan.evaluations)), downscaler)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def bench_training(factor: Factor, *, preset: PresetName, device: str, steps: int | None = None) -> dict[str, float]:
    """Patches per second that networks learn from in each stage, on synthetic rain.

    Without more of 3 steps, 300 on a GPU, after one that warms up; validation and saving are not among it.
    """
    rain = np.random.default_rng(0).gamma(0.3, 2.0, (72, 400, 400)).astype(np.float32)
    region, chosen, run = region_of("synthetic", rain), PRESETS[preset], Run.join(choose_device(device))
    mean, denoiser = (network.to(run.device) for network in build_networks(chosen.architecture))
    steps = steps or (3 if run.device.type == "cpu" else 300)
    scales = {factor: 1.0}
    served = {factor: Served(configuration=recipe(factor), residual_scale=1.0, evaluations=DISTILLED_EVALUATIONS)}
    losses = {
        "mean": (mean, mean_loss),
        "denoiser": (denoiser, denoiser_loss(mean, scales)),
        "student": (copy.deepcopy(denoiser), distillation_loss(mean, denoiser, scales)),
        "scored": (copy.deepcopy(denoiser), score_loss(mean, served, Transform().scale_mm)),
    }
    found = {}
    training = Training([region], [region], [recipe(factor)], chosen, Path(), run)
    for number, (name, (network, loss)) in enumerate(losses.items()):
        stage, patches, started = Stage(name, number, network, steps + 1, chosen.learning_rate), 0, 0.0
        for step, drawn in enumerate(training.draws(number, 0, steps + 1)):
            training.learn(stage, loss, drawn)
            if step in (0, steps) and run.device.type == "cuda":
                torch.cuda.synchronize()
            if step == 0:
                started = time.perf_counter()
            else:
                patches += len(drawn.fine)
        found[f"{name}_patches_per_s"] = patches / (time.perf_counter() - started)
    return found
