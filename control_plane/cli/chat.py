"""`penstock chat`: a conversation in the terminal, through the same HTTP API as everybody's."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control_plane.cli import options
from control_plane.cli.failures import CommandFailed, clean_errors, say_error
from control_plane.runtimes.state import read_state

if TYPE_CHECKING:
    from control_plane.cli.completion import ChatClient, Message

INTERRUPTED = 130
_HELP = "Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D ends it."


def chat(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Ask this and end; or pipe it in. Without: a conversation.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Of the gateway, without /v1. (default: the cluster that runs here)")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model. (default: the first one served)")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
) -> None:
    """Talk to the model. The answer streams as it is generated."""
    with clean_errors():
        from control_plane.cli.completion import ChatClient

        limits = {"max_tokens": max_tokens, "temperature": temperature}
        settings = {name: value for name, value in limits.items() if value is not None}
        history: list[Message] = [{"role": "system", "content": system}] if system else []
        with ChatClient(url or _url_here(config, run_dir), model=model, settings=settings) as client:
            if prompt or not sys.stdin.isatty():
                _answer_once(client, history, " ".join(prompt) if prompt else sys.stdin.read())
            else:
                _converse(client, history)


def _url_here(config: Path | None, run_dir: Path | None) -> str:
    directory = options.load(config, run_dir).run_dir
    state = read_state(directory)
    if state is None or not state.launcher.is_alive():
        raise CommandFailed(
            f"nothing runs in {directory}: start it with penstock up, or name its --run-dir or a gateway's --url"
        )
    return state.http_url


def _answer_once(client: "ChatClient", history: "list[Message]", prompt: str) -> None:
    if not prompt.strip():
        raise CommandFailed("the prompt is empty")
    try:
        for text in client.stream([*history, {"role": "user", "content": prompt}]):
            _show(text)
    except KeyboardInterrupt as e:
        raise typer.Exit(INTERRUPTED) from e
    finally:
        print(flush=True)
    if client.last_finish_reason == "length":
        print("(cut at the longest length; --max-tokens sets another one)", file=sys.stderr)


def _converse(client: "ChatClient", history: "list[Message]") -> None:
    import readline  # noqa: F401  input() edits lines and remembers them

    print(f"{client.model} at {client.url}. {_HELP}")
    start = list(history)
    while True:
        try:
            line = input("\n> ").strip()
        except KeyboardInterrupt:
            print(f"\n{_HELP}")
            continue
        except EOFError:
            print()
            return
        match line:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/clear":
                history[:] = start
            case _ if line.startswith("/") and " " not in line:
                print(f"There is no command {line}. {_HELP}")
            case _:
                _answer_turn(client, history, line)


def _answer_turn(client: "ChatClient", history: "list[Message]", line: str) -> None:
    """Adds the question and its answer, also a stopped one, to the history; a failed turn leaves it as it was."""
    answer: list[str] = []
    began_s = time.monotonic()
    question: Message = {"role": "user", "content": line}
    try:
        for text in client.stream([*history, question]):
            if not answer:
                first_s = time.monotonic() - began_s
            answer.append(text)
            _show(text)
        if answer:
            _show_figures(client, first_s=first_s, total_s=time.monotonic() - began_s)
    except KeyboardInterrupt:
        print(" [stopped]", flush=True)
    except CommandFailed as e:
        print(flush=True)
        say_error(str(e))
        return
    history += [question, {"role": "assistant", "content": "".join(answer)}]


def _show(text: str) -> None:
    """Without control characters: what a model writes must not steer the terminal."""
    sys.stdout.write("".join(c for c in text if c.isprintable() or c in "\n\t"))
    sys.stdout.flush()


def _show_figures(client: "ChatClient", *, first_s: float, total_s: float) -> None:
    usage = client.last_usage
    if usage is None:
        print(flush=True)
        return
    figures = f"{usage.num_output_tokens} tokens, the first after {first_s:.2f} s"
    if usage.num_output_tokens > 1 and total_s > first_s:
        figures += f", then {(usage.num_output_tokens - 1) / (total_s - first_s):.0f}/s"
    if usage.num_cached_tokens:
        figures += f"; {usage.num_cached_tokens} of {usage.num_prompt_tokens} prompt tokens were cached"
    if client.last_finish_reason == "length":
        figures += "; cut at the longest length"
    print(f"\n\x1b[2m{figures}\x1b[0m" if sys.stdout.isatty() else f"\n({figures})", flush=True)
