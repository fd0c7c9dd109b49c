"""The ``condgan`` command: parse, call one library function, print.

A command returns its report, which :func:`main` prints on standard output as text or as one JSON object. All else goes
to standard error. What is slow to import is imported inside the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import json
import os
import re
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, get_args, get_origin, get_type_hints

from condgan import __version__

if TYPE_CHECKING:
    from condgan.hub import PretrainedModel
    from condgan.presets import TrainConfig
    from condgan.realism import RealismReport
    from condgan.requests import Place
    from condgan.results import Drawing

DRAWS = 64
"""Pictures a list that ``evaluate`` draws."""
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a terminal has ASCII only
    try:
        args = _parser().parse_args(argv)
    except KeyboardInterrupt:
        print("condgan: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    rank, name = 0, args.parser.prog
    try:
        rank = _rank()
        if rank:
            name = f"{name}, rank {rank}"
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            _show_warnings_of_users()
            warnings.showwarning = lambda message, *_, **__: print(f"{name}: warning: {message}", file=sys.stderr)
            report = args.run(args)
        if rank == 0:
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
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"{name}: error: {_explain(error)}", file=sys.stderr)
        return EXIT_FAILED
    return 0


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
    whose = f", by process 0 of {count}" if count > 1 else ""
    return Report(
        {**dataclasses.asdict(report), "out": str(report.out)},
        f"{report.out}: {_counted(report.pictures, 'picture', 'pictures')} in "
        f"{_counted(report.shards, 'tar file', 'tar files')}; "
        f"{report.drawn:,} drawn now{whose}, {report.skipped:,} were there",
    )


def _counted(number: int, one: str, several: str) -> str:
    """A number and what it is of."""
    return f"{number:,} {one if number == 1 else several}"


def _rank() -> int:
    """The number of this process among those that ``torchrun`` has started."""
    if "RANK" not in os.environ:  # PyTorch, which condgan.ranks needs, takes seconds to import
        return 0
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
    from condgan import hub

    classes = _model_classes()
    generator = classes["IterativeGenerator"]
    name = str(generator.default_pretrained if args.model is None else args.model)
    folder = hub.find_checkpoint(name)
    model = classes.get(_model_type(folder / hub.CONFIG_NAME), generator).from_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    file_bytes = (folder / hub.WEIGHTS_NAME).stat().st_size
    config = dataclasses.asdict(model.config)
    objects = config.pop("objects", ())  # a counter and a noise encoder know no names
    card_file = folder / hub.CARD_NAME
    card = ""
    with contextlib.suppress(OSError):  # there is none, or it may not be read
        card = card_file.read_text(encoding="utf-8", errors="replace")
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


def _prepare(args: argparse.Namespace) -> Report:
    from condgan.prepare import prepare

    report = prepare(args.data_dir, out=args.out, image_size=args.image_size, progress=sys.stderr.isatty())
    return Report({**dataclasses.asdict(report), "path": str(report.path)}, report.summary())


def _train(args: argparse.Namespace) -> Report:
    from condgan.presets import PRESETS

    if args.preset not in PRESETS:
        known = f"{_did_you_mean(args.preset, PRESETS)} The presets are {', '.join(PRESETS)}."
        args.parser.error(f"argument --preset: unknown preset {args.preset!r}: {known}")
    shortcuts = {"images": args.images, "batch_scenes": args.batch_scenes, "seed": args.seed}
    assignments = [*args.set, *(f"{field}={value}" for field, value in shortcuts.items() if value is not None)]
    try:
        config = _with_fields(PRESETS[args.preset], assignments)
    except ValueError as error:
        args.parser.error(f"argument --set: {error}")
    from condgan.allocator import keep_freed_memory
    from condgan.runs import train  # not needed to refuse what is wrong above

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


def _with_fields(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """The config with some fields changed, all at once, each given as ``FIELD=VALUE``.

    Raises:
        ValueError: there is no such field, or its value does not fit.
    """
    hints = _field_types(type(config))
    parts: dict[str, dict[str, Any]] = {"": {}}
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not FIELD=VALUE, such as lr_generator=1e-4")
        if field not in hints:
            raise ValueError(
                f"unknown field {field!r}: {_did_you_mean(field, hints)} The fields are those of "
                "condgan.presets.TrainConfig."
            )
        part, _, name = field.rpartition(".")
        parts.setdefault(part, {})[name] = _field_value(field, text, hints[field])
    changes = parts.pop("")
    nested = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **changes, **nested)


def _field_types(config_class: Any) -> dict[str, Any]:
    """Field name -> type; the fields of a config inside the config are called ``generator.width``."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            types |= {f"{name}.{field}": kind for field, kind in _field_types(hint).items()}
        else:
            types[name] = hint
    return types


