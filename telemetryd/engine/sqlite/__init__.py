"""Everything that knows SQLite: the engine, its files and connections, its statements and tools."""
