"""The `tandem` command. Each command loads only what it needs: help is instant, torch never comes in here."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from cluster.cache_commands import cache_app
from cluster.convert_command import add_convert_command
from cluster.flags import ConfigFlags, load
from cluster.operate_commands import add_operate_commands
from cluster.scale_commands import add_scale_commands
from cluster.tokens import cluster_token
from contracts.cells import cell_named
from contracts.config_loader import file_schema
from contracts.errors import ConfigError, TandemError

HELP = """Serves large language models from two pools of workers: prefill workers read prompts, decode workers
write answers. Every key of the configuration is also a variable: TANDEM_GATEWAY__PORT=8080."""

app = App(name="tandem", help=HELP, version=version("tandem-serve"), help_format="plaintext")
config_app = App(name="config", help="Look at the configuration.")
app.command(config_app)
app.command(cache_app)
add_operate_commands(app)
add_scale_commands(app)
add_convert_command(app)
# Commands of packages that this one may not import; each is loaded when it is asked for.
_elsewhere = entry_points(group="tandem.commands")
for _entry in _elsewhere:
    app.command(_entry.value, name=_entry.name)

StateFile = Annotated[
    Path | None,
    Parameter(name="--state-file", help="Also tell addresses, pids and the token in this file (mode 0600)."),
]
Coordinator = Annotated[str, Parameter(name="--coordinator", help="Address of the coordinator, host:port.")]
TokenFile = Annotated[
    Path | None,
    Parameter(name="--token-file", help="File with the cluster token; else TANDEM_CLUSTER_TOKEN is read."),
]
RuntimeDir = Annotated[
    Path, Parameter(name="--runtime-dir", help="Private folder that all workers of this machine share.")
]
Cell = Annotated[str | None, Parameter(name="--cell", help="Which one of `models` it is for, where there are several.")]
Bind = Annotated[str, Parameter(name="--bind", help="Address for rpc, host:port; port 0 takes a free one.")]


@app.command
def serve(
    model: Annotated[str | None, Parameter(help="demo, a checkpoint folder, or a hub id.")] = None,
    /,
    *,
    flags: ConfigFlags | None = None,
    state_file: StateFile = None,
) -> int:
    """Serve a model on this machine until Ctrl-C."""
    from cluster.serve import run_cluster, serve_until_stopped

    config = load(flags, dict(os.environ), model=model).config
    with_key = bool(config.gateway.api_keys or config.gateway.tenants)
    return run_cluster(
        config,
        state_file=state_file,
        body=lambda cluster, stop: serve_until_stopped(cluster, stop, with_key=with_key),
    )


@app.command
def demo(*, flags: ConfigFlags | None = None) -> int:
    """Start a small cluster, hold three chats with it, show where the time went, stop it."""
    from cluster.demo import run_demo

    return run_demo(load(flags, {"TANDEM_GATEWAY__PORT": "0", **os.environ}).config)


@app.command
def coordinator(
    *,
    flags: ConfigFlags | None = None,
    cell: Cell = None,
    bind: Bind = "127.0.0.1:0",
    token_file: TokenFile = None,
) -> int:
    """Run a coordinator alone."""
    from cluster.standalone import run_coordinator

    return run_coordinator(cell_named(load(flags, dict(os.environ)).config, cell), bind, cluster_token(token_file))


@app.command
def gateway(
    *,
    coordinator: Coordinator,
    flags: ConfigFlags | None = None,
    cell: Cell = None,
    token_file: TokenFile = None,
) -> int:
    """Run a gateway alone."""
    from cluster.standalone import run_gateway

    return run_gateway(cell_named(load(flags, dict(os.environ)).config, cell), coordinator, cluster_token(token_file))


@app.command
def agent(
    *,
    coordinator: Coordinator,
    runtime_dir: RuntimeDir,
    flags: ConfigFlags | None = None,
    cell: Cell = None,
    bind: Bind = "127.0.0.1:0",
    token_file: TokenFile = None,
) -> int:
    """Keep the workers of all pools running on this machine."""
    from cluster.standalone import run_agent

    config = cell_named(load(flags, dict(os.environ)).config, cell)
    return run_agent(config, coordinator, cluster_token(token_file), runtime_dir, bind)


@app.command
def worker(
    *,
    coordinator: Coordinator,
    pool: Annotated[str, Parameter(name="--pool", help="Pool of the configuration that it belongs to.")],
    index: Annotated[int, Parameter(name="--index", help="Its number in the pool.")] = 0,
    runtime_dir: RuntimeDir,
    flags: ConfigFlags | None = None,
    cell: Cell = None,
    bind: Bind = "127.0.0.1:0",
    token_file: TokenFile = None,
) -> int:
    """Become one worker of a pool, without a supervisor."""
    from cluster.standalone import become_worker

    config = cell_named(load(flags, dict(os.environ)).config, cell)
    become_worker(config, coordinator, cluster_token(token_file), f"{pool}-{index}", runtime_dir, bind)


@app.command
def doctor(
    *,
    state_file: Annotated[
        Path | None, Parameter(name="--state-file", help="Audit the running cluster that wrote this file.")
    ] = None,
    coordinator: Annotated[
        str | None, Parameter(name="--coordinator", help="Audit the running cluster of this coordinator.")
    ] = None,
    token_file: TokenFile = None,
    flags: ConfigFlags | None = None,
) -> int:
    """Check this machine, or audit the books of a running cluster."""
    from cluster import doctor as checks

    if state_file is not None:
        return checks.audit_from_state(state_file)
    if coordinator is not None:
        return checks.audit(coordinator, cluster_token(token_file))
    return checks.check_machine(load(flags, dict(os.environ)).config)


@app.command
def profile(
    model: Annotated[str | None, Parameter(help="demo, a checkpoint folder, or a hub id.")] = None,
    /,
    *,
    output: Annotated[
        Path | None, Parameter(name="--output", help="File for the profile; default: a place in the user's cache.")
    ] = None,
    threads: Annotated[
        int | None, Parameter(name="--threads", help="Compute threads; default: those of the first worker.")
    ] = None,
    max_context: Annotated[
        int | None, Parameter(name="--max-context", help="Longest context to measure, in tokens; default 2048.")
    ] = None,
    serving: Annotated[
        bool, Parameter(name="--serving", help="Also measure what a cluster of two workers adds to its engines.")
    ] = True,
    flags: ConfigFlags | None = None,
    cell: Cell = None,
) -> int:
    """Measure what steps cost on this machine, for planning and simulation."""
    from cluster.profile import ProfileOptions, run_profile

    config = cell_named(load(flags, dict(os.environ), model=model).config, cell)
    options = ProfileOptions(output=output, threads=threads, max_context_tokens=max_context, serving=serving)
    return run_profile(config, options)


@config_app.command
def show(*, flags: ConfigFlags | None = None) -> int:
    """Print every value and where it came from; secrets are redacted."""
    rows = load(flags, dict(os.environ)).rows()
    key_width = max(len(row.key) for row in rows)
    value_width = max(len(row.value) for row in rows)
    for row in rows:
        print(f"{row.key:<{key_width}}  {row.value:<{value_width}}  {row.source}")
    return 0


@config_app.command
def validate(*files: Path, flags: ConfigFlags | None = None) -> int:
    """Check cluster files (or what flags and environment make of the default)."""
    from dataclasses import replace

    for file in files or (None,):
        chosen = flags or ConfigFlags()
        load(replace(chosen, config=file) if file is not None else chosen, dict(os.environ))
        print(f"{file or chosen.config or 'the defaults'}: ok")
    return 0


@config_app.command
def schema() -> int:
    """Print the JSON schema of a cluster file."""
    print(json.dumps(file_schema(), indent=2))
    return 0


def main() -> None:
    """Entry point of the console script. Errors are one line each, without a traceback."""
    if not sys.argv[1:] or sys.argv[1] in app.help_flags:
        _load_commands()
    try:
        status = app(sys.argv[1:], exit_on_error=True, result_action="return_value")
    except ConfigError as error:
        for line in error.message.splitlines():
            print(f"tandem: {line}", file=sys.stderr)
        sys.exit(2)
    except TandemError as error:
        print(f"tandem: {error.code}: {error.message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(status or 0)


def _load_commands() -> None:
    """The list of commands tells what each does, so that those of other packages must be there."""
    for entry in _elsewhere:
        app[entry.name]  # pyright: ignore[reportUnusedExpression]
