"""``python -m toolkit``: list, show or run methods, merge models, make samples, measure a lab."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from toolkit.core import io
from toolkit.core.declare.catalogue import Entry, broken, catalogue, entry
from toolkit.core.declare.fields import Hyper
from toolkit.core.program import run_program
from toolkit.labs import command as lab_command


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a subcommand is a parser and a function of its arguments."""
    parser = argparse.ArgumentParser(prog="python -m toolkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    every = commands.add_parser("list", help="every method, a line each")
    every.set_defaults(do=do_list)
    show = commands.add_parser("show", help="equation, hyperparameters and costs of a method")
    show.add_argument("slug")
    show.set_defaults(do=do_show)
    run = commands.add_parser("run", help="train a method on the planted-rank task")
    run.add_argument("slug")
    run.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyperparameters")
    run.add_argument("--steps", type=int, default=300)
    run.add_argument("--lr", type=float, default=5e-3)
    run.add_argument("--seed", type=int, default=0)
    run.set_defaults(do=do_run)
    merging = commands.add_parser("merge", help="make one model of several in files")
    merging.add_argument("--base", help="folder or file of what the models were trained from")
    merging.add_argument("--models", nargs="+", metavar="DIR", help="folders or files")
    merging.add_argument("--method", help="slug of the rule")
    merging.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="its settings")
    merging.add_argument("--weights", nargs="+", type=float, help="one per model")
    merging.add_argument(
        "--targets", nargs="+", help="name patterns of what takes part; all if none"
    )
    merging.add_argument("--heads", help="tensors that differ: refuse, base or a model's number")
    merging.add_argument("--buffers", help="statistics: average, base or a model's number")
    merging.add_argument("--dtype", help="of the result, as float16")
    merging.add_argument("--seed", type=int, help="of random masks")
    merging.add_argument("--tokenizer", choices=["refuse", "base"], default="refuse")
    merging.add_argument("--like", metavar="FILE", help="recipe of an earlier merge")
    merging.add_argument("--out", required=True, help="folder to make")
    merging.set_defaults(do=do_merge)
    sampling = commands.add_parser("sample", help="make pictures with a pretrained denoiser")
    sampling.add_argument("--base", default="mnist", help="mnist, or digits of 8 x 8 pixels")
    sampling.add_argument("--method", default="unipc", help="a solver, or a method that is one")
    sampling.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="its settings")
    sampling.add_argument("--steps", type=int, default=18)
    sampling.add_argument("--labels", nargs="+", type=int, default=list(range(10)))
    sampling.add_argument("--rows", type=int, default=4, help="pictures of each label")
    sampling.add_argument("--guidance", type=float, default=1.0, help="1 is none")
    sampling.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    sampling.add_argument("--low", type=float, default=0.002, help="least noise before none")
    sampling.add_argument("--high", type=float, default=80.0, help="noise at the start")
    sampling.add_argument("--out", required=True, help="PNG file to write")
    sampling.set_defaults(do=do_sample)
    lab = commands.add_parser("lab", help="measure the experiments of a chapter")
    lab_command.options(lab)
    lab.set_defaults(do=lab_command.main)
    args = parser.parse_args(arguments)
    try:
        return args.do(args)
    except (ImportError, KeyError, TypeError, ValueError, FloatingPointError) as error:
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    except (io.DiskFull, FileExistsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def do_list(args: argparse.Namespace) -> int:
    """Print the catalogue, and on the error stream what of it cannot be read; 1 if there is any."""
    entries, damaged = catalogue(), broken()
    if entries:
        print(listing(entries))
    for module, error in damaged.items():
        print(f"error: {module} cannot be read: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if damaged else 0


def do_show(args: argparse.Namespace) -> int:
    print(description(entry(args.slug)))
    return 0


def do_run(args: argparse.Namespace) -> int:
    found = entry(args.slug)
    chosen = settings(found, args.set)
    print(json.dumps(trial(found, chosen, args.steps, args.lr, args.seed), indent=2))
    return 0


def do_merge(args: argparse.Namespace) -> int:
    """Merge as the arguments say, and as the recipe says where they are silent."""
    import torch

    from toolkit.core.states.merging import merge
    from toolkit.core.states.rules import Rule

    given = {name: value for name, value in vars(args).items() if value is not None}
    told = recipe(args.like) | given if args.like else given
    if not told.get("models") or not told.get("method"):
        raise ValueError("write --models and --method, or --like with a recipe that has both")
    found = entry(told["method"])
    kept = told.get("settings", {}) if args.method in (None, told.get("rule")) else {}
    if not issubclass(found.method, Rule):
        raise ValueError(f"{told['method']!r} is no rule of merging; see `python -m toolkit list`")
    method = found.method.restored(kept | settings(found, args.set))
    dtype = getattr(torch, told.get("dtype") or "", None)
    if told.get("dtype") and not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {told['dtype']}: write a dtype of PyTorch, as float16")
    options: dict[str, Any] = {
        name: int(told[name]) if str(told[name]).isdigit() else told[name]
        for name in ("weights", "targets", "heads", "buffers", "seed", "tokenizer")
        if name in told
    }
    out = merge(told.get("base"), told["models"], method, dtype=dtype, out=args.out, **options)
    print(out)
    return 0


def do_sample(args: argparse.Namespace) -> int:
    """Make pictures as the arguments say; everything is checked before a network is read."""
    from toolkit.core.data import DataError
    from toolkit.labs.pictures import grid, pictures, write_png

    if not args.out.lower().endswith(".png"):
        raise ValueError(f"--out {args.out}: write a name that ends in .png")
    try:
        made = pictures(
            args.base, solver(args.method, args.set), args.steps, labels=args.labels,
            rows=args.rows, guidance=args.guidance, seed=args.seed, low=args.low, high=args.high,
            say=print,
        )  # fmt: skip
    except DataError as error:
        raise ValueError(str(error)) from error
    write_png(grid(made.x, len(args.labels), enlarge=4 if made.x.shape[-1] < 16 else 2), args.out)
    print(f"{args.out}: {len(made.x)} pictures, {args.steps} steps, {made.calls} network calls")
    return 0


def solver(name: str, pairs: list[str]) -> Any:
    """A plan by its own name, or a method of the catalogue that is one.

    Raises:
        ValueError: no such solver, or settings that it has not.
    """
    from toolkit.core.sample.plans import PLANS, Plan

    if name not in PLANS:
        try:
            found = entry(name)
        except KeyError as error:
            raise ValueError(
                f"--method {name}: no such solver; choose {', '.join(PLANS)}, or a method that is "
                "one"
            ) from error
        if not issubclass(found.method, Plan):
            raise ValueError(f"--method {name}: it adapts or merges models and is no solver")
        return found.method(**settings(found, pairs))
    kinds = {f.name: f.default for f in dataclasses.fields(PLANS[name])}  # type: ignore[arg-type]
    chosen: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        kind = type(kinds.get(key))
        if not separator or kind not in (bool, int, str):
            known = sorted(k for k, v in kinds.items() if isinstance(v, bool | int | str))
            raise ValueError(f"--set {pair}: write NAME=VALUE with a NAME of {known}")
        if kind is bool and text not in ("True", "False"):
            raise ValueError(f"--set {pair}: {key} must be True or False")
        try:
            chosen[key] = text == "True" if kind is bool else kind(text)
        except ValueError as error:
            raise ValueError(f"--set {pair}: {key} must be {kind.__name__}") from error
    return PLANS[name](**chosen)


def recipe(path: str) -> dict[str, Any]:
    """What a file of an earlier merge says, without what it leaves open.

    Raises:
        FileNotFoundError, ValueError: no such file, or no recipe.
    """
    from toolkit.core.states.written import Recipe

    told = io.read_json(path)
    names = {f.name for f in dataclasses.fields(Recipe)}
    if not isinstance(told, dict) or set(told) != names:
        raise ValueError(f"--like {path} is no recipe of a merge; it needs {sorted(names)}")
    if any(model is None for model in told["models"]):
        told["models"] = None
    told["method"] = told["rule"]
    return {name: value for name, value in told.items() if value is not None}


def listing(entries: list[Entry]) -> str:
    width = max(len(e.slug) for e in entries)
    return "\n".join(
        f"{e.slug:{width}}  {e.part:9} {e.year}  {e.title}: {e.acts_on}" for e in entries
    )


def description(e: Entry) -> str:
    code = f"; code {e.code}" if e.code else ""
    lines = [
        f"{e.title} ({e.part}/{e.slug})",
        f"paper      arXiv {e.arxiv}, {e.year}{code}",
        f"equation   {e.equation}",
        f"acts on    {e.acts_on}",
        f"trained    {e.count} per layer of shape m x n",
        f"inference  {e.inference}",
        f"at start   {'equals the base' if e.zero_init else 'differs from the base'}",
        f"merges     {'yes' if e.mergeable else 'no'}",
        f"layers     {', '.join(e.kinds)}",
        "hyperparameters",
    ]
    return "\n".join(lines + [f"  {line(h)}" for h in e.hyperparameters])


def line(h: Hyper) -> str:
    if h.choices is not None:
        allowed = " | ".join(map(str, h.choices))
    elif h.type in (int, float):
        allowed = f"{h.low:g} to {h.high:g}" if h.high is not None else f"from {h.low:g}"
    else:
        allowed = h.type.__name__
    return f"{h.name} = {h.default!r}  [{allowed}]  {h.help}; source: {h.source}"


def settings(e: Entry, pairs: list[str]) -> dict[str, Any]:
    """``rank=4`` -> {"rank": 4}, typed by the hyperparameter's declaration."""
    known = {h.name: h for h in e.hyperparameters}
    chosen: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or name not in known:
            raise ValueError(f"--set {pair}: write NAME=VALUE with a NAME of {sorted(known)}")
        h = known[name]
        try:
            chosen[name] = None if h.optional and text == "None" else parse(h, text)
        except ValueError as error:
            raise ValueError(f"--set {pair}: {name} must be {h.type.__name__}") from error
    return chosen


def parse(h: Hyper, text: str) -> Any:
    if h.type is bool:
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    return h.type(text)


def trial(e: Entry, chosen: dict[str, Any], steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Adapt a small network to a teacher that differs from it by low-rank matrices.

    Returns:
        Hyperparameters, test error before and after (mean squared error over the teacher's
        variance), the four costs, and what the adapters report of themselves.
    """
    import torch

    from toolkit.core.adapt.put import adapt
    from toolkit.core.nets import planted_teacher

    if steps < 1:
        raise ValueError(f"--steps {steps}: train for at least one step")
    if not hasattr(e.method, "build"):
        raise ValueError(f"{e.slug} adapts no model, so it has no run here; read its chapter")
    names = {h.name for h in e.hyperparameters}
    # a task of 36 to 48 units with schedules cut to the run: defaults are meant for large models
    small = {"rank": 6, "target_rank": 2, "warmup": steps // 8, "final": steps // 3}
    defaults = {k: v for k, v in small.items() if k in names}
    method = e.method(**(defaults | chosen))
    draw = torch.Generator().manual_seed(seed)
    student, teacher = planted_teacher(generator=draw)
    held_out = torch.randn(2048, student[0].in_features, generator=draw)
    target = teacher(held_out).detach()

    @torch.no_grad()
    def error() -> float:
        return float((student(held_out) - target).square().mean() / target.var())

    before = error()
    adapted = adapt(student, method, generator=draw)
    optimizer = torch.optim.Adam(adapted.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    adapted.attach(optimizer, total_steps=steps)
    for _ in range(steps):
        x = torch.randn(128, student[0].in_features, generator=draw)
        optimizer.zero_grad()
        (student(x) - teacher(x).detach()).square().mean().backward()
        optimizer.step()
        decay.step()
    rows = adapted.report()
    return {
        "method": e.slug,
        "hyperparameters": dataclasses.asdict(method),
        "error_before": round(before, 6),
        "error_after": round(error(), 6),
        "costs": adapted.costs(),
        "ranks": dict(zip(rows["layer"], rows["rank"].tolist(), strict=True))
        if "rank" in rows
        else None,
    }


if __name__ == "__main__":
    sys.exit(run_program(main))
