"""Flags and errors, wrapped once for every command.

Exit status: 0 success; 2 for an unusable flag, config, file or shape, with one message and no
traceback (unless `--debug`); 143 (SIGTERM), 130 (Ctrl-C) or 129 (SIGHUP) for a run that was ended
by a signal after saving; 1 for anything else.

Flags are absl's, which by itself exits with 1 on a bad flag. Config fields (`--config.model.depth=6`)
are removed from the command line first and applied by `config.apply_overrides`, so that they work
the same way on a config file and on the stored config of a workdir, and a mistyped field gets a suggestion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence, Set
from pathlib import Path

from absl import flags

from uwm_jax import host_memory, host_tpu
from uwm_jax.ending import drop_output, exit_process
from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.files import Place, is_remote, local_path, place
from uwm_jax.hub import runs as hub_runs
from uwm_jax.reading import cause_of, no_room
from uwm_jax.storage.errors import told

FLAGS = flags.FLAGS

USAGE_STATUS = 2
_HELP = {"--help", "-h", "-help"}
INTERRUPTED_STATUS = 130

# Errors that user-given paths can cause; other OSErrors (a full disk) are not the fault of the command line.
_PATH_ERRORS: tuple[int, ...] = (
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
)
_PATH_ERRORS += (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.ENXIO)

flags.DEFINE_bool("debug", False, "show the traceback behind an error message")

DescribeConfig = Callable[[str, list[tuple[str, str]]], list[str]]

_describe_config: DescribeConfig | None = None
_takes_arguments = False
_passes_on = False


def accept_config_overrides(describe: DescribeConfig) -> None:
    """Called by commands that read a config: `--config.any.field=value` becomes part of their flags.

    Args:
      describe: lines of `--help` about the fields of a config, from the value of `--config` ("" without one) and the
        overrides; `uwm_jax.config_help.describe`.
    """
    global _describe_config
    _describe_config = describe


def accept_arguments() -> None:
    """Called by commands that take positional arguments; other commands refuse them."""
    global _takes_arguments
    _takes_arguments = True


def pass_on() -> None:
    """Called by commands that hand what follows `--` to another program, as `Call.passed_on`; others refuse it."""
    global _passes_on
    _passes_on = True


@dataclasses.dataclass(frozen=True)
class Call:
    """A command as it was called, besides its flags.

    Attributes:
      arguments: the positional arguments.
      passed_on: what follows `--`, unparsed.
      overrides: the `--config.any.field=value` pairs, in order.
      line: the command as it can be rerun: `("python", "-m", "uwm_jax.train", "--workdir=...")`.
      began: when the process was started, and when its imports were done, on the clock of `time.perf_counter`; None if
        it is not a process of its own, or the system does not report when a process was started.
    """

    arguments: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    line: tuple[str, ...] = ()
    began: tuple[float, float] | None = None
    passed_on: tuple[str, ...] = ()

    @property
    def changed(self) -> list[str]:
        """The names of the fields that `overrides` change, in order."""
        return [name for name, _ in self.overrides]


def required(name: str) -> str:
    """The value of a required string flag."""
    value = FLAGS[name].value
    if not value:
        raise UserError(f"--{name.replace('_', '-')} is required. Run with --help to see the flags.")
    return value


def required_path(name: str) -> Place:
    """The path of a required flag, as `files.place`; `workdir` must not be a file or lie below one."""
    value = required(name)
    path = place(value, f"--{name.replace('_', '-')}")
    if name == "workdir":
        there: Place = path
        if isinstance(path, Path):
            there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if there.is_file() if is_remote(there) else not there.is_dir():
            raise UserError(f"--workdir={value}: {there} is a file. Expected a directory, existing or new.")
    return path


def optional_path(name: str) -> Place | None:
    """The path of an optional flag, as `files.place`; None if the flag is absent."""
    return required_path(name) if FLAGS[name].value else None


def required_local_path(name: str) -> Path:
    """The path of a required flag that must be local, as `files.local_path`."""
    return local_path(required(name), f"--{name.replace('_', '-')}")


def optional_local_path(name: str) -> Path | None:
    """The path of an optional flag that must be local; None if the flag is absent."""
    return required_local_path(name) if FLAGS[name].value else None


def required_run() -> Place:
    """The workdir that `--workdir` names, of a run that is only read: a path, or a repository of the hub."""
    value = required("workdir")
    found = hub_runs.workdir(value, "--workdir")
    return found if hub_runs.origin_of(found) else required_path("workdir")


def export_folder() -> Path | None:
    """The export folder that `--export` names, a path or a repository of the hub; None if the flag is absent."""
    value = FLAGS["export"].value
    return hub_runs.export(value, "--export") if value else None


def need_extra(extra: str, *modules: str) -> None:
    """Raises UserError where one of these modules, which an extra of the package brings, is not installed."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)}: not installed. Run `pip install 'uwm-jax[{extra}]'`.")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as text with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)


