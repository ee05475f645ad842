"""Prepare a checkout for a release: python .ci/release.py https://HOST/OWNER/NAME TAG.

README's links become absolute, so that they work on PyPI, and pyproject.toml gets the addresses of the project.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]*)\)")


def with_absolute_links(text: str, address: str, tag: str) -> str:
    """Return Markdown whose relative links and pictures lead to the files of ``tag`` at ``address``."""

    def absolute(link: re.Match[str]) -> str:
        mark, label, target = link.groups()
        return f"{mark}[{label}]({address}/{'raw' if mark else 'blob'}/{tag}/{target})"

    return LINK.sub(absolute, text)


def with_addresses(text: str, address: str) -> str:
    """Return the text of pyproject.toml with the addresses of the project."""
    urls = {
        "Homepage": address,
        "Documentation": f"{address}/tree/main/docs",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    return text.replace("[project.urls]\n", f"[project.urls]\n{lines}", 1)


def main() -> None:
    """Change README.md and pyproject.toml in place."""
    address, tag = sys.argv[1].rstrip("/"), sys.argv[2]
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(with_absolute_links(readme.read_text(), address, tag))
    project.write_text(with_addresses(project.read_text(), address))


if __name__ == "__main__":
    main()
