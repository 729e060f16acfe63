"""Writes a manual page for each command from the command line's own help, for the Debian package."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

import telemetryd
from telemetryd.cli.options import NO_FLAG
from telemetryd.settings import Settings, flag, variable
from tests.tools.command_line import contexts, subcommands

_SECTION: Final = 8
"""Commands of a system's administrator."""
_FILES: Final = {
    "/etc/telemetryd/telemetryd.env": "The settings of the daemon and of every command.",
    "/var/lib/telemetryd/telemetry.sqlite": "The database. Never copy, move or delete it while the daemon runs.",
    "/run/telemetryd/telemetryd.sock": "The Unix socket for operators.",
    "/var/backups/telemetryd": "Backups of telemetryd-backup.timer.",
    "/usr/share/doc/telemetryd": "The handbook and examples.",
}


def escaped(text: str) -> str:
    r"""Return a text as roff shows it literally (groff_char(7)); a line must not look like a request.

    >>> escaped(".5 is --half of a\\b")
    '\\&.5 is \\-\\-half of a\\eb'
    """
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"[^\x00-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", text)
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if paragraph.lstrip().startswith("\b"):  # Click leaves its lines as they are
            lines = escaped(paragraph.replace("\b", "").strip("\n"))
            yield f".PP\n.nf\n{lines}\n.fi"
        else:
            yield f".PP\n{escaped(' '.join(paragraph.split()))}"


def _terms(terms: Iterator[tuple[str, str]]) -> Iterator[str]:
    for term, text in terms:
        yield f".TP\n\\fB{escaped(term)}\\fR\n{escaped(' '.join(text.split()))}"


def _section(title: str, parts: Iterator[str]) -> str:
    text = "\n".join(parts)
    return f".SH {title}\n{text}" if text else ""


def page(context: click.Context, date: str) -> str:
    """Return the manual page of one command."""
    command = context.command
    name = context.command_path.replace(" ", "-")
    parameters = command.get_params(context)
    options = (
        record for one in parameters if isinstance(one, click.Option) and (record := one.get_help_record(context))
    )
    commands = (
        (f"{context.command_path.replace(' ', '-')}-{sub}({_SECTION})", found.get_short_help_str(200))
        for sub, found in subcommands(context)
    )
    usage = f"\\fB{escaped(context.command_path)}\\fR {escaped(' '.join(command.collect_usage_pieces(context)))}"
    sections = [
        f'.TH {name.upper()} {_SECTION} "{date}" "telemetryd {telemetryd.__version__}"',
        f".SH NAME\n{escaped(name)} \\- {escaped(command.get_short_help_str(200).rstrip('.'))}",
        f".SH SYNOPSIS\n{usage}",
        _section("DESCRIPTION", _paragraphs(command.help or "")),
        _section("OPTIONS", _terms(options)),
        _section("COMMANDS", _terms(commands)),
    ]
    if context.parent is None:
        sections += [_section("ENVIRONMENT", _terms(_settings())), _section("FILES", _terms(iter(_FILES.items())))]
    else:
        sections.append(f".SH SEE ALSO\n\\fBtelemetryd\\fR({_SECTION})")
    return "\n".join(filter(None, sections)) + "\n"


def _settings() -> Iterator[tuple[str, str]]:
    for name, setting in Settings.model_fields.items():
        flags = "" if name in NO_FLAG else f" Flag: {flag(name)}."
        yield variable(name), f"{setting.description}{flags}"


def pages(date: str) -> Iterator[tuple[str, str]]:
    """Yield the file name and the text of the page of each command."""
    for context in contexts():
        yield f"{context.command_path.replace(' ', '-')}.{_SECTION}", page(context, date)


if __name__ == "__main__":
    [folder] = sys.argv[1:]
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    for file, text in pages(day):
        Path(folder, file).write_text(text, "utf-8")
