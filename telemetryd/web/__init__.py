"""HTTP machinery that knows no store: connections, bodies, access, answers, errors, pages."""
