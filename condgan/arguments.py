"""What may stand on a command line of ``condgan``, and the help that explains it."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condgan import __version__

if TYPE_CHECKING:
    from condgan.requests import Place

DRAWS = 64
"""Pictures a list that ``evaluate`` draws."""


def parser() -> argparse.ArgumentParser:
    """The parser of every command.

    What it returns has the command's name as ``command``, its parser as ``parser``, and as ``after_interrupt`` what to
    tell who interrupts it.
    """
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
    for add_command in (_generate, _add, _info, _list, _render, _prepare, _train, _evaluate, _export):
        add_command(commands)
    return parser


def _command(commands: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """Add a command whose help begins with the first line of ``text`` and ends with examples."""
    summary, _, more = textwrap.dedent(text).strip().partition("\n")
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=f"{summary}\n{more}".strip(),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    added.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    added.set_defaults(command=name, parser=added, after_interrupt="")
    return added


def _generate(commands: Any) -> None:
    command = _command(
        commands,
        "generate",
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
    command.add_argument("objects", nargs="*", metavar="OBJECT", help='what to draw, such as "red cube"')
    command.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="LIST.jsonl",
        help="draw a large set: one scene a line, into tar files in the folder --out",
    )
    command.add_argument(
        "--shard-size", type=_count, metavar="N", help="with --from: pictures a tar file (default: 1000)"
    )
    _add_drawing_options(command, "scene.png")


def _add(commands: Any) -> None:
    command = _command(
        commands,
        "add",
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
    command.add_argument("image", metavar="IMAGE", help="the picture to start from")
    command.add_argument("objects", nargs="+", metavar="OBJECT", help='what to add, such as "green cylinder"')
    _add_drawing_options(command, "more.png")


def _info(commands: Any) -> None:
    command = _command(
        commands,
        "info",
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
    _add_model(command, "model", nargs="?", metavar="MODEL")


def _list(commands: Any) -> None:
    command = _command(
        commands,
        "list",
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
    command.add_argument("--all", action="store_true", help="every other kind of model too, and what each is")


def _render(commands: Any) -> None:
    command = _command(
        commands,
        "render",
        """
        Render a data set in the look and the layout of i-CLEVR.

        For who has no i-CLEVR at hand: OUT_DIR gets images/, train.json, objects.json,
        test.json and new_test.json. Every scene has three turns; scene number i depends on
        the seed and i only, so the same command with more scenes, or after an
        interruption, goes on. Needs Mitsuba: pip install mitsuba
        """,
        """
        condgan render scenes --scenes 500 --seed 0
        condgan prepare scenes
        condgan train --data scenes --out run
        """,
    )
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write")
    command.add_argument("--scenes", type=_count, default=500, metavar="N", help="how many scenes (default: 500)")
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="of all scenes (default: 0)")
    command.add_argument(
        "--height",
        type=_count,
        default=240,
        metavar="PIXELS",
        help="of the pictures, which are 4/3 as wide (default: 240, as i-CLEVR's)",
    )
    command.set_defaults(after_interrupt=": run the same command again to go on")


def _prepare(commands: Any) -> None:
    command = _command(
        commands,
        "prepare",
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
    command.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="the folder to read")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="the .npy file to write (default: condgan-SIZE.npy in DATA_DIR)"
    )
    command.add_argument(
        "--image-size", type=_count, default=64, metavar="PIXELS", help="side of the packed pictures (default: 64)"
    )
    command.set_defaults(after_interrupt=": run the same command again to go on")


def _train(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        """
        Train a generator.

        RUN gets log.jsonl, checkpoint.safetensors, pictures/ (drawings of the model so far),
        model/, which every command takes as a model, discriminator/ and, for presets with
        a noise encoder (compact), noise-encoder/. After an interruption the same command
        goes on; until the run is over model/ lacks what is fitted at its end. The presets:
          compact         small, knows places; four hours or more on one CPU core
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
    command.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="what `condgan prepare` packed: its folder or its file"
    )
    command.add_argument("--preset", default="compact", metavar="NAME", help="configuration (default: compact)")
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run; made if not there")
    command.add_argument("--images", type=_count, metavar="N", help="pictures to train on (default: the preset's)")
    command.add_argument("--batch-scenes", type=_count, metavar="N", help="scenes a step (default: the preset's)")
    command.add_argument("--seed", type=_seed, metavar="N", help="of the whole run (default: the preset's)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field of the configuration; may be repeated",
    )
    command.add_argument(
        "--accumulate",
        type=_count,
        default=1,
        metavar="N",
        help="let the scenes of a step pass in N parts, which takes less memory (default: 1)",
    )
    command.add_argument("--device", type=_device, help="such as cuda or cpu (default: a GPU if there is one)")
    command.set_defaults(
        after_interrupt=": run the same command again to go on; until then RUN/model lacks what a run fits at its end"
    )


def _evaluate(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
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
    _add_model(command, "model", nargs="?", metavar="MODEL")
    command.add_argument(
        "--conditions",
        type=Path,
        metavar="FILE",
        help='JSON list of lists of names: [["red cube"], ["gray cube", "cyan sphere"]]; required without --realism',
    )
    command.add_argument("--draws", type=_count, metavar="N", help=f"pictures a list (default: {DRAWS})")
    command.add_argument(
        "--data", type=Path, metavar="PATH", help="folder or file of `condgan prepare`, to compare with"
    )
    _add_model(command, "--judge", shown="judge", metavar="NAME")
    _add_model(command, "--counter", shown="counter", metavar="NAME")
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the first picture (default: 0)")
    _add_best_of(command)
    command.add_argument(
        "--device",
        type=_device,
        default="cpu",
        help="where to draw, and to train --realism's classifiers (default: cpu)",
    )
    command.add_argument("--realism", action="store_true", help="tell drawn pictures from the real ones of --data")
    command.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write a picture of what --realism is surest about"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON object to this file")


def _export(commands: Any) -> None:
    command = _command(
        commands,
        "export",
        """
        Write a generator for programs without PyTorch.

        As three ONNX graphs in a folder: the empty scene, the RNN and one turn, beside
        config.json and a README with a program that draws with them. They are compared with
        the generator first. Takes up to a minute; needs the packages onnx, onnxscript and
        onnxruntime.
        """,
        """
        condgan export --format onnx --out exported
        condgan export run/model --out exported
        """,
    )
    _add_model(command, "model", nargs="?", metavar="MODEL")
    command.add_argument("--format", choices=("onnx",), default="onnx", help="of the files (default: onnx)")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it is made")


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
