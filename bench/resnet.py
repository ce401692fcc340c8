"""Whole networks with PyTorch's batch norms and with fastbn's, by turns: `python -m bench.resnet`, see --help."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bench import command, machine, plot
from bench.command import RESULTS, relative, replace_block, rounded, write_result
from bench.measure import paired, rounds
from bench.report import milliseconds
from fastbn import progress
from fastbn.cli import info

COMMAND = "python -m bench.resnet"
IMAGES, SIDE, STEPS = 32, 128, 20
FORMATS, MODES, PASSES = ("first", "last"), ("eager", "compiled"), ("training", "inference")
# whose batch norms; none: Identity in their place, to know their share
PYTORCH, FASTBN, NONE = "PyTorch", "fastbn", "none"
LOSS_ERROR = 1e-4  # target: relative difference of the losses of STEPS steps
RATE = 1e-3  # ten times as much and rounding errors grow a hundredfold within the steps, with either library


def network(name: str, norms: str, layout: str) -> Any:
    """A network with the same weights each time, and the batch norms of one of three."""
    import torch
    from torch import nn

    import fastbn.torch
    from bench.networks import NETWORKS

    torch.manual_seed(0)
    model = NETWORKS[name]()
    if norms == FASTBN:
        model = fastbn.torch.convert(model)
    elif norms == NONE:
        for module in list(model.modules()):
            for child, found in list(module.named_children()):
                if isinstance(found, nn.BatchNorm2d):
                    setattr(module, child, nn.Identity())
    return model.to(memory_format=torch.channels_last) if layout == "last" else model


def batch(layout: str, images: int, side: int, seed: int = 0) -> tuple[Any, Any]:
    """(images, labels) of noise."""
    import torch

    from bench.networks import CLASSES

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, side, side, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    return (x.contiguous(memory_format=torch.channels_last) if layout == "last" else x), labels


def stepper(model: Any, rate: float, mode: str = "eager") -> Callable[[Any, Any], float]:
    """One training step on a batch: its loss."""
    import torch
    from torch.nn import functional

    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    run = torch.compile(model) if mode == "compiled" else model

    def step(x: Any, labels: Any) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def calls(name: str, layout: str, mode: str, what: str, images: int, side: int) -> dict[str, Callable[[], object]]:
    """A call per contestant, warmed up; training leaves the weights as they are, so that each step costs the same."""
    import torch

    x, labels = batch(layout, images, side)
    found: dict[str, Callable[[], object]] = {}
    for norms in (PYTORCH, FASTBN, NONE) if mode == "eager" else (PYTORCH, FASTBN):
        model = network(name, norms, layout)
        if what == "training":
            step = stepper(model.train(), 0.0, mode)
            found[norms] = partial(step, x, labels)
        else:
            run = torch.compile(model.eval()) if mode == "compiled" else model.eval()
            found[norms] = partial(_infer, run, x)
        found[norms]()
    return found


def _infer(run: Any, x: Any) -> Any:
    import torch

    with torch.inference_mode():
        return run(x)


def timed(name: str, layout: str, mode: str, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each contestant, fastbn's ratio to PyTorch, and the batch norms' shares of the time."""
    import torch

    times = rounds(calls(name, layout, mode, what, args.images, args.side), args.seconds)
    torch._dynamo.reset()
    medians = {norms: statistics.median(values) for norms, values in times.items()}
    shares = {norms: 1 - paired(times[NONE], times[norms]) for norms in (PYTORCH, FASTBN) if NONE in times}
    return {
        "shape": name, "layout": layout, "mode": mode, "pass": what, "seconds": medians,
        "ratio": paired(times[PYTORCH], times[FASTBN]),
        "shares": shares, "rounds": len(times[FASTBN]),
    }  # fmt: skip


