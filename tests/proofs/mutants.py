"""Mutants are copies of the loss code with one thing changed: what a slip of the hand would make of a formula.

The operators below change one node of a function's syntax tree: a sign, a factor, a time, two arguments, a detach, a
weight. A mutant is named after its function and what it changes there, so that a name holds while lines move.
"""

from __future__ import annotations
import __future__

import ast
import copy
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any

ANNOTATIONS = __future__.annotations.compiler_flag  # every module of ours is compiled so
MODULES = (
    "distillers.training.losses",
    *(
        f"distillers.methods.{name}"
        for name in (
            "adversarial_consistency", "boot", "consistency", "diffusion", "disback", "dmd2", "hyper_sd",
            "multi_student", "pso", "refine", "scm",
        )
    ),
)  # fmt: skip
# What a method is, not what it descends: checks of options, the networks, what is published, and messages.
NOT_LOSSES = {
    "__post_init__", "__init__", "networks", "generator", "data", "parts", "doubts", "check_steps",
    "consistency_generator", "sampling_times", "shares", "share", "method", "untrained", "matched", "class_embeddings",
    "equal_clusters", "_apply", "fits_head", "needs_pictures", "Lpips", "perceptual_distance", "clusters", "finish",
    "_check_chosen", "_encoded",
}  # fmt: skip
SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
DROPPED = {"detach", "clamp", "clamp_min", "square", "sqrt", "abs", "relu", "exp", "sigmoid", "sign", "log", "flip"}
# What a name is easily confused with: the first of these that the function has takes its place.
CONFUSED = {
    "x_t": ("x0", "x", "fake_x0", "winner", "x_s"), "x_s": ("x_t",), "x_m": ("x_t",), "real_t": ("x0",), "x": ("x0",),
    "y": ("x0",), "f": ("y",), "t": ("s", "m", "t_min"), "s": ("t",), "m": ("t",), "b": ("m",), "u": ("b",),
    "eps": ("torch.randn_like(eps)",), "real": ("fake",), "fake": ("real",), "target": ("student", "teacher"),
    "student": ("target", "teacher"), "critic": ("teacher",), "teacher": ("critic", "student"), "won": ("lost",),
    "lost": ("won",), "won_ref": ("won",), "lost_ref": ("lost",), "winner": ("loser",), "a": ("b",), "fake_x0": ("x0",),
    "fake_logits": ("real_logits",), "real_logits": ("fake_logits",), "y_s": ("y_top",), "y_top": ("y_s",),
}  # fmt: skip
SYMMETRIC = {
    "per_sample_mse",
    "pseudo_huber",
    "focal_frequency",
    "unit_length_distance",
    "d",
    "zip",
}  # arguments may change places
TIMES = {"t", "s", "m", "b", "u", "t_min", "top"}
TENSORS = {*CONFUSED, "x0", "noise", "goal", "targets", "features", "truth", "pixels", "x_b"} - TIMES


@dataclass(frozen=True)
class Mutant:
    """One change of one function."""

    module: str
    function: str  # qualified name inside the module
    line: int
    change: str  # "`old` -> `new`", with " (2nd)" where the same text stands there more than once
    kind: str
    code: CodeType

    @property
    def file(self) -> str:
        return self.code.co_filename

    @property
    def name(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.function}: {self.change}"

    def apply(self) -> None:
        """Give the living function this code; every module that imported it now runs the mutant."""
        found: Any = importlib.import_module(self.module)
        for part in self.function.split("."):
            found = inspect.getattr_static(found, part)
        found = getattr(found, "fget", None) or getattr(found, "func", None) or found
        inspect.unwrap(found).__code__ = self.code


def mutants() -> list[Mutant]:
    """Every mutant of the loss code, in the order of the source."""
    return [mutant for module in MODULES for mutant in _mutants_of(module)]


@cache
def _mutants_of(module: str) -> list[Mutant]:
    living = importlib.import_module(module)
    path = inspect.getsourcefile(living)
    source = inspect.getsource(living)
    found, seen = list[Mutant](), dict[str, int]()
    for name, function in _functions(ast.parse(source)):
        whole = _code(name, function, str(path))
        for node, kind, old, new in _changes(function):
            changed = _code(name, function, str(path))
            if changed == whole:
                continue
            change = f"`{old}` -> `{new}`"
            seen[name + change] = seen.get(name + change, 0) + 1
            if seen[name + change] > 1:
                change += f" ({seen[name + change]})"
            found.append(Mutant(module, name, node.lineno, change, kind, changed))
    return found


def _code(name: str, function: ast.FunctionDef, path: str) -> CodeType:
    """Compile one function, as a method where it is one, under the annotations' rule of its file."""
    inner: list[ast.stmt] = [function]
    for outer in name.split(".")[:-1]:
        inner = [ast.ClassDef(outer, [], [], inner, [])]
    tree = ast.fix_missing_locations(ast.Module(inner, []))
    code = compile(tree, path, "exec", flags=ANNOTATIONS)
    for part in name.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return code


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for part in tree.body:
        if isinstance(part, ast.FunctionDef) and part.name not in NOT_LOSSES:
            yield part.name, part
        if isinstance(part, ast.ClassDef) and part.name not in NOT_LOSSES:
            for method in part.body:
                if isinstance(method, ast.FunctionDef) and method.name not in NOT_LOSSES:
                    yield f"{part.name}.{method.name}", method


