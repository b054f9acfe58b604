"""The command `serve`: options checked, an engine opened, HTTP served until a signal says stop.

Knows no models; imports what takes time when it is called.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    DEMO,
    BitwiseOption,
    DepthOption,
    DrafterOption,
    DtypeOption,
    ModelOption,
    RevisionOption,
    Source,
    UsageError,
    open_runtime,
    parse_depth,
)
from .terminal import note

if TYPE_CHECKING:
    from types import FrameType

    import uvicorn
    from starlette.types import ASGIApp

    from .engine import Engine
    from .runtime import Runtime
    from .server.service import Service

log = logging.getLogger(__name__)

_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def serve(
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8080,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="What clients call the model; may be given several times.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MLX_GEMMA_MTP_API_KEY", help="Asked of every client; see --insecure.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others in without a key.")] = False,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Let pages of this origin ask; *: all.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name this machine is called by, beside localhost.")
    ] = None,
    depth: DepthOption = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests decoded together.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="For requests that don't say.")] = 4096,
    prefill_budget: Annotated[int, typer.Option(min=1, help="Prompt tokens per step.")] = 512,
    kv_budget: Annotated[
        str | None, typer.Option(metavar="8GB", help="Memory for K/V; what the device recommends, less the weights.")
    ] = None,
    prefix_cache: Annotated[str, typer.Option(metavar="2GB", help="Memory for prefixes of chats; 0: none.")] = "1GB",
    max_body: Annotated[str, typer.Option(metavar="4MiB", help="Largest body of a request.")] = "4MiB",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers get to finish at the end.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log, too.")] = False,
    bitwise: BitwiseOption = False,
) -> None:
    """Serve the OpenAI and Anthropic APIs, and a page to chat on. Without --model: the demo pair."""
    try:
        options = Options(
            host=host,
            port=port,
            names=name or [model or DEMO],
            api_key=api_key,
            insecure=insecure,
            cors_origins=cors_origin or (),
            allow_hosts=allow_host or (),
            depth=parse_depth(depth),
            max_batch=max_batch,
            max_waiting=max_waiting,
            max_tokens=max_tokens,
            prefill_budget=prefill_budget,
            kv_budget=None if kv_budget is None else parse_bytes(kv_budget),
            prefix_cache=parse_bytes(prefix_cache),
            max_body=parse_bytes(max_body),
            timeout=timeout,
            drain=drain,
            log_prompts=log_prompts,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    bound = open_socket(options)
    rows = max_batch if bitwise else 0
    source = Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=rows)
    runtime = open_runtime(source, quiet=False)
    with open_engine(runtime, options) as engine:
        service = make_service(runtime, engine, options)
        note(greeting(runtime, options, bound.getsockname()[1]))
        show_logs()
        run(service, make_app(service, options), bound, options)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to serve; `names` are what the model is called, byte counts are bytes. Raises ValueError."""

    host: str = "127.0.0.1"
    port: int = 8080
    names: Sequence[str] = ()
    api_key: str | None = None
    insecure: bool = False
    cors_origins: Sequence[str] = ()
    allow_hosts: Sequence[str] = ()
    depth: int | str = "auto"
    max_batch: int = 8
    max_waiting: int = 64
    max_tokens: int = 4096
    prefill_budget: int = 512
    kv_budget: int | None = None
    prefix_cache: int = 0
    max_body: int = 4 * 2**20
    timeout: float = 600.0
    drain: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key:
            raise ValueError("--api-key is empty")
        if not self.local and self.api_key is None and not self.insecure:
            raise ValueError(
                f"--host {self.host} lets others in: give an --api-key, or --insecure if everybody may use it"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_bytes(text: str) -> int:
    """Bytes of a text like "2GB", "512MiB" or "1000000". Raises ValueError."""
    number = text.strip().upper().rstrip("BIKMG")
    unit = text.strip().upper().removeprefix(number)
    try:
        count = float(number) * _UNITS[unit if unit != "B" else ""]
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is no number of bytes like 2GB or 512MiB") from None
    if not 0 <= count < 2**63:
        raise ValueError(f"{text!r} is no number of bytes like 2GB or 512MiB")
    return int(count)


def open_socket(options: Options) -> socket.socket:
    """Bind, so that a taken port is known before a model is loaded. Raises OSError, naming the address."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((options.host, options.port))
    except OSError as error:
        bound.close()
        raise OSError(f"can't listen on {options.host}:{options.port}: {error.strerror or error}") from error
    return bound


def open_engine(rt: Runtime, options: Options) -> Engine:
    """The engine that serves."""
    from .engine import Engine

    return Engine(
        rt,
        max_batch=options.max_batch,
        depth=options.depth,
        prefill_budget=options.prefill_budget,
        kv_budget=options.kv_budget,
        prefix_cache=options.prefix_cache,
        max_waiting=options.max_waiting,
    )


def make_service(rt: Runtime, engine: Engine, options: Options) -> Service:
    """The service over an engine. Raises ValueError for a model that can't be talked to."""
    from .generation_config import generation_defaults
    from .server.metrics import Metrics
    from .server.service import Service, Settings

    if rt.text is None:
        raise ValueError("this model has no tokenizer, which a server needs")
    bitwise, differing = rt.bitwise()
    settings = Settings(
        models=tuple(options.names),
        context=rt.config.max_positions,
        defaults=generation_defaults(Path(rt.info()["model"]["path"])),
        max_tokens=options.max_tokens,
        timeout=options.timeout,
        log_prompts=options.log_prompts,
        bitwise=bitwise,
        differing_shapes=differing,
    )
    return Service(engine, rt.text, settings, Metrics())


def make_app(service: Service, options: Options) -> ASGIApp:
    """The application with the options' rules."""
    from .server.app import make_app
    from .server.guard import LOCAL_HOSTS, Rules

    # A key keeps strangers out, whatever name they use for this machine.
    named = options.local and options.api_key is None
    return make_app(
        service,
        Rules(
            max_body=options.max_body,
            key=options.api_key,
            origins=tuple(options.cors_origins),
            hosts=LOCAL_HOSTS | set(options.allow_hosts) | {options.host} if named else None,
        ),
    )


def make_server(service: Service, app: ASGIApp, options: Options) -> uvicorn.Server:
    """What serves the application."""
    import uvicorn

    from .server.wire import Protocol

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.closing = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=Protocol,
        timeout_graceful_shutdown=int(options.drain),
        timeout_keep_alive=30,
    )
    return Server(config)