def losses(name: str, layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """Losses of some steps of training from the same weights on the same batches, and how far they are apart."""
    found: dict[str, list[float]] = {}
    for norms in (PYTORCH, FASTBN):
        step = stepper(network(name, norms, layout).train(), RATE)
        found[norms] = [step(*batch(layout, args.images, args.side, seed)) for seed in range(args.steps)]
    far = max(abs(a - b) / abs(a) for a, b in zip(found[PYTORCH], found[FASTBN], strict=True))
    return {"shape": name, "layout": layout, "losses": found, "apart": far}


def peak(name: str, norms: str, layout: str, images: int, side: int) -> float:
    """MB of memory at most in this process after three steps of training."""
    step = stepper(network(name, norms, layout).train(), RATE)
    for seed in range(3):
        step(*batch(layout, images, side, seed))
    return machine.peak() / 1e6


def peaks(name: str, layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of each, in a process of its own."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    found = {}
    for norms in (PYTORCH, FASTBN):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[norms] = pool.submit(peak, name, norms, layout, args.images, args.side).result()
    return {"shape": name, "layout": layout, "megabytes": found}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    threads = machine.give_threads(None)
    result: dict[str, Any] = {
        "kind": "resnet",
        "machine": machine.facts(threads, False),
        "images": args.images,
        "side": args.side,
    }
    result |= {"records": [], "losses": [], "memory": []}
    for name, layout in itertools.product(args.networks, FORMATS):
        result["memory"].append(peaks(name, layout, args))
        result["losses"].append(losses(name, layout, args))
        for mode, what in itertools.product(args.modes, PASSES):
            result["records"].append(record := timed(name, layout, mode, what, args))
            print(f"{name} {layout} {mode} {what}: {', '.join(cells(record))}", flush=True)
    return result


def cells(record: Mapping[str, Any]) -> list[str]:
    """Both times, their ratio, and the shares of the batch norms."""
    times = [milliseconds(record["seconds"][norms]) for norms in (PYTORCH, FASTBN)]
    return [*times, f"{record['ratio']:.2f}x", *(f"{round(share * 100)} %" for share in record["shares"].values())]


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A line per network, memory order, mode and pass."""
    headers = [
        "network",
        "channels",
        "mode",
        "pass",
        "PyTorch",
        "fastbn",
        "PyTorch takes",
        "PyTorch's norms",
        "fastbn's norms",
    ]
    lines = [[r["shape"], r["layout"], r["mode"], r["pass"], *cells(r)] for r in result["records"]]
    return headers, [line + ["-"] * (len(headers) - len(line)) for line in lines]


def note(result: Mapping[str, Any]) -> str:
    """Losses and memory, and what the table holds."""
    apart = max(found["apart"] for found in result["losses"])
    held = "; ".join(
        f"{m['shape']} {m['layout']} {m['megabytes'][PYTORCH]:.0f} / {m['megabytes'][FASTBN]:.0f} MB"
        for m in result["memory"]
    )
    ratios = [r["ratio"] for r in result["records"]]
    steps = len(result["losses"][0]["losses"][PYTORCH])
    return (
        f"Batches of {result['images']} x 3 x {result['side']}², float32. A step is forward, backward and SGD; the "
        f"norms' share is what the time shrinks by with none. fastbn is ahead in {sum(r >= 1 for r in ratios)} of "
        f"{len(ratios)}, geometric mean {statistics.geometric_mean(ratios):.2f}x. Losses of {steps} steps differ by "
        f"{apart:.1e} at most (target {LOSS_ERROR:g}). Peak memory of the process, PyTorch / fastbn: {held}. "
        f"{info.sentence(result['machine'])}."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Train and run whole networks with PyTorch's batch norms and fastbn's."
    )
    names = ("ResNet-18", "MobileNetV2")
    command.add_outputs(parser, "resnet", "write the result here (default: into bench/results)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="of rounds for each line (default: 20)"
    )
    parser.add_argument(
        "--networks", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=f"of {', '.join(MODES)}"
    )
    parser.add_argument("--images", type=int, default=IMAGES, help=f"of a batch (default: {IMAGES})")
    parser.add_argument("--side", type=int, default=SIDE, help=f"pixels (default: {SIDE})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"whose losses are compared (default: {STEPS})")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    progress.need("rich", "matplotlib", command=COMMAND, named="rich and matplotlib")
    if args.readme:
        replace_block(args.readme, "resnet")
    path = args.source or args.json
    if args.source:
        result = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        import fastbn.torch  # noqa: F401 # says so where PyTorch lacks

        result = rounded(measured(args))
        path = args.json or RESULTS / f"resnet-{machine.slug(result['machine'])}.json"
        write_result(path, result)
        plot.draw_networks(result, path.with_suffix(".png"))
        print(f"wrote {path} and {path.with_suffix('.png')}")
    progress.table(*table(result))
    print(note(result))
    if args.readme:
        data = relative(path, args.readme)
        picture = f"![step times by network, memory order and mode]({data.removesuffix('.json')}.png)"
        written = f"{note(result)} Written by `{COMMAND}` from [its results]({data})."
        replace_block(args.readme, "resnet", command.markdown(*table(result)), picture, written)
    return 0


main = partial(command.main, _parser, run)

if __name__ == "__main__":
    sys.exit(main())
