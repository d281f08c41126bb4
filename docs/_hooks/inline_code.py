"""Short inline code is kept in one line: a browser would break a flag behind its hyphens, and a file name anywhere."""

from __future__ import annotations

import re
from typing import Any

#: Characters that fit into a line of a phone, beside a second column.
SHORT = 28


def on_page_content(html: str, **_: Any) -> str:
    """Mark short inline code with a class, which assets/site.css keeps in one line."""
    return re.sub(rf"<code>([^<\n]{{1,{SHORT}}})</code>", r'<code class="short">\1</code>', html)