Main = Callable[[Call], None]


def run(main: Main, define_flags: Callable[[], None] | None = None) -> None:
    """Parses the flags, calls `main` and exits the process."""
    began = _beginning()
    gc.freeze()  # objects created by imports stay alive: the collector need not scan them
    host_memory.keep_freed()
    host_tpu.quiet_where_absent()
    exit_process(call(main, sys.argv, define_flags, began))


def command(main: Main, define_flags: Callable[[], None] | None = None) -> Callable[[], None]:
    """`run` with these arguments bound: the entry point of `python -m` and of the console script."""
    return functools.partial(run, main, define_flags)


def _beginning() -> tuple[float, float] | None:
    """`Call.began` of this process, whose imports are done now; its start is known to 10 ms."""
    with contextlib.suppress(OSError, AttributeError, ValueError, IndexError):  # no /proc
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, since the boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        now = time.perf_counter()
        return now - age, now
    return None


def call(
    main: Main,
    argv: Sequence[str],
    define_flags: Callable[[], None] | None = None,
    began: tuple[float, float] | None = None,
) -> int:
    """Like `run`, but returns the exit status.

    Args:
      define_flags: declares the command's flags; they are removed afterwards, so that several commands, which share
        flag names such as --workdir, can be called in one process.
      began: as `Call` has it.
    """
    global _describe_config, _takes_arguments, _passes_on
    before = set(FLAGS)
    try:
        if define_flags:
            define_flags()
        return _call(main, argv, set(FLAGS) - before, began)
    finally:
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)
        if define_flags:
            _describe_config, _takes_arguments, _passes_on = None, False, False


def _call(main: Main, argv: Sequence[str], own: Set[str], began: tuple[float, float] | None) -> int:
    debug = any(a.lower() in ("-debug", "--debug", "--debug=true", "--debug=t", "--debug=1") for a in argv)
    try:
        if _HELP & set(argv):
            print(sys.modules[main.__module__].__doc__ or "", "Flags:", *_flag_lines(own), sep="\n")
            print(*_config_lines(argv), sep="\n")
            return 0
        module = _module_name(main)
        started = ["-m", module] if module != "__main__" else [argv[0]]  # `python uwm_jax/train.py`
        own_argv, passed_on = _split(argv)
        arguments, overrides = _parse(own_argv)
        main(Call(tuple(arguments), tuple(overrides), ("python", *started, *argv[1:]), began, passed_on))
    except Preempted as e:
        _tell(str(e))
        return e.status
    except (UserError, RunError) as e:
        _tell(f"error: {e}", with_traceback=debug)
        return USAGE_STATUS if isinstance(e, UserError) else 1
    except BrokenPipeError as e:
        drop_output(sys.stdout)
        _tell(f"error: stdout is closed ({e.strerror}).", with_traceback=debug)
        return 1
    except OSError as e:
        message = _os_error(e) or _of_bucket(e)
        _tell(message, with_traceback=debug or not message)
        return USAGE_STATUS if e.errno in _PATH_ERRORS else 1
    except KeyboardInterrupt:
        _tell("interrupted")
        return INTERRUPTED_STATUS
    except Exception as e:
        full = no_room(e) and f"error: {cause_of(e)}. Free some space and rerun the same command."
        message = full or _of_bucket(e)
        _tell(message, with_traceback=debug or not message)
        return 1
    return 0


