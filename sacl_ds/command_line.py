"""Shared parts of the training command lines: options, help, errors of one line, the check of the hostfile."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import yaml

from sacl_ds.config import RunConfig, TrainingConfig
from sacl_ds.config.room import expanded
from sacl_ds.config_file import Config, load_config
from sacl_ds.errors import FULL, Fault, SharedError, Stopped, UserError
from sacl_ds.faults import restarts
from sacl_ds.faults.guard import Guard, current
from sacl_ds.faults.restarts import Exit

_HELP = """
settings (all of them with defaults: docs/configuration.md, or '?'):
  key=value             set one, e.g. train.steps=2000 data.source=shards data.shards='/data/{00000..00331}.tar'
  key=?                 explain one, or a room of them: loss.contrastive=? or loss=?

example:
  """


class Parser(argparse.ArgumentParser):
    """Argument parser whose mistakes are UserErrors and whose help is printed by one rank only."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def print_help(self, file: object = None) -> None:
        if _first():
            print(self.format_help(), end="", flush=True)


def training_parser(purpose: str, example: str, task: bool = False) -> Parser:
    """Make the parser of --ds_config, --config, --resume, --print_config and key=value.

    example: one command line. task: --task too.
    """
    parser = _parser(
        f"{'--task TASK ' if task else ''}--ds_config FILE [--config FILE] [--resume] [--print_config] [key=value ...]",
        purpose,
        example,
    )
    files = parser.add_argument_group("files")
    files.add_argument("--ds_config", type=expanded, metavar="FILE", help="DeepSpeed's own JSON (required)")
    files.add_argument(
        "--config", type=expanded, metavar="FILE", help="run configuration, YAML (default: the built-in run)"
    )
    run = parser.add_argument_group("run")
    if task:
        run.add_argument("--task", metavar="TASK", help="retrieval, vqa or nlvr2")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of output_dir")
    _add_questions(run)
    return parser


def evaluation_parser(purpose: str, example: str) -> Parser:
    """Make the parser of --task, --config, --print_config and key=value."""
    parser = _parser("[--task TASK] [--config FILE] [--print_config] checkpoint=RUN [key=value ...]", purpose, example)
    parser.add_argument(
        "--config", type=expanded, metavar="FILE", help="run configuration, YAML (default: that of the run)"
    )
    parser.add_argument("--task", metavar="TASK", help="retrieval, vqa or nlvr2 (default: what RUN was fine-tuned for)")
    _add_questions(parser)
    return parser


def _parser(usage: str, purpose: str, example: str) -> Parser:
    parser = Parser(
        prog=f"deepspeed {os.path.relpath(sys.argv[0])}" if sys.argv[0] else None,
        usage=f"%(prog)s {usage}",
        description=purpose,
        epilog=_HELP.lstrip("\n") + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    return parser


def _add_questions(group: argparse._ActionsContainer) -> None:
    group.add_argument("--print_config", action="store_true", help="print the resolved run configuration and stop")
    group.add_argument("-h", "--help", action="help", help="print this and stop")
    group.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher


def read_options(
    parser: Parser, resolved: Callable[[argparse.Namespace], Config], root: type[Config]
) -> tuple[argparse.Namespace, Config | None]:
    """Parse options and run configuration; None where the command line only asked something, now answered.

    resolved: makes the configuration, of the type `root`, from the options.
    """
    options = parser.parse_intermixed_args()  # key=value may stand before and after options
    questions = [a.removesuffix("=?").removesuffix("?") for a in options.overrides if a == "?" or a.endswith("=?")]
    if questions:
        from sacl_ds.config_help import explain

        _say(explain(questions, root))
        return options, None
    run = resolved(options)
    if options.print_config:
        _say(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).rstrip())
        return options, None
    if getattr(options, "ds_config", "") is None:
        raise UserError("--ds_config is missing, e.g. --ds_config ds_configs/zero2.json; see --help")
    check_hostfile()
    return options, run


def pretraining_config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.config, options.overrides)


