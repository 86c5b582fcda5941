"""Trains a Linear-MoE language model: python train.py --job.config_file FILE [--table.key value ...]"""

from torchlmoe.command import run
from torchlmoe.config.load import import_custom_modules, load_config, to_toml
from torchlmoe.config.reference import help_text


def main(arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        import_custom_modules([argument for argument in arguments if argument not in ("--help", "-h")])
        print(help_text())
        return
    config = load_config(arguments)
    if config.job.print_config:
        print(to_toml(config), end="")
        return
    # Imported here, so that --help and mistyped settings get a fast answer.
    from torchlmoe.training.trainer import Trainer

    Trainer(config).train()


if __name__ == "__main__":
    run(main)