Change = tuple[ast.expr | ast.stmt, str, str, str]  # node, kind, old text, new text


def _changes(function: ast.FunctionDef) -> Iterator[Change]:
    """Change the function in place, one node at a time; each change stands until the next is asked for."""
    names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} | {a.arg for a in function.args.args}
    for parent in (n for statement in _body(function) for n in [_Holder(statement), *ast.walk(statement)]):
        for field, value in list(ast.iter_fields(parent)):
            if field in ("annotation", "returns", "decorator_list", "args") and not isinstance(parent, ast.Call):
                continue
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.expr | ast.stmt):
                    continue
                for kind, new in _replacements(node, parent, names):
                    texts = _text(node), _text(new)
                    place = function.body if isinstance(parent, _Holder) else value
                    i = place.index(node) if isinstance(parent, _Holder) else i
                    _put(parent, field, i, place, new)
                    try:
                        yield node, kind, *texts
                    finally:
                        _put(parent, field, i, place, node)


class _Holder(ast.AST):
    """Stands for the function's own body, one statement of it."""

    _fields = ("statement",)


def _put(parent: ast.AST, field: str, i: int, value: Any, node: ast.AST) -> None:
    if isinstance(value, list):
        value[i] = node
    else:
        setattr(parent, field, node)


def _body(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements without the docstring."""
    return function.body[1:] if ast.get_docstring(function) else function.body


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else text[:60] + " ... " + text[-25:]


def _replacements(node: ast.expr | ast.stmt, parent: ast.AST, names: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in a node's place, with the kind of slip that it is."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) in SWAPPED:
                yield "operator", _with(node, op=SWAPPED[type(op)]())
            if isinstance(op, ast.Mult):
                yield "factor dropped", left
                yield "factor dropped", right
            if isinstance(op, ast.Add | ast.Sub):
                yield "term dropped", left
        case ast.Compare(ops=[op]) if type(op) in SWAPPED:
            yield "choice", _with(node, ops=[SWAPPED[type(op)]()])
        case ast.BoolOp(op=op):
            yield "choice", _with(node, op=SWAPPED[type(op)]())
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield "sign", operand
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield "choice", _with(node, body=orelse, orelse=body)
        case ast.Constant(value=bool(value)) if not (isinstance(parent, ast.keyword) and parent.arg == "strict"):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)) if type(value) is int and not isinstance(parent, ast.Slice):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)) if not 0 < value < 1e-5:  # which only guards a division
            yield "constant", ast.Constant(2 * value if value else 1.0)
        case ast.Call(func=ast.Attribute(value=of, attr=attribute), args=arguments) if attribute in DROPPED:
            yield "function dropped", arguments[0] if _text(of) in ("torch", "F") else of
        case ast.Call(func=ast.Attribute(attr="mean")):
            yield "reduction", _with(node, func=_with(node.func, attr="sum"))
        case ast.Call(func=ast.Attribute(attr="sum")):
            yield "reduction", _with(node, func=_with(node.func, attr="mean"))
        case ast.If(test=test):
            yield "choice", _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.With(items=items, body=body) if any("no_grad" in ast.unparse(item) for item in items):
            left = [item for item in items if "no_grad" not in ast.unparse(item)]
            yield "gradient", _with(node, items=left) if left else ast.If(ast.Constant(1), body, [], lineno=node.lineno)
        case ast.With(items=items, body=body) if any("frozen_gradients" in ast.unparse(item) for item in items):
            yield "gradient", ast.If(ast.Constant(1), body, [], lineno=node.lineno)
        case ast.Expr(value=ast.Call()):
            yield "statement dropped", ast.Pass()
        case ast.AugAssign():
            yield "statement dropped", ast.Pass()
        case ast.Name(id="cond") if isinstance(parent, ast.Call):
            yield "condition dropped", ast.Constant(None)
        # all networks of a method have one schedule
        case ast.Name(id=name, ctx=ast.Load()) if name in CONFUSED and getattr(parent, "attr", "") != "schedule":
            for other in [o for o in CONFUSED[name] if "(" in o or o in names][:1]:
                yield "name", ast.parse(other, mode="eval").body
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") not in SYMMETRIC:
        for i, (one, two) in enumerate(pairwise(node.args)):
            if any({_root(one), _root(two)} <= kind for kind in (TIMES, TENSORS)) and _text(one) != _text(two):
                yield "arguments", _with(node, args=[*node.args[:i], two, one, *node.args[i + 2 :]])


def _root(node: ast.expr) -> str:
    """The name that an argument is about: x of x, x.detach() and f(x, t)."""
    while not isinstance(node, ast.Name):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="torch" | "nets" | "schedule" | "D" | "losses")), args=[first, *_]
            ):
                node = first
            case ast.Call(func=ast.Name(), args=[first, *_]):
                node = first
            case ast.Call(func=ast.Attribute(value=of)):
                node = of
            case _:
                return ""
    return node.id


def _with(node: Any, **fields: Any) -> Any:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
