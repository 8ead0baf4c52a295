"""What all entry points share: flags, and one line for a user's mistake."""

from collections.abc import Callable, Sequence
import contextlib
import os
import re
import sys
import traceback
from typing import Any

from absl import app, flags, logging

from resnet_jax import compilation, config as config_lib
from resnet_jax.errors import UsageError

_OVERRIDE = re.compile(r"--?config\.([^=]+)(?:=(.*))?", re.DOTALL)


def define_config_flags() -> None:
    """Defines ``--config``; its fields are set by ``--config.a.b=value``."""
    flags.DEFINE_string("config", None, "A config file, or the bare name of a shipped one (as in cifar_20).")


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits ``--config.a.b=value`` (or ``--config.a.b value``) off the arguments."""
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if not match:
            rest.append(argument)
            continue
        name, value = match.groups()
        value = next(arguments, None) if value is None else value
        if value is None or value.startswith("--"):
            raise UsageError(f"--config.{name} needs a value: --config.{name}=VALUE")
        overrides.append((name, value))
    return rest, overrides


def run(main: Callable[..., int | None], usage: str, needs: Sequence[str] = (), takes_arguments: bool = False) -> None:
    """Runs an entry point: parses the flags, calls ``main(overrides)``, and exits with what it returns.

    Args:
      main: the entry point; ``overrides`` are the config fields that the command line sets.
      usage: what ``--help`` says first.
      needs: flags that must be given.
      takes_arguments: whether arguments that are no flags are meant: ``main(overrides, arguments)`` gets them.
    """
    overrides: list[tuple[str, str]] = []
    sys.modules["__main__"].__doc__ = usage

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest, found = take_overrides(argv)
            overrides.extend(found)
            return flags.FLAGS(rest)
        except (flags.Error, UsageError) as error:
            _fail(error)

    def body(argv: Sequence[str]) -> int:
        try:
            if len(argv) > 1 and not takes_arguments:
                raise UsageError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
            for name in needs:
                if not flags.FLAGS[name].value:
                    raise UsageError(f"--{name} is needed; --help says more")
            compilation.use_own_convolutions()
            compilation.keep_programs()
            status = main(overrides, list(argv[1:])) if takes_arguments else main(overrides)
            if _peers():
                _peers().leave()
            return status or 0
        except UsageError as error:
            _tell_others(2, str(error))
            _fail(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            if _peers():
                _peers().dismiss(130, "interrupted")
            sys.stdout.flush()
            os._exit(130)  # JAX's threads may be at work, which an orderly end would pull the ground from under.
        except BrokenPipeError:  # Whoever read our output has seen enough.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            return 0
        except Exception as error:
            _tell_others(1, f"{type(error).__name__}: {error}", error)
            raise

    _quiet()
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in sys.argv[1:]):
        with contextlib.suppress(BrokenPipeError):  # Whoever reads it may have seen enough.
            print(f"{usage}\n\n{_flag_help()}", flush=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(0)
    app.run(body, flags_parser=parse)


def _peers() -> Any:
    """The processes of this run, where there are several."""
    module = sys.modules.get("resnet_jax.peers")  # Importing it would start JAX.
    return module and module.peers()


def _tell_others(status: int, message: str, unforeseen: Exception | None = None) -> None:
    """Ends the other processes of the run, where there are any, and this one, which an orderly end would keep waiting.

    Args:
      status: the exit status.
      message: why.
      unforeseen: an error whose reason may be that another was lost; then that is said.
    """
    peers = _peers()
    if peers:
        if unforeseen:
            peers.wait_for_verdict(unforeseen)
            traceback.print_exc()
        peers.fail(status, " ".join(message.split()))


def _flag_help() -> str:
    defined = flags.FLAGS.flags_by_module_dict()
    ours = [module for module in defined if "resnet_jax" in module or module == sys.argv[0]]
    own = [flag for module in ours for flag in defined[module]]
    lines = ["Flags:"]
    for flag in own:
        default = "" if flag.default is None else f" (default {flag.default})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    if "config" in flags.FLAGS:
        lines += ["", config_lib.describe_fields()]
    return "\n".join(lines)


def _quiet() -> None:
    """Libraries' chatter off; warnings stay."""
    logging.set_verbosity(logging.WARNING)


def _fail(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
