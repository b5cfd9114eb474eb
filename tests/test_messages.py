"""Every warning and every error of the package has its place on the troubleshooting page."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# Calls that say something; `_tell` is the monitor's, `Family` has what is said of a loss.
TELLING = {"info", "warning", "warn", "_tell", "Family"}
# For authors of layers, who read the contributing page, and of this package.
FOR_AUTHORS = {"AttributeError", "AssertionError"}


def text_of(node):
    """The text of an expression, with an ellipsis for what is filled in, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-.\d]*[a-z]", "…", node.value).replace("%%", "%")
    if isinstance(node, ast.JoinedStr):
        parts = [text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(parts)
    return None


def messages():
    """Warnings and errors in the source, with the line that they are in."""
    for path in sorted((ROOT / "keras_kfc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).split(".")[-1]
            errs = name.endswith("Error") and name not in FOR_AUTHORS
            if errs or name in TELLING:
                text = max((text_of(part) or "" for part in node.args), key=len, default="")
                if " " in text:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", " ".join(text.split())


def headings(page):
    """Beginnings of messages that the page explains."""
    lines, errors = page.split("## Errors")
    rows = [row for row in errors.splitlines() if row.startswith("| ") and "---" not in row]
    cells = [row.split("|")[1].strip() for row in rows]
    return re.findall(r"\*\*(.+?)\*\*", lines.split("## Lines in the log")[1]) + cells[1:]


def pieces(text):
    return [piece.strip() for piece in text.split("…") if piece.strip()]


def explains(heading, message):
    """Whether the parts of a heading stand in a message, in their order."""
    place = 0
    for piece in pieces(heading):
        found = message.find(piece, place)
        if found < 0 or (place == 0 and found and not heading.startswith("…")):
            return False
        place = found + len(piece)
    return place > 0


def about_an_argument(message):
    """Names the argument, what was expected and what was received: that is explanation enough."""
    return bool(
        re.match(r"(Arrays in argument `…`|Argument `[\w…]+`|`…`) (must|can|is needed)", message)
    )


def test_messages_are_found():
    found = [text for _, text in messages()]
    assert len(found) > 70
    assert any(text.startswith("KFC left out … of the … steps") for text in found)
    assert any("has a newer format" in text for text in found)


def test_every_message_is_explained():
    # What is said of a loss gets its first word where it is logged.
    known = headings(PAGE) + [heading.removeprefix("KFC ") for heading in headings(PAGE)]
    missing = [
        f"{where}: {text}"
        for where, text in messages()
        if not about_an_argument(text) and not any(explains(heading, text) for heading in known)
    ]
    assert not missing, "\n".join(missing)


def test_nothing_is_explained_that_nobody_says():
    said = [
        " ".join(text.split())
        for path in (ROOT / "keras_kfc").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for part in node.args
        if (text := text_of(part))
    ]
    # Lines on losses get their first word where they are logged.
    stale = [
        heading
        for heading in headings(PAGE)
        if not any(explains(h, s) for s in said for h in (heading, heading.removeprefix("KFC ")))
    ]
    assert not stale


def test_a_message_without_a_place_would_be_found():
    known = headings(PAGE)
    assert not any(explains(heading, "The … of the moon is …") for heading in known)
    assert explains("The … of the … is", "The colour of the … is …")
    assert explains("… of the … is", "The colour of the … is …")
    assert not explains("is … of", "The colour of the … is …")
    assert not explains("of the … is", "The colour of the … is …")
    assert not explains("The … The", "The colour") and not explains("…", "The colour")
    assert not about_an_argument("The optimizer has no factors yet.")