def _field_value(field: str, text: str, hint: Any) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: it does not stand for one of that type.
    """
    if get_origin(hint) is tuple:
        return tuple(_field_value(field, item.strip(), get_args(hint)[0]) for item in text.split(","))
    if type(None) in get_args(hint):  # such as `str | None`
        return None if text.lower() == "none" else _field_value(field, text, get_args(hint)[0])
    words = {"true": True, "false": False} if hint is bool else {word: word for word in get_args(hint)}
    if words:
        if text.lower() not in words:
            raise ValueError(f"{field} must be {' or '.join(words)}, got {text!r}")
        return words[text.lower()]
    try:
        return hint(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[hint]
        raise ValueError(f"{field} must be {kind}, got {text!r}") from None


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    return f"did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]!r}?"


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
    lost, found = "", None
    try:  # the file is opened first: nobody wants to hear after an hour that it cannot be written
        with _written_whole(args.out) if args.out else contextlib.nullcontext() as file:
            found = _measured(args)
            if file:
                file.write(json.dumps(found.data, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        if found is None:
            raise
        lost = f"--out: {str(args.out)!r} cannot be written ({error.strerror}); all that was measured is printed"
    if args.sheet and found.realism is not None:
        try:
            save_image(found.realism.sheet(), args.sheet, {"realism": found.realism.to_dict()})
        except OSError as error:
            lost = str(error)
    return Report(found.data, found.text, lost)


class Measured(NamedTuple):
    """What ``condgan evaluate`` has found."""

    data: dict[str, Any]
    text: str
    realism: RealismReport | None


def _measured(args: argparse.Namespace) -> Measured:
    """Both parts of an evaluation, or the one that is asked for."""
    from condgan.evaluation import evaluate
    from condgan.models import IterativeGenerator
    from condgan.realism import realism_report

    model_name = args.model or IterativeGenerator.default_pretrained
    data: dict[str, Any] = {"model": model_name}
    texts, realism = [], None
    generator = IterativeGenerator.from_pretrained(args.model).to(args.device)
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
        realism = realism_report(
            generator,
            args.data,
            first_seed=args.seed,
            best_of=args.best_of,
            redraw=args.redraw,
            progress=progress,
            model_name=model_name,
        )
        data["realism"] = realism.to_dict()
        texts.append(str(realism))
    return Measured(data, "\n\n".join(texts), realism)


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


# --- the arguments ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "condgan",
        description="Draw scenes one object at a time, and train and evaluate the models that do it.",
        epilog='example:\n  condgan generate "red cube" "blue sphere" --seed 7 --out scene.png\n\n'
        "`condgan COMMAND --help` explains a command and shows examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"condgan {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Report], text: str, examples: str) -> Any:
        summary, _, more = textwrap.dedent(text).strip().partition("\n")
        added = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=f"{summary}\n{more}".strip(),
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        added.set_defaults(run=run, parser=added, after_interrupt="")
        return added

    generate = command(
        "generate",
        _generate,
        """
        Draw a scene, one object after the other.

        The objects belong to one scene and are added in the order given. An object is a
        colour (gray, red, blue, green, brown, purple, cyan, yellow) and a shape (cube,
        sphere, cylinder) in quotes; `condgan info` lists what a model knows.

        --from draws a list of scenes into OUT/00000.tar, 00001.tar, ... (WebDataset: PNG
        and JSON). The same command goes on with what is not there yet, with any number of
        processes. Picture n has the seed N + n (default of N: 0) unless its line gives one.
        """,
        """
        condgan generate "red cube" "blue sphere" --seed 7 --out scene.png

        # four draws of one scene, with the seeds 7 to 10, on one sheet
        condgan generate "red cube" "blue sphere" --num 4 --seed 7 --grid --out sheet.png

        # how the scene grows: the empty one and every turn, side by side
        condgan generate "red cube" "blue sphere" --seed 7 --turns --out turns.png

        # the cube where the model likes, the sphere with its centre 45 pixels from the
        # left and 30 from the top: one --at for each object, in their order
        condgan generate "red cube" "blue sphere" --at none --at 45,30

        # draw eight, keep the one that the verifier likes best, say what it found in it;
        # the seed that is printed draws that picture again, alone
        condgan generate "red cube" "blue sphere" --best-of 8 --verify

        # nearly as good and much cheaper: draw only those turns again that failed
        condgan generate "red cube" "blue sphere" --seed 7 --best-of 8 --redraw turn

        # a large set: each line of the file a scene, ["red cube", "blue sphere"] or
        # {"conditions": ["red cube"], "seed": 7, "places": [[45, 30]], "num_images": 4}
        condgan generate --from list.jsonl --out set
        torchrun --nproc-per-node 4 -m condgan generate --from list.jsonl --out set
        """,
    )
    generate.add_argument("objects", nargs="*", metavar="OBJECT", help='what to draw, such as "red cube"')
    generate.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="LIST.jsonl",
        help="draw a large set: one scene a line, into tar files in the folder --out",
    )
    generate.add_argument(
        "--shard-size", type=_count, metavar="N", help="with --from: pictures a tar file (default: 1000)"
    )
    _add_drawing_options(generate, "scene.png")

    add = command(
        "add",
        _add,
        """
        Add objects to a picture.

        The picture may have any size and format; it is resized to that of the model
        (`condgan info`: image_size). IMAGE itself is left as it is, unless --out names it.
        """,
        """
        condgan generate "red cube" --seed 7 --out scene.png
        condgan add scene.png "green cylinder" --seed 8 --out more.png

        # with its centre 20 pixels from the left and 40 from the top
        condgan add scene.png "green cylinder" --at 20,40 --out more.png
        """,
    )
    add.add_argument("image", metavar="IMAGE", help="the picture to start from")
    add.add_argument("objects", nargs="+", metavar="OBJECT", help='what to add, such as "green cylinder"')
    _add_drawing_options(add, "more.png")

    info = command(
        "info",
        _info,
        """
        Describe a model.

        Its configuration, its size, the objects it knows and the beginning of its card.
        Any kind of model of `condgan list --all`, not generators only.
        """,
        """
        condgan info
        condgan info verifier
        condgan info run/model --json
        """,
    )
    _add_model(info, "model", nargs="?", metavar="MODEL")

    listing = command(
        "list",
        _list,
        """
        List the names of the pretrained generators.

        First those that came with the installation, which need no network, then those on
        the hub (none so far). Each can be given as MODEL or with --model.
        """,
        """
        condgan list
        condgan list --all
        """,
    )
    listing.add_argument("--all", action="store_true", help="every other kind of model too, and what each is")

    prepare = command(
        "prepare",
        _prepare,
        """
        Pack a folder in the layout of i-CLEVR into one file for training.

        To be done once. The folder holds train.json, objects.json and the pictures, in
        images/ or beside them; they may have any size. Pictures that are missing,
        unreadable or unlabelled are named. After an interruption the same command goes on.
        """,
        """
        condgan prepare iclevr
        condgan prepare iclevr --image-size 128 --out packed/large.npy
        """,
    )
    prepare.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="the folder to read")
    prepare.add_argument(
        "--out", type=Path, metavar="FILE", help="the .npy file to write (default: condgan-SIZE.npy in DATA_DIR)"
    )
    prepare.add_argument(
        "--image-size", type=_count, default=64, metavar="PIXELS", help="side of the packed pictures (default: 64)"
    )
    prepare.set_defaults(after_interrupt=": run the same command again to go on")

    train = command(
        "train",
        _train,
        """
        Train a generator.

        RUN gets log.jsonl, checkpoint.safetensors, pictures/ (drawings of the model so far),
        model/, which every command takes as a model, discriminator/ and, for presets with
        a noise encoder (compact), noise-encoder/. After an interruption the same command
        goes on. The presets:
          compact         small, knows places; two hours or more on one CPU core
          reference       the networks and the numbers of the reference system
          reference-code  likewise, with the losses of its public code
        """,
        """
        condgan prepare iclevr
        condgan train --data iclevr --preset compact --out run
        condgan generate "red cube" --model run/model

        # a narrower and shorter one; fields as in condgan.presets.TrainConfig
        condgan train --data iclevr --out small --images 200000 \\
            --set generator.width=8 --set lr_generator=1e-4

        # one process for each of four GPUs, or CPU cores; docs/scale.md says more
        torchrun --nproc-per-node 4 -m condgan train --data iclevr --out run
        """,
    )
    train.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="what `condgan prepare` packed: its folder or its file"
    )
    train.add_argument("--preset", default="compact", metavar="NAME", help="configuration (default: compact)")
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run; made if not there")
    train.add_argument("--images", type=_count, metavar="N", help="pictures to train on (default: the preset's)")
    train.add_argument("--batch-scenes", type=_count, metavar="N", help="scenes a step (default: the preset's)")
    train.add_argument("--seed", type=_seed, metavar="N", help="of the whole run (default: the preset's)")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field of the configuration; may be repeated",
    )
    train.add_argument(
        "--accumulate",
        type=_count,
        default=1,
        metavar="N",
        help="let the scenes of a step pass in N parts, which takes less memory (default: 1)",
    )
    train.add_argument("--device", type=_device, help="such as cuda or cpu (default: a GPU if there is one)")
    train.set_defaults(after_interrupt=": run the same command again to go on")

    evaluate = command(
        "evaluate",
        _evaluate,
        """
        Measure how well a model draws what it is asked for.

        Every list of objects in a JSON file is drawn many times. Accuracy is the share of
        asked objects that the judge finds, a classifier that has no other use; its 95 %
        interval is over lists. With --data, the same numbers for real held-out pictures stand
        beside, and how far the drawn pictures are from the real ones in look and in layout.
        Controls, drawn pictures under wrong lists and empty scenes, show what each measure
        can see; docs/evaluation.md defines them all. A few minutes on one CPU core.
        --realism, with or without --conditions, says how often a fresh classifier tells drawn
        pictures from real ones, which takes longer than all the rest.
        """,
        """
        condgan evaluate --conditions iclevr/test.json --draws 64
        condgan evaluate run/model --conditions iclevr/test.json --data iclevr --json --out test-report.json

        # how real the pictures look, and those that give themselves away
        condgan evaluate --realism --data iclevr --sheet sheet.png
        """,
    )
    _add_model(evaluate, "model", nargs="?", metavar="MODEL")
    evaluate.add_argument(
        "--conditions",
        type=Path,
        metavar="FILE",
        help='JSON list of lists of names: [["red cube"], ["gray cube", "cyan sphere"]]; required without --realism',
    )
    evaluate.add_argument("--draws", type=_count, metavar="N", help=f"pictures a list (default: {DRAWS})")
    evaluate.add_argument(
        "--data", type=Path, metavar="PATH", help="folder or file of `condgan prepare`, to compare with"
    )
    _add_model(evaluate, "--judge", shown="judge", metavar="NAME")
    _add_model(evaluate, "--counter", shown="counter", metavar="NAME")
    evaluate.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the first picture (default: 0)")
    _add_best_of(evaluate)
    evaluate.add_argument(
        "--device",
        type=_device,
        default="cpu",
        help="where to draw, and to train --realism's classifiers (default: cpu)",
    )
    evaluate.add_argument("--realism", action="store_true", help="tell drawn pictures from the real ones of --data")
    evaluate.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write a picture of what --realism is surest about"
    )
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON object to this file")
    return parser


def _add_model(
    parser: argparse.ArgumentParser, name: str, shown: str = "the generator inside the package", **options: Any
) -> None:
    """An argument that names a checkpoint; None where it is left out."""
    text = f"a name of `condgan list --all`, a folder or a hub id ORG/REPO (default: {shown})"
    parser.add_argument(name, help=text, **options)


def _add_drawing_options(parser: argparse.ArgumentParser, out: str) -> None:
    """What ``generate`` and ``add`` have in common."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"picture to write; several pictures are numbered, as NAME-0.png (default: {out})",
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="the same seed draws the same picture (default: a new one)"
    )
    parser.add_argument(
        "--num", type=_count, default=1, metavar="N", help="pictures, of seeds N, N+1, ... (default: 1)"
    )
    parser.add_argument(
        "--at",
        action="append",
        type=_place,
        metavar="X,Y",
        help="centre of an object in pixels from the left and from the top, or `none` to leave it to the model; "
        "give one --at for each object",
    )
    parser.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="pictures that pass the networks at once (default: 1; with --from on a GPU 256); 16 draws many "
        "pictures faster on a CPU, the same but for last bits, which may decide on a level of 256",
    )
    parser.set_defaults(default_out=out)
    _add_best_of(parser)
    parser.add_argument("--grid", action="store_true", help="write one sheet with all pictures")
    parser.add_argument(
        "--turns", action="store_true", help="write one sheet with every turn, one row a picture, with --grid too"
    )
    parser.add_argument("--verify", action="store_true", help="say which of these objects the verifier finds")
    _add_model(parser, "--model", metavar="NAME")


def _add_best_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--best-of", type=_count, default=1, metavar="N", help="draw N candidates and keep the verifier's favourite"
    )
    parser.add_argument(
        "--redraw",
        choices=("picture", "turn"),
        help="with --best-of: draw N whole pictures, or draw a turn again, up to N times, while the verifier does not "
        "find the objects asked so far (default: picture)",
    )


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    """A whole number from 0 to 2**63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def _place(text: str) -> Place | None:
    """``45,30``, or ``none``."""
    if text.lower() == "none":
        return None
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither X,Y in pixels, such as 45,30, nor none") from None
    return x, y


def _device(text: str) -> str:
    """A device that tensors can be put on."""
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({reason}); give cpu, or leave it out") from None
    return text