def exit_status(main: Callable[[], int | None]) -> int:
    """Run `main` and return its exit status; a failure is printed as one line by the ranks that must say it."""
    restarts.die_with_supervisor()
    guard: Callable[[], Guard | None] = current
    try:
        if "RANK" not in os.environ:  # not started by deepspeed or torchrun
            from sacl_ds.launcher import take_place

            take_place()
        return main() or Exit.DONE
    except Stopped as stop:
        if _first():
            print(f"{stop}; --resume goes on from there", flush=True)
        return Exit.STOPPED
    except UserError as error:
        # what every rank meets alike, the first one says; what one rank alone met, that one
        alone = _in_a_job() and not isinstance(error, SharedError)
        if _first() or alone:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if held := guard():
            held.failed(str(error), alone, mistake=True)
            if not (_first() or alone):
                held.let_the_first_speak(_SECONDS_TO_SPEAK)
        elif not (_first() or alone):  # the launcher ends all ranks when one has ended: not before the first has spoken
            time.sleep(_SECONDS_TO_SPEAK)
        return Exit.MISTAKE
    except Fault as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if held := guard():
            held.failed(str(error), True)
        return Exit.FAULT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        return _unforeseen(error, guard())


def _unforeseen(error: Exception, guard: Guard | None) -> int:
    rank = os.environ.get("RANK", "0")
    if not isinstance(error, OSError) and any(sign in str(error) for sign in _PEER_GONE):
        if guard:
            guard.wait_for_the_cause(_SECONDS_TO_SPEAK)
        print(f"rank {rank} stops: another rank ended first, whose own line says why", file=sys.stderr, flush=True)
        return Exit.FAULT
    traceback.print_exc()
    if isinstance(error, OSError) and error.errno in FULL:
        said = f"the disk is full: {error.filename or 'of output_dir'}; make room, and go on with --resume"
    else:
        first = next(iter(str(error).splitlines()), "")
        said = f"{type(error).__name__}: {first}"
    print(f"error: rank {rank}: {said}", file=sys.stderr, flush=True)
    if guard:
        guard.failed(said, True)
    return Exit.FAULT


def under_supervision(run: TrainingConfig) -> int | None:
    """If `train.max_restarts` > 0 and we are not supervised yet, run as a supervised child and return its exit code.

    Returns None where this process itself is to train. Raises UserError.
    """
    if not run.train.max_restarts or restarts.supervised():
        return None
    if run.output_dir is None:
        raise UserError("train.max_restarts needs output_dir, by which a restart finds the run; give output_dir=FOLDER")
    return restarts.supervise([sys.executable, "-u", *sys.argv], run.train.max_restarts)


def should_resume(options: argparse.Namespace, run: TrainingConfig) -> bool:
    """Return whether this start resumes: as asked, or as a restart that has a checkpoint."""
    again = restarts.attempt() > 0 and run.output_dir is not None
    return bool(options.resume) or (again and restarts.holds_checkpoint(Path(run.output_dir or ".")))


def _in_a_job() -> bool:
    """Return whether this process has joined the others, without importing torch, which takes seconds."""
    if "torch" not in sys.modules:
        return False
    from sacl_ds.distributed import initialised

    return initialised()


_SECONDS_TO_SPEAK = 30.0
_PEER_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",  # gloo's, NCCL's
)  # fmt: skip


def check_hostfile() -> None:
    """Raise UserError if the launcher's --hostfile does not exist: DeepSpeed would go on with this machine alone."""
    import psutil

    try:
        lines = [process.cmdline() for process in psutil.Process().parents()]
    except psutil.Error:
        return
    for words in lines:
        if any(Path(word).name in ("deepspeed", "ds") for word in words[:2]):
            named = launcher_option(words, ("--hostfile", "-H"))
            if named is not None and not Path(named).is_file():
                raise UserError(f"--hostfile {named} does not exist; correct the path, or leave it out for one machine")


def launcher_option(words: list[str], names: tuple[str, ...]) -> str | None:
    """Return the value of a launcher's own option from its command line, which ends at the script, or None."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.endswith(".py"):
            return None  # from here on the script's own
        name, separator, value = word.partition("=")
        if name in names:
            return value if separator else after
    return None


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _first():
        print(text, flush=True)
