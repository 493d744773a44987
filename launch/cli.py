"""The command line: `fast-inference serve | generate | chat | status | replay | explain | simulate`.

Owns the commands, their flags and what they print; must not know how an engine works. Imports what a command needs
when it runs, so that `--help` is quick. An `EngineError` leaves as one line (see `__main__.py`).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .flags import (
    engine_config,
    sampling_params,
    takes_engine_flags,
    takes_sampling_flags,
    takes_scheduling_flags,
)
from .simulate import simulate

if TYPE_CHECKING:
    from ..frontend.client import Client
    from ..frontend.outputs import RequestOutput
    from .supervisor import Supervisor

app = typer.Typer(
    name="fast-inference",
    help="Serve and run language models: processes over ZeroMQ, an OpenAI-compatible HTTP server.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # boxes cut the names of flags short in a terminal of 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "folder, Hugging Face name, GGUF file or class:NAME; without it SmolLM2-135M-Instruct"
LEFT_OUT = ("host", "port", "api_key", "seed")  # by commands that open no port; their --seed is that of the sampling

Endpoint = Annotated[
    str | None, typer.Option("--endpoint", help="use the running engine at this ipc:// or tcp:// address")
]


def serve(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    model_option: Annotated[str | None, typer.Option("--model", help="the same as MODEL", show_default=False)] = None,
    **engine: Any,
) -> None:
    """Start an engine and serve it over HTTP until SIGINT or SIGTERM."""
    if model and model_option and model != model_option:
        raise typer.BadParameter(f"MODEL is {model} and --model is {model_option}: give one")
    config = engine_config({**engine, "model": model or model_option})
    from . import logs
    from .child import set_title
    from .display import StartDisplay
    from .launcher import Launcher

    logs.configure("supervisor", config.log_level)
    set_title("supervisor", config)
    with StartDisplay(plain=True) as display:
        launcher = Launcher(config, on_line=display.line)
        stopped = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped
            stopped = True
            launcher.request_stop(config.shutdown_timeout)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        from ..protocol.errors import EngineDead

        try:
            supervisor = launcher.start(display.event)
        except EngineDead:
            if stopped:
                return
            raise
    set_title("supervisor", supervisor.config)
    _say(*_summary(supervisor))
    supervisor.follow(display.later)
    if supervisor.failure is not None:
        raise supervisor.failure
    _say("stopped")


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="texts to go on from")],
    endpoint: Endpoint = None,
    **flags: Any,
) -> None:
    """Print what the model makes of each PROMPT."""
    params = sampling_params(flags, max_tokens=128)
    with _client(endpoint, flags) as client:
        if len(prompts) == 1:
            _print_stream(client.stream(prompts[0], params))
            return
        for output in client.generate(prompts, params, use_tqdm=sys.stderr.isatty()):
            print(f"{output.prompt}{output.outputs[0].text}\n", flush=True)


def chat(
    system: Annotated[str | None, typer.Option("--system", help="the system message", show_default=False)] = None,
    endpoint: Endpoint = None,
    **flags: Any,
) -> None:
    """Talk with the model: one line of standard input is one turn; an empty line or end of input ends it."""
    params = sampling_params(flags, max_tokens=None)
    with _client(endpoint, flags) as client:
        messages = [{"role": "system", "content": system}] if system else []
        while text := _ask():
            messages.append({"role": "user", "content": text})
            answer = _print_stream(client.stream_chat(messages, params))
            messages.append({"role": "assistant", "content": answer})


def status(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Show the engines of this user that run on this machine."""
    from .status import show

    show(as_json)


def replay(
    journal: Annotated[Path, typer.Argument(metavar="FILE", help="what `serve --journal FILE` has written")],
) -> None:
    """Run a journal of the scheduler again; exit status 1, with the first difference, if an output is not the same."""
    from .replay import show_replay

    sys.exit(show_replay(journal))


def explain(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="the id of an answer, or its X-Request-Id")],
    journal: Annotated[
        Path | None,
        typer.Option("--journal", metavar="FILE", help="a journal to run again, instead of asking a server"),
    ] = None,
    url: Annotated[str, typer.Option("--url", help="the running server")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option("--api-key", help="the server's key", show_default=False)] = None,
) -> None:
    """Show where a request's time has gone: each wait with its reason, each part of its run."""
    from .explain import show_request

    show_request(request_id, journal, url, api_key)


app.command()(takes_engine_flags(serve, leave_out=("model",)))
app.command()(takes_sampling_flags(takes_engine_flags(generate, leave_out=LEFT_OUT)))
app.command()(takes_sampling_flags(takes_engine_flags(chat, leave_out=LEFT_OUT)))
app.command()(takes_scheduling_flags(simulate))
app.command()(status)
app.command()(replay)
app.command()(explain)


@contextmanager
def _client(endpoint: str | None, flags: dict[str, Any]) -> Iterator[Client]:
    """A client of the engine at `endpoint`, or of one started for this command."""
    from ..frontend.client import Client

    if endpoint is not None:
        with Client(endpoint) as client:
            yield client
        return
    engine = {name: value for name, value in flags.items() if name not in LEFT_OUT}
    config = engine_config({**engine, "log_level": flags["log_level"] or "warning"}).replace(port=None)
    from ..protocol.errors import EngineDead
    from . import logs
    from .display import StartDisplay
    from .launcher import Launcher

    logs.configure("supervisor", config.log_level)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with StartDisplay() as display:
        launcher = Launcher(config, on_line=display.line)
        try:
            supervisor = launcher.start(display.event)
        except BaseException:
            launcher.stop()
            raise
    try:
        with Client(supervisor.endpoints.client) as client:
            supervisor.on_end(lambda failure: client.fail_all(failure or EngineDead("the engine was stopped")))
            yield client
    finally:
        launcher.stop()


def _print_stream(outputs: Iterator[RequestOutput]) -> str:
    """Print text as it comes; returns all of it."""
    text = ""
    for output in outputs:
        print(output.outputs[0].text[len(text) :], end="", flush=True)
        text = output.outputs[0].text
    print(flush=True)
    return text


def _ask() -> str:
    """The next line that the user types; "" at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _summary(supervisor: Supervisor) -> list[str]:
    """What has been started, in a few lines."""
    facts = supervisor.facts.get("executor", {})
    config = supervisor.config
    lines = [
        f"model      {config.model_name} ({facts.get('architecture')}, {facts.get('dtype')}, {facts.get('device')})"
    ]
    mebibytes = int(facts.get("kv_bytes", 0)) / 2**20
    lines.append(
        f"KV cache   {facts.get('num_blocks')} blocks of {config.block_size} tokens, {mebibytes:,.0f} MiB; "
        f"context {facts.get('max_model_len')}"
    )
    seconds = [
        f"{name.removesuffix('_seconds').replace('_', ' ')} {value} s"
        for name, value in facts.items()
        if name.endswith("_seconds")
    ]
    lines.append(f"start      {supervisor.start_seconds:.1f} s ({', '.join(seconds)})")
    lines.append(f"clients    {supervisor.endpoints.client}")
    if supervisor.url is not None:
        lines.append(f"serving    {supervisor.url}")
    return lines


def _say(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)
