"""Changes of the site's pages that CSS cannot make. mkdocs.yml names this file."""

import re

SHORT = 32  # characters of code that fit a line of a phone


def on_page_content(html: str, **_: object) -> str:
    """Mark short names in lines of text, so that extra.css keeps a line from breaking at their hyphens."""
    return re.sub(rf"<code>([^<\n]{{1,{SHORT}}})</code>", r'<code class="short">\1</code>', html)
