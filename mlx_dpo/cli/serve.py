"""`mlx-dpo serve`: an OpenAI-compatible server for the base and the aligned model."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.answers import model_and_adapter_flags, thinking_flag
from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.output import echo
from mlx_dpo.cli.sampling_flags import sampling_flags
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.adapters.switch import AdapterState
    from mlx_dpo.chat.feedback import JsonlFile
    from mlx_dpo.chat.served_feedback import ServedFeedback
    from mlx_dpo.chat.served_model import ServedModel
    from mlx_dpo.chat.server import Server
    from mlx_dpo.saved_runs.open import SwitchableModel

REQUEST_ONLY_SETTINGS = ("seed", "repetition_penalty")  # set by each request, not by a flag


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo serve run",
        "mlx-dpo serve --model ORG/MODEL --adapter adapter --port 9000",
    ),
)
@click.argument("run", required=False, type=FOLDER)
@model_and_adapter_flags
@click.option(
    "--host", metavar="ADDRESS", default="127.0.0.1", help="Address to listen on; 0.0.0.0 = all."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    default=8080,
    help="Port to listen on; 0 = a free one.",
)
@click.option(
    "--allowed-origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web page that may send requests (`https://example.org`, `*`); repeat it for several.",
    show_default="none",
)
@click.option(
    "--feedback",
    type=FILE,
    metavar="FILE",
    help="Write judgements of answers, sent to /v1/feedback, to this file as rows for `train`.",
)
@thinking_flag
@sampling_flags(without=REQUEST_ONLY_SETTINGS, temperature=0.7)
def serve(
    run: str | None,
    model: str | None,
    adapter: str | None,
    host: str,
    port: int,
    allowed_origins: tuple[str, ...],
    feedback: str | None,
    **settings: Any,
) -> None:
    """Serve a RUN or a model through OpenAI's API: chat, completions and the list of models.

    `aligned` and `base` are two model names on one set of weights. The sampling flags are the
    defaults for requests. The server is mlx-lm's and is not made for the internet.

    \b
    curl localhost:8080/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{"model": "aligned",
           "messages": [{"role": "user", "content": "Hello"}]}'
    """
    from mlx_dpo.chat.server import Server, is_loopback
    from mlx_dpo.saved_runs.open import open_switchable

    thinking = settings.pop("thinking")
    sampling = Sampling(**settings)
    file = None if feedback is None else _open_feedback_file(feedback)
    with Server(host, port) as server:
        opened = open_switchable(run, model=model, adapter=adapter)
        served = _make_served_model(opened, sampling, thinking, allowed_origins)
        if file is not None:
            served = replace(served, feedback=_make_feedback(file, opened, served))
        for line in _header(opened, served, server):
            echo(line, err=True)
        if not is_loopback(str(server.server_address[0])):
            echo(
                "Anyone who can reach this machine can send requests; there is no password.",
                err=True,
            )
        try:
            server.serve(served)
        except KeyboardInterrupt:
            echo("\nStopped", err=True)


def _open_feedback_file(name: str) -> "JsonlFile":
    """Return the file for judgements, without an incomplete last line that a crash left in it."""
    from mlx_dpo.chat.feedback import JsonlFile

    file = JsonlFile(Path(name).expanduser())
    if (note := file.repair()) is not None:
        echo(note, err=True)
    return file


def _make_feedback(
    file: "JsonlFile", opened: "SwitchableModel", served: "ServedModel"
) -> "ServedFeedback":
    from mlx_dpo.chat.served_feedback import ServedFeedback

    states = set(served.names.values())
    return ServedFeedback(file, {state: opened.provenance(state) for state in states})


def _make_served_model(
    opened: "SwitchableModel", sampling: Sampling, thinking: bool | None, origins: tuple[str, ...]
) -> "ServedModel":
    from mlx_dpo.chat.served_model import ServedModel
    from mlx_dpo.generation.context import context_length
    from mlx_dpo.generation.prompt import check_thinking

    tokenizer, config = opened.base.tokenizer, opened.run and opened.run.config
    names: dict[str, AdapterState] = {"base": "base"}
    if opened.switch.can_switch:
        names = {"aligned": "aligned", "base": "base"}
    thinks = bool(config.thinking if thinking is None and config else thinking)
    system = config.system if config else None
    if thinking is not None:
        check_thinking(tokenizer)
    if sampling.top_k >= len(tokenizer):
        raise ConfigError(f"`top_k` must be below the vocabulary size of {len(tokenizer)}")
    return ServedModel(
        opened.base.model,
        tokenizer,
        opened.switch,
        names,
        min(len(tokenizer), opened.base.vocab_size),
        context_length(opened.base.config),
        sampling,
        thinking=thinks,
        system=system,
        origins=origins,
        digests={
            name: _digest(opened.provenance(state), sampling, thinks, system)
            for name, state in names.items()
        },
    )


def _digest(provenance: dict[str, Any], *settings: object) -> str:
    """Return a digest of weights and defaults, which tells models under the same name apart."""
    weights = {name: provenance.get(name) for name in ("model_digest", "adapter_digest")}
    return sha256(f"{weights} {settings}".encode()).hexdigest()


def _header(opened: "SwitchableModel", served: "ServedModel", server: "Server") -> list[str]:
    names = " and ".join(f"`{name}`" for name in served.names)
    lines = [*opened.notes, f"{opened.base.source} as {names} at {server.url}"]
    if opened.run is not None and opened.run.trained_on_text:
        lines.append("The run was trained on plain text: use /v1/completions, not chat")
    if served.system is not None:
        lines.append(f"Conversations without a system message get: {served.system}")
    if served.feedback is not None:
        lines.append(f"POST /v1/feedback writes labelled answers to {served.feedback.file.path}")
    return [*lines, "Ctrl-C stops it."]
