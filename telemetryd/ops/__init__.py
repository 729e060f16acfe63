"""What a process needs of its system: logs, metrics, systemd, files, limits."""
