"""What `KLEIN_MODEL`, `KLEIN_DEVICE` and the settings of adapters mean on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from app.domain import NO_CARD, Device, Lora
from app.engine.adapters.directory import FOLDER, SETTLE_S, Directory
from app.engine.adapters.shapes import linear_shapes
from app.engine.hub.hf_cache import find_snapshot
from app.engine.models.registry import MODELS, find_model, find_spec
from app.engine.quantization.formats import check_choice
from app.errors import StartupError
from app.settings import ALL, CPU, PER_CARD, Settings, complete_path
from app.telemetry.cards import Cards
from app.telemetry.preflight import check_driver, check_gpu, torch_cuda

_log = logging.getLogger(__name__)

KLEIN = "flux.2-klein-4b"
DEMO = "shapes"
SMALLEST_GPU_BYTES = 5_500_000_000
"""Total memory of a GPU sold with 6 GB; the smallest plan needs about 5 GB."""
LORA_RECORD = "loras.json"
"""Holds the hashes of adapters, in the cache."""
_LOOK_S = 2.0
"""To look for an adapter at the start."""


def read_settings(environ: Mapping[str, str], **overrides: object) -> Settings:
    """Read the settings, and check what the registries of the engine alone know.

    Raises:
        StartupError: as `Settings.read`, and for a precision that is none.
    """
    settings = Settings.read(environ, **overrides)
    check_choice(settings.precision, PER_CARD)
    return settings


@dataclass(frozen=True, slots=True)
class Choice:
    """Which model is served, from which path (None: the cache or the package), and why."""

    key: str
    path: str | None
    reason: str

    @property
    def is_demo(self) -> bool:
        """Whether it is the embedded demo."""
        return self.key == DEMO and self.path is None


def choose_model(settings: Settings, card: Device | None) -> Choice:
    """Choose the model that `KLEIN_MODEL` means on this machine, whose largest card is *card*.

    Raises:
        StartupError: it is neither a catalogue key nor a path that exists.
    """
    name = settings.model
    if name == "auto":
        if settings.is_cpu:
            return Choice(DEMO, None, "KLEIN_DEVICE is cpu")
        if card is None or card.total_bytes is None:
            return Choice(DEMO, None, "no CUDA card was found")
        if card.total_bytes < SMALLEST_GPU_BYTES:
            return Choice(DEMO, None, f"{card.name} has less than 6 GB")
        return Choice(KLEIN, None, f"{card.name} can hold it")
    looks_like_path = "/" in name or name.startswith(".") or os.path.lexists(name)
    if looks_like_path and name not in MODELS:
        try:
            path = complete_path(Path(name))
        except ValueError as error:
            raise StartupError(f"KLEIN_MODEL is a path that cannot be used: {error}.") from None
        if not os.access(path, os.F_OK):
            raise StartupError(
                "KLEIN_MODEL is a path at which there is nothing; correct it and start again."
            )
        # A file keeps its name: in Hugging Face's cache it is a link to one named by a hash.
        path = path.parent.resolve() / path.name if path.is_file() else path.resolve()
        found = find_snapshot(path)
        reason = "KLEIN_MODEL is a path" + ("" if found == path else " in Hugging Face's cache")
        return Choice(find_spec(settings.variant).id, str(found), reason)
    return Choice(find_spec(name).id, None, "KLEIN_MODEL names it")


def choose_devices(settings: Settings, choice: Choice, cards: Cards) -> tuple[Device, ...]:
    """Choose what computes: cards in the order of KLEIN_DEVICE, or processes without a card.

    The demo model falls back to the CPU, unless KLEIN_DEVICE names a card. Of `all`, cards that
    cannot serve klein are left out.

    Raises:
        StartupError: a card that is named cannot be used, or none can.
    """
    if settings.is_cpu:
        return _processors(len(settings.device))
    if choice.is_demo:
        return _demo_devices(settings, cards)
    cuda = check_driver(cards, torch_cuda())
    devices = _find(settings, cards)
    faults = {
        each: f"Card {each.index}: {fault}"
        for each in devices
        if (fault := check_gpu(cards.open(each), cuda))
    }
    able = tuple(each for each in devices if each not in faults)
    if faults and (settings.device != ALL or not able):
        raise StartupError(" ".join(faults.values()))
    for fault in faults.values():
        _log.warning("A card is left out. %s", fault)
    return able


def named_cards(settings: Settings, cards: Cards) -> tuple[Device, ...]:
    """Return those cards that KLEIN_DEVICE names and that are there."""
    if settings.is_cpu:
        return ()
    if settings.device == ALL:
        return cards.visible()
    found = map(cards.find, settings.device)
    return tuple(each for each in found if isinstance(each, Device))


def largest_card(settings: Settings, cards: Cards) -> Device | None:
    """Return the card with the most memory of those that KLEIN_DEVICE names, if any."""
    named = named_cards(settings, cards)
    return max(named, key=lambda each: each.total_bytes or 0, default=None)


def _demo_devices(settings: Settings, cards: Cards) -> tuple[Device, ...]:
    if cards.visible():
        return _find(settings, cards)
    if "device" not in settings.model_fields_set:
        return _processors(1)
    if not all(name.isdigit() for name in settings.device):
        check_driver(cards, torch_cuda())
    # torch may see a card where NVML does not answer; the engine will find out.
    return tuple(Device(int(name), f"card {name}", f"card {name}") for name in settings.device)


def _find(settings: Settings, cards: Cards) -> tuple[Device, ...]:
    """Find the cards that KLEIN_DEVICE names."""
    if settings.device == ALL:
        return cards.visible()
    devices = []
    for name in settings.device:
        found = cards.find(name)
        if isinstance(found, str):
            raise StartupError(
                f"KLEIN_DEVICE cannot be followed: {found}. `nvidia-smi -L` lists the cards; "
                "set KLEIN_DEVICE to some of them."
            )
        if found in devices:
            raise StartupError(f"KLEIN_DEVICE names card {found.index} twice; leave one name out.")
        devices.append(found)
    return tuple(devices)


def _processors(count: int) -> tuple[Device, ...]:
    """Return *count* processes without a card, each with its share of the cores."""
    if count == 1:
        return (NO_CARD,)
    share = max(1, len(os.sched_getaffinity(0)) // count)
    return tuple(Device(None, CPU, f"{CPU}:{each}", threads=share) for each in range(count))


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """Where adapters lie, which are fused, and the rank that GPU memory is planned for."""

    directory: Directory
    fused: tuple[Lora, ...]
    planned_rank: int


def lora_directory(settings: Settings, choice: Choice, *, settle_s: float = SETTLE_S) -> Directory:
    """Return the directory of adapters, to which a model in the package adds its own."""
    folders = [settings.lora_dir or settings.cache_dir / FOLDER]
    package = find_model(choice.key).folder
    if choice.path is None and package is not None:
        folders.append(package / FOLDER)
    return Directory(folders, record=settings.cache_dir / LORA_RECORD, settle_s=settle_s)


def choose_loras(settings: Settings, choice: Choice) -> LoraChoice:
    """Choose what is fused, and whether memory for adapters is planned.

    It is where somebody is known to use them: KLEIN_LORA_RANK or KLEIN_LORAS is set, or the folder
    holds an adapter of the model. Else the plan is what it is without adapters, and one that is
    added later takes what the plan has left.

    Raises:
        StartupError: an adapter of KLEIN_LORA_FUSE is not there.
    """
    if settings.lora_dir is not None and not settings.lora_dir.is_dir():
        _log.warning("KLEIN_LORA_DIR names no folder; until there is one no adapter is listed.")
    directory = lora_directory(settings, choice)
    fused = tuple(_find_fused(directory, *each) for each in settings.lora_fuse)
    return LoraChoice(directory, fused, planned_rank(settings, choice, directory))


def asked_rank(settings: Settings) -> int:
    """Return the rank that the settings ask memory for; 0 where they say nothing of adapters."""
    is_asked_for = bool(settings.loras) or "lora_rank" in settings.model_fields_set
    return settings.lora_rank if is_asked_for else 0


def planned_rank(settings: Settings, choice: Choice, directory: Directory) -> int:
    """Return the rank that memory is planned for: that of the settings, or of what lies there."""
    if rank := asked_rank(settings):
        return rank
    shapes = linear_shapes(find_model(choice.key).architecture)
    return settings.lora_rank if directory.holds_any(shapes, _LOOK_S) else 0


def _find_fused(directory: Directory, name: str, scale: float) -> Lora:
    """Find an adapter of KLEIN_LORA_FUSE; whether it fits, the engine says."""
    files = {file.name: file for file in directory.walk()[0]}
    if name not in files:
        near = ", ".join(get_close_matches(name, files, n=3))
        like = f"; names like it are {near}" if near else ""
        raise StartupError(
            f"KLEIN_LORA_FUSE names {name}, but there is no such adapter{like}. `klein lora list` "
            "shows those there are."
        )
    try:
        return Lora(name, scale, directory.hash(files[name]), str(files[name].path))
    except OSError as error:
        raise StartupError(
            f"The file of {name}, which KLEIN_LORA_FUSE names, cannot be read ({error.strerror})."
        ) from None
