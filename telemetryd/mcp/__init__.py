"""Answers assistants over the Model Context Protocol: messages, tools, and the HTTP endpoint."""
