"""The ``condgan`` command: parse (:mod:`condgan.arguments`), call one library function, print.

A command returns its report, which :func:`main` prints on standard output as text or as one JSON object. All else goes
to standard error. What is slow to import is imported inside the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from condgan.arguments import DRAWS, parser

if TYPE_CHECKING:
    from condgan.hub import PretrainedModel
    from condgan.presets import TrainConfig
    from condgan.realism import RealismReport
    from condgan.results import Drawing

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Report(NamedTuple):
    """What a command has to say."""

    data: dict[str, Any]
    """What ``--json`` prints."""
    text: str
    """What is printed without it."""
    lost: str = ""
    """What could not be written after all, though there is a report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None for those of this process.

    Returns:
        The exit status: 0, 1 for a failure that one line on standard error explains, 130 after Ctrl-C.

    Raises:
        SystemExit: 2 for wrong usage, 0 after ``--help`` and ``--version``.
    """
    for closed in ("stdout", "stderr"):
        if getattr(sys, closed) is None:  # as `2>&-` has it
            setattr(sys, closed, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a terminal has ASCII only
    try:
        args = parser().parse_args(argv)
    except KeyboardInterrupt:
        print("condgan: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    rank, name = 0, args.parser.prog
    try:
        args.rank = rank = _rank(args)
        if rank:
            name = f"{name}, rank {rank}"
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), _stopped_by_sigterm(args.command):
            _show_warnings_of_users()
            warnings.showwarning = lambda message, *_, **__: print(f"{name}: warning: {message}", file=sys.stderr)
            report = COMMANDS[args.command](args)
        # The tasks of a job array, each with a part of a set, report each its own.
        if rank == 0 or (args.command == "generate" and "LOCAL_RANK" not in os.environ):
            print(json.dumps(report.data, allow_nan=False) if args.json else report.text, flush=True)
        if report.lost:
            print(f"{name}: error: {report.lost}", file=sys.stderr)
            return EXIT_FAILED
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{name}: interrupted{args.after_interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who read our output has gone, as in `condgan info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return EXIT_FAILED
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        print(f"{name}: error: {_explain(error)}", file=sys.stderr)
        return EXIT_FAILED
    return 0


@contextlib.contextmanager
def _stopped_by_sigterm(command: str) -> Iterator[None]:
    """SIGTERM is like Ctrl-C, so that no half-written file stays; ``train`` has a way of its own."""
    if command == "train" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warnings_of_users() -> None:
    """Each warning once, whatever PYTHONWARNINGS says; those for developers are not shown, as Python has it."""
    warnings.simplefilter("default")
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def _explain(error: Exception) -> str:
    """One line; of the system's own errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {os.fsdecode(error.filename)!r}" if isinstance(error.filename, (str, bytes)) else ""
        advice = ": make room and run the same again" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}{advice}"
    return " ".join(str(error).split()) or type(error).__name__


# --- the commands -------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> Report:
    from condgan.models import IterativeGenerator

    if args.source is not None:
        return _generate_set(args)
    if not args.objects:
        args.parser.error("the following arguments are required: OBJECT (or --from)")
    if args.shard_size is not None:
        args.parser.error("argument --shard-size: needs --from, whose tar files it is about")
    options = _drawing_options(args)
    generator = IterativeGenerator.from_pretrained(args.model)
    return _save(generator.generate(args.objects, **options), args)


def _generate_set(args: argparse.Namespace) -> Report:
    """Draw a list of scenes into a folder."""
    from condgan.models import IterativeGenerator
    from condgan.ranks import launched, own_device
    from condgan.shards import draw_set

    if args.objects:
        args.parser.error("argument --from: the list says what to draw: give no OBJECT beside it")
    for option in ("at", "turns", "grid", "verify"):
        if getattr(args, option):
            args.parser.error(f"argument --{option}: not allowed with argument --from")
    if args.out is None:
        args.parser.error("argument --from: needs --out, the folder of the set")
    _settle_redraw(args)
    args.after_interrupt = ": run the same command again to go on"
    device, (rank, count) = own_device(), launched()
    generator = IterativeGenerator.from_pretrained(args.model).to(device)
    report = draw_set(
        generator,
        args.source,
        args.out,
        num_images=args.num,
        seed=args.seed or 0,
        best_of=args.best_of,
        redraw=args.redraw,
        batch_size=args.batch_size,
        **({} if args.shard_size is None else {"shard_size": args.shard_size}),
        rank=rank,
        count=count,
        progress=rank == 0 and sys.stderr.isatty(),
    )
    whose = f", by process {rank} of {count}" if count > 1 else ""
    return Report(
        {**dataclasses.asdict(report), "out": str(report.out)},
        f"{report.out}: {_counted(report.pictures, 'picture', 'pictures')} in "
        f"{_counted(report.shards, 'tar file', 'tar files')}; "
        f"{report.drawn:,} drawn now{whose}, {report.skipped:,} were there",
    )


