"""Updates the table in kernels/README.md: python -m benchmarks.kernels_page

To find the mixers that a file serves, each mixer runs forward and backward on tensors without data, with kernels chosen
as on a GPU, and the operations that it calls are recorded.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fingerprints import parts_of
from torchlmoe.layers.sequence import SequenceLayout
from torchlmoe.mixers import MIXERS
from torchlmoe.mixers.base import Place
from torchlmoe.ops import kernel_backend

FOLDER = Path("kernels")
BEGIN, END = "<!-- written by python -m benchmarks.kernels_page: do not edit -->\n", "<!-- end -->\n"


class OperationNames(TorchDispatchMode):
    """Records the names of torchlmoe's operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if namespace == "torchlmoe":
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def choosing_as_on_a_gpu() -> Iterator[None]:
    """Chooses kernels as for CUDA tensors."""
    original = kernel_backend.kernels_serve

    def kernels_serve(backend: str, *tensors: Tensor | None, refusal: str | None = None) -> bool:
        return (refusal or kernel_backend._refusal(True, *tensors)) is None

    users = [module for module in list(sys.modules.values()) if getattr(module, "kernels_serve", None) is original]
    for module in users:
        module.kernels_serve = kernels_serve  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.kernels_serve = original  # type: ignore[attr-defined]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def operations_of(name: str) -> set[str]:
    """Return the operations that a mixer calls in float16, forward and backward.

    In float32, ReBased would use float64, for which there are no kernels.
    """
    kind = MIXERS[name]
    fake, half = FakeTensorMode(shape_env=ShapeEnv()), default_dtype(torch.float16)
    with fake, half, choosing_as_on_a_gpu(), OperationNames() as called:
        mixer = kind.at(Place(), 64, **({"num_heads": 4} if "num_heads" in kind.settings() else {}))
        x = torch.empty(1, 32, 64, requires_grad=True)
        y = mixer(x, sequence=SequenceLayout.of_rows(1, 32, torch.device("cpu")))
        (y if isinstance(y, Tensor) else y[0]).sum().backward()
    return called.names


def table() -> str:
    """Return the table: for each file its length, its first sentence, and the mixers that call it."""
    called = {name: operations_of(name) for name in MIXERS}
    lines = ["| file | lines | what | mixers |", "|---|---|---|---|"]
    total, served = 0, set()
    files = {path: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
    needed = {path: parts_of(path) for path in files}
    for path, text in files.items():
        whole = "".join(of_user for user, of_user in files.items() if path in needed[user])
        operations = set(re.findall(r'"torchlmoe::(\w+)"', whole))
        mixers = [name for name in MIXERS if operations & called[name]]
        summary = text.split('"""')[1].split("\n\n")[0].replace("\n", " ").rstrip(".")
        total, served = total + text.count("\n"), served | set(mixers)
        names = f"{len(mixers)}: {', '.join(mixers)}" if mixers else "every block"
        lines.append(f"| [{path.name}]({path.name}) | {text.count(chr(10))} | {summary} | {names} |")
    rest = ", ".join(name for name in MIXERS if name not in served)
    lines.append(f"| together | {total} | | {len(served)} of {len(MIXERS)} mixers; not {rest} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = FOLDER / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
