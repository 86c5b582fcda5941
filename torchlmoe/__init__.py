"""torchlmoe: Linear-MoE language models in plain PyTorch (arXiv 2503.05447)."""

from pathlib import Path

__version__ = "0.1.0"

# A wheel holds kernels/ and assets/ inside the package. In a checkout, or an editable install of one, they lie beside
# it, and kernels/ must not be a top-level package, so the package also looks for its parts there.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))
