"""The interface of a method of combination, and the registry of methods."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from tinyspan.registry import Registry
from tinyspan.workflows.combine.problem import Candidate, Problem

__all__ = ["METHODS", "SCALES", "Method", "along_scales", "register_method"]

Build = Callable[[Problem], Iterator[Candidate]]
SCALES = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)  # about a factor of 2 in two steps
WORSE = 2  # number of successive scales below the best after which a grid ends


@dataclass(frozen=True)
class Method:
    """A function that yields candidates.

    Attributes:
        name: name in results and on the command line.
        build: the function. It may learn from the rows in the part `learn` and compare on `choose`, never on `test`.
        simplicity: of candidates with as many learned numbers, those of the method with the smaller value are simpler.
        applies: whether the method applies to the models and tasks.
        needs: module of an optional package; None if it needs none.
    """

    name: str
    build: Build
    simplicity: int
    applies: Callable[[Problem], bool]
    needs: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the optional package is installed."""
        return self.needs is None or find_spec(self.needs) is not None


METHODS: Registry[Method] = Registry("method of combination")


def register_method(
    name: str,
    *,
    simplicity: int,
    applies: Callable[[Problem], bool] = lambda problem: True,
    needs: str | None = None,
) -> Callable[[Build], Build]:
    """Register a function as a method of combination; see `Method`.

    Example:
        >>> METHODS["uniform-average"].simplicity
        1
    """

    def register(build: Build) -> Build:
        METHODS.add(name, Method(name, build, simplicity, applies, needs))
        return build

    return register


def along_scales(problem: Problem, candidate: Callable[[float], Candidate]) -> Iterator[Candidate]:
    """Yield candidates for increasing scales, until several in a row are below the best on the rows to choose on."""
    best, worse = float("-inf"), 0
    for scale in SCALES:
        one = candidate(scale)
        yield one
        value = problem.evaluate(one, "choose").mean
        if value > best:
            best, worse = value, 0
        elif value < best:
            worse += 1
        if worse == WORSE:
            return