def run(service: Service, app: ASGIApp, bound: socket.socket, options: Options) -> None:
    """Serve on `bound` until SIGTERM or SIGINT; answers under way may take `drain` seconds more."""
    # uvicorn sends the signal that ended it again, when it is done: the engine has to be shut down first.
    signal.signal(signal.SIGTERM, lambda *_: None)
    make_server(service, app, options).run(sockets=[bound])


def show_logs() -> None:
    """JSON lines on stderr: this server's own, and others' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    own, other = logging.getLogger(__package__), logging.getLogger("uvicorn.error")
    for logger, level in ((own, logging.INFO), (other, logging.WARNING)):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class _Lines(logging.Formatter):
    """One JSON object a line; a request's own fields stand beside time and level."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        fields: dict[str, Any] = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname}
        if message.startswith("{"):
            fields |= json.loads(message)
        else:
            fields |= {"event": "log", "message": message}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def greeting(rt: Runtime, options: Options, port: int) -> str:
    """What a user needs to know: the address, a line to try, the memory it takes."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    url, info = f"http://{host}:{port}", rt.info()
    weights = info["model"]["bytes"] + (info["drafter"]["bytes"] if info["drafter"] else 0)
    kv = info["kv"]["bytes_per_1k_tokens"] / 1024
    row = info["kv"]["ring_bytes_per_request"] + kv * rt.config.max_positions
    key = " -H 'Authorization: Bearer YOUR_KEY'" if options.api_key else ""
    body = json.dumps(
        {"model": options.names[0], "stream": True, "messages": [{"role": "user", "content": "Tell me a short story."}]}
    )
    return "\n".join(
        [
            f"{options.names[0]} at {url} (page), {url}/v1 (OpenAI), {url}/v1/messages (Anthropic)",
            f"memory: {_size(weights)} of weights; K/V {_size(kv * 1000)} per 1,000 tokens, at most {_size(row)} for a "
            f"request of {rt.config.max_positions:,} tokens, {options.max_batch} at a time; at most "
            f"{_size(options.prefix_cache)} for prefixes",
            f"drafts: {_drafts(rt, options)}",
            f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        ]
    )


def _drafts(rt: Runtime, options: Options) -> str:
    if rt.info()["drafter"] is None:
        return "none, as there is no drafter"
    if options.depth != "auto":
        return f"{options.depth} a round"
    if rt.depth_memory.costs.stored:
        return "as many as pay, by costs that were measured here"
    return "as many as pay, which is learned while serving, or measured by `mlx-gemma-mtp tune` with the same model"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
