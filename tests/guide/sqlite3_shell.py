"""Stands in for the `sqlite3` command line shell in the guide's commands: `sqlite3 DATABASE [SQL]`.

Python's own module is always there, the shell is not. It knows what the guide uses: statements, `#` comments
between them, `.quit`, `.backup 'file'`, and rows with `|` between the values.
"""

from __future__ import annotations

import shlex
import sqlite3
import sys
from contextlib import closing


def main(database: str, script: str) -> None:
    with closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True, isolation_level=None, timeout=5)) as connection:
        statement = ""
        for line in script.splitlines(keepends=True):
            word = line.strip()
            if not statement and (not word or word.startswith("#")):
                continue
            if not statement and word == ".quit":
                return
            if not statement and word.startswith(".backup "):
                with closing(sqlite3.connect(shlex.split(word)[1])) as copy:
                    connection.backup(copy)
                continue
            statement += line
            if sqlite3.complete_statement(statement):
                for row in connection.execute(statement):
                    print("|".join("" if value is None else str(value) for value in row))  # noqa: T201
                statement = ""
        if statement.strip():
            raise SystemExit(f"incomplete statement: {statement}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else sys.stdin.read())