def _counted(number: int, one: str, several: str) -> str:
    """A number and what it is of."""
    return f"{number:,} {one if number == 1 else several}"


def _rank(args: argparse.Namespace) -> int:
    """The number of this process among those that share the work; what cannot be shared each does for itself."""
    shared = args.command == "train" or (args.command == "generate" and args.source is not None)
    if "RANK" not in os.environ or not shared:
        return 0  # without PyTorch, which condgan.ranks needs and which takes seconds to import
    from condgan.ranks import launched

    return launched()[0]


def _add(args: argparse.Namespace) -> Report:
    from condgan.models import IterativeGenerator

    options = _drawing_options(args)
    generator = IterativeGenerator.from_pretrained(args.model)
    return _save(generator.add(args.image, args.objects, **options), args)


def _drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``generate`` and ``add`` are both told; wrong usage ends here, before anything is drawn."""
    from condgan.requests import MAX_PICTURES
    from condgan.results import check_picture_path

    _settle_redraw(args)
    for option in ("num", "best_of"):
        if getattr(args, option) > MAX_PICTURES:
            flag = option.replace("_", "-")
            args.parser.error(f"argument --{flag}: at most {MAX_PICTURES:,}, got {getattr(args, option):,}")
    if args.at and len(args.at) != len(args.objects):
        args.parser.error(
            f"argument --at: give one for each object, `none` to leave it to the model: there are {len(args.objects)} "
            f"objects, got {len(args.at)}"
        )
    args.out = args.out or Path(args.default_out)
    check_picture_path(args.out)
    return {
        "num_images": args.num,
        "seed": args.seed,
        "at": args.at,
        "best_of": args.best_of,
        "redraw": args.redraw,
        "batch_size": args.batch_size,
    }


def _settle_redraw(args: argparse.Namespace) -> None:
    """Refuse ``--redraw`` without ``--best-of``; where it was left out, whole pictures are drawn again."""
    if args.redraw and args.best_of == 1:
        args.parser.error("argument --redraw: needs --best-of, how often to draw again at most")
    args.redraw = args.redraw or "picture"


def _save(drawing: Drawing, args: argparse.Namespace) -> Report:
    """Write what was drawn, as pictures or as a sheet."""
    from condgan.results import save_image

    out = args.out
    verified = drawing.verify() if args.verify else None
    pictures = [drawing.metadata(i) for i in range(len(drawing.seeds))]
    if args.grid or args.turns:
        save_image(drawing.grid(turns=args.turns), out, {"pictures": pictures})
        files = [out] * len(pictures)
    else:
        files = drawing.save(out)
    lines = []
    for i, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        picture["file"] = str(file)
        picture["score"] = None if drawing.scores is None else drawing.scores[i]
        picture["passes"] = None if drawing.passes is None else drawing.passes[i]
        picture["verified"] = None
        score = ""
        if drawing.scores is not None and drawing.passes is not None:
            score = f", score {drawing.scores[i]:.3f}, {_counted(drawing.passes[i], 'pass', 'passes')}"
        lines.append(f"{file}: {', '.join(drawing.conditions[i])}; seed {drawing.seeds[i]}{score}")
        if verified is not None:
            findings = verified[i].items()
            picture["verified"] = {name: {"found": found, "probability": value} for name, (found, value) in findings}
            lines += [
                f"  {name}: {'found' if found else 'not found'}, {value:.3f}" for name, (found, value) in findings
            ]
    return Report({"files": [str(file) for file in dict.fromkeys(files)], "pictures": pictures}, "\n".join(lines))


def _info(args: argparse.Namespace) -> Report:
    from condgan.hub import CARD_NAME, find_checkpoint
    from condgan.remote import CONFIG_NAME, WEIGHTS_NAME

    classes = _model_classes()
    generator = classes["IterativeGenerator"]
    name = str(generator.default_pretrained if args.model is None else args.model)
    folder = find_checkpoint(name)
    model = classes.get(_model_type(folder / CONFIG_NAME), generator).from_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    file_bytes = (folder / WEIGHTS_NAME).stat().st_size
    config = dataclasses.asdict(model.config)
    objects = config.pop("objects", ())  # a counter and a noise encoder know no names
    card_file = folder / CARD_NAME
    card = ""
    with contextlib.suppress(OSError):  # there is none, or it may not be read
        read = card_file.read_text(encoding="utf-8", errors="replace")
        card = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in read)
    data = {
        "model": name,
        "model_type": type(model).__name__,
        "folder": str(folder),
        "parameters": parameters,
        "file_bytes": file_bytes,
        "objects": objects,
        "config": config,
        "card": card,
    }
    width = max(map(len, config))
    rows = ((key, ", ".join(map(str, value)) if isinstance(value, tuple) else value) for key, value in config.items())
    text = [
        f"{name}: {type(model).__name__}, {parameters:,} parameters, {file_bytes / 1e6:.1f} MB",
        f"in {folder}",
        "",
        *(f"{key:<{width}}  {value}" for key, value in rows),
        "",
        *([textwrap.fill(f"{len(objects)} objects: {', '.join(objects)}", 100), ""] if objects else []),
        _introduction(card),
    ]
    return Report(data, "\n".join(text).rstrip())


def _model_classes() -> dict[str, type[PretrainedModel]]:
    """Every class that has checkpoints, by its name."""
    from condgan.classifier import SceneClassifier
    from condgan.counter import ObjectCounter
    from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder

    classes = (IterativeGenerator, DiffDiscriminator, NoiseEncoder, SceneClassifier, ObjectCounter)
    return {cls.__name__: cls for cls in classes}


def _model_type(config_file: Path) -> str:
    """What a ``config.json`` says, "" if it says nothing; loading the model tells what is wrong with it."""
    try:
        return str(json.loads(config_file.read_bytes())["model_type"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _introduction(card: str) -> str:
    """The text of a model card before its first section, without the YAML header."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    return re.split(r"^## ", body, maxsplit=1, flags=re.MULTILINE)[0].strip()


