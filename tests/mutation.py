"""Mutation testing: small faults in function bodies, and the tests that see them.

``python tests/mutation.py it3_lightning/priors/*.py --tests it3_lightning/priors tests/priors``

The tests are collected once. Each mutant is a fork of that process, in which the functions of the
file get the code of the mutated source; it runs the tests that reach the mutated statement until
one fails: first those that are quick for the mutants that they have found so far. Needs ``fork``.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import gc
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_UNTOUCHED = ("annotation", "returns", "decorator_list", "ops", "op", "ctx")  # fields
_Removable = ast.Raise | ast.Delete | ast.Continue | ast.Break | ast.AugAssign


@dataclass(frozen=True)
class Mutant:
    """One place of a file and what stands there instead."""

    file: Path
    line: int
    statement: int  # line where the statement around it begins
    holder: ast.AST
    field: str
    index: int | None
    old: ast.AST
    new: ast.AST

    def __str__(self) -> str:
        """Return the place and the change, in one line."""
        old, new = (" ".join(ast.unparse(node).split()) for node in (self.old, self.new))
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
        start = max(0, len(list(same)) - 30)  # what is before it is the same
        old, new = old[start : start + 60], new[start : start + 60]
        return f"{os.path.relpath(self.file)}:{self.line}: {old}  ->  {new}"

    def put(self, node: ast.AST) -> None:
        """Put a node in its place."""
        if self.index is None:
            setattr(self.holder, self.field, node)
        else:
            getattr(self.holder, self.field)[self.index] = node


def changed(node: ast.AST, **fields: Any) -> ast.AST:
    """Return a shallow copy with other fields."""
    return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node)


def removed(node: ast.stmt) -> ast.AST:
    """Return a statement that is never run; its names stay those of the function."""
    return ast.If(test=ast.Constant(False), body=[node], orelse=[])


def operators(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node with other operators."""
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            for other in _OPERATORS.get(type(op), ()):
                yield changed(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        for other in _OPERATORS.get(type(node.op), ()):
            yield changed(node, op=other())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand


def values(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node with other constants, conditions, keywords or results."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield changed(node, value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield changed(node, value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield changed(node, value=f"{node.value}XX")
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):
            yield changed(node, test=ast.UnaryOp(op=ast.Not(), operand=node.test))
    elif isinstance(node, ast.comprehension):
        for index in range(len(node.ifs)):
            yield changed(node, ifs=[*node.ifs[:index], *node.ifs[index + 1 :]])
    elif isinstance(node, ast.Call):
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield changed(node, keywords=[*node.keywords[:index], *node.keywords[index + 1 :]])
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        never = ast.IfExp(test=ast.Constant(True), body=ast.Constant(None), orelse=node.value)
        yield changed(node, value=never)


def removals(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a statement that is left out, or the body of a ``with`` alone."""
    if isinstance(node, ast.With):
        contexts: list[ast.stmt] = [ast.Expr(item.context_expr) for item in node.items]
        yield ast.If(test=ast.Constant(True), body=node.body, orelse=contexts)
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    stored = isinstance(node, ast.Assign) and not any(isinstance(t, ast.Name) for t in node.targets)
    if called or stored or isinstance(node, _Removable):
        assert isinstance(node, ast.stmt)
        yield removed(node)


def mutants(file: Path, node: ast.AST, *, statement: int = 0) -> Iterator[Mutant]:
    """Yield all mutants of the function bodies in a node; ``statement`` is 0 outside of them."""
    for name, value in ast.iter_fields(node):
        function = isinstance(node, ast.FunctionDef | ast.Lambda)
        if name in _UNTOUCHED or (function and name == "args") or isinstance(node, ast.Raise):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr) or text:
                continue
            inside = statement or isinstance(node, ast.FunctionDef | ast.Lambda)
            outermost = isinstance(node, ast.Lambda) and not statement
            begins = isinstance(child, ast.stmt) or outermost
            at = getattr(child, "lineno", statement) if inside and begins else statement
            for new in (*operators(child), *values(child), *removals(child)) if inside else ():
                line = getattr(child, "lineno", at)
                yield Mutant(file, line, at, node, name, index, child, new)
            yield from mutants(file, child, statement=at)


class Marked(ast.NodeTransformer):
    """Makes the statements of functions, and lambdas outside of them, say that they are run."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)
        self.depth = 0

    def _mark(self, line: int) -> ast.Call:
        place: list[ast.expr] = [ast.Constant(self.file), ast.Constant(line)]
        return ast.Call(func=ast.Name("__reached__", ast.Load()), args=place, keywords=[])

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visit a node and what is in it."""
        function = isinstance(node, ast.FunctionDef | ast.Lambda)
        if isinstance(node, ast.Lambda) and not self.depth:
            marked = [self._mark(node.body.lineno), node.body]  # a mark is None
            node.body = ast.BoolOp(op=ast.Or(), values=marked)
        self.depth += function
        for name, value in ast.iter_fields(node) if self.depth else ():
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                marks = [[ast.Expr(self._mark(s.lineno)), s] for s in value]
                setattr(node, name, [part for pair in marks for part in pair])
        found = super().generic_visit(node)
        self.depth -= function
        return found


Key = tuple[str, int]


def codes(code: CodeType) -> dict[Key, list[CodeType]]:
    """Return a code object and all inside it by name and line, in the order of the source."""
    found: dict[Key, list[CodeType]] = {(code.co_qualname, code.co_firstlineno): [code]}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for key, inner in codes(constant).items():
                found.setdefault(key, []).extend(inner)
    return found


class Source:
    """A file, its syntax, and the functions that have been made from it.

    Args:
        file: Python source, imported before.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tree = ast.parse(file.read_text())
        self.functions: list[tuple[FunctionType, Key, int]] = []

    def find(self, functions: list[FunctionType]) -> None:
        """Note which of these are from this file, and as which of those on the same line."""
        own = codes(compile(self.tree, str(self.file), "exec"))
        for function in functions:
            code = function.__code__
            if code.co_filename == str(self.file):
                key = (code.co_qualname, code.co_firstlineno)
                self.functions.append((function, key, own[key].index(code)))

    def swap(self, tree: ast.Module) -> None:
        """Give the functions the code of another tree."""
        fresh = codes(compile(ast.fix_missing_locations(tree), str(self.file), "exec"))
        for function, key, index in self.functions:
            if index < len(fresh.get(key, ())):
                function.__code__ = fresh[key][index]


@dataclass(frozen=True)
class Reached:
    """The processor's time of a test, the statements that it reaches, and whether it passes."""

    name: str
    seconds: float
    places: frozenset[Key]
    passes: bool


def ran(session: pytest.Session, items: list[pytest.Item]) -> Iterator[bool]:
    """Run tests and yield for each whether it passes."""
    for item, after in zip(items, [*items[1:], None], strict=True):
        failed = session.testsfailed
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        yield session.testsfailed == failed


def forked(work: Callable[[], None], limit: float | None = None) -> bool:
    """Do work in a fork that prints nothing; return whether it ends well, and in time.

    Args:
        work: to do.
        limit: seconds of the processor, so that a busy machine fails nothing; to wait, 20 times.
    """

    def silent() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit)))
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        work()

    process = multiprocessing.get_context("fork").Process(target=silent)
    process.start()
    process.join(None if limit is None else 20 * limit)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def first_failing(
    mutant: Mutant,
    source: Source,
    session: pytest.Session,
    items: list[pytest.Item],
    limit: float,
) -> int | None:
    """Return the first of these tests that fails with a mutant, or is not done within some seconds.

    ``None``: all pass.
    """
    done = mmap.mmap(-1, 4)  # shared with the fork

    def work() -> None:
        mutant.put(mutant.new)
        source.swap(source.tree)
        for count, passes in enumerate(ran(session, items), start=1):
            if not passes:
                os._exit(1)
            done[:] = count.to_bytes(4, "little")

    if not items or forked(work, limit):
        return None
    return min(int.from_bytes(done[:], "little"), len(items) - 1)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Mutation:
    """A plugin of pytest that runs the collected tests on mutants instead.

    Args:
        files: to be mutated.
        sample: how many mutants of each file are tried; ``None``: all.
        seed: that they are drawn with.
        seconds: that the tests of a mutant may need, without a mutant; quick ones come first.
        again: what was said of mutants that survived; these alone are tried. ``None``: all.
    """

    def __init__(
        self,
        files: list[Path],
        *,
        sample: int | None,
        seed: int,
        seconds: float,
        again: str | None,
    ) -> None:
        self.sources = [Source(file.resolve()) for file in files]
        self.sample = sample
        self.seed = seed
        self.seconds = seconds
        self.again = again
        self.kills: Counter[int] = Counter()  # mutants that each test has found

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Try the mutants of all files."""
        if session.testsfailed:  # while they were collected
            return None
        functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
        for source in self.sources:
            source.find(functions)
            if not source.functions:
                pytest.exit(f"Expected a file that the tests import, name it too: {source.file}", 1)
        gc.freeze()  # what lies in memory now stays shared with the forks
        tests = self._reached(session)
        failed = [test.name for test in tests if not test.passes]
        if failed or not tests:
            pytest.exit(f"Expected tests that pass without mutants, failed: {failed}", 1)
        say(f"{len(tests)} tests, {sum(test.seconds for test in tests):.0f} s")
        for source in self.sources:
            self._try(source, session, tests)
        return True

    def _reached(self, session: pytest.Session) -> list[Reached]:
        """Run all tests once, in a fork, and note what they reach."""
        with tempfile.NamedTemporaryFile() as file:

            def work() -> None:
                places: set[Key] = set()

                def reached(file: str, line: int) -> None:
                    places.add((file, line))

                builtins.__reached__ = reached  # type: ignore[attr-defined]
                for source in self.sources:
                    source.swap(Marked(source.file).visit(source.tree))
                found, started = [], time.process_time()
                for item, passes in zip(session.items, ran(session, session.items), strict=True):
                    seconds = time.process_time() - started
                    found.append(Reached(item.nodeid, seconds, frozenset(places), passes))
                    places.clear()
                    started = time.process_time()
                Path(file.name).write_bytes(pickle.dumps(found))

            forked(work)
            return list(pickle.loads(Path(file.name).read_bytes() or pickle.dumps([])))

    def _try(self, source: Source, session: pytest.Session, tests: list[Reached]) -> None:
        """Run the mutants of a file and print those that no test sees."""
        found = list(mutants(source.file, source.tree))
        if self.sample is not None and self.sample < len(found):
            found = sorted(
                random.Random(self.seed).sample(found, self.sample), key=lambda m: m.line
            )
        if self.again is not None:
            found = [mutant for mutant in found if f"{mutant}  (" in self.again]
        tried = survivors = 0
        try:
            for mutant in found:
                chosen, passes = self._run(mutant, source, session, tests)
                tried, survivors = tried + 1, survivors + passes
                if passes:
                    say(f"{mutant}  ({chosen} tests)")
        finally:  # it may be interrupted
            name = os.path.relpath(source.file)
            say(f"{name}: {tried} of {len(found)} mutants, {survivors} survive\n")

    def _run(
        self, mutant: Mutant, source: Source, session: pytest.Session, tests: list[Reached]
    ) -> tuple[int, bool]:
        """Run the tests that reach a mutant; return how many there are, and whether all pass."""
        place = (str(source.file), mutant.statement)
        chosen = [index for index, test in enumerate(tests) if place in test.places]
        chosen.sort(key=lambda index: tests[index].seconds)
        sums = itertools.accumulate(tests[index].seconds for index in chosen)
        chosen = [i for i, total in zip(chosen, sums, strict=True) if total <= self.seconds]
        chosen.sort(key=lambda index: tests[index].seconds / (1 + self.kills[index]))
        limit = 10 + 5 * sum(tests[index].seconds for index in chosen)
        items = [session.items[index] for index in chosen]
        failing = first_failing(mutant, source, session, items, limit)
        if failing is not None:
            self.kills[chosen[failing]] += 1
        return len(chosen), failing is None


def main() -> int:
    """Read the command line and run the mutants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="Python files that are mutated")
    parser.add_argument("--sample", type=int, help="mutants tried of each file; default: all")
    parser.add_argument("--seed", type=int, default=0, help="that the sample is drawn with")
    parser.add_argument("--seconds", type=float, default=20, help="of tests for a mutant at most")
    parser.add_argument("--again", type=Path, help="output of a run: its survivors alone")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, required=True, help="last: for pytest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
        options = "-q -s --no-header -p no:cacheprovider --override-ini addopts=--doctest-modules"
        options += " --assert=plain"  # others would change the code of files that are named
        how: dict[str, Any] = {"sample": given.sample, "seed": given.seed}
        again = given.again and given.again.read_text()
        plugin = Mutation(given.files, **how, seconds=given.seconds, again=again)
        return int(pytest.main([*options.split(), *given.tests], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
