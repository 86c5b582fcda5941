"""Prints every setting with its type, limits, default and meaning: python -m torchlmoe.settings_reference"""

from torchlmoe.config.reference import markdown

if __name__ == "__main__":
    print(markdown())
