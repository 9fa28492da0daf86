"""What holds for the repository as a whole, and no tool of `make lint` checks."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import mask_llava_hf


ROOT = Path(__file__).parents[1]
# A path of somebody's machine: absolute, and not the path of a URL
MACHINE_PATH = re.compile(r"(?<![\w.:/~$}-])/(?:home|Users|work|root|mnt)/\w")


def text_files() -> dict[str, str]:
    """Files that are, or are about to be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    texts = {}
    for name in listed:
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # binary, or deleted but not yet committed
    return texts


def test_basenames_are_unique():
    """A checkpoint that carries its code has all modules in one folder."""
    seen: dict[str, Path] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        if path.name != "__init__.py":
            assert path.name not in seen, f"{path} and {seen[path.name]} would overwrite each other"
            seen[path.name] = path


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mask_llava_hf.__version__


def test_no_file_names_a_path_of_one_machine():
    found = {name: match[0] for name, text in text_files().items() if (match := MACHINE_PATH.search(text))}
    assert not found


def test_readme_names_only_what_is_there():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`|\$ )make ([a-z][\w-]*)", readme, re.MULTILINE)) <= targets
    missing = [
        name for name in re.findall(r"\b(?:examples|benchmarks)/[\w/]+\.py", readme) if not (ROOT / name).exists()
    ]
    assert not missing


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
    for target in phony:
        assert target == "help" or f'"make {target}' in makefile