def _os_error(error: OSError) -> str:
    """The message for an OSError; "" if it names no file or no reason."""
    if no_room(error):
        where = error.filename or "the output"
        return f"error: {where} cannot be written: {error.strerror}. Free some space and rerun the same command."
    if error.errno is None or error.filename is None:
        return ""
    rest = "Check the paths of the flags." if error.errno in _PATH_ERRORS else "Fix this and rerun the same command."
    return f"error: {error.filename}: {error.strerror}. {rest}"


def _of_bucket(error: Exception) -> str:
    """The message for a library's failure to reach a bucket; "" for any other error."""
    message = told(error)
    return message and f"error: {message}"


def _tell(message: str, with_traceback: bool = False) -> None:
    """Prints to stderr, after the traceback of the current exception; does nothing if stderr is closed."""
    text = (traceback.format_exc() if with_traceback else "") + (message and f"{message}\n")
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        drop_output(sys.stderr)


def _flag_lines(own: Set[str]) -> list[str]:
    """Help of a command's flags, in all modules that declare them; of the main module's if it has none."""
    declared = FLAGS.flags_by_module_dict().items()
    modules = [module for module, defined in declared if any(flag.name in own for flag in defined)]
    texts = [FLAGS.module_help(module) for module in modules] or [FLAGS.main_module_help()]
    return [line for text in texts for line in text.strip().split("\n")[1:]]  # without the module's name


def _config_lines(argv: Sequence[str]) -> list[str]:
    """The help of the config fields of a command that takes them, of its `--config` where that is given."""
    if _describe_config is None:
        return []
    overrides: list[tuple[str, str]] = []
    with contextlib.suppress(UserError):  # help is wanted most when another flag is wrong
        _, overrides = _parse([a for a in argv if a not in _HELP])
    spec = FLAGS["config"].value if "config" in FLAGS else ""
    return _describe_config(spec or "", overrides)


def _module_name(main: Main) -> str:
    """The command's module, `uwm_jax.train`, also when it runs as `__main__`."""
    spec = getattr(main, "__globals__", {}).get("__spec__")
    return spec.name if spec else main.__module__


def _split(argv: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """The command line up to `--`, and what follows it."""
    if not _passes_on or "--" not in argv:
        return argv, ()
    end = argv.index("--")
    return argv[:end], tuple(argv[end + 1 :])


def _parse(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Sets absl's flags; returns the positional arguments and the overrides."""
    rest, overrides = [argv[0]], []
    arguments = iter(argv[1:])
    for argument in arguments:
        if _describe_config and argument.lstrip("-").startswith("config.") and argument.startswith("-"):
            name, equals, value = argument.lstrip("-").removeprefix("config.").partition("=")
            overrides.append((name, value if equals else next(arguments, "true")))
        elif argument.startswith("--"):
            name, equals, value = argument.partition("=")
            rest.append(name.replace("-", "_").replace("__", "--", 1) + equals + value)
        else:
            rest.append(argument)
    FLAGS.unparse_flags()
    for flag in FLAGS.flags_by_module_dict().values():
        for f in flag:
            f.unparse()
    try:
        found = FLAGS(rest)[1:]
    except (flags.Error, OverflowError) as e:
        raise UserError(f"{e}\nRun with --help to see the flags.") from e
    if found and not _takes_arguments:
        raise UserError(f"unexpected argument {found[0]!r}: flags are written --flag=value.")
    for flag_name, value in FLAGS.flag_values_dict().items():
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"--{flag_name}={value}: expected an integer of at most 63 bits.")
    return found, overrides
