"""The commands of scripts/bench, which installs what they need and becomes root before."""

import argparse
import os
import pathlib
import signal
import sys
import tempfile

import bench_cost
import bench_durable
import bench_growth
import bench_speed
from bench_place import Failure

PROJECT = pathlib.Path(__file__).resolve().parent.parent

COMMANDS = {
    "cost": bench_cost.main,
    "durable": bench_durable.main,
    "growth": bench_growth.main,
    "speed": bench_speed.main,
}


def interrupted(number, _frame):
    """A plea to end is met like Ctrl-C: what was mounted is unmounted on the way out."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--out",
        type=pathlib.Path,
        default=PROJECT / "target/bench",
        help="where the results go (default: target/bench)",
    )
    shared.add_argument(
        "--scratch",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()) / "rearview-bench",
        help="a folder of ours alone for images and trees, deleted at the end "
        "(default: rearview-bench in $TMPDIR)",
    )
    shared.add_argument("--quick", action="store_true", help="less of everything, for a trial")
    shared.add_argument(
        "--resume",
        action="store_true",
        help="keep the results of an earlier run with the same settings, measure the others",
    )
    cost = commands.add_parser(
        "cost", parents=[shared], help="bytes that history costs, for the same work"
    )
    bench_cost.add_arguments(cost)
    speed = commands.add_parser(
        "speed", parents=[shared], help="the time that the same work takes here and on the peers"
    )
    bench_speed.add_arguments(speed)
    # In memory: a disk's own pace would hide what is compared.
    speed.set_defaults(scratch=pathlib.Path("/dev/shm/rearview-bench"))
    growth = commands.add_parser(
        "growth", parents=[shared], help="the same work, and memory, as a store grows"
    )
    bench_growth.add_arguments(growth)
    growth.set_defaults(scratch=speed.get_default("scratch"))
    durable = commands.add_parser(
        "durable", parents=[shared], help="what fsync, checkpoints and recovery take"
    )
    bench_durable.add_arguments(durable)
    durable.set_defaults(scratch=speed.get_default("scratch"))
    commands.add_parser("scale", help="runs tests/scale.rs")
    return parser.parse_args()


def main():
    """Runs one command; the exit code is 1 if a number is missing."""
    options = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    # The bench's own reads must find the files whatever the caller's mask.
    os.umask(0o022)
    try:
        return COMMANDS[options.command](options)
    except Failure as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as signalled:
        print(f"bench: interrupted {signalled}".rstrip(), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