def _list(args: argparse.Namespace) -> Report:
    from condgan.hub import list_pretrained

    classes = _model_classes()
    types = [*classes] if args.all else ["IterativeGenerator"]
    models = [{"name": name, "model_type": kind} for kind in types for name in list_pretrained(kind)]
    lines = [f"{model['name']:<24} {model['model_type']}" if args.all else model["name"] for model in models]
    return Report({"models": models, "default": classes["IterativeGenerator"].default_pretrained}, "\n".join(lines))


def _render(args: argparse.Namespace) -> Report:
    from condgan.render import render_dataset

    report = render_dataset(args.out, args.scenes, args.seed, height=args.height, progress=sys.stderr.isatty())
    return Report(dataclasses.asdict(report), report.summary())


def _prepare(args: argparse.Namespace) -> Report:
    from condgan.prepare import prepare

    report = prepare(args.data_dir, out=args.out, image_size=args.image_size, progress=sys.stderr.isatty())
    return Report({**dataclasses.asdict(report), "path": str(report.path)}, report.summary())


def _train(args: argparse.Namespace) -> Report:
    from condgan.presets import find_preset, with_fields

    try:
        preset = find_preset(args.preset)
    except ValueError as error:
        args.parser.error(f"argument --preset: {error}")
    shortcuts = {"images": args.images, "batch_scenes": args.batch_scenes, "seed": args.seed}
    assignments = [*args.set, *(f"{field}={value}" for field, value in shortcuts.items() if value is not None)]
    try:
        config = with_fields(preset, assignments)
    except ValueError as error:
        args.parser.error(f"argument --set: {error}")
    from condgan.allocator import keep_freed_memory
    from condgan.runs import train  # not needed to refuse what is wrong above

    if args.rank == 0:
        _warn_of_missing_stages(config)
    keep_freed_memory()
    progress = sys.stderr.isatty()
    generator = train(args.data, args.out, config, device=args.device, accumulate=args.accumulate, progress=progress)
    model = args.out / "model"
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    return Report(
        {"out": str(args.out), "model": str(model), "images": config.images, "parameters": parameters},
        f"{model}: trained on {config.images:,} pictures; draw with it:\n"
        f'  condgan generate "{generator.vocabulary.names[0]}" --model {shlex.quote(str(model))}',
    )


def _warn_of_missing_stages(config: TrainConfig) -> None:
    """Say if a shortened run ends before its adversarial stage, or before its learning rates would have fallen."""
    images = config.images
    if config.reconstruction_images >= images > 0:
        warnings.warn(
            f"images={images:,} are reconstruction only (reconstruction_images={config.reconstruction_images:,}): the "
            f"discriminator never learns; ask for more, or for a shorter stage, such as --set "
            f"reconstruction_images={images // 8} --set decay_images={images // 4}",
            stacklevel=2,
        )
    elif config.decay_images > images:
        warnings.warn(
            f"learning rates fall over decay_images={config.decay_images:,} pictures, more than images={images:,}, and "
            f"so begin low; to have them fall at the end, give --set decay_images={images // 4}",
            stacklevel=2,
        )


