"""The settings: the only code that reads the environment.

Every setting is read from `KLEIN_<NAME>` and validated before anything heavy is imported. The
docstring under a field is its text in docs/settings.md. Only the composition root, the app factory
and the command line import this module.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from app.errors import StartupError
from app.limits import MAX_LORA_SCALE, MAX_LORAS

PREFIX = "KLEIN_"
_LISTS = frozenset(
    {"api_keys", "allowed_hosts", "allowed_origins", "trusted_proxies", "loras", "lora_fuse"}
)
_HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
_DEFAULT_PORTS = re.compile(r"http://.*:80|https://.*:443")

PER_CARD = "per-card"
CPU = "cpu"
ALL = ("all",)
MAX_WORKERS = 16
_PROCESSORS = re.compile(r"cpu(?::([0-9]{1,9}))?")
_LONGEST_NUMBER = 5
_UUID = re.compile(r"(gpu|mig)(-[0-9a-f]+)+")
_PCI_ID = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")

MIN_KEY_LENGTH = 8
LORA_RANKS = (32, 64, 128, 256)

Seconds = Annotated[float, Field(gt=0, le=86_400)]


def complete_path(path: Path) -> Path:
    """Expand `~` and make *path* absolute.

    Raises:
        ValueError: the home or the current folder is unknown; the message says what to do.
    """
    try:
        path = path.expanduser()
    except RuntimeError:
        raise ValueError(
            f"the home folder that {path.parts[0]} stands for is not known; set HOME, or give a "
            "path that begins with /"
        ) from None
    try:
        return path.absolute()
    except FileNotFoundError:
        raise ValueError(
            "the current folder has been deleted, so a relative path leads nowhere; give a path "
            "that begins with /"
        ) from None


CompletePath = Annotated[Path, AfterValidator(complete_path)]


class Settings(BaseModel):
    """All settings, validated once and frozen."""

    # Defaults pass the same validators as values from the environment.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    host: str = "127.0.0.1"
    """Address to listen on. A public one needs `KLEIN_API_KEYS` or `KLEIN_TRUST_NETWORK=true`."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one."""
    model: str = Field(default="auto", min_length=1)
    """A catalogue key, a local folder or file, or `auto`: klein where a GPU holds it, else
    `shapes`. A folder may be ComfyUI's models folder, one in diffusers' layout, or a repository's
    in Hugging Face's cache."""
    variant: str = "flux.2-klein-4b"
    """For a local path: the catalogue key whose names, defaults and limits it is served under."""
    vae: CompletePath | None = None
    """A safetensors file with the VAE to use instead of the model's, such as that of
    FLUX.2-small-decoder."""
    device: tuple[str, ...] = ("0",)
    """The cards that compute, separated by commas: numbers from 0 as `nvidia-smi` counts, UUIDs
    (`GPU-...`, `MIG-...`, or the beginning of one) or PCI ids such as `0000:65:00.0`. `all` takes
    each that can serve, `cpu` none, `cpu:3` three processes without a card."""
    precision: str = "auto"
    """Arithmetic of the transformer; `auto` chooses by the GPU and a probe, and says why. Several
    cards of different kinds all take what the first to load chooses, so that a seed's pixels do not
    depend on the card; with `per-card` each chooses for itself."""
    attention: str = "auto"
    """Attention of the 8-bit transformer: `torch`, `cudnn`, `int8` or `fp8`; `auto` takes the
    fastest that keeps its bound on this card."""
    offload: Literal["auto", "none", "model", "disk"] = "auto"
    """Where weights wait that do not fit on the GPU (bf16 only): in host memory or on disk."""
    plan: Literal["auto", "resident", "resident tiled", "streamed", "streamed tiled"] = "auto"
    """What stays on the GPU at 8 bit: `auto` takes the fastest plan that fits, and says why.
    `resident` keeps all networks there, `streamed` streams the text encoder from host
    memory, `tiled` decodes in tiles."""
    prompt_cache: int = Field(default=32, ge=0, le=1024)
    """How many prompts' embeddings are kept in host memory, 8 MB each; 0 keeps none."""
    reference_cache: int = Field(default=32, ge=0, le=1024)
    """How many references' latents are kept in host memory, 1 MB for each megapixel; 0 keeps
    none."""
    cache_dir: CompletePath = Path("~/.cache/klein")
    """Where models are downloaded to, and quantized weights and compiled code are kept. A relative
    path counts from the folder that the service is started in."""
    cache_max_gb: float = Field(default=0.0, ge=0, le=1_000_000)
    """GB that the cache may take; 0 sets no limit. Above it, each load deletes quantized weights
    and compiled code, the least recently used first, but nothing in use and no download."""
    lora_dir: CompletePath | None = None
    """The folder of adapters (LoRA), which is only read and may be ComfyUI's `loras`; else `loras`
    in `KLEIN_CACHE_DIR`. It is looked at every few seconds."""
    loras: tuple[tuple[str, float], ...] = ()
    """Adapters of each image whose request names none, with their scales from -2 to 2, such as
    `a:0.8,b:0.5`; at most four. `klein lora list` shows the names."""
    lora_rank: int = 128
    """The most that the ranks of an image's adapters may sum up to: 32, 64, 128 or 256. Memory for
    so much is kept free on the GPU, 98 MB for each 32, if this or `KLEIN_LORAS` is set or the
    folder holds an adapter of the model at the start."""
    lora_fuse: tuple[tuple[str, float], ...] = ()
    """Adapters that become part of the weights, such as `a:0.8`: they cost no time, and no request
    can leave them out. It needs the bf16 file of the transformer."""
    queue_images: int = Field(default=32, ge=1, le=10_000)
    """How many images may wait; a request for n images takes n places."""
    deadline_s: Seconds = 120.0
    """Seconds until a request is given up, besides four times its predicted time."""
    load_limit_s: Seconds = 1800.0
    """Seconds that loading, compiling and warming up may take together. A download, and hashing
    what came, do not count."""
    download_silence_s: Seconds = 120.0
    """Seconds without a byte after which a download is given up; what came is kept, and the next
    start goes on from there. Waiting for another process's download is not limited."""
    idle_sleep_s: float = Field(default=0.0, ge=0, le=1_000_000)
    """Seconds without a picture after which the worker ends and the card is free; the next request
    starts it again. 0 keeps it."""
    sleep_api: bool = True
    """Answer `POST /sleep` and `POST /wake`, which free the card and take it back."""
    yields: Literal["off", "auto"] = "off"
    """`auto` leaves the card to other programs that need its memory while no picture is made, and
    takes it back when that has been free for a minute."""
    watchdog_s: Seconds = 60.0
    """Seconds that a running job may be silent (or 20 predicted steps, if longer) until the worker
    counts as hung and is replaced."""
    max_pixels: int = Field(default=4_194_304, ge=1_835_008, le=16_777_216)
    """Largest output in pixels."""
    max_body_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Largest request body in bytes."""
    body_limit_s: Seconds = 120.0
    """Seconds that a request's body may take to arrive."""
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    """Bearer keys, separated by commas. Without any, everyone who reaches the port may ask."""
    api_keys_file: CompletePath | None = None
    """A file with more keys, one on each line; empty lines and those that begin with `#` do not
    count."""
    rate_limit_per_minute: int = Field(default=0, ge=0, le=100_000)
    """Images that one key, or one address where there is none, may ask for at once, and in a minute
    on average; 0 sets no limit."""
    metrics_key: Literal["open", "required"] = "open"
    """Whether `/metrics` needs a key where keys are set."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the service may be addressed, besides IP addresses, `localhost` and
    Docker's and Podman's names of the host; `*` admits all."""
    allowed_origins: tuple[str, ...] = ()
    """Origins, such as `https://ui.example`, whose pages may ask and read (CORS); `*` admits all
    and needs keys."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks, such as `172.18.0.0/16`, of proxies whose `X-Forwarded-For`, `-Proto`
    and `-Host` tell who asks, and where; from anybody else, 127.0.0.1 too, they are ignored."""
    trust_network: bool = False
    """Listen on a public address without keys: everyone who reaches the port may ask."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """What happens to a field of a request that no route knows, a file of a form too. What a route
    knows and cannot use it refuses."""
    model_aliases: bool = True
    """Accept `gpt-image-*`, `dall-e-*` and `chatgpt-image-*` as names of the served model."""
    list_aliases: bool = False
    """List those aliases in `/v1/models` too."""
    image_urls: bool = True
    """Give links for `response_format=url`; the pictures are kept in memory for an hour."""
    sdapi: bool = True
    """Answer under `/sdapi/v1/` as AUTOMATIC1111 does, for Open WebUI's default engine, SillyTavern
    and Dify; a key may be the password of Basic authentication there."""
    public_url: str | None = None
    """What links start with, such as `https://pictures.example`; else the request's own address,
    or the one that a trusted proxy forwards. Its name is an allowed host."""
    demo_scale: bool = True
    """For the embedded demo model only: make a size that it cannot, such as 1024x1024, at the
    nearest that it can, and scale it; a warning says so. Else such a size is refused."""
    max_references: int = Field(default=4, ge=1, le=4)
    """How many pictures an edit may bring."""
    mask: Literal["auto", "alpha"] = "auto"
    """How masks are read. `auto`: transparent pixels are repainted, and where there are none the
    white ones, which the answer says in `warnings`. `alpha`: a mask without transparent pixels is
    refused. Masks under `/sdapi/v1/` are read as AUTOMATIC1111 reads them."""
    png_metadata: bool = True
    """Write prompt, seed, steps, guidance, size, model and precision into the picture: as
    AUTOMATIC1111 does, and as JSON under `klein`, which is XMP in JPEG and WebP."""
    docs: bool = True
    """Serve `/docs` and `/openapi.json`."""
    log_format: Literal["text", "json"] = "text"
    """Log lines for people or one JSON object each."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines that are logged."""

    @property
    def engine_precision(self) -> str:
        """What each worker is asked for."""
        return "auto" if self.precision == PER_CARD else self.precision

    @property
    def is_cpu(self) -> bool:
        """Whether no card computes."""
        return self.device[0] == CPU

    @field_validator("device", mode="before")
    @classmethod
    def _read_devices(cls, value: object) -> tuple[str, ...]:
        if not isinstance(value, (tuple, list)):
            return read_devices(str(value))
        is_cpu = set(value) == {CPU}
        return read_devices(f"{CPU}:{len(value)}" if is_cpu else ",".join(map(str, value)))

    @field_validator("api_keys")
    @classmethod
    def _refuse_weak_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(key) < MIN_KEY_LENGTH for key in value):
            raise ValueError(f"a key has fewer than {MIN_KEY_LENGTH} characters")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, each in enumerate(value, 1):
            is_name = each == "*" or _HOST_NAME.fullmatch(each.lower())
            if not is_name and not _is_address(each.strip("[]")):
                raise ValueError(
                    f"entry {number} is no name such as gpu.lan, without a scheme, a port or a path"
                )
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        value = tuple(each.lower() for each in value)
        for number, each in enumerate(value, 1):
            is_sent = _ORIGIN.fullmatch(each) and not _DEFAULT_PORTS.fullmatch(each)
            if each != "*" and not is_sent:
                raise ValueError(
                    f"entry {number} is no origin such as https://ui.example or "
                    "http://localhost:3000, without a path, a final slash or the usual port"
                )
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, each in enumerate(value, 1):
            try:
                ipaddress.ip_network(each)
            except ValueError:
                raise ValueError(
                    f"entry {number} is neither an address nor a network, such as 172.18.0.0/16"
                ) from None
        return value

    @field_validator("loras", "lora_fuse", mode="before")
    @classmethod
    def _read_adapters(cls, value: Sequence[object]) -> tuple[object, ...]:
        return tuple(read_adapter(each) if isinstance(each, str) else each for each in value)

    @field_validator("loras", "lora_fuse")
    @classmethod
    def _check_adapters(cls, value: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        if len(value) > MAX_LORAS:
            raise ValueError(f"it names {len(value)} adapters, the most is {MAX_LORAS}")
        if len({name for name, _ in value}) < len(value):
            raise ValueError("it names an adapter twice")
        if not all(abs(scale) <= MAX_LORA_SCALE for _, scale in value):
            raise ValueError("a scale is not between -2 and 2")
        return value

    @field_validator("lora_rank")
    @classmethod
    def _check_rank(cls, value: int) -> int:
        if value not in LORA_RANKS:
            raise ValueError("it is none of 32, 64, 128 and 256")
        return value

    @field_validator("public_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", value):
            raise ValueError("it is no address that starts with http:// or https://")
        return value and value.rstrip("/")

    @classmethod
    def read(cls, environ: Mapping[str, str], **overrides: object) -> Settings:
        """Build the settings from *environ*; *overrides* (the command line's) win unless None.

        Raises:
            StartupError: a value is invalid, or a variable with our prefix is not a setting.
        """
        values: dict[str, object] = {}
        for name, text in environ.items():
            if not name.startswith(PREFIX) or text == "":
                continue
            key = next((each for each in cls.model_fields if variable(each) == name), None)
            if key is None:
                raise StartupError(
                    f"{name} is not a setting of this service; remove it or see docs/settings.md."
                )
            parts = tuple(part.strip() for part in text.split(",") if part.strip())
            values[key] = parts if key in _LISTS else text
        values.update({key: value for key, value in overrides.items() if value is not None})
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            raise StartupError(_say(error)) from None
        if settings.api_keys_file is not None:
            keys = settings.api_keys + _read_keys(settings.api_keys_file)
            settings = settings.model_copy(update={"api_keys": keys})
        if "*" in settings.allowed_origins and not settings.api_keys:
            raise StartupError(
                "KLEIN_ALLOWED_ORIGINS=* lets every page that somebody visits use the service; set "
                "KLEIN_API_KEYS or KLEIN_API_KEYS_FILE too, or list the origins."
            )
        return settings


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def variable(field: str) -> str:
    """Return the environment variable of a field of `Settings`."""
    # A keyword of Python's cannot be an attribute.
    return PREFIX + ("YIELD" if field == "yields" else field.upper())


def check_exposure(settings: Settings, host: str | None = None) -> None:
    """Refuse to serve other machines without authentication by accident.

    *host* is the address listened on, where it is not that of the settings.

    Raises:
        StartupError: other machines reach it, no key is set, and nobody said that this is wanted.
    """
    host = host or settings.host
    if not (settings.api_keys or settings.trust_network or is_loopback(host)):
        raise StartupError(
            f"{host} can be reached from other machines and no key is set; "
            "set KLEIN_API_KEYS, or listen on 127.0.0.1, or set KLEIN_TRUST_NETWORK=true."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on *host*."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def read_devices(text: str) -> tuple[str, ...]:
    """Read names of cards, each into one form; `cpu:3` becomes `cpu` three times.

    Raises:
        ValueError: *text* is no such list.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    alone = _PROCESSORS.fullmatch(parts[0])
    count = int(alone[1] or 1) if alone and len(parts) == 1 else len(parts)
    if not 1 <= count <= MAX_WORKERS:
        raise ValueError(f"it asks for {count} processes, and 1 to {MAX_WORKERS} are possible")
    if alone and len(parts) == 1:
        return (CPU,) * count
    devices = tuple(_read_device(part, number) for number, part in enumerate(parts, 1))
    if ALL[0] in devices and len(devices) > 1:
        raise ValueError("all takes every card, so no other can stand beside it")
    if len(set(devices)) < len(devices):
        raise ValueError("it names a card twice; leave one out")
    return devices


def _read_device(part: str, number: int) -> str:
    if not part:
        raise ValueError(f"entry {number} is empty; take the comma away")
    if part.startswith(CPU):
        raise ValueError("cpu stands alone, without cards, and several processes are cpu:3")
    if part == ALL[0]:
        return part
    if part.isascii() and part.isdigit() and len(part) < _LONGEST_NUMBER:
        return str(int(part))
    if _UUID.fullmatch(part):
        return part[:3].upper() + part[3:]
    if found := _PCI_ID.fullmatch(part):
        # As the kernel writes it; nvidia-smi prints eight digits of the domain.
        return f"{int(found[1] or '0', 16):04x}:{found[2]}"
    raise ValueError(
        f"entry {number} is no number such as 0, no UUID such as GPU-1b2c3d4e and no PCI id such "
        "as 0000:65:00.0; all, cpu and cpu:3 are possible too"
    )


def read_adapter(text: str) -> tuple[str, float]:
    """Read a name and its scale, such as `style:0.8`; without one it is 1.

    Raises:
        ValueError: it is neither.
    """
    name, colon, scale = (part.strip() for part in text.partition(":"))
    try:
        number = float(scale) if colon else 1.0
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise ValueError("an entry is no name with a scale, such as style:0.8")
    return name, number


def _read_keys(path: Path) -> tuple[str, ...]:
    """Read a file of keys; one without keys ends the start, else the service would be open."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        raise StartupError(
            "KLEIN_API_KEYS_FILE names a file that cannot be read; correct it and start again."
        ) from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise StartupError(
            "The file of KLEIN_API_KEYS_FILE must hold one key on each line, each of at least "
            f"{MIN_KEY_LENGTH} characters; correct it and start again."
        )
    return keys


def _say(error: ValidationError) -> str:
    """Name the first invalid setting without repeating its value, which may be secret."""
    first = error.errors(include_input=False, include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    message = first["msg"].removeprefix("Value error, ")
    return f"{variable(name)} has a value that does not fit: {message}. Correct it and start again."
