"""python -m torchlmoe.settings_reference > docs/settings.md: every setting, its type, limits, default and meaning."""

from torchlmoe.config.reference import markdown

if __name__ == "__main__":
    print(markdown())