def _evaluate(args: argparse.Namespace) -> Report:
    from condgan.results import check_picture_path, save_image

    if args.conditions is None and not args.realism:
        args.parser.error("the following arguments are required: --conditions (or --realism)")
    if args.realism and args.data is None:
        args.parser.error("argument --realism: needs --data, the real pictures to tell the drawn ones from")
    if args.sheet and not args.realism:
        args.parser.error("argument --sheet: needs --realism, whose pictures it shows")
    if args.conditions is None:
        for option in ("draws", "judge", "counter"):
            if getattr(args, option) is not None:
                args.parser.error(f"argument --{option}: needs --conditions, whose pictures it is about")
    _settle_redraw(args)
    if args.sheet and (args.sheet.suffix.lower() != ".png" or not args.sheet.parent.is_dir()):
        args.parser.error(f"argument --sheet: {str(args.sheet)!r} is not a .png file in a folder that is there")
    if args.sheet:
        check_picture_path(args.sheet)
    found, failures = None, []
    try:  # the file is opened first: nobody wants to hear after an hour that it cannot be written
        with _written_whole(args.out) if args.out else contextlib.nullcontext() as file:
            found = _measured(args)
            if file:
                file.write(json.dumps(found.data, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        if found is None:
            raise
        failures.append(
            f"--out: {str(args.out)!r} cannot be written ({error.strerror}); all that was measured is printed"
        )
    if args.sheet and found.realism is not None:
        try:
            save_image(found.realism.sheet(), args.sheet, {"realism": found.realism.to_dict()})
        except OSError as error:
            failures.append(str(error))
    return Report(found.data, found.text, "; ".join(filter(None, (found.lost, *failures))))


class Measured(NamedTuple):
    """What ``condgan evaluate`` has found."""

    data: dict[str, Any]
    text: str
    realism: RealismReport | None
    lost: str
    """Why the trial of told apart is not there, if it was asked for."""


def _measured(args: argparse.Namespace) -> Measured:
    """Both parts of an evaluation, or the one that is asked for."""
    from condgan.evaluation import evaluate
    from condgan.models import IterativeGenerator
    from condgan.realism import check_data, realism_report

    model_name = args.model or IterativeGenerator.default_pretrained
    data: dict[str, Any] = {"model": model_name}
    texts, realism = [], None
    generator = IterativeGenerator.from_pretrained(args.model).to(args.device)
    if args.realism:
        check_data(args.data, generator)  # before the first part, which takes minutes
    progress = sys.stderr.isatty()
    if args.conditions is not None:
        report = evaluate(
            generator,
            args.conditions,
            draws=args.draws or DRAWS,
            judge=args.judge or "judge",
            counter=args.counter or "counter",
            data=args.data,
            best_of=args.best_of,
            redraw=args.redraw,
            seed=args.seed,
            progress=progress,
            model_name=model_name,
        )
        data |= report.to_dict()
        texts.append(str(report))
    if args.realism:
        try:
            realism = realism_report(
                generator,
                args.data,
                first_seed=args.seed,
                best_of=args.best_of,
                redraw=args.redraw,
                progress=progress,
                model_name=model_name,
            )
        except (KeyboardInterrupt, ValueError, OSError, RuntimeError, MemoryError) as error:
            if args.conditions is None:
                raise
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else _explain(error)
            return Measured(data, texts[0], None, f"--realism: {reason}; what was measured before is printed")
        data["realism"] = realism.to_dict()
        texts.append(str(realism))
    return Measured(data, "\n\n".join(texts), realism, "")


def _export(args: argparse.Namespace) -> Report:
    from condgan.export import export
    from condgan.models import IterativeGenerator

    name = args.model or IterativeGenerator.default_pretrained
    found = export(IterativeGenerator.from_pretrained(args.model), args.out, progress=sys.stderr.isatty())
    files = [f"  {file}, {size / 1e6:.1f} MB" for file, size in found.files.items()]
    return Report(
        {
            "model": name,
            "format": args.format,
            "out": str(found.folder),
            "files": found.files,
            "furthest_levels": found.levels,
        },
        "\n".join(
            [
                f"{found.folder}: {name}, whose pictures the graphs draw within {found.levels:.0f} of 256 levels",
                *files,
            ]
        ),
    )


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of ``path`` when the block ends well, and is removed when it does not.

    Raises:
        OSError: there is no such folder, or it cannot be written.
    """
    from condgan.files import replacing

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(stack.enter_context(replacing(path)).open("w", encoding="utf-8"))
        except OSError as error:
            raise OSError(f"cannot write {str(path)!r} ({error.strerror}): give --out another place") from error
        yield file


COMMANDS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "generate": _generate,
    "add": _add,
    "info": _info,
    "list": _list,
    "render": _render,
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
}
"""What each command does, by the names of :func:`condgan.arguments.parser`."""
